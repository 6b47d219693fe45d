"""Third step, a task a part: what becomes of each of its documents.

A document goes if a better-ranked one, kept or not, equals it, has its URL, or shares a bucket with it and at least
`threshold` of their n-grams (Jaccard, of the whole sets). The reason is the first of these that holds, and
`duplicate_of` the best-ranked document it holds for. So the fate of a document depends on the set of all documents and
their order, and not on when which of them was looked at.

`<part>.decided` holds arrays of the removed, by place: `places` (uint32), `reasons` (uint8), `of` (numbers, uint64),
`similarities` (float32), and `ids` with `id_ends` of what they are duplicates of; `named`, the distinct `of`;
`pair_places` and `pair_of`, the near pairs of this run that are least alike. `<part>.fate` in the index holds
`removed` (uint8), by place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np

from gristmill.data.dedup.arrays import Arrays, write_arrays
from gristmill.data.dedup.config import DedupConfig
from gristmill.data.dedup.parts import Part, Parts

REASONS = ("", "exact", "url", "near")
EXACT, URL, NEAR = 1, 2, 3
PAIRS = 20  # least alike near duplicates for people to look at
COMPARISONS = 1 << 19  # candidates held at a time
SHINGLES = 1 << 24  # n-gram hashes held at a time: 64 MB


@dataclass
class Fates:
    """Of each document of a part, the reason why it goes (0: it stays), for which one, and how alike they are."""

    reasons: np.ndarray
    of: np.ndarray
    similarities: np.ndarray

    @classmethod
    def undecided(cls, count: int) -> Fates:
        """All stay."""
        return cls(np.zeros(count, np.uint8), np.zeros(count, np.uint64), np.zeros(count, np.float32))

    def remove(self, places: np.ndarray, reason: int, of: np.ndarray, similarities: np.ndarray | None = None) -> None:
        """Those of the places that stay until now go."""
        new = self.reasons[places] == 0
        places = places[new]
        self.reasons[places], self.of[places] = reason, of[new]
        self.similarities[places] = 1 if similarities is None else similarities[new]


def write_decisions(number: int, parts: Path, groups_folder: Path, config: DedupConfig, result: Path) -> None:
    """Decide the documents of one part, from all the groups' files; of its own parts this run keeps the fates too."""
    groups = sorted(groups_folder.glob("*.rows"))
    all_parts = Parts.load(parts)
    part = all_parts.all[number]
    fates = Fates.undecided(part.documents)
    for reason, kind in ((EXACT, "exact"), (URL, "url")):
        if getattr(config, kind):
            _decide_equal(part, kind, reason, [g for g in groups if g.name.startswith(f"{kind}-")], fates)
    near = [g for g in groups if g.name[0].isdigit()]
    for documents, candidates in _candidates(part, near, fates):
        similar = verified(documents, candidates, all_parts, config.threshold)
        found = similar[0] >= 0
        places = (documents[found] - np.uint64(part.offset)).astype(np.int64)
        fates.remove(places, NEAR, similar[0][found].astype(np.uint64), similar[1][found])
    if part.own:
        write_arrays(part.file("fate"), {"removed": (fates.reasons > 0).astype(np.uint8)})
    write_arrays(result, _decisions(part, fates, all_parts))


def _decide_equal(part: Part, kind: str, reason: int, groups: list[Path], fates: Fates) -> None:
    """Exact or URL duplicates: the best of this shard is known; is there a better one elsewhere?"""
    with Arrays(part.file("keys")) as arrays:
        best = arrays.read(f"{kind}/best")
    best_of = best.astype(np.uint64) + np.uint64(part.offset)
    for group in groups:
        with Arrays(group) as rows:
            first, last = _slice(rows, part)
            asked = (rows.read("documents", first, last) - np.uint64(part.offset)).astype(np.int64)
            best_of[asked] = rows.mapped("leaders")[rows.read("starts", first, last)]
    best_of = best_of[best]  # whose best of the shard has a better one has it too
    own = np.arange(part.documents, dtype=np.uint64) + np.uint64(part.offset)
    places = np.flatnonzero(best_of != own)
    fates.remove(places, reason, best_of[places])


def _slice(rows: Arrays, part: Part) -> tuple[int, int]:
    documents = rows.mapped("documents")
    first, last = np.searchsorted(documents, np.array([part.offset, part.end], np.uint64))
    return int(first), int(last)


