"""The numbers of a run, gathered from the folders of its stages: what `report.json` holds.

Nothing here depends on a clock, a machine or a place: what took how long belongs to the page alone
(`costs.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gristmill.flows.cards.extras import removal_tables
from gristmill.flows.cards.folder import Row, StageFolder, curve, is_number
from gristmill.flows.report import thinking

MODELS = ("base", "zero", "cold_start", "rl")
RESAMPLINGS, INTERVAL = 4000, 0.95
BOOTSTRAP_SEED = 20250122
SIEVES = ("dedup", "filter", "decontaminate")  # the stages that remove documents

Folders = Mapping[str, StageFolder]


def gather(folders: Folders) -> dict[str, Any]:
    """All findings; a part that the folders do not tell is left out and named in `absent`."""
    results = {row["model"]: row for row in folders["evaluate"].rows("results.jsonl") if "model" in row}
    found: dict[str, Any] = {
        "results": {m: results[m] for m in MODELS if m in results},
        "gains": _gains(folders["evaluate"], results),
        "corpus": _corpus(folders),
        "pretraining": _pretraining(folders),
        "reinforcement": {n: _reinforcement(folders[n]) for n in ("rl_zero", "rl") if folders[n].metrics},
        "thinking": {
            "cold_start_data": thinking.cold_start_data(folders["problems"]),
            "models": thinking.models(folders["evaluate"], folders["problems"], MODELS),
        },
        "compute": _compute(folders),
        "stages": _stages(folders),
    }
    if phases := {name: folder.metrics for name, folder in folders.items() if name.startswith("extend_")}:
        found["extension"] = phases
    found["absent"] = _absent(found, folders)
    return found


def headline(found: Mapping[str, Any]) -> dict[str, Any]:
    """The few numbers that a run is judged by; those that cannot be told are left out."""
    numbers: dict[str, Any] = {}
    for name, gain in found["gains"].items():
        numbers |= {name: gain["gain"], f"{name}_low": gain["low"], f"{name}_high": gain["high"]}
    results = found["results"]
    if "rl" in results:
        numbers["final_pass1"] = results["rl"]["pass1"]
    if growth := thought_growth(results):
        numbers["thought_growth"] = growth
    if found["pretraining"].get("bpb_vs_unigram"):
        numbers["bpb_vs_unigram"] = found["pretraining"]["bpb_vs_unigram"]
    numbers["tokens"] = sum(found["compute"]["tokens"].values())
    numbers["flops"] = sum(found["compute"]["flops"].values())
    return numbers


def thought_growth(results: Mapping[str, Row]) -> float | None:
    """Mean thought length after RL over that after the cold start, on the held-out problems."""
    before = results.get("cold_start", {}).get("thought_length")
    after = results.get("rl", {}).get("thought_length")
    return round(after / before, 5) if before and is_number(after) else None


def _gains(evaluate: StageFolder, results: Mapping[str, Row]) -> dict[str, Row]:
    pairs = {"rl_gain": ("cold_start", "rl"), "zero_gain": ("base", "zero")}
    return {
        name: gain(evaluate, results, before, after)
        for name, (before, after) in pairs.items()
        if before in results and after in results
    }


def gain(evaluate: StageFolder, results: Mapping[str, Row], before: str, after: str) -> Row:
    """Pass@1 of one model minus that of another, with a 95 % interval by paired bootstrap over problems.

    Both models answered the same problems, so the problems are drawn and not the models' answers apart.
    Without the answers the interval is that of two independent means.
    """
    difference = results[after]["pass1"] - results[before]["pass1"]
    rights = [_right(evaluate, name) for name in (before, after)]
    if rights[0] and rights[0].keys() == rights[1].keys():
        low, high = _paired_interval([rights[1][k] - rights[0][k] for k in sorted(rights[0])])
        method = "paired bootstrap over problems"
    else:
        widths = [(results[n]["pass1_high"] - results[n]["pass1_low"]) / 2 for n in (before, after)]
        half = (widths[0] ** 2 + widths[1] ** 2) ** 0.5
        low, high, method = difference - half, difference + half, "two independent means"
    return {
        "before": before,
        "after": after,
        "gain": round(difference, 5),
        "low": round(low, 5),
        "high": round(high, 5),
        "method": method,
    }


def _right(evaluate: StageFolder, model: str) -> dict[str, float]:
    rows = evaluate.each(f"answers/{model}.jsonl")
    return {row["id"]: sum(row["right"]) / len(row["right"]) for row in rows}


def _paired_interval(differences: list[float]) -> tuple[float, float]:
    import numpy as np

    values = np.asarray(differences, dtype=np.float64)
    generator = np.random.Generator(np.random.PCG64(BOOTSTRAP_SEED))
    means = np.sort(values[generator.integers(0, len(values), (RESAMPLINGS, len(values)))].mean(1))
    tail = (1 - INTERVAL) / 2
    return float(means[int(tail * RESAMPLINGS)]), float(means[int((1 - tail) * RESAMPLINGS) - 1])


def _corpus(folders: Folders) -> dict[str, Any]:
    steps = []
    for name in ("ingest", "dedup", "spans", "filter", "decontaminate", "tokenize"):
        metrics = folders[name].metrics if name in folders else {}
        documents = metrics.get("documents_out", metrics.get("documents"))
        if is_number(documents):
            steps.append({"stage": name, "documents": documents, "bytes": _bytes(metrics)})
    removed: dict[str, Any] = {n: t for n in SIEVES if (t := removal_tables(folders[n].metrics))}
    if "filter" not in removed and (reasons := _reasons(folders["filter"])):
        removed["filter"] = {"removed_by_reason": reasons}
    return {"funnel": steps, "removed": removed, "tokenize": folders["tokenize"].metrics}


def _bytes(metrics: Row) -> int | None:
    for name in ("bytes_out", "text_bytes", "bytes", "characters_out", "characters"):
        if is_number(metrics.get(name)):
            return metrics[name]
    return None


def _reasons(stage: StageFolder) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in stage.each("removed/*.jsonl.zst"):
        reason = str(row.get("reason", "no reason given"))
        counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items()))


def _pretraining(folders: Folders) -> dict[str, Any]:
    metrics = folders["pretrain"].metrics
    if not metrics:
        return {}
    rows = folders["pretrain"].rows("curves.jsonl")
    _, bits = curve(rows, "held_out_bpb")
    found: dict[str, Any] = {
        "metrics": metrics,
        "held_out_bpb": bits[-1] if bits else metrics.get("held_out_bpb"),
    }
    unigram = found["unigram_bpb"] = metrics.get("unigram_bpb")
    if unigram and found["held_out_bpb"]:
        found["bpb_vs_unigram"] = round(found["held_out_bpb"] / unigram, 5)
    return found


def _reinforcement(stage: StageFolder) -> dict[str, Any]:
    rows = stage.rows("curves.jsonl")
    tenth = max(1, len(rows) // 10)
    ends: dict[str, Any] = {}
    for name in ("reward", "accuracy", "format", "thought_length", "response_length", "entropy"):
        _, values = curve(rows, name)
        if values:
            first, last = values[:tenth], values[-tenth:]
            ends[name] = {"first": round(sum(first) / len(first), 5), "last": round(sum(last) / len(last), 5)}
    return {"metrics": stage.metrics, "ends": ends, "steps_in_an_end": tenth}


def _compute(folders: Folders) -> dict[str, dict[str, float]]:
    return {
        name: {s: f.metrics[name] for s, f in folders.items() if is_number(f.metrics.get(name))}
        for name in ("tokens", "flops")
    }


def _stages(folders: Folders) -> dict[str, Any]:
    return {
        name: {
            "stage": folder.manifest.get("stage", name),
            "key": folder.manifest.get("key"),
            "version": folder.manifest.get("version"),
            "content_hash": folder.manifest.get("content_hash"),
            "inputs": folder.manifest.get("inputs", {}),
            "bytes": folder.content_bytes,
            "metrics": folder.metrics,
        }
        for name, folder in folders.items()
        if folder.manifest
    }


def _absent(found: Mapping[str, Any], folders: Folders) -> list[str]:
    """Sentences on what the page cannot show, in the order of its sections."""
    told = {
        "evaluate/results.jsonl gives no result": found["results"],
        "no stage counts documents (documents_out)": found["corpus"]["funnel"],
        "pretrain/curves.jsonl is empty": folders["pretrain"].rows("curves.jsonl", 1),
        "no unigram line: pretrain has no metric unigram_bpb": found["pretraining"].get("unigram_bpb"),
        "pretrain/expert_load.jsonl is empty": folders["pretrain"].rows("expert_load.jsonl", 1),
        "rl_zero/curves.jsonl is empty": folders["rl_zero"].rows("curves.jsonl", 1),
        "rl/curves.jsonl is empty": folders["rl"].rows("curves.jsonl", 1),
        "evaluate/samples.jsonl is empty": folders["evaluate"].rows("samples.jsonl", 1),
        "problems tells no styles of the cold start": found["thinking"]["cold_start_data"],
        "no ways of thinking: there are no answers to problems of known length": found["thinking"]["models"],
    }
    missing = [f"{name} has no manifest" for name, folder in folders.items() if not folder.manifest]
    return missing + [sentence for sentence, there in told.items() if not there]
