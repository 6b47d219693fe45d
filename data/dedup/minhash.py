"""MinHash (Broder 1997): signatures of documents in one pass over their characters.

A document is its set of word n-grams. Its signature is the minima of rows × buckets permutations of 64-bit hashes (112
for 14 × 8); the minima of a bucket are hashed to one key, and documents that share a key are candidates. Row i of
bucket b permutes by x → mixᵢ(x) ⊕ cᵦ: both are bijections of the 64-bit numbers, so that each minimum is a fair draw
from the set, and eight mixes and 112 exclusive-ors a shingle vectorise where 112 multiplications of 64 bits do not
(AVX2 has none): 1.7 times as fast. The rows of a bucket are drawn with different mixes, the buckets of a row with one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numba
import numpy as np
import xxhash

from gristmill.data.dedup.words import (
    BLOCK,
    COUNT,
    GRAM_PRIME,
    MIX,
    STATE_SIZE,
    characters,
    normalised,
    pieces,
    scan,
    scan_ascii,
)

SEED = 20_240_605  # fixed for all time: an index is of use only to who draws the same permutations
LANES = 16  # shingles are padded to a multiple, which spares the loops their slow ends
MOST = np.int64(2**63 - 1)
LOW = np.uint64(0xFFFFFFFF)
NONE = np.empty(0, np.uint32)


class Signature(NamedTuple):
    """Of one document: the 128-bit hash of its normalised text, its buckets' keys (uint64), its n-grams (uint32).

    `shingles` holds the low halves of the hashes in the order of the text, repeated ones too: sorting them is left to
    whom a document is a candidate for, and most are for none.
    """

    exact: tuple[int, int]
    keys: np.ndarray
    shingles: np.ndarray


class Signatures(NamedTuple):
    """Of n documents: hashes uint64 (n, 2), buckets' keys uint64 (n, buckets), and n-grams uint32 with their ends."""

    exact: np.ndarray
    keys: np.ndarray
    shingles: np.ndarray
    ends: np.ndarray