def _candidates(part: Part, groups: list[Path], fates: Fates) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Documents that are not decided yet, with the distinct better-ranked ones of their buckets, the best first.

    A bounded number of comparisons at a time, whatever there is.
    """
    asked = np.zeros(part.documents, np.int64)
    for group in groups:
        with Arrays(group) as rows:
            first, last = _slice(rows, part)
            places = (rows.read("documents", first, last) - np.uint64(part.offset)).astype(np.int64)
            asked[places] += rows.read("counts", first, last)
    asked[fates.reasons > 0] = 0
    turns = np.cumsum(asked) // COMPARISONS
    for turn in np.unique(turns[asked > 0]):
        within = np.flatnonzero((turns == turn) & (asked > 0))
        yield _gathered(part, groups, fates, int(within[0]), int(within[-1]) + 1)


def _gathered(
    part: Part, groups: list[Path], fates: Fates, start: int, stop: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    low, high = np.uint64(part.offset + start), np.uint64(part.offset + stop)
    for group in groups:
        with Arrays(group) as rows:
            first, last = (int(i) for i in np.searchsorted(rows.mapped("documents"), np.array([low, high])))
            documents = rows.read("documents", first, last)
            open_ = fates.reasons[(documents - np.uint64(part.offset)).astype(np.int64)] == 0
            counts = rows.read("counts", first, last)[open_].astype(np.int64)
            starts = rows.read("starts", first, last)[open_].astype(np.int64)
            total = int(counts.sum())
            if total:
                at = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(total)
                repeated = np.repeat(documents[open_], counts)
                columns.append((repeated, rows.mapped("leader_ranks")[at], rows.mapped("leaders")[at]))
    documents, ranks, leaders = (np.concatenate(column) for column in zip(*columns, strict=True))
    order = np.lexsort((leaders, ranks, documents))
    documents, leaders = documents[order], leaders[order]
    new = np.ones(len(order), bool)
    new[1:] = (documents[1:] != documents[:-1]) | (leaders[1:] != leaders[:-1])
    documents, leaders = documents[new], leaders[new]
    distinct, starts = np.unique(documents, return_index=True)
    return distinct, np.split(leaders, starts[1:])


def verified(
    documents: np.ndarray, candidates: list[np.ndarray], parts: Parts, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Of each document the first candidate that is near enough (int64, −1: none), and their similarity.

    In rounds: all documents are compared with their first candidates, those without success with their second, and so
    on. Most are done after the first.
    """
    found, alike = np.full(len(documents), -1, np.int64), np.zeros(len(documents), np.float32)
    waiting, turn = np.arange(len(documents)), 0
    while len(waiting):
        partners = np.array([candidates[i][turn] for i in waiting], np.uint64)
        similarities = _similarities(documents[waiting], partners, parts)
        enough = similarities >= threshold
        found[waiting[enough]] = partners[enough].astype(np.int64)
        alike[waiting[enough]] = similarities[enough]
        turn += 1
        waiting = np.array([i for i in waiting[~enough] if len(candidates[i]) > turn], np.int64)
    return found, alike


def _similarities(documents: np.ndarray, partners: np.ndarray, parts: Parts) -> np.ndarray:
    """Jaccard similarities of pairs, as many at a time as memory is meant for."""
    sizes = parts.shingle_counts(documents)[0]
    order = np.argsort(partners, kind="stable")
    partner_sizes = np.empty(len(partners), np.int64)
    partner_sizes[order] = parts.shingle_counts(partners[order])[0]
    made = np.empty(len(documents), np.float64)
    turns = np.cumsum(sizes + partner_sizes) // SHINGLES
    for turn in np.unique(turns):
        these = np.flatnonzero(turns == turn)
        numbers, where = np.unique(np.concatenate([documents[these], partners[these]]), return_inverse=True)
        flat, ends = parts.shingles(numbers)
        made[these] = jaccards(flat, np.append(0, ends), where[: len(these)], where[len(these) :])
    return made


@numba.njit(cache=True, nogil=True)
def jaccards(flat, bounds, a, b):
    """|A ∩ B| / |A ∪ B| of pairs of sorted arrays, whose repeated values count once.

    Args:
        flat: uint32; bounds: int64, array i is flat[bounds[i] : bounds[i + 1]]; a, b: which ones to compare.
    """
    made = np.empty(len(a), np.float64)
    for pair in range(len(a)):
        i, i_end = bounds[a[pair]], bounds[a[pair] + 1]
        j, j_end = bounds[b[pair]], bounds[b[pair] + 1]
        common, union = 0, 0
        while i < i_end or j < j_end:
            if j >= j_end or (i < i_end and flat[i] < flat[j]):
                value = flat[i]
            else:
                value = flat[j]
            in_a = i < i_end and flat[i] == value
            in_b = j < j_end and flat[j] == value
            while i < i_end and flat[i] == value:
                i += 1
            while j < j_end and flat[j] == value:
                j += 1
            common += in_a and in_b
            union += 1
        made[pair] = common / union if union else 1.0
    return made


def _decisions(part: Part, fates: Fates, parts: Parts) -> dict[str, np.ndarray]:
    places = np.flatnonzero(fates.reasons)
    of = fates.of[places]
    named, where = np.unique(of, return_inverse=True)
    ids = [i.encode("utf-8", "surrogatepass") for i in parts.ids(named)]
    repeated = [ids[i] for i in where]
    near = places[(fates.reasons[places] == NEAR) & (of >= parts.own_from)] if part.own else places[:0]
    near = near[np.lexsort((near, fates.similarities[near]))][:PAIRS]
    return {
        "places": places.astype(np.uint32),
        "reasons": fates.reasons[places],
        "of": of,
        "similarities": fates.similarities[places],
        "ids": np.frombuffer(b"".join(repeated), np.uint8),
        "id_ends": np.cumsum([len(i) for i in repeated], dtype=np.uint64),
        "named": named,
        "pair_places": near.astype(np.uint32),
        "pair_of": fates.of[near],
        "pair_similarities": fates.similarities[near],
    }
