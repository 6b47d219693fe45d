"""A quality classifier that a user trains on examples of good and of bad documents, and the rule that applies it.

Word n-grams are hashed into a table of weights (Weinberger et al. 2009), and a document's score is the logistic
function of their sum: what GPT-3 and fastText's classifiers do, without embeddings between. Training is a stochastic
gradient descent with one step size a weight (Duchi et al. 2011) in an order that is fixed, in one thread: the same
examples give the same bits. Of the examples 70 % train, 15 % calibrate the scores as probabilities (Platt 1999), and
15 % that neither saw give the figures of the report; which, a hash of the text says, so that copies never part.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numba import njit
from pydantic import Field, model_validator

from gristmill.data.documents import atomic, read_rows
from gristmill.data.filters.rule import Prepared, Rule, RuleConfig
from gristmill.data.folded_words import codes, words_of
from gristmill.data.row_files import JSON_LINES, files_of, open_packed, read_objects, sha256_of
from gristmill.data.sieve import Verdict, remove

FORMAT = 1
LEAST_EXAMPLES = 20  # of each kind
SAMPLED_SHARDS, SAMPLED_OF_A_SHARD = 100, 200  # documents by which a share is turned into a threshold
BINS = 10  # of the calibration error
WEIGHTS, ABOUT = "weights.safetensors", "classifier.json"


class QualityConfig(RuleConfig):
    """A classifier by its examples, or one trained before, and which scores stay."""

    positive: list[str] = Field(
        default=[],
        title="Good examples",
        description="Files, folders or patterns: each row of JSONL (.gz, .zst) and Parquet is a document, each other "
        "file is one.",
    )
    negative: list[str] = Field(default=[], title="Bad examples", description="As the good ones.")
    text_field: str = Field(default="text", title="Text field", description="Column of a row with the text.")
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
    """The classifier that a configuration asks for; trained once a process for the same files."""
    if config.model:
        return Classifier.load(Path(config.model))
    what = {"least_score": None, "keep_share": None}
    return _trained(config.model_copy(update=what).model_dump_json(), tuple(map(_stamp, rule_files(config))))


def _stamp(file: str) -> tuple[str, int, int]:
    return file, Path(file).stat().st_size, Path(file).stat().st_mtime_ns


@lru_cache(maxsize=4)
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


@njit(cache=True)
def _shape(points, end, start, stop):
    """What folding took away: whether a word begins with a capital, and the first mark that follows it, if any."""
    capital = 65 <= points[start] <= 90
    mark = np.uint64(0)
    for at in range(end, min(stop, end + 8)):
        if points[at] > 32:
            mark = np.uint64(points[at])
            break
    return mark * np.uint64(2) + np.uint64(capital)


@njit(cache=True)
def _features(points, words, starts, ends, ngram, bits):
    """(places, values) of a document: places of its n-grams in the table, in order; ln(1 + count), of length 1.

    Single words are folded; in longer runs each goes with its capital and the mark after it.
    """
    mask = np.uint64((1 << bits) - 1)
    count = len(words)
    found = np.empty(count * ngram, np.int64)
    shapes = np.empty(count, np.uint64)
    for i in range(count):
        shapes[i] = _shape(points, ends[i], starts[i], starts[i + 1] if i + 1 < count else len(points))
    size = 0
    for first in range(count):
        key = np.uint64(0)
        for i in range(min(ngram, count - first)):
            if i == 1:
                key ^= shapes[first]
            key = (key ^ words[first + i] ^ (shapes[first + i] if i else np.uint64(0))) * np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(29)
            found[size] = np.int64((key * np.uint64(0xFF51AFD7ED558CCD) >> np.uint64(32)) & mask)
            size += 1
    found = np.sort(found[:size])
    places, values = np.empty(size, np.int64), np.empty(size, np.float64)
    distinct, at, squares = 0, 0, 0.0
    while at < size:
        end = at
        while end < size and found[end] == found[at]:
            end += 1
        places[distinct], values[distinct] = found[at], math.log(1.0 + (end - at))
        squares += values[distinct] ** 2
        distinct, at = distinct + 1, end
    return places[:distinct], values[:distinct] / math.sqrt(max(squares, 1e-30))


def features_of(text: str, ngram: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Places in a table of 2^bits weights, int64, and values, float64, of a text's word n-grams."""
    points = codes(text).astype(np.uint32)  # one type, one compilation
    return _features(points, *words_of(text), ngram, bits)


