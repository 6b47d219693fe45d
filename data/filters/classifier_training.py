"""Training of the quality classifier on examples, so that the same examples give the same bits.

A stochastic gradient descent with one step size a weight (Duchi et al. 2011), in an order that is fixed, in one thread.
Of the examples 70 % train, 15 % calibrate the scores as probabilities (Platt 1999), and 15 % that neither saw give the
figures of the report; which, a hash of the text says, so that copies never part.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numba import njit
from pydantic import Field

from gristmill.data.config import Config
from gristmill.data.filters.calibration import auc, calibration_error, deciles, platt
from gristmill.data.filters.linear_classifier import Classifier, features_of, logistic, margin_of
from gristmill.data.row_files import JSON_LINES, files_of, open_packed, read_objects, sha256_of

LEAST_EXAMPLES = 20  # of each kind


class TrainingConfig(Config):
    """Examples of good and of bad documents, and how a classifier is trained on them."""

    positive: list[str] = Field(
        default=[],
        title="Good examples",
        description="Files, folders or patterns: each row of JSONL (.gz, .zst) and Parquet is a document, each other "
        "file is one.",
    )
    negative: list[str] = Field(default=[], title="Bad examples", description="As the good ones.")
    text_field: str = Field(default="text", title="Text field", description="Column of a row with the text.")
    ngram: int = Field(default=2, ge=1, le=5, title="n-gram", description="Words of the longest feature.")
    bits: int = Field(default=20, ge=8, le=26, title="Bits", description="2^bits weights of four bytes.")
    epochs: int = Field(default=20, ge=1, le=100, title="Epochs", description="Passes over the training examples.")
    learning_rate: float = Field(
        default=0.05, gt=0, le=10, title="Learning rate", description="First step of a weight."
    )
    l2: float = Field(default=1e-6, ge=0, le=1, title="L2", description="Pull of a weight towards 0.")
    most_examples: int = Field(
        default=10_000, ge=LEAST_EXAMPLES, title="Most examples", description="Of each kind; a fair draw of more."
    )
    most_characters: int = Field(
        default=20_000, ge=100, title="Characters seen", description="Of a document, from its beginning."
    )


@njit(cache=True)
def _descend(order, starts, places, values, labels, weights, squares, rate, l2, bias):
    """One pass over the examples in an order; changes `weights` and their sums of squared gradients; the bias."""
    bias_squares = 1.0
    for example in order:
        low, high = starts[example], starts[example + 1]
        margin = margin_of(places[low:high], values[low:high], weights, bias)
        error = 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, margin)))) - labels[example]
        for i in range(low, high):
            gradient = error * values[i] + l2 * weights[places[i]]
            squares[places[i]] += gradient * gradient
            weights[places[i]] -= rate * gradient / math.sqrt(squares[places[i]] + 1e-8)
        bias_squares += error * error
        bias -= rate * error / math.sqrt(bias_squares)
    return bias


@dataclass(frozen=True)
class _Examples:
    """Features of examples, one after the other: those of example i are places[starts[i] : starts[i + 1]]."""

    starts: np.ndarray
    places: np.ndarray
    values: np.ndarray
    labels: np.ndarray
    parts: np.ndarray  # 0 trains, 1 calibrates, 2 is reported on

    def without_rare(self) -> Self:
        """These without the n-grams of one training example alone: they would be learnt by heart."""
        of = np.repeat(np.arange(len(self.labels)), np.diff(self.starts))
        seen = np.bincount(self.places[self.parts[of] == 0], minlength=int(self.places.max()) + 1)
        kept = seen[self.places] > 1
        starts = np.concatenate([[0], np.cumsum(np.bincount(of[kept], minlength=len(self.labels)))])
        return replace(self, starts=starts, places=self.places[kept], values=self.values[kept])

    def margins(self, which: int, weights: np.ndarray, bias: float) -> tuple[np.ndarray, np.ndarray]:
        """Margins and labels of one part."""
        chosen = np.flatnonzero(self.parts == which)
        spans = ((self.starts[i], self.starts[i + 1]) for i in chosen)
        margins = [margin_of(self.places[a:b], self.values[a:b], weights, bias) for a, b in spans]
        return np.array(margins, np.float64), self.labels[chosen]


def train(config: TrainingConfig) -> Classifier:
    """Train, calibrate and measure a classifier on the examples that a configuration names.

    Raises:
        ValueError: examples cannot be read, or are too few.
    """
    for which, paths in (("good", config.positive), ("bad", config.negative)):
        if not paths:
            raise ValueError(f"quality: no {which} examples are named: give positive and negative ones")
    texts = {label: _drawn(config, paths) for label, paths in ((1, config.positive), (0, config.negative))}
    both = set(texts[0]) & set(texts[1])
    examples = _featured(config, texts)
    weights, squares = np.zeros(1 << config.bits, np.float64), np.zeros(1 << config.bits, np.float64)
    training, bias = np.flatnonzero(examples.parts == 0), 0.0
    examples = examples.without_rare()
    rng = np.random.Generator(np.random.PCG64(20_241_125))
    for _ in range(config.epochs):
        order = rng.permutation(training)
        bias = _descend(
            order,
            examples.starts,
            examples.places,
            examples.values,
            examples.labels,
            weights,
            squares,
            config.learning_rate,
            config.l2,
            bias,
        )
    weights = weights.astype(np.float32)
    slope, offset = platt(*examples.margins(1, weights, bias))
    margins, labels = examples.margins(2, weights, bias)
    scores = np.array([logistic(slope * m + offset) for m in margins])
    report = {
        "examples": {"positive": len(texts[1]), "negative": len(texts[0]), "in_both": len(both)},
        "held_out": {"positive": int(labels.sum()), "negative": int((1 - labels).sum())},
        "auc": round(auc(margins, labels), 6),
        "calibration_error": round(calibration_error(scores, labels), 6),
        "deciles": deciles(scores, labels),
    }
    made = config.model_dump(include={"ngram", "bits", "epochs", "learning_rate", "l2", "most_characters"})
    files = files_of([*config.positive, *config.negative], "quality")
    digest = hashlib.sha256("".join(sorted(map(sha256_of, files))).encode()).hexdigest()
    about = {"config": made, "report": report, "examples_sha256": digest}
    return Classifier(weights, float(bias), slope, offset, about)


def train_classifier(config: TrainingConfig, out: Path) -> dict[str, Any]:
    """Train a classifier into the folder `out`, to be named as `model` elsewhere; its report."""
    classifier = train(config)
    classifier.save(out)
    return classifier.about["report"]


def _drawn(config: TrainingConfig, paths: Sequence[str]) -> list[str]:
    """Different texts of some files, in the order of their hashes: a draw that no order of files changes."""
    held: dict[bytes, str] = {}
    heap: list[tuple[int, bytes]] = []  # those held, the greatest hash first
    for text in _texts(config, paths):
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        if digest in held:
            continue
        held[digest] = text
        heapq.heappush(heap, (-int.from_bytes(digest), digest))
        if len(heap) > config.most_examples:
            del held[heapq.heappop(heap)[1]]
    if len(held) < LEAST_EXAMPLES:
        raise ValueError(
            f"quality: {', '.join(paths)} hold {len(held)} different texts, where {LEAST_EXAMPLES} are the least that "
            f"a classifier can be trained and measured with: give more"
        )
    return [text for _, text in sorted(held.items())]


def _texts(config: TrainingConfig, paths: Sequence[str]) -> Iterator[str]:
    for file in files_of(paths, "quality"):
        if file.name.endswith(JSON_LINES) or file.suffix == ".parquet":
            for number, row in read_objects(file, "quality"):
                text = row.get(config.text_field)
                if not isinstance(text, str):
                    raise ValueError(f"quality: {file}, row {number}, has no text in {config.text_field!r}: mend it")
                yield text[: config.most_characters]
            continue
        with open_packed(file) as raw:
            data = raw.read(4 * config.most_characters)
        yield data.decode("utf-8", "replace")[: config.most_characters]


def _featured(config: TrainingConfig, texts: dict[int, list[str]]) -> _Examples:
    found, labels, parts = [], [], []
    for label, own in sorted(texts.items()):
        for text in own:
            found.append(features_of(text, config.ngram, config.bits))
            labels.append(label)
            draw = hashlib.sha256(b"part" + text.encode("utf-8", "surrogatepass")).digest()[0]
            parts.append(0 if draw < 179 else 1 if draw < 218 else 2)  # 70, 15 and 15 of a hundred
    if not any(len(places) for places, _ in found):
        raise ValueError("quality: there is no word in any example: correct positive and negative, or text_field")
    labels, parts = np.array(labels, np.float64), np.array(parts)
    for label in (0, 1):  # of few examples a part might get none
        for part in range(3):
            if not ((labels == label) & (parts == part)).any():
                parts[np.flatnonzero(labels == label)[part::3]] = part
    return _Examples(
        starts=np.cumsum([0, *(len(places) for places, _ in found)]),
        places=np.concatenate([places for places, _ in found]),
        values=np.concatenate([values for _, values in found]),
        labels=labels,
        parts=parts,
    )
