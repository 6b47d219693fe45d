"""A whole small run made of synthetic folders: what every stage leaves behind, without running one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from gristmill.data.arithmetic import draw_chain, generator, question, thought

STAGES = (
    "ingest",
    "problems",
    "dedup",
    "filter",
    "exam",
    "decontaminate",
    "tokenize",
    "mix",
    "pretrain",
    "cold_start",
    "rl_zero",
    "rl",
    "evaluate",
    "export",
)
INPUTS = {
    "ingest": {},
    "problems": {},
    "dedup": {"documents": "ingest"},
    "filter": {"documents": "dedup"},
    "exam": {},
    "decontaminate": {"documents": "filter", "problems": "exam"},
    "tokenize": {"documents": "decontaminate"},
    "mix": {"tokens": "tokenize"},
    "pretrain": {"tokens": "tokenize", "mixture": "mix"},
    "cold_start": {"model": "pretrain", "problems": "problems", "tokenizer": "tokenize"},
    "rl_zero": {"model": "pretrain", "problems": "problems", "tokenizer": "tokenize"},
    "rl": {"model": "cold_start", "problems": "problems", "tokenizer": "tokenize"},
    "evaluate": {
        "problems": "problems",
        "tokenizer": "tokenize",
        "documents": "decontaminate",
        "base": "pretrain",
        "cold_start": "cold_start",
        "zero": "rl_zero",
        "rl": "rl",
    },
    "export": {"model": "rl", "tokenizer": "tokenize"},
}
SECONDS = dict(
    zip(STAGES, (9.4, 0.6, 14.2, 21.7, 0.2, 3.1, 8.8, 0.9, 176.0, 84.0, 71.0, 168.0, 46.0, 5.1), strict=True)
)
# Of each model: shares of thorough, hasty, guess, other thoughts.
WAYS = {
    "base": (0.12, 0.10, 0.08, 0.70),
    "zero": (0.55, 0.30, 0.10, 0.05),
    "cold_start": (0.34, 0.33, 0.32, 0.01),
    "rl": (0.93, 0.06, 0.01, 0.0),
}
RIGHT = {"thorough": 0.93, "hasty": 0.62, "guess": 0.14, "other": 0.03}


def make_run(
    root: Path, *, steps: int = 40, problems: int = 40, samples: int = 4, removed: bool = True
) -> dict[str, Path]:
    """Folders of every stage under `root`, by name, with `steps` of every curve."""
    folders = {name: root / name for name in STAGES}
    for folder in folders.values():
        folder.mkdir(parents=True)
    metrics = {
        "ingest": {
            "documents_out": 5230,
            "bytes_out": 13_400_000,
            "documents_by_source": {"code": 2210, "prose": 1420, "lessons": 1600},
        },
        "problems": _problems(folders["problems"], problems),
        "dedup": _dedup(folders["dedup"], removed),
        "filter": _filter(folders["filter"], removed),
        "exam": _exam(folders["exam"], folders["problems"], problems),
        "decontaminate": {
            "documents_in": 4511 if removed else 5230,
            "documents_out": 4511 if removed else 5230,
            "bytes_out": 12_100_000,
            "removed_by_reason": {},
            "removed_by_source": {"stdlib": 0},
        },
        "mix": {"sequences": 7680},
        "tokenize": {
            "documents": 4511 if removed else 5230,
            "bytes": 12_100_000,
            "tokens": 4_080_000,
            "held_out_tokens": 81_000,
            "vocab_size": 2048,
            "bytes_per_token": 2.91,
        },
        "pretrain": _pretrain(folders["pretrain"], steps),
        "cold_start": _cold_start(folders["cold_start"], steps),
        "rl_zero": _reinforce(folders["rl_zero"], steps, (0.1, 0.62), (22, 27)),
        "rl": _reinforce(folders["rl"], steps, (0.62, 0.98), (13, 25)),
        "evaluate": _evaluate(folders["evaluate"], folders["problems"], samples),
        "export": {"parameters": 1_412_000, "largest_difference": 2.1e-6},
    }
    started = 1_790_000_000.0
    for name in STAGES:
        write_manifest(folders[name], name, metrics[name], started)
        started += SECONDS[name] + 0.4
    return folders


def write_manifest(folder: Path, name: str, metrics: dict[str, Any], started: float) -> None:
    """The manifest of a folder, over the files that are in it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    manifest = {
        "format": 1,
        "stage": name,
        "title": name.replace("_", " ").capitalize(),
        "key": f"{name:0<32}".replace("_", "a"),
        "version": 1,
        "config": {"steps": 3, "nested": {"a": 1}}
        if name != "rl"
        else {"steps": 3, "rewards": {"accuracy": 1.0, "format": 0.1, "language": 0.05}},
        "seed": 7,
        "inputs": {k: {"stage": v, "key": f"{v:0<32}".replace("_", "a")} for k, v in INPUTS[name].items()},
        "sources": {},
        "files": [
            {
                "path": p.relative_to(folder).as_posix(),
                "bytes": p.stat().st_size,
                "sha256": "0" * 64,
                "content": not p.relative_to(folder).as_posix().startswith(("log/", "view/")),
            }
            for p in files
        ],
        "metrics": metrics,
        "content_hash": "c" * 64,
        "fingerprint": "f" * 64,
        "environment": {
            "python": "3.11.9",
            "torch": "2.13.0",
            "device": "cpu",
            "threads": 2,
            "ranks": 1,
            "platform": "Linux x86_64",
        },
        "started": started,
        "seconds": SECONDS[name],
        "device_hours": SECONDS[name] / 3600,
        "code_version": "0.1.0",
        "attempts": 1,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines, compressed where the name ends in .zst."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(zstandard.ZstdCompressor().compress(data) if path.suffix == ".zst" else data)


def _problems(folder: Path, count: int) -> dict[str, Any]:
    def row(which: str, index: int) -> dict[str, Any]:
        rng = generator(7, which, index)
        chain = draw_chain(rng, (4, 6), 9, held_out=which == "test")
        form = "words" if index % 2 else "symbols"
        made = {
            "id": f"{which}/{index}",
            "question": question(chain, form, rng),
            "answer": f"{thought(chain, 'thorough')}\n#### {chain.answer}",
            "terms": chain.terms,
            "form": form,
        }
        if which == "cold_start":
            style = ("thorough", "hasty", "guess")[index % 3]
            made |= {"thought": thought(chain, style), "final": str(chain.answer), "style": style}
        return made

    write_rows(folder / "cold_start.jsonl", [row("cold_start", i) for i in range(60)])
    write_rows(folder / "train.jsonl", [row("train", i) for i in range(8)])
    write_rows(folder / "test.jsonl", [row("test", i) for i in range(count)])
    return {
        "cold_start_problems": 60,
        "train_problems": 8,
        "test_problems": count,
        "styles": {"thorough": 20, "hasty": 20, "guess": 20},
    }


def _exam(folder: Path, problems: Path, count: int) -> dict[str, Any]:
    (folder / "test.jsonl").write_bytes((problems / "test.jsonl").read_bytes())
    return {"test_problems": count}


TEXT = (
    "def closing(thing):\n    '''Context manager that closes a thing at the end of the block, even when the "
    "block raises an exception in between.'''\n    return _Closing(thing)"
)


def _dedup(folder: Path, removed: bool) -> dict[str, Any]:
    exact, near = (141, 322) if removed else (0, 0)
    pairs = [
        {
            "removed": f"stdlib/test{i}.py/1",
            "kept": "stdlib/contextlib.py/3",
            "similarity": round(0.76 + i / 50, 2),
            "differs": "−thing +file … −_Closing(thing) +_Closing(file)",
            "removed_text": TEXT.replace("thing", "file"),
            "kept_text": TEXT,
        }
        for i in range(3)
    ]
    write_rows(folder / "pairs.jsonl", pairs if removed else [])
    _decided(
        folder, 5230, {"exact duplicate": exact, "near duplicate": near}, {"duplicate_of": "stdlib/contextlib.py/3"}
    )
    return {
        "documents_in": 5230,
        "documents_out": 5230 - exact - near,
        "bytes_out": 12_600_000,
        "clusters": (exact + near) // 2,
        "removed_by_reason": {"exact duplicate": exact, "near duplicate": near} if removed else {},
        "removed_by_source": {"stdlib": exact + near} if removed else {},
    }


def _decided(folder: Path, documents: int, reasons: dict[str, int], because: dict[str, Any]) -> None:
    """The tables of a stage that judges documents: funnel, histograms, samples."""
    gone = {r: n for r, n in reasons.items() if n}
    funnel = [("kept", "", documents - sum(gone.values())), *(("removed", r, n) for r, n in gone.items())]
    write_rows(
        folder / "funnel.jsonl",
        [
            {
                "source": source,
                "outcome": outcome,
                "reason": reason,
                "documents": share * n // 10,
                "bytes_in": share * n * 250,
                "bytes_out": share * n * 250 if outcome == "kept" else 0,
            }
            for outcome, reason, n in funnel
            for source, share in (("stdlib", 7), ("docstrings", 3))
        ],
    )
    rng = np.random.default_rng(5)
    write_rows(
        folder / "histograms.jsonl",
        [
            {"name": name, "outcome": outcome, "low": low, "documents": int(rng.integers(1, 400))}
            for outcome in ("kept", *(["removed"] if gone else []))
            for name, lows in (("characters", [2.0**p for p in range(6, 14)]), ("duplicate_lines", [0.0, 0.05, 0.6]))
            for low in lows
        ],
    )
    rows = [
        {
            "outcome": "removed",
            "reason": r,
            "source": "stdlib",
            "id": f"stdlib/{r}/{i}",
            **because,
            "text": "a ⟦-- --⟧| *b*",
        }
        for i in range(4)
        for r in gone
    ]
    kept = {"outcome": "kept", "reason": "", "source": "stdlib", "id": "stdlib/contextlib.py/3", "text": TEXT}
    write_rows(folder / "samples.jsonl", [*rows, kept])


def _filter(folder: Path, removed: bool) -> dict[str, Any]:
    reasons = {"too short": 118, "repeated lines": 61, "symbols to words": 44, "language": 33} if removed else {}
    rows = [{"reason": r, "id": f"stdlib/{i}", "text": "-- -- --\n" * 6} for i, r in enumerate(reasons)]
    write_rows(folder / "removed" / "00000.jsonl.zst", rows)
    documents = 4767 if removed else 5230
    _decided(folder, documents, reasons, {})
    gone = sum(reasons.values())
    return {
        "documents_in": documents,
        "documents_out": documents - gone,
        "bytes_out": 12_100_000,
        "removed_by_reason": reasons,
        "removed_by_source": {"stdlib": gone} if removed else {},
    }


def _pretrain(folder: Path, steps: int) -> dict[str, Any]:
    rng, curves, loads = np.random.default_rng(1), [], []
    for step in range(steps):
        through = step / max(1, steps - 1)
        loss = 3.1 + 4.5 * math.exp(-6 * through) + rng.normal(0, 0.05)
        row = {
            "step": step,
            "loss": loss * 1.3,
            "main_loss": loss,
            "mtp_loss": loss + 0.6,
            "balance_loss": 4e-4,
            "grad_norm": 0.6 + rng.random() / 5,
            "learning_rate": 3e-3 * (1 - through),
            "load_violation": 0.9 * math.exp(-3 * through) + rng.random() / 10,
        }
        if step % max(1, steps // 5) == 0 or step == steps - 1:
            row["held_out_bpb"] = 1.6 + 2.4 * math.exp(-5 * through)
        curves.append(row)
        if step % max(1, steps // 40) == 0 or step == steps - 1:
            for layer in range(3):
                skew = rng.dirichlet(np.full(8, 6 + 200 * through))
                loads.append({"step": step, "layer": layer, "load": [round(float(v), 5) for v in skew]})
    write_rows(folder / "curves.jsonl", curves)
    write_rows(folder / "expert_load.jsonl", loads)
    return {
        "parameters": 1_412_000,
        "active_parameters": 803_000,
        "tokens": 1_638_400,
        "flops": 9_380_000_000_000,
        "steps": steps,
        "loss": 3.1,
        "held_out_bpb": 1.6,
        "unigram_bpb": 2.94,
    }


def _cold_start(folder: Path, steps: int) -> dict[str, Any]:
    rows = [
        {
            "step": s,
            "loss": 0.3 + 2 * math.exp(-5 * s / steps),
            "main_loss": 0.3 + 2 * math.exp(-5 * s / steps),
            "grad_norm": 0.4,
            "learning_rate": 1e-3,
        }
        for s in range(steps)
    ]
    rows[-1]["held_out_loss"] = 0.35
    write_rows(folder / "curves.jsonl", rows)
    write_rows(folder / "samples.jsonl", [{"step": steps - 1, "prompt": "3+4=?", "text": "3+4=7</think>7"}])
    told = {"conversations": 59, "held_out_conversations": 1, "steps": steps, "loss": 0.3, "held_out_loss": 0.35}
    return {**told, "tokens": 820_000, "flops": 4_100_000_000_000}


def _reinforce(folder: Path, steps: int, reward: tuple, length: tuple) -> dict[str, Any]:
    rng, rows = np.random.default_rng(2), []
    for step in range(steps):
        rise = 1 - math.exp(-4 * step / max(1, steps - 1))
        now = reward[0] + (reward[1] - reward[0]) * rise + rng.normal(0, 0.03)
        long = length[0] + (length[1] - length[0]) * rise + rng.normal(0, 0.6)
        rows.append(
            {
                "step": step,
                "reward": now + 0.1,
                "accuracy": min(1.0, max(0.0, now)),
                "format": 0.9 + rise / 10,
                "response_length": long + 4,
                "thought_length": long,
                "entropy": 0.5 - 0.3 * rise,
                "kl": 0.0,
                "clip_fraction": 0.01,
                "grad_norm": 0.3,
                "learning_rate": 2e-4,
                "groups_kept": int(20 - 8 * rise),
            }
        )
    write_rows(folder / "curves.jsonl", rows)
    return {"steps": steps, "tokens": 900_000, "flops": 5_600_000_000_000, "reward": rows[-1]["reward"]}


def _evaluate(folder: Path, problems: Path, samples: int) -> dict[str, Any]:
    asked = [json.loads(line) for line in (problems / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    results, shown = [], {}
    for model, shares in WAYS.items():
        rng = np.random.default_rng(len(model))
        rows = [_answered(rng, p, shares, samples) for p in asked]
        write_rows(folder / "answers" / f"{model}.jsonl", rows)
        shown[model] = rows
        each = np.array([sum(r["right"]) / samples for r in rows])
        half = 1.96 * each.std() / math.sqrt(len(each))
        results.append(
            {
                "model": model,
                "pass1": round(float(each.mean()), 5),
                "pass1_low": round(float(each.mean() - half), 5),
                "pass1_high": round(float(each.mean() + half), 5),
                "cons": round(float((each >= 0.5).mean()), 5),
                "k": samples,
                "problems": len(asked),
                "format": 0.97,
                "thought_length": round(float(np.mean([r["thought_lengths"] for r in rows])), 4),
                "response_length": round(float(np.mean([r["response_lengths"] for r in rows])), 4),
            }
        )
    write_rows(folder / "results.jsonl", results)
    write_rows(
        folder / "samples.jsonl",
        [
            {
                "question": p["question"],
                "reference": p["answer"].rsplit(" ", 1)[-1],
                "before": shown["cold_start"][i]["responses"][0],
                "after": shown["rl"][i]["responses"][0],
            }
            for i, p in enumerate(asked[:5])
        ],
    )
    return {
        "problems": len(asked),
        "samples": samples,
        "seen_in_training": 3,
        "pass1": {r["model"]: r["pass1"] for r in results},
    }


def _answered(rng: np.random.Generator, problem: dict, shares: tuple, samples: int) -> dict[str, Any]:
    solution, final = problem["answer"].split("\n#### ")
    lines = solution.split("\n")
    responses, right, thoughts = [], [], []
    for _ in range(samples):
        way = ("thorough", "hasty", "guess", "other")[int(rng.choice(4, p=shares))]
        kept = {"thorough": lines, "hasty": lines[: -(-len(lines) // 2)], "guess": [], "other": lines * 3}[way]
        correct = bool(rng.random() < RIGHT[way])
        responses.append("\n".join(kept) + f"\n</think>\n{final if correct else int(final) + 1}")
        right.append(float(correct))
        thoughts.append(sum(map(len, kept)))
    return {
        "id": problem["id"],
        "reference": final,
        "responses": responses,
        "finals": [final] * samples,
        "right": right,
        "formed": [1.0] * samples,
        "thought_lengths": thoughts,
        "response_lengths": [t + 4 for t in thoughts],
    }
