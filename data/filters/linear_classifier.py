"""A linear classifier of texts over hashed word n-grams: its features, its scores, and how it is kept on disk.

Word n-grams are hashed into a table of weights (Weinberger et al. 2009), and a document's score is the logistic
function of their sum: what GPT-3 and fastText's classifiers do, without embeddings between.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from gristmill.data.documents import atomic
from gristmill.data.folded_words import codes, words_of

FORMAT = 1
WEIGHTS, ABOUT = "weights.safetensors", "classifier.json"


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
def margin_of(places, values, weights, bias):
    """Sum of the weights at `places` times `values`, float64 (n,), and the bias."""
    total = bias
    for i in range(len(places)):
        total += weights[places[i]] * values[i]
    return total


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
        return float(margin_of(*seen, self.weights, self.bias))

    def score(self, text: str) -> float:
        """The probability that a text is good, among texts as the examples were."""
        return logistic(self.slope * self.margin(text) + self.offset)

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


def logistic(x: float) -> float:
    """1 / (1 + exp(-x)), within float64's range for any x."""
    return 1 / (1 + math.exp(-max(-500.0, min(500.0, x))))
