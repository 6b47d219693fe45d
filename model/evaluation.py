"""Pass@1 and majority on held-out problems, as a job (R1 section 3): every model of the run, the same draws."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zstandard

from gristmill.model.chat import Chat
from gristmill.model.config import EvaluateConfig
from gristmill.model.generate import Sampling, sample, thought_tokens
from gristmill.model.rl.config import RewardConfig
from gristmill.model.rl.rewards import judge, reference_answer, same_answer, split_response
from gristmill.model.stage_types import Metrics, Progress
from gristmill.model.training.batches import numpy_generator, torch_seed
from gristmill.model.training.loop import Row, write_rows
from gristmill.model.training.models import load_model
from gristmill.model.transformer import Transformer

RESAMPLINGS = 2000
CONTEXT = 40  # characters around a place, for what stands right before and after it
SUM_BEFORE = re.compile(r"\d[+-]\d+=-?\d+ $")
SUM_AFTER = re.compile(r" -?\d+(?:[+-]\d+)+=")


def run(job: dict[str, Any], out: Path, device: torch.device, progress: Progress) -> Metrics:
    """Evaluate each of `job["models"]` (name → folder) on the problems that no training stage saw."""
    config, seed = EvaluateConfig.model_validate(job["config"]), int(job["seed"])
    chat = Chat(Path(job["tokenizer"]) / "tokenizer")
    problems = _read(Path(job["problems"]) / "test.jsonl")
    seen = seen_in_training(problems, Path(job["problems"]), Path(job["documents"]))
    clean = [p for p in problems if p["id"] not in seen][: config.problems]
    if not clean:
        raise ValueError(
            f"all {len(problems)} test problems were seen in training ({sorted(seen)[:3]}, …): give other problems"
        )
    (out / "answers").mkdir(exist_ok=True)
    results, answers = [], {}
    for number, (name, folder) in enumerate(job["models"].items()):
        answered = out / "answers" / f"{name}.jsonl"
        if not answered.exists():
            model = load_model(Path(folder) / "model", device, mtp=False)

            def told(done: int, total: int, first: int = number) -> None:
                progress(first * total + done, len(job["models"]) * total)

            write_rows(answered, answers_to(model, chat, clean, config, seed, told))
        answers[name] = _read(answered)
        results.append(_result(name, answers[name], clean, config, seed))
    write_rows(out / "results.jsonl", results)
    write_rows(out / "samples.jsonl", _side_by_side(answers, clean))
    metrics: Metrics = {"problems": len(clean), "samples": config.samples, "seen_in_training": len(seen)}
    for field in ("pass1", "cons", "format", "thought_length"):
        metrics[field] = {r["model"]: r[field] for r in results}
    return metrics


def answers_to(
    model: Transformer,
    chat: Chat,
    problems: list[Row],
    config: EvaluateConfig,
    seed: int,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """A row a problem with its k judged responses; a batch is a fixed slice of the problems, told when it is done."""
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p)
    per = max(1, config.batch_size // config.samples)
    rows: list[Row] = []
    for first in range(0, len(problems), per):
        asked = problems[first : first + per]
        samples = sample(
            model,
            [chat.prompt(p["question"]) for p in asked],
            [torch_seed(seed, "evaluate", p["id"], k) for p in asked for k in range(config.samples)],
            sampling,
            eos=chat.eos,
            pad=chat.pad,
            copies=config.samples,
        )
        for i, problem in enumerate(asked):
            own = samples[i * config.samples : (i + 1) * config.samples]
            texts = [chat.text(s.tokens) for s in own]
            reference = reference_answer(problem["answer"])
            judged = [
                judge(t, s.ended, problem["question"], reference, RewardConfig())
                for t, s in zip(texts, own, strict=True)
            ]
            rows.append(
                {
                    "id": problem["id"],
                    "reference": reference,
                    "responses": texts,
                    "finals": [j.final for j in judged],
                    "right": [j.accuracy for j in judged],
                    "formed": [j.format for j in judged],
                    "thought_lengths": [thought_tokens(s.tokens, chat.thought_end) for s in own],
                    "response_lengths": [len(s.tokens) for s in own],
                }
            )
        told(len(rows), len(problems))
    return rows


def _result(name: str, rows: list[Row], problems: list[Row], config: EvaluateConfig, seed: int) -> Row:
    """pass@1 (mean over samples, then problems) with a 95 % bootstrap interval over problems, and cons@k."""
    each = torch.tensor([sum(r["right"]) / len(r["right"]) for r in rows], dtype=torch.float64).numpy()
    draws = numpy_generator(seed, "bootstrap", name).integers(0, len(each), (RESAMPLINGS, len(each)))
    means = each[draws].mean(1)
    means.sort()
    agreed = [same_answer(majority(r["finals"]), r["reference"]) for r in rows]

    def mean(field: str) -> float:
        return round(sum(sum(r[field]) for r in rows) / (len(rows) * config.samples), 4)

    return {
        "model": name,
        "pass1": round(float(each.mean()), 5),
        "pass1_low": round(float(means[int(0.025 * RESAMPLINGS)]), 5),
        "pass1_high": round(float(means[int(0.975 * RESAMPLINGS)]), 5),
        "cons": round(sum(agreed) / len(agreed), 5),
        "k": config.samples,
        "problems": len(problems),
        "format": mean("formed"),
        "thought_length": mean("thought_lengths"),
        "response_length": mean("response_lengths"),
    }


def majority(finals: list[str]) -> str:
    """The most frequent answer (cons@k); of equally frequent ones the first given; nothing where none was given.

    Answers that are equal as numbers are one: 1080 and 1,080 vote together.
    """
    votes: Counter[str] = Counter()
    for final in filter(None, finals):
        votes[next((known for known in votes if same_answer(final, known)), final)] += 1
    return votes.most_common(1)[0][0] if votes else ""


def seen_in_training(problems: list[Row], folder: Path, documents: Path) -> set[str]:
    """Ids of problems whose question, or whose whole worked solution, stands in the corpus or a training set."""
    needles = {p["id"]: [_plain(p["question"]), _plain(_worked(p))] for p in problems}
    known: set[str] = set()
    for row in (r for name in ("cold_start", "train") for r in _read(folder / f"{name}.jsonl")):
        known |= {_plain(row["question"]), _plain(_worked(row)), _plain(row.get("thought", ""))}
    seen = {key for key, parts in needles.items() if any(part in known for part in parts if part)}
    for shard in sorted((documents / "documents").glob("*.jsonl.zst")):
        text = _plain("\n".join(_texts(shard)))
        for key, parts in needles.items():
            if key not in seen and any(_stands_in(part, text) for part in parts if part):
                seen.add(key)
    return seen


def _worked(problem: Row) -> str:
    """The worked solution of a GSM8K-format problem, without its final answer."""
    return problem["answer"].rsplit("####", 1)[0]


def _stands_in(needle: str, text: str) -> bool:
    """Whether the needle stands in the text by itself: 1+2 does not stand in 11+2.

    Nor do the sums of a short chain stand in those of a longer one, which is another problem: no further sum may come
    right before or right after them.
    """
    at = text.find(needle)
    while at >= 0:
        end = at + len(needle)
        before, after = text[max(0, at - CONTEXT) : at], text[end : end + CONTEXT]
        touches = before[-1:].isalnum() or before[-1:] in ("+", "-") or (after[:1].isalnum() and needle[-1:].isalnum())
        sums = needle[-1:].isdigit() and "=" in needle and (SUM_BEFORE.search(before) or SUM_AFTER.match(after))
        if not touches and not sums:
            return True
        at = text.find(needle, at + 1)
    return False


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().lower()


def _texts(shard: Path) -> list[str]:
    with shard.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        return [json.loads(line)["text"] for line in io.TextIOWrapper(stream, encoding="utf-8")]


def _side_by_side(answers: dict[str, list[Row]], problems: list[Row], count: int = 5) -> list[Row]:
    """Five problems with a thought before and after RL: those where the two differ most in length come first."""
    before, after = answers.get("cold_start"), answers.get("rl")
    if before is None or after is None:
        return []
    gain = [a["thought_lengths"][0] - b["thought_lengths"][0] for b, a in zip(before, after, strict=True)]
    # Every tenth problem in the order of the gain, so that the five are typical and not the best.
    order = sorted(range(len(gain)), key=lambda i: (gain[i], i))
    picked = [order[len(order) * (2 * i + 1) // (2 * count)] for i in range(min(count, len(order)))]
    return [
        {
            "question": problems[i]["question"],
            "reference": before[i]["reference"],
            "before": _shown(before[i]),
            "after": _shown(after[i]),
        }
        for i in picked
    ]


def _shown(row: Row) -> str:
    parts = split_response(row["responses"][0])
    return row["responses"][0] if parts is None else f"{parts[0]}\n</think>\n{parts[1]}"


def _read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
