"""From signatures to clusters: buckets give candidate pairs, shingles verify them, union-find joins them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

WHOLE_BUCKET = 32  # up to this many members every pair is compared; beyond, each with its bucket's first and neighbour


class Banding(Protocol):
    """The part of the configuration that this module needs."""

    @property
    def buckets(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def threshold(self) -> float: ...


@dataclass(frozen=True)
class Removal:
    """A document that goes, the one that stays for it, and why."""

    shard: int
    place: int
    kept_shard: int
    kept_place: int
    reason: str
    similarity: float


class UnionFind:
    """Disjoint sets whose representative is their least member."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def find(self, item: int) -> int:
        root = item
        while self.parent[root] != root:
            root = self.parent[root]
        while self.parent[item] != root:
            self.parent[item], item = root, self.parent[item]
        return root

    def join(self, a: int, b: int) -> None:
        low, high = sorted((self.find(a), self.find(b)))
        self.parent[high] = low


def find_duplicates(signatures: list[Path], config: Banding) -> list[Removal]:
    """Every document to remove, in order; exact duplicates first claim theirs, near ones are verified by shingles."""
    loaded = [dict(np.load(path)) for path in signatures]
    where = np.array([(s, p) for s, part in enumerate(loaded) for p in range(len(part["exact"]))]).reshape(-1, 2)
    exact = np.concatenate([part["exact"] for part in loaded]) if loaded else np.zeros((0, 2), np.uint64)
    minima = np.concatenate([part["minima"] for part in loaded]) if loaded else np.zeros((0, 1), np.uint64)
    shingles = [own for part in loaded for own in np.split(part["shingles"], part["ends"][:-1])[: len(part["ends"])]]
    sets = UnionFind(len(exact))
    for group in _groups(exact):
        for member in group[1:]:
            sets.join(int(group[0]), int(member))
    distinct = np.array([i for i in range(len(exact)) if sets.find(i) == i], dtype=np.int64)
    for a, b in sorted(candidates(minima, distinct, config)):
        if sets.find(a) != sets.find(b) and jaccard(shingles[a], shingles[b]) >= config.threshold:
            sets.join(a, b)
    removals = []
    for item in range(len(exact)):
        kept = sets.find(item)
        if kept != item:
            same = bool((exact[item] == exact[kept]).all())
            alike = 1.0 if same else round(jaccard(shingles[item], shingles[kept]), 4)
            (shard, place), (kept_shard, kept_place) = where[item].tolist(), where[kept].tolist()
            removals.append(Removal(shard, place, kept_shard, kept_place, "exact" if same else "near", alike))
    return removals


def candidates(minima: np.ndarray, members: np.ndarray, config: Banding) -> set[tuple[int, int]]:
    """Pairs of documents that agree in all rows of a bucket."""
    pairs: set[tuple[int, int]] = set()
    for bucket in range(config.buckets):
        band = np.ascontiguousarray(minima[members, bucket * config.rows : (bucket + 1) * config.rows])
        for group in _groups(band):
            own = members[group].tolist()
            if len(own) <= WHOLE_BUCKET:
                pairs |= {(a, b) for i, a in enumerate(own) for b in own[i + 1 :]}
            else:
                pairs |= {(own[0], b) for b in own[1:]} | set(itertools.pairwise(own))
    return pairs


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|a ∩ b| / |a ∪ b| of two sorted arrays of distinct hashes."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    union = len(a) + len(b) - common
    return common / union if union else 1.0


def _groups(rows: np.ndarray) -> list[np.ndarray]:
    """Indices of equal rows, in ascending order, for every row that occurs more than once."""
    if not len(rows):
        return []
    order = np.lexsort(rows.T[::-1])
    ordered = rows[order]
    new = np.ones(len(rows), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(1)
    starts = np.flatnonzero(new)
    return [np.sort(g) for g in np.split(order, starts[1:]) if len(g) > 1]