@njit(cache=True)
def _margin(places, values, weights, bias):
    total = bias
    for i in range(len(places)):
        total += weights[places[i]] * values[i]
    return total


@njit(cache=True)
def _descend(order, starts, places, values, labels, weights, squares, rate, l2, bias):
    """One pass over the examples in an order; changes `weights` and their sums of squared gradients; the bias."""
    bias_squares = 1.0
    for example in order:
        low, high = starts[example], starts[example + 1]
        margin = _margin(places[low:high], values[low:high], weights, bias)
        error = 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, margin)))) - labels[example]
        for i in range(low, high):
            gradient = error * values[i] + l2 * weights[places[i]]
            squares[places[i]] += gradient * gradient
            weights[places[i]] -= rate * gradient / math.sqrt(squares[places[i]] + 1e-8)
        bias_squares += error * error
        bias -= rate * error / math.sqrt(bias_squares)
    return bias


@dataclass(frozen=True)
class Classifier:
    """A trained classifier.

    Attributes:
        weights: float32 (2^bits,).
        bias: added to the weighted sum.
        slope, offset: of Platt's calibration: probability = 1 / (1 + exp(-(slope · margin + offset))).
        about: the configuration it was trained with, and the report.
    """

    weights: np.ndarray
    bias: float
    slope: float
    offset: float
    about: dict[str, Any]

    def margin(self, text: str) -> float:
        """The weighted sum of a text's features: above 0 where it looks good."""
        made = self.about["config"]
        seen = features_of(text[: made["most_characters"]], made["ngram"], made["bits"])
        return float(_margin(*seen, self.weights, self.bias))

    def score(self, text: str) -> float:
        """The probability that a text is good, among texts as the examples were."""
        return _logistic(self.slope * self.margin(text) + self.offset)

    def save(self, folder: Path) -> None:
        """Write the weights and what they mean, the latter last."""
        from safetensors.numpy import save

        folder.mkdir(parents=True, exist_ok=True)
        with atomic(folder / WEIGHTS) as part:
            part.write_bytes(save({"weights": self.weights}))
        rest = {"format": FORMAT, "bias": self.bias, "slope": self.slope, "offset": self.offset, **self.about}
        with atomic(folder / ABOUT) as part:
            part.write_text(json.dumps(rest, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Classifier:
        """Read what `save` wrote.

        Raises:
            ValueError: it is not there, damaged, or of another format.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            if about.pop("format", None) != FORMAT:
                raise ValueError(f"{folder / ABOUT} has another format than {FORMAT}: train the classifier again")
            weights = load((folder / WEIGHTS).read_bytes())["weights"]
            bias, slope, offset = (float(about.pop(name)) for name in ("bias", "slope", "offset"))
            own = cls(weights, bias, slope, offset, about)
            if weights.shape != (1 << about["config"]["bits"],) or weights.dtype != np.float32:
                raise ValueError(f"{folder / WEIGHTS} does not fit {ABOUT}: train the classifier again")
        except (OSError, KeyError, json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(f"quality: {folder} holds no whole classifier ({error}): train it again") from error
        return own


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
        margins = [_margin(self.places[a:b], self.values[a:b], weights, bias) for a, b in spans]
        return np.array(margins, np.float64), self.labels[chosen]


def train(config: QualityConfig) -> Classifier:
    """Train, calibrate and measure a classifier.

    Raises:
        ValueError: examples cannot be read, or are too few.
    """
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
    scores = np.array([_logistic(slope * m + offset) for m in margins])
    report = {
        "examples": {"positive": len(texts[1]), "negative": len(texts[0]), "in_both": len(both)},
        "held_out": {"positive": int(labels.sum()), "negative": int((1 - labels).sum())},
        "auc": round(auc(margins, labels), 6),
        "calibration_error": round(calibration_error(scores, labels), 6),
        "deciles": deciles(scores, labels),
    }
    made = config.model_dump(include={"ngram", "bits", "epochs", "learning_rate", "l2", "most_characters"})
    digest = hashlib.sha256("".join(sorted(sha256_of(Path(f)) for f in rule_files(config))).encode()).hexdigest()
    about = {"config": made, "report": report, "examples_sha256": digest}
    return Classifier(weights, float(bias), slope, offset, about)


def train_classifier(config: QualityConfig, out: Path) -> dict[str, Any]:
    """Train a classifier into the folder `out`, to be named as `model` elsewhere; its report."""
    classifier = train(config)
    classifier.save(out)
    return classifier.about["report"]


def _drawn(config: QualityConfig, paths: Sequence[str]) -> list[str]:
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


def _texts(config: QualityConfig, paths: Sequence[str]) -> Iterator[str]:
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


def _featured(config: QualityConfig, texts: dict[int, list[str]]) -> _Examples:
    found, labels, parts = [], [], []
    for label, own in sorted(texts.items()):
        for text in own:
            found.append(features_of(text, config.ngram, config.bits))
            labels.append(label)
            draw = hashlib.sha256(b"part" + text.encode("utf-8", "surrogatepass")).digest()[0]
            parts.append(0 if draw < 179 else 1 if draw < 218 else 2)  # 70, 15 and 15 of a hundred
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


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-max(-500.0, min(500.0, x))))


def platt(margins: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Slope and offset of the logistic function that makes probabilities of margins, by Newton's method.

    Targets are drawn in from 0 and 1 as in Platt 1999, so that examples without an error give no infinite slope.
    """
    good, bad = float(labels.sum()), float((1 - labels).sum())
    targets = np.where(labels > 0, (good + 1) / (good + 2), 1 / (bad + 2))
    scale = float(np.abs(margins).mean()) or 1.0  # margins near 1 keep the matrix well conditioned
    design = np.stack([margins / scale, np.ones_like(margins)], axis=1)
    found = np.array([1.0, 0.0])

    def loss(at: np.ndarray) -> float:
        return float(np.sum(np.logaddexp(0, design @ at) - targets * (design @ at)))

    for _ in range(100):
        chance = 1 / (1 + np.exp(-np.clip(design @ found, -500, 500)))
        gradient = design.T @ (chance - targets)
        if np.abs(gradient).max() < 1e-10 * len(labels):
            break
        curvature = (design * (chance * (1 - chance))[:, None]).T @ design + 1e-10 * np.eye(2)
        step, size = np.linalg.solve(curvature, gradient), 1.0
        while loss(found - size * step) > loss(found) and size > 1e-6:
            size /= 2
        found = found - size * step
    return float(found[0]) / scale, float(found[1])


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The chance that a good example scores above a bad one, ties half: by ranks (Mann and Whitney 1947)."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    good = float(labels.sum())
    bad = len(labels) - good
    return float((ranks[labels > 0].sum() - good * (good + 1) / 2) / (good * bad))


def calibration_error(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean distance between score and share of good ones, over bins of equal width by their sizes (Naeini 2015)."""
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    parts = [bins == b for b in range(BINS) if (bins == b).any()]
    return float(sum(p.mean() * abs(scores[p].mean() - labels[p].mean()) for p in parts))


def deciles(scores: np.ndarray, labels: np.ndarray) -> list[dict[str, float]]:
    """Rows for a card: of each tenth of the scores, lowest first, its bounds and the share of good ones."""
    order = np.argsort(scores, kind="stable")
    tenths = [part for part in np.array_split(order, 10) if len(part)]
    return [
        {
            "from": round(float(scores[p].min()), 4),
            "to": round(float(scores[p].max()), 4),
            "examples": len(p),
            "good": round(float(labels[p].mean()), 4),
        }
        for p in tenths
    ]
