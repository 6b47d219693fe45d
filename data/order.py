"""Which sequence of which source a position of a run reads, and at which positions a sequence is read.

Nothing is drawn and nothing is remembered: both are computed from (seed, position), in the same time anywhere.

- A phase of the run gives each source an exact number of its positions (`quotas`) and spreads them evenly: source 0
  takes position p if round((p + 1) · q / n) > round(p · q / n), of what is left source 1 takes its part in the same
  way, and so on. Of any first p positions a source has its share to within one for each source before it.
- The r-th position of a source reads its sequence π(r mod pool), π being a permutation of the pool that is keyed by
  (seed, source, r div pool): each epoch is another order, and reads each sequence once.
- π is a Feistel network over Z_a × Z_b with modular additions (Black and Rogaway 2002, "Ciphers with arbitrary finite
  domains", the generalised Feistel cipher), with cycle walking over the few values of a·b past the pool's size.

numpy and the standard library alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROUNDS = 8
MOST = 1 << 31  # positions of a run, so that a product of two counts fits 63 bits
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: a bijection of 64-bit words in which every bit depends on every other."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _sides(size: int) -> tuple[np.uint64, np.uint64]:
    """a and b, about equal, with size ≤ a·b < size + a."""
    a = math.isqrt(max(0, size - 1)) + 1
    return np.uint64(a), np.uint64(-(-size // a))


def _forward(x: np.ndarray, key: np.ndarray, a: np.uint64, b: np.uint64) -> np.ndarray:
    left, right = x // b, x % b
    for number in range(ROUNDS):
        if number % 2 == 0:
            left = (left + _mixed(right + key + np.uint64(number) * GOLDEN) % a) % a
        else:
            right = (right + _mixed(left + key + np.uint64(number) * GOLDEN) % b) % b
    return left * b + right


def _backward(x: np.ndarray, key: np.ndarray, a: np.uint64, b: np.uint64) -> np.ndarray:
    left, right = x // b, x % b
    for number in reversed(range(ROUNDS)):
        if number % 2 == 0:
            left = (left + a - _mixed(right + key + np.uint64(number) * GOLDEN) % a) % a
        else:
            right = (right + b - _mixed(left + key + np.uint64(number) * GOLDEN) % b) % b
    return left * b + right


def _walk(step, index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    a, b = _sides(size)
    with np.errstate(over="ignore"):
        x = step(index.astype(np.uint64), key, a, b)
        outside = np.flatnonzero(x >= size)
        while len(outside):
            x[outside] = step(x[outside], key[outside], a, b)
            outside = outside[x[outside] >= size]
    return x.astype(np.int64)


def permute(index: np.ndarray, size: int, key: np.ndarray | np.uint64) -> np.ndarray:
    """Where the permutation of [0, size) that `key` (uint64, one an element or one for all) names sends `index`."""
    return _walk(_forward, index, size, np.broadcast_to(np.asarray(key, np.uint64), index.shape))


def unpermute(index: np.ndarray, size: int, key: np.ndarray | np.uint64) -> np.ndarray:
    """The inverse of `permute`."""
    return _walk(_backward, index, size, np.broadcast_to(np.asarray(key, np.uint64), index.shape))


def key_of(*parts: int | str) -> np.uint64:
    """A 64-bit key that is a pure function of `parts`."""
    return np.uint64(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little"))


@dataclass(frozen=True)
class Phase:
    """Positions [first, end) of the run, `quotas[s]` of them for source s."""

    first: int
    end: int
    quotas: tuple[int, ...]


class Order:
    """The order of a run.

    Args:
        sources: names, which enter the keys.
        sizes: sequences that each source has.
        pools: of these the run uses so many (a cap): the first of a permutation that all epochs share.
        phases: one after the other from position 0 on.

    Raises:
        ValueError: phases that do not join, quotas that do not fill them, a source without sequences, a run too long.
    """

    def __init__(
        self, seed: int, sources: Sequence[str], sizes: Sequence[int], pools: Sequence[int], phases: Sequence[Phase]
    ) -> None:
        self.sources, self.sizes, self.pools, self.phases = list(sources), list(sizes), list(pools), list(phases)
        self.total = self.phases[-1].end if self.phases else 0
        self._capped = [key_of(seed, "cap", name) for name in sources]
        self._epochs = [key_of(seed, "epoch", name) for name in sources]
        quotas = np.array([p.quotas for p in self.phases], dtype=np.int64).reshape(len(self.phases), len(self.sources))
        self.before = np.vstack([np.zeros(len(self.sources), np.int64), np.cumsum(quotas, axis=0)])
        self._check()

    def _check(self) -> None:
        at = 0
        for phase in self.phases:
            if phase.first != at or phase.end < at or sum(phase.quotas) != phase.end - at or min(phase.quotas) < 0:
                raise ValueError(f"the phase {phase} does not follow position {at}, or its quotas do not fill it")
            at = phase.end
        if at > MOST:
            raise ValueError(f"a run of {at} sequences is longer than {MOST}: make the sequences longer")
        for name, size, pool, used in zip(self.sources, self.sizes, self.pools, self.used, strict=True):
            if not 0 <= pool <= size or (used and not pool):
                raise ValueError(f"source {name!r} has {size} sequences, a pool of {pool}, and {used} are asked for")

    @property
    def used(self) -> list[int]:
        """Positions of each source in the whole run."""
        return [int(n) for n in self.before[-1]]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and sequence of each position, int64.

        Raises:
            ValueError: a position lies outside the run.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if len(positions) and not 0 <= positions.min() <= positions.max() < self.total:
            raise ValueError(
                f"position {positions.min()} or {positions.max()} was asked for, and the run has {self.total}: "
                f"mix again with more sequences"
            )
        source, rank = np.empty_like(positions), np.empty_like(positions)
        ends = np.array([p.end for p in self.phases])
        which = np.searchsorted(ends, positions, side="right")
        for number in np.unique(which):
            mine = np.flatnonzero(which == number)
            source[mine], rank[mine] = self._in_phase(int(number), positions[mine])
        sequence = np.empty_like(positions)
        for s in np.unique(source):
            mine = np.flatnonzero(source == s)
            sequence[mine] = self.sequences(int(s), rank[mine])
        return source, sequence

    def _in_phase(self, number: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        phase, source, rank = self.phases[number], np.empty_like(positions), np.empty_like(positions)
        place, left, where = positions - phase.first, phase.end - phase.first, np.arange(len(positions))
        for s, quota in enumerate(phase.quotas):
            if not quota:
                continue
            taken = (place * quota + left // 2) // left
            takes = ((place + 1) * quota + left // 2) // left > taken
            source[where[takes]], rank[where[takes]] = s, self.before[number, s] + taken[takes]
            place, where, left = (place - taken)[~takes], where[~takes], left - quota
            if not len(where):
                break
        return source, rank

    def sequences(self, source: int, ranks: np.ndarray) -> np.ndarray:
        """The sequence that each of a source's positions reads, these counted from 0 over the run."""
        pool, size = self.pools[source], self.sizes[source]
        found = permute(ranks % pool, pool, self._keys(source, ranks // pool))
        return found if pool == size else permute(found, size, self._capped[source])

    def _keys(self, source: int, epoch: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return _mixed(self._epochs[source] + epoch.astype(np.uint64) * GOLDEN)

    def positions(self, source: int, sequence: int) -> list[int]:
        """All positions of the run that read this sequence, ascending; its cost grows with the epochs alone."""
        pool, size, used = self.pools[source], self.sizes[source], self.used[source]
        one = np.array([sequence])
        place = one if pool == size else unpermute(one, size, self._capped[source])
        if not used or place[0] >= pool:
            return []
        epoch = np.arange(-(-used // pool))
        rank = epoch * pool + unpermute(np.broadcast_to(place, epoch.shape), pool, self._keys(source, epoch))
        return sorted(self._position(source, int(r)) for r in rank if r < used)

    def _position(self, source: int, rank: int) -> int:
        """The position of a source's rank: `_in_phase` backwards, in Python's whole numbers."""
        number = int(np.searchsorted(self.before[1:, source], rank, side="right"))
        phase = self.phases[number]
        lefts = [phase.end - phase.first - sum(phase.quotas[:s]) for s in range(source + 1)]
        taken, quota, left = rank - int(self.before[number, source]), phase.quotas[source], lefts[source]
        place = -(-((taken + 1) * left - left // 2) // quota) - 1
        for s in reversed(range(source)):
            if phase.quotas[s]:
                place = (place * lefts[s] + lefts[s] // 2) // (lefts[s] - phase.quotas[s])
        return phase.first + place
