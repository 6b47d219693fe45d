"""Which sequence of which source a position of a run reads, and at which positions a sequence is read.

Nothing is drawn and nothing is remembered: both are computed from (seed, position), in the same time anywhere.

- A phase of the run gives each source an exact number of its positions (`quotas`) and spreads them evenly: source 0
  takes position p if round((p + 1) · q / n) > round(p · q / n), of what is left source 1 takes its part in the same
  way, and so on. Of any first p positions a source has its share to within one for each source before it.
- The r-th position of a source reads its sequence π(r mod pool), π being a permutation of the pool that is keyed by
  (seed, source, r div pool): each epoch is another order, and reads each sequence once.
- π is a Feistel network over Z_a × Z_b with modular additions (Black and Rogaway 2002, "Ciphers with arbitrary finite
  domains", the generalised Feistel cipher), with cycle walking over the few values of a·b past the pool's size.

The permutation is a loop of numba: as operations on whole arrays it took half of the time of a batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

ROUNDS = 8
MOST = 1 << 31  # positions of a run, so that a product of two counts fits 63 bits
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@njit(cache=True, nogil=True)
def _mixed(x):
    """The finaliser of SplitMix64: a bijection of 64-bit words in which every bit depends on every other."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(cache=True, nogil=True)
def _through(index, network, generation, backward):
    """`index` through a network (size, a, b, key), or backwards, until it is below the size; a·b is just above it."""
    size, a, b, key = network
    own = _mixed(key + np.uint64(generation) * GOLDEN)
    x = np.uint64(index)
    while True:
        left, right = x // b, x % b
        for turn in range(ROUNDS):
            number = ROUNDS - 1 - turn if backward else turn
            salt = own + np.uint64(number) * GOLDEN
            if number % 2 == 0:
                step = _mixed(right + salt) % a
                left = (left + (a - step if backward else step)) % a
            else:
                step = _mixed(left + salt) % b
                right = (right + (b - step if backward else step)) % b
        x = left * b + right
        if x < size:
            return np.int64(x)


@njit(cache=True, nogil=True)
def _all_through(index, network, generation, backward):
    out = np.empty(len(index), np.int64)
    for i in range(len(index)):
        out[i] = _through(index[i], network, generation[i], backward)
    return out


def _network(size: int, key: np.uint64) -> np.ndarray:
    """Size, sides and key, (4,) uint64."""
    a = math.isqrt(max(0, size - 1)) + 1
    return np.array([size, a, -(-size // a), key], np.uint64)


@njit(cache=True, nogil=True)
def _located(positions, firsts, ends, quotas, before, pools, epochs, caps):
    """Source and sequence of each position; `before[p, s]` are the positions of source s before phase p."""
    sources, sequences = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
    for i in range(len(positions)):
        phase = 0
        while ends[phase] <= positions[i]:
            phase += 1
        place, left = positions[i] - firsts[phase], ends[phase] - firsts[phase]
        for s in range(len(pools)):
            quota = quotas[phase, s]
            if quota == 0:
                continue
            taken = (place * quota + left // 2) // left
            if ((place + 1) * quota + left // 2) // left > taken:
                break
            place -= taken
            left -= quota
        rank = before[phase, s] + taken
        sequence = _through(rank % pools[s], epochs[s], rank // pools[s], False)
        if caps[s, 0] != epochs[s, 0]:
            sequence = _through(sequence, caps[s], 0, False)
        sources[i], sequences[i] = s, sequence
    return sources, sequences


def permute(index: np.ndarray, size: int, key: np.uint64, generation: np.ndarray | int = 0) -> np.ndarray:
    """Where a permutation of [0, size) sends `index`; `key` and `generation` (one an element, or one) name it."""
    return _all_through(index, _network(size, key), np.broadcast_to(np.asarray(generation), index.shape), False)


def unpermute(index: np.ndarray, size: int, key: np.uint64, generation: np.ndarray | int = 0) -> np.ndarray:
    """The inverse of `permute`."""
    return _all_through(index, _network(size, key), np.broadcast_to(np.asarray(generation), index.shape), True)


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
        self._arrays = (
            np.array([p.first for p in self.phases], np.int64),
            np.array([p.end for p in self.phases], np.int64),
            quotas,
            self.before,
            np.array(self.pools, np.int64),
            np.stack([_network(n, key) for n, key in zip(self.pools, self._epochs, strict=True)]),
            np.stack([_network(n, key) for n, key in zip(self.sizes, self._capped, strict=True)]),
        )

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
        return _located(positions, *self._arrays)

    def sequences(self, source: int, ranks: np.ndarray) -> np.ndarray:
        """The sequence that each of a source's positions reads, these counted from 0 over the run."""
        pool, size = self.pools[source], self.sizes[source]
        found = permute(ranks % pool, pool, self._epochs[source], ranks // pool)
        return found if pool == size else permute(found, size, self._capped[source])

    def positions(self, source: int, sequence: int) -> list[int]:
        """All positions of the run that read this sequence, ascending; its cost grows with the epochs alone."""
        pool, size, used = self.pools[source], self.sizes[source], self.used[source]
        one = np.array([sequence])
        place = one if pool == size else unpermute(one, size, self._capped[source])
        if not used or place[0] >= pool:
            return []
        epoch = np.arange(-(-used // pool))
        rank = epoch * pool + unpermute(np.broadcast_to(place, epoch.shape), pool, self._epochs[source], epoch)
        return sorted(self._position(source, int(r)) for r in rank if r < used)

    def _position(self, source: int, rank: int) -> int:
        """The position of a source's rank: what `_located` does backwards, in Python's whole numbers."""
        number = int(np.searchsorted(self.before[1:, source], rank, side="right"))
        phase = self.phases[number]
        lefts = [phase.end - phase.first - sum(phase.quotas[:s]) for s in range(source + 1)]
        taken, quota, left = rank - int(self.before[number, source]), phase.quotas[source], lefts[source]
        place = -(-((taken + 1) * left - left // 2) // quota) - 1
        for s in reversed(range(source)):
            if phase.quotas[s]:
                place = (place * lefts[s] + lefts[s] // 2) // (lefts[s] - phase.quotas[s])
        return phase.first + place
