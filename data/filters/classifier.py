"""A quality classifier that a user trains on examples of good and of bad documents: its section, and its rule.

`linear_classifier.py` says what it is, `classifier_training.py` how it is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import Field, model_validator

from gristmill.data.documents import read_rows
from gristmill.data.filters.classifier_training import TrainingConfig, train
from gristmill.data.filters.linear_classifier import ABOUT, WEIGHTS, Classifier
from gristmill.data.filters.rule import Prepared, Rule, RuleConfig
from gristmill.data.row_files import files_of
from gristmill.data.sieve import Verdict, remove

SAMPLED_SHARDS, SAMPLED_OF_A_SHARD = 100, 200  # documents by which a share is turned into a threshold


class QualityConfig(TrainingConfig, RuleConfig):
    """A classifier by its examples, or one trained before, and which scores stay."""

    model: str | None = Field(
        default=None, title="Model", description="Folder of a trained classifier, in place of examples."
    )
    least_score: float | None = Field(
        default=None, ge=0, le=1, title="Least score", description="Probability of good below which a document goes."
    )
    keep_share: float | None = Field(
        default=None,
        gt=0,
        le=1,
        title="Share kept",
        description="In place of a least score: the share of a sample of the documents that scores above it.",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if bool(self.model) == bool(self.positive or self.negative):
            raise ValueError("quality: give examples (positive and negative) or a trained model, one of the two")
        if not self.model and not (self.positive and self.negative):
            raise ValueError("quality: examples of one kind teach nothing: give positive and negative ones")
        if self.least_score is not None and self.keep_share is not None:
            raise ValueError("quality: least_score and keep_share both say what stays: give one")
        return self

    def rule(self, exact: bool) -> Rule:
        """The rule; without a least score it only scores.

        Raises:
            ValueError: `keep_share` has not been turned into a score by `resolve`, or examples cannot be read.
        """
        if self.keep_share is not None:
            raise ValueError("quality: keep_share needs the documents: call resolve(config, shards, folder) first")
        return Quality(classifier_of(self), self.least_score)


def rule_files(config: QualityConfig) -> list[str]:
    """The files that decide scores; their contents belong to the stage's key."""
    if config.model:
        return [str(Path(config.model) / name) for name in (WEIGHTS, ABOUT)]
    return [str(path) for path in files_of([*config.positive, *config.negative], "quality")]


def check_quality(config: QualityConfig) -> None:
    """Refuse examples or a model that are not there, before anything runs.

    Raises:
        ValueError: with the path and what to do.
    """
    for file in rule_files(config):
        if not Path(file).is_file():
            raise ValueError(f"quality: there is no {file}: correct `model` or train one")


def resolve(config: QualityConfig, shards: Sequence[Path], folder: Path, kind: str | None = None) -> QualityConfig:
    """Train once, before tasks are handed out: a configuration that names the trained model and a least score.

    Args:
        shards: the documents to come; a sample of them turns `keep_share` into a score.
        folder: where the classifier is written, which is a result to keep; one that lies there already is used.
        kind: of the documents to sample; none takes all.
    """
    if not (folder / ABOUT).exists():
        classifier_of(config).save(folder)
    least = config.least_score
    if config.keep_share is not None:
        scores = list(map(Classifier.load(folder).score, _sample(shards, kind)))
        least = float(np.quantile(scores, 1 - config.keep_share)) if scores else 0.0
    origin = {"positive": [], "negative": [], "model": str(folder)}
    return config.model_copy(update={**origin, "least_score": least, "keep_share": None})


def _sample(shards: Sequence[Path], kind: str | None) -> Iterator[str]:
    """Texts from the beginnings of shards that lie evenly among all."""
    for path in shards[:: max(1, math.ceil(len(shards) / SAMPLED_SHARDS))]:
        taken = 0
        for row in read_rows(path):
            if kind is None or row["metadata"]["kind"] == kind:
                yield row["text"]
                taken += 1
            if taken == SAMPLED_OF_A_SHARD:
                break


def classifier_of(config: QualityConfig) -> Classifier:
    """The classifier that a configuration asks for; loaded or trained once a process for the same files."""
    if config.model:
        check_quality(config)
        return _loaded(config.model, tuple(map(_stamp, rule_files(config))))
    what = {"least_score": None, "keep_share": None}
    return _trained(config.model_copy(update=what).model_dump_json(), tuple(map(_stamp, rule_files(config))))


def _stamp(file: str) -> tuple[str, int, int]:
    return file, Path(file).stat().st_size, Path(file).stat().st_mtime_ns


@lru_cache(maxsize=2)  # a table is 256 MiB at most
def _loaded(folder: str, files: tuple[tuple[str, int, int], ...]) -> Classifier:
    return Classifier.load(Path(folder))


@lru_cache(maxsize=2)  # a table is 256 MiB at most
def _trained(config: str, files: tuple[tuple[str, int, int], ...]) -> Classifier:
    return train(QualityConfig.model_validate_json(config))


class Quality:
    """Scores documents, and removes those below a score; `quality` of what stays is in its metadata."""

    name = "quality"

    def __init__(self, classifier: Classifier, least: float | None) -> None:
        self._classifier, self._least = classifier, least

    def judge(self, document: Prepared) -> Verdict:
        """By the score of the text as the rules before left it."""
        score = self._classifier.score(document.text)
        if self._least is not None and score < self._least:
            detail = f"{score:.4f} is below {self._least:.4f}"
            return remove("quality: below threshold", values={"quality": score}, detail=detail)
        return Verdict(metadata={"quality": round(score, 4)}, values={"quality": score})
