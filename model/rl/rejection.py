"""Rejection sampling as a job: a reasoner and problems in, its right answers as chains of thought out (R1 2.3.3).

Problems are answered in fixed parts that are kept in work/, so that a resumed run answers none of them again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gristmill.model.chat import Chat
from gristmill.model.config import TracesConfig
from gristmill.model.evaluation import answers_to
from gristmill.model.rl.rewards import split_response
from gristmill.model.stage_types import Metrics, Progress
from gristmill.model.training.loop import Row, write_rows
from gristmill.model.training.models import load_model

SAMPLES = 12


def run(job: dict[str, Any], out: Path, device: torch.device, progress: Progress) -> Metrics:
    """Write `cold_start.jsonl` of the answers of `job["model"]` to `train.jsonl` of `job["problems"]`."""
    config, seed = TracesConfig.model_validate(job["config"]), int(job["seed"])
    chat = Chat(Path(job["tokenizer"]) / "tokenizer")
    problems = _read(Path(job["problems"]) / "train.jsonl")[: config.problems]
    model = load_model(Path(job["model"]) / "model", device, mtp=False)
    per, answers = max(1, config.batch_size // config.samples), []
    for first in range(0, len(problems), per):
        part = out / "work" / f"answers-{first:08d}.jsonl"
        asked = problems[first : first + per]
        if not part.exists():
            write_rows(part, answers_to(model, chat, asked, config, seed))
        answers += _read(part)
        progress(first + len(asked), len(problems))
    rows = [row for pair in zip(problems, answers, strict=True) for row in accepted(*pair, config.kept)]
    if not rows:
        raise ValueError(
            f"none of {config.samples} answers to each of {len(problems)} problems is right and in form: ask more of "
            f"them (samples, problems), or train the reasoner longer"
        )
    write_rows(out / "cold_start.jsonl", rows)
    write_rows(out / "samples.jsonl", [{n: row[n] for n in ("question", "thought", "final")} for row in rows[:SAMPLES]])
    right = sum(sum(row["right"]) for row in answers)
    return {
        "chains": len(rows),
        "problems": len(problems),
        "problems_answered": len({row["question"] for row in rows}),
        "right": round(right / (len(problems) * config.samples), 5),
    }


def accepted(problem: Row, answered: Row, kept: int) -> Iterator[Row]:
    """The first `kept` different chains of a problem that are right and in form, as rows of fine-tuning."""
    judged = zip(answered["responses"], answered["right"], answered["formed"], strict=True)
    good = dict.fromkeys(text for text, right, formed in judged if right and formed)
    for number, parts in enumerate(list(map(split_response, good))[:kept]):
        assert parts is not None  # it is in form
        identifier = f"traces/{problem['id']}/{number}"
        yield {**problem, "id": identifier, "thought": parts[0], "final": parts[1]}


def _read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
