"""A rule by any sequence classifier in Hugging Face's format: a local folder, or a hub's repository at a commit.

torch and transformers are imported where the model is loaded, in the worker that applies it. Documents come one at a
time, so a batch is one document's windows: a long text is read in windows of the model's length and its scores are
averaged, weighted by their tokens.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from gristmill.data.filters.rule import Prepared, Rule, RuleConfig
from gristmill.data.sieve import Verdict, remove

COMMIT = re.compile(r"[0-9a-f]{40}")
CODE_OR_PICKLE = "use one saved as safetensors in an architecture that transformers has"


class HubClassifierConfig(RuleConfig):
    """Which classifier, which of its outputs is the score, and which scores stay."""

    model: str = Field(min_length=1, title="Model", description="Local folder, or the hub's owner/name.")
    revision: str | None = Field(
        default=None, title="Revision", description="Commit of the hub's repository; needed there."
    )
    name: str = Field(
        default="hub_classifier",
        pattern=r"^[a-z][a-z0-9_]*$",
        title="Name",
        description="Of the score, in metadata and reasons.",
    )
    label: str | int | None = Field(
        default=None,
        title="Label",
        description="Whose probability is the score, by name or number; none takes the last label.",
    )
    score: Literal["probability", "sigmoid", "value"] = Field(
        default="probability",
        title="Score",
        description="Softmax over the labels, a label's own sigmoid, or a regression's bare value.",
    )
    scale: float = Field(
        default=1.0, gt=0, title="Scale", description="A value is divided by it: 5 for scores from 0 to 5."
    )
    least_score: float | None = Field(default=None, title="Least score", description="Documents below go, after scale.")
    most_score: float | None = Field(default=None, title="Most score", description="Documents above go, after scale.")
    window: int = Field(default=512, ge=8, title="Window", description="Tokens read at once.")
    most_windows: int = Field(default=4, ge=1, title="Most windows", description="From the beginning of a text.")
    batch: int = Field(default=4, ge=1, title="Batch", description="Windows that are run at once.")

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        low, high = self.least_score, self.most_score
        if low is not None and high is not None and low > high:
            raise ValueError(f"{self.name}: least_score {low} is more than most_score {high}: nothing would stay")
        return self

    def rule(self, exact: bool) -> Rule:
        """The rule; the model is loaded once a process.

        Raises:
            ValueError: the model cannot be loaded, or has no such label.
        """
        return HubClassifier(self)


def rule_files(config: HubClassifierConfig) -> list[str]:
    """The files of a local model; a hub's is pinned by its commit."""
    folder = Path(config.model)
    return [str(p) for p in sorted(folder.rglob("*")) if p.is_file()] if folder.is_dir() else []


def check_hub_classifier(config: HubClassifierConfig) -> None:
    """Refuse a model that is not there or may change, before anything runs.

    Raises:
        ValueError: with the name and what to do.
    """
    folder = Path(config.model)
    if folder.is_dir():
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"{config.name}: the folder {config.model!r} holds no model (config.json and *.safetensors): correct it"
            )
    elif config.model.count("/") != 1 or config.model.startswith((".", "/", "~")):
        raise ValueError(f"{config.name}: {config.model!r} is no folder and no hub name owner/name: correct it")
    elif not config.revision or not COMMIT.fullmatch(config.revision):
        raise ValueError(
            f"{config.name}: the hub model {config.model!r} has the revision {config.revision!r}: name a commit, 40 "
            f"hexadecimal digits, so that the same recipe always asks the same model"
        )


class HubClassifier:
    """Scores documents with a model and removes those outside of bounds."""

    def __init__(self, config: HubClassifierConfig) -> None:
        self.name = config.name
        self._config = config
        self._tokenizer, self._model = _loaded(config.model, config.revision, config.name)
        self._label = _label(config, self._model.config)

    def judge(self, document: Prepared) -> Verdict:
        """By the score of the text as the rules before left it."""
        score = self.score_of(document.text)
        low, high = self._config.least_score, self._config.most_score
        values = {self.name: score}
        if low is not None and score < low:
            return remove(f"{self.name}: too low", values=values, detail=f"{score:.4f} is below {low:g}")
        if high is not None and score > high:
            return remove(f"{self.name}: too high", values=values, detail=f"{score:.4f} is above {high:g}")
        return Verdict(metadata={self.name: round(score, 4)}, values=values)

    def score_of(self, text: str) -> float:
        """The score of a text: the mean over its windows, weighted by their tokens."""
        import torch

        window = min(self._config.window, self._tokenizer.model_max_length)
        read = self._tokenizer(
            text[: 32 * window * self._config.most_windows],  # more than its windows hold: bounded work on any text
            truncation=True,
            max_length=window,
            return_overflowing_tokens=True,
            padding=True,
            return_tensors="pt",
        )
        read.pop("overflow_to_sample_mapping", None)
        rows = min(len(read["input_ids"]), self._config.most_windows)
        total, weight = 0.0, 0.0
        for first in range(0, rows, self._config.batch):
            part = {k: v[first : min(rows, first + self._config.batch)] for k, v in read.items()}
            with torch.no_grad():
                scores = self._scores(self._model(**part).logits.double())
            tokens = part["attention_mask"].sum(1).double()
            total, weight = total + float(scores @ tokens), weight + float(tokens.sum())
        return total / max(weight, 1.0)

    def _scores(self, logits: Any) -> Any:
        """(windows, labels) → (windows,)."""
        match self._config.score:
            case "probability":
                return logits.softmax(-1)[:, self._label]
            case "sigmoid":
                return logits[:, self._label].sigmoid()
            case "value":
                return logits[:, self._label] / self._config.scale


@lru_cache(maxsize=2)
def _loaded(model: str, revision: str | None, name: str) -> tuple[Any, Any]:
    """(tokenizer, model) for inference; weights from safetensors alone, and no code of the repository's own."""
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False, use_fast=True)
        loaded = AutoModelForSequenceClassification.from_pretrained(
            model, revision=revision, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"{name}: {model!r} cannot be loaded ({said}): {CODE_OR_PICKLE}") from error
    return tokenizer, loaded.eval()


def _label(config: HubClassifierConfig, model: Any) -> int:
    names = [model.id2label[i] for i in range(model.num_labels)]
    if config.label is None:
        return len(names) - 1
    if isinstance(config.label, int) and 0 <= config.label < len(names):
        return config.label
    if config.label in names:
        return names.index(config.label)
    raise ValueError(f"{config.name}: {config.model!r} has no label {config.label!r}, but {', '.join(map(str, names))}")
