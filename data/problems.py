"""The `problems` stage: what the model is asked in cold start, reinforcement learning and evaluation.

Rows have the fields of GSM8K, `question` and `answer` ending in `#### N`, so that a GSM8K file takes their place.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from gristmill.data.arithmetic import Style, draw_chain, generator, question, thought
from gristmill.data.config import Config
from gristmill.data.stage_types import Metrics, Progress

Row = dict[str, Any]


class Styles(Config):
    """Shares of the ways of thinking in the cold-start data; they are scaled to sum to one."""

    thorough: float = Field(default=1.0, ge=0, title="Thorough", description="Every running sum is written.")
    hasty: float = Field(default=1.0, ge=0, title="Hasty", description="Two steps are taken at a time.")
    guess: float = Field(default=1.0, ge=0, title="Guess", description="The answer follows an empty thought.")

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.thorough + self.hasty + self.guess <= 0:
            raise ValueError("styles are all 0: give at least one of thorough, hasty, guess a positive share")
        return self


class ExamConfig(Config):
    """The problems of the evaluation: what the corpus must not hold is made of these alone."""

    family: Literal["arithmetic", "gsm8k"] = Field(
        default="arithmetic", title="Family", description="Generated chains of sums, or files in GSM8K's format."
    )
    test: int = Field(default=500, ge=1, title="Test", description="Held-out problems for evaluation.")
    least_terms: int = Field(default=4, ge=2, le=20, title="Least terms", description="Numbers in the shortest chain.")
    most_terms: int = Field(default=6, ge=2, le=20, title="Most terms", description="Numbers in the longest chain.")
    largest: int = Field(
        default=9, ge=2, le=49, title="Largest number", description="Largest number added or taken away."
    )
    words: float = Field(default=0.5, ge=0, le=1, title="In words", description="Share of problems put in words.")
    test_file: str | None = Field(default=None, title="Test file", description="GSM8K-format JSONL(.gz), family gsm8k.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.least_terms > self.most_terms:
            raise ValueError(f"least_terms {self.least_terms} is more than most_terms {self.most_terms}: swap them")
        if self.family == "gsm8k" and not self.test_file:
            raise ValueError("family gsm8k needs train_file and test_file: name two JSONL files in GSM8K's format")
        return self


class ProblemsConfig(ExamConfig):
    """Which problems there are and how the cold-start chains of thought are written."""

    cold_start: int = Field(
        default=3000, ge=1, title="Cold start", description="Chains of thought for supervised training."
    )
    train: int = Field(default=6000, ge=1, title="Training", description="Problems for reinforcement learning.")
    styles: Styles = Field(default_factory=Styles, title="Ways of thinking", description="In the cold start.")
    train_file: str | None = Field(
        default=None, title="Training file", description="GSM8K-format JSONL(.gz), family gsm8k."
    )

    @model_validator(mode="after")
    def _two_files(self) -> Self:
        if self.family == "gsm8k" and not self.train_file:
            raise ValueError("family gsm8k needs train_file and test_file: name two JSONL files in GSM8K's format")
        return self

    @property
    def exam(self) -> ExamConfig:
        """The part that the evaluation's problems follow from."""
        return ExamConfig(**{name: getattr(self, name) for name in ExamConfig.model_fields})


def problem_files(config: ExamConfig) -> list[str]:
    """The files outside the store that the problems are read from; their contents belong to the stage's key."""
    train_file = config.train_file if isinstance(config, ProblemsConfig) else None
    return [f for f in (train_file, config.test_file) if f] if config.family == "gsm8k" else []


def make_exam(config: ExamConfig, out: Path, seed: int, *, progress: Progress) -> Metrics:
    """Write test.jsonl, the very file that `make_problems` writes: a stage of its own, so that the corpus, which must
    not hold these problems, is not made again when only the training problems change.

    Raises:
        ValueError: as `make_problems`.
    """
    rows = _test(config, seed)
    _write(out / "test.jsonl", rows)
    _write(out / "samples.jsonl", rows[:6])
    progress(1, 1, rows=len(rows))
    return {"test_problems": len(rows)}


def _test(config: ExamConfig, seed: int) -> list[Row]:
    if config.family == "arithmetic":
        return list(_distinct(config, seed))
    assert config.test_file
    rows = (_bare(row) for row in _read_gsm8k(Path(config.test_file), "test"))
    return list(islice(rows, config.test))


def _bare(row: Row) -> Row:
    return {k: v for k, v in row.items() if k not in ("thought", "final")}