class Signer:
    """Makes signatures; holds the scratch memory of one block of a text, a few hundred KiB whatever its length."""

    def __init__(self, ngram: int, buckets: int, rows: int) -> None:
        rng = np.random.Generator(np.random.PCG64(SEED))
        self.ngram = ngram
        self._mixers = rng.integers(-(2**63), 2**63, rows, dtype=np.int64) | np.int64(1)
        self._flips = rng.integers(-(2**63), 2**63, buckets, dtype=np.int64)
        self._characters = characters()
        self._state = np.zeros(STATE_SIZE, np.uint64)
        self._words = np.zeros(ngram + BLOCK + 2, np.uint64)
        self._grams = np.zeros(BLOCK + 2 + LANES, np.uint64)
        self._mixed = np.zeros(BLOCK + 2 + LANES, np.int64)
        self._text = np.zeros(4 * BLOCK + 2, np.uint8)
        self._minima = np.zeros((rows, buckets), np.int64)
        self._shingles = np.zeros(BLOCK + 2, np.uint32)
        self._scratch = (
            self._characters,
            ngram,
            self._state,
            self._words,
            self._grams,
            self._text,
            self._mixers,
            self._flips,
            self._mixed,
            self._minima,
            self._shingles,
        )

    def sign_all(self, texts: Sequence[str]) -> Signatures:
        """The signatures of some texts, each as if it were signed alone.

        Short ones in ASCII, which most are, share a call: alone, each would spend a third of its time on calls.
        """
        exact, keys = np.empty((len(texts), 2), np.uint64), np.empty((len(texts), self._minima.shape[1]), np.uint64)
        shingles = [NONE] * len(texts)
        short = [place for place, text in enumerate(texts) if len(text) <= BLOCK and text.isascii()]
        if short:
            exact[short], keys[short], made, ends = self._sign_short([texts[place] for place in short])
            if len(short) == len(texts) and np.diff(ends, prepend=0).all():
                return Signatures(exact, keys, made, ends)
            start = 0
            for place, end in zip(short, ends.tolist(), strict=True):
                shingles[place], start = made[start:end], end
        for place, text in enumerate(texts):
            if not len(shingles[place]):
                one = self.sign(text)
                exact[place], keys[place], shingles[place] = one.exact, one.keys, one.shingles
        ends = np.cumsum([len(own) for own in shingles], dtype=np.uint64)
        return Signatures(exact, keys, np.concatenate([NONE, *shingles]), ends)

    def _sign_short(self, texts: list[str]) -> Signatures:
        """Of ASCII texts of at most a block; with fewer words than n there is no n-gram, and the keys mean nothing."""
        units = np.frombuffer("".join(texts).encode(), np.uint8)
        sizes = np.array([len(text) for text in texts])
        keys, ends = np.empty((len(texts), self._minima.shape[1]), np.uint64), np.empty(len(texts), np.uint64)
        normal, normal_ends = np.empty(len(units) + 2, np.uint8), np.empty(len(texts), np.int64)
        shingles = np.empty(len(units) // 2 + 1 + len(texts), np.uint32)  # a word is a letter and a blank, but the last
        sign_short(
            units, sizes, self._characters, self.ngram, self._state, self._words, self._grams, self._mixers,
            self._flips, self._mixed, self._minima, normal, normal_ends, shingles, ends, keys,
        )  # fmt: skip
        view, bounds = normal.data, [0, *normal_ends.tolist()]
        digests = [xxhash.xxh3_128_digest(view[start:end]) for start, end in itertools.pairwise(bounds)]
        exact = np.frombuffer(b"".join(digests), ">u8").astype(np.uint64).reshape(-1, 2)
        return Signatures(exact, keys, shingles[: int(ends[-1])], ends)

    def sign(self, text: str) -> Signature:
        """The signature of one text, of any length."""
        keys = np.empty(self._minima.shape[1], np.uint64)
        self._state[:] = 0
        hasher = xxhash.xxh3_128()
        made: list[np.ndarray] = []
        for units, final in _blocks(text):
            sign_block = sign_ascii if units.dtype == np.uint8 else sign_any
            count, size = sign_block(units, final, *self._scratch, keys)
            hasher.update(self._text[:size].data)
            made.append(self._shingles[:count].copy())
        digest, shingles = hasher.intdigest(), np.concatenate(made)
        if not len(shingles):
            shingles = self._alone(digest, keys)
        return Signature((digest >> 64, digest & (2**64 - 1)), keys, shingles)

    def exact(self, text: str) -> tuple[int, int]:
        """The hash of a text's normalised form alone."""
        digest = xxhash.xxh3_128_intdigest(normalised(text).encode("utf-8", "surrogatepass"))
        return digest >> 64, digest & (2**64 - 1)

    def _alone(self, digest: int, keys: np.ndarray) -> np.ndarray:
        """The one shingle of a text of fewer words than n: all its words, or the text itself where it has none."""
        count = int(self._state[COUNT])
        if count:
            digest = xxhash.xxh3_64_intdigest(self._words[self.ngram - count : self.ngram].data)
        self._grams[0] = digest & (2**64 - 1)
        self._minima[:] = MOST
        lower_minima(self._grams, 1, self._mixers, self._flips, self._mixed, self._minima)
        bucket_keys(self._minima, keys)
        return self._grams[:1].astype(np.uint32)


def _blocks(text: str) -> Iterator[tuple[np.ndarray, bool]]:
    """A text's characters in blocks, and whether each is the last."""
    held = None
    for units in pieces(text):
        for start in range(0, max(1, len(units)), BLOCK):
            if held is not None:
                yield held, False
            held = units[start : start + BLOCK]
    if held is not None:
        yield held, True


@numba.njit(cache=True, nogil=True)
def sign_short(
    units, sizes, characters, ngram, state, words, grams, mixers, flips, mixed, minima, normal, normal_ends, shingles,
    ends, keys,
):  # fmt: skip
    """`sign_ascii` for the whole texts that lie in `units` one behind another, of these many characters.

    Their normalised forms go to `normal`, their n-grams to `shingles`, one behind another too.
    """
    start, size, made = 0, 0, 0
    for place in range(len(sizes)):
        end = start + sizes[place]
        state[:] = 0
        count, written = sign_ascii(
            units[start:end], True, characters, ngram, state, words, grams, normal[size:], mixers, flips, mixed,
            minima, shingles[made:], keys[place],
        )  # fmt: skip
        start, size, made = end, size + np.int64(written), made + count
        normal_ends[place], ends[place] = size, made


@numba.njit(cache=True, nogil=True)
def sign_ascii(
    units, final, characters, ngram, state, words, grams, text, mixers, flips, mixed, minima, shingles, keys
):
    """`scan_ascii`, and of its n-grams the minima and low halves; the keys after the last block.

    One call a block: what a document costs beside its characters is for the most part calls.
    """
    begins = state[COUNT] == 0
    made, size = scan_ascii(units, final, characters, ngram, state, words, grams, text)
    _take_in(made, final, begins, ngram, state, grams, mixers, flips, mixed, minima, shingles, keys)
    return made, size


@numba.njit(cache=True, nogil=True)
def sign_any(units, final, characters, ngram, state, words, grams, text, mixers, flips, mixed, minima, shingles, keys):
    """What `sign_ascii` does, for any characters."""
    begins = state[COUNT] == 0
    made, size = scan(units, final, characters, ngram, state, words, grams, text)
    _take_in(made, final, begins, ngram, state, grams, mixers, flips, mixed, minima, shingles, keys)
    return made, size


@numba.njit(cache=True, nogil=True)
def _take_in(made, final, begins, ngram, state, grams, mixers, flips, mixed, minima, shingles, keys):
    if begins:  # no word until now, and so no n-gram
        minima[:] = MOST
    for i in range(made):
        shingles[i] = np.uint32(grams[i] & LOW)
    if made:
        lower_minima(grams, made, mixers, flips, mixed, minima)
    if final:
        bucket_keys(minima, keys)


@numba.njit(cache=True, nogil=True)
def lower_minima(grams, count, mixers, flips, mixed, minima):
    """Take `count` shingle hashes into the minima, int64 (rows, buckets); `grams` and `mixed` have room to pad."""
    padded = (count + LANES - 1) // LANES * LANES
    for i in range(count, padded):
        grams[i] = grams[0]
    for row in range(len(mixers)):
        mixer = mixers[row]
        for i in range(padded):
            x = np.int64(grams[i]) * mixer
            x ^= (x >> np.int64(32)) & np.int64(0xFFFFFFFF)
            mixed[i] = x * mixer
        for bucket in range(len(flips)):
            flip = flips[bucket]
            least = minima[row, bucket]
            for i in range(padded):
                least = min(least, mixed[i] ^ flip)
            minima[row, bucket] = least


@numba.njit(cache=True, nogil=True)
def bucket_keys(minima, keys):
    """One 64-bit key a bucket of minima (rows, buckets), into `keys`."""
    rows, buckets = minima.shape
    for bucket in range(buckets):
        key = np.uint64(bucket + 1) * GRAM_PRIME
        for row in range(rows):
            key = (key ^ np.uint64(minima[row, bucket])) * MIX
            key ^= key >> np.uint64(32)
        keys[bucket] = key
