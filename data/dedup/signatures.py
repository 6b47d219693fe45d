"""MinHash signatures of documents: words, shingles, minima.

Words are hashed once each (a dictionary remembers them); shingles and minima are vectorised over a document, which
runs at tens of megabytes a second a core where a Python loop over shingles runs at a few tenths.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from gristmill.data.documents import read_rows

WORD = re.compile(r"\w+")
AT_ONCE = 4096  # shingles times permutations held at once


def normalised(text: str) -> str:
    """NFKC, lower case, white space as single blanks: what "exactly equal" means here."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


@dataclass(frozen=True)
class MinHash:
    """Shingles of `ngram` words, and `buckets` × `rows` minima of 64-bit hashes (Broder 1997)."""

    ngram: int
    buckets: int
    rows: int

    @cached_property
    def permutations(self) -> tuple[np.ndarray, np.ndarray]:
        """Odd multipliers and offsets of the hash functions, fixed for all time."""
        rng = np.random.Generator(np.random.PCG64(20_240_605))
        count = self.buckets * self.rows
        multiplier = rng.integers(0, 2**64, count, dtype=np.uint64) | np.uint64(1)
        return multiplier, rng.integers(0, 2**64, count, dtype=np.uint64)

    def shingles(self, text: str, known: dict[str, int]) -> np.ndarray:
        """Sorted distinct 64-bit hashes of a normalised text's word n-grams; a shorter text is one shingle."""
        words = WORD.findall(text)
        hashes = np.array([_word_hash(w, known) for w in words], dtype=np.uint64)
        if len(hashes) < self.ngram:
            return np.array([xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))], dtype=np.uint64)
        count = len(hashes) - self.ngram + 1
        mixed = np.zeros(count, dtype=np.uint64)
        for place in range(self.ngram):
            mixed = _mix(mixed * np.uint64(0x9E3779B97F4A7C15) + hashes[place : place + count])
        return np.unique(mixed)

    def minima(self, shingles: np.ndarray) -> np.ndarray:
        """The signature, uint64 (buckets · rows)."""
        multiplier, offset = self.permutations
        least = np.full(len(multiplier), np.iinfo(np.uint64).max, dtype=np.uint64)
        for start in range(0, len(shingles), AT_ONCE):
            part = shingles[start : start + AT_ONCE, None]
            np.minimum(least, _mix(part * multiplier + offset).min(0), out=least)
        return least


def _word_hash(word: str, known: dict[str, int]) -> int:
    found = known.get(word)
    if found is None:
        found = known[word] = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
    return found


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3: every bit of the input moves every bit of the output."""
    x = x ^ (x >> np.uint64(33))
    x = x * np.uint64(0xFF51AFD7ED558CCD)
    return x ^ (x >> np.uint64(33))


def write_signatures(shard: Path, result: Path, minhash: MinHash) -> None:
    """Signatures, shingles and exact hashes of a shard's documents, as one .npz."""
    known: dict[str, int] = {}
    exact, minima, shingles = [], [], []
    for row in read_rows(shard):
        text = normalised(row["text"])
        exact.append(np.frombuffer(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16], np.uint64))
        own = minhash.shingles(text, known)
        shingles.append(own)
        minima.append(minhash.minima(own))
    width = minhash.buckets * minhash.rows
    result.parent.mkdir(parents=True, exist_ok=True)
    part = result.with_name(f"{result.name}.tmp")
    with part.open("wb") as file:
        np.savez(
            file,
            exact=np.array(exact, dtype=np.uint64).reshape(-1, 2),
            minima=np.array(minima, dtype=np.uint64).reshape(-1, width),
            shingles=np.concatenate(shingles) if shingles else np.zeros(0, np.uint64),
            ends=np.cumsum([len(s) for s in shingles], dtype=np.int64),
        )
    os.replace(part, result)