def make_problems(config: ProblemsConfig, out: Path, seed: int, *, progress: Progress) -> Metrics:
    """Write cold_start.jsonl, train.jsonl and test.jsonl; no question of the test is in the others.

    Raises:
        ValueError: a GSM8K-format file has a row without `question` or an answer without `####`.
    """
    sets = _from_files(config, seed) if config.family == "gsm8k" else _arithmetic(config, seed)
    asked = {row["question"] for row in sets["test"]}
    kept = {
        name: rows if name == "test" else [r for r in rows if r["question"] not in asked] for name, rows in sets.items()
    }
    for done, (name, rows) in enumerate(kept.items(), start=1):
        _write(out / f"{name}.jsonl", rows)
        progress(done, len(kept), rows=len(rows))
    _write(out / "samples.jsonl", [{"set": name, **row} for name, rows in kept.items() for row in rows[:6]])
    styles = {s: sum(row["style"] == s for row in kept["cold_start"]) for s in ("thorough", "hasty", "guess")}
    return {
        **{f"{name}_problems": len(rows) for name, rows in kept.items()},
        "dropped_seen_in_test": sum(len(sets[n]) - len(kept[n]) for n in kept),
        "styles": styles,
    }


def _arithmetic(config: ProblemsConfig, seed: int) -> dict[str, list[Row]]:
    return {
        "cold_start": [_arithmetic_row(config, seed, "cold_start", i, config.styles) for i in range(config.cold_start)],
        "train": [_arithmetic_row(config, seed, "train", i) for i in range(config.train)],
        "test": _test(config, seed),
    }


def _distinct(config: ExamConfig, seed: int) -> Iterator[Row]:
    """Test problems with different questions: one asked twice would be counted twice."""
    seen: set[str] = set()
    for index in range(100 * config.test):
        row = _arithmetic_row(config, seed, "test", index)
        if row["question"] not in seen:
            seen.add(row["question"])
            yield row
        if len(seen) == config.test:
            return
    raise ValueError(
        f"problems.test {config.test} asks for more different chains than there are with at most "
        f"{config.most_terms} terms up to {config.largest}: lower it or raise problems.largest"
    )


def _arithmetic_row(config: ExamConfig, seed: int, which: str, index: int, styles: Styles | None = None) -> Row:
    """Problem `index` of a set; with the thought of one of `styles` where they are given."""
    rng = generator(seed, which, index)
    chain = draw_chain(rng, (config.least_terms, config.most_terms), config.largest, held_out=which == "test")
    form = "words" if rng.random() < config.words else "symbols"
    row: Row = {
        "id": f"{which}/{index}",
        "question": question(chain, form, rng),
        "answer": f"{thought(chain, 'thorough')}\n#### {chain.answer}",
        "terms": chain.terms,
        "form": form,
    }
    if styles is not None:
        shares = style_shares(styles)
        style: Style = ("thorough", "hasty", "guess")[int(rng.choice(3, p=shares))]
        row |= {"thought": thought(chain, style), "final": str(chain.answer), "style": style}
    return row


def style_shares(styles: Styles) -> list[float]:
    """The three shares (thorough, hasty, guess), scaled to sum to one."""
    total = styles.thorough + styles.hasty + styles.guess
    return [styles.thorough / total, styles.hasty / total, styles.guess / total]


def _from_files(config: ProblemsConfig, seed: int) -> dict[str, list[Row]]:
    """GSM8K-format files: the written solution is the chain of thought; calculator marks `<<…>>` are left out."""
    assert config.train_file
    rows = list(_read_gsm8k(Path(config.train_file), "train"))
    order = generator(seed, "gsm8k").permutation(len(rows))
    rows = [rows[i] for i in order]
    cold = [{**r, "id": f"cold_start/{r['id']}", "style": "thorough"} for r in rows[: config.cold_start]]
    return {"cold_start": cold, "train": [_bare(r) for r in rows[: config.train]], "test": _test(config, seed)}


def _read_gsm8k(path: Path, which: str) -> Iterator[Row]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                asked, answer = str(row["question"]), str(row["answer"])
                solution, final = answer.rsplit("####", 1)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}, is not a GSM8K row with `question` and an `answer` ending in "
                    f"`#### N` ({type(error).__name__}: {error}): mend or remove the line"
                ) from error
            yield {
                "id": f"{which}/{number - 1}",
                "question": asked,
                "answer": answer,
                "terms": 0,
                "form": "words",
                "thought": _without_marks(solution.strip()),
                "final": final.strip().replace(",", ""),
            }


def _without_marks(text: str) -> str:
    parts = text.split("<<")
    return parts[0] + "".join(p.split(">>", 1)[-1] for p in parts[1:])


def _write(path: Path, rows: list[Row]) -> None:
    part = path.with_suffix(".tmp")
    with part.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")
    os.replace(part, path)
