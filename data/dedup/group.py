"""Second step, a task a kind of key and range of its values: which documents meet, and the best-ranked of each meeting.

`<kind>-<range>.rows` holds arrays of those that met a better-ranked document: `documents` (their numbers, uint64,
ascending), `starts` and `counts` (uint32: a slice of the following), `leaders` (numbers, uint64, the best-ranked first)
and `leader_ranks`. A bucket of any size costs each of its documents at most `leaders` comparisons.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gristmill.data.dedup.arrays import Arrays, write_arrays
from gristmill.data.dedup.config import DedupConfig
from gristmill.data.dedup.parts import Part, Parts
from gristmill.data.dedup.sign import FENCES

ENTRIES = 1 << 21  # keys in a range, about: some 200 MB of arrays while a task sorts them


def ranges_of(parts: Parts) -> int:
    """Into how many ranges the keys are cut: a power of two, by the number of documents alone."""
    return 1 << max(0, (parts.documents - 1).bit_length() - (ENTRIES.bit_length() - 1))


def write_group(kind: str, number: int, ranges: int, parts: Path, config: DedupConfig, result: Path) -> None:
    """The meetings by one kind of key in one range of its values."""
    all_parts = Parts.load(parts)
    exactly = kind in ("exact", "url")
    held = [_range(part, kind, number, ranges) for part in all_parts.all]
    keys, checks, ranks, documents = (np.concatenate(column) for column in zip(*held, strict=True))
    order = _meeting(keys)
    if not exactly and config.exact:  # of equal documents, the best-ranked alone
        order = order[np.lexsort((documents[order], ranks[order], checks[order], keys[order]))]
        order = order[_new(keys[order], checks[order])]
    if exactly:
        order = order[np.lexsort((documents[order], ranks[order], checks[order], keys[order]))]
        new = _new(keys[order], checks[order])
    else:
        order = order[np.lexsort((documents[order], ranks[order], keys[order]))]
        new = _new(keys[order])
    most = 1 if exactly else config.leaders
    # with the policy first nothing that came before is decided anew
    from_number = all_parts.own_from if config.policy == "first" else 0
    write_arrays(result, _rows(documents[order], ranks[order], new, most, from_number))


def _range(part: Part, kind: str, number: int, ranges: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A part's keys of one range, with checks, ranks and document numbers."""
    with Arrays(part.file("keys")) as arrays:
        fences = arrays.read(f"{kind}/fences")
        start = int(fences[number * FENCES // ranges])
        stop = int(fences[-(-(number + 1) * FENCES // ranges)])
        keys = arrays.read(f"{kind}/keys", start, stop)
        if ranges > FENCES:
            shift = np.uint64(64 - (ranges.bit_length() - 1))
            first, last = np.searchsorted(keys >> shift, np.array([number, number + 1], np.uint64))
            keys, start, stop = keys[first:last], start + int(first), start + int(last)
        checks = arrays.read(f"{kind}/checks", start, stop)
        documents = arrays.read(f"{kind}/places", start, stop).astype(np.uint64) + np.uint64(part.offset)
        name = f"{kind}/ranks"
        ranks = arrays.read(name, start, stop) if name in arrays else np.zeros(len(keys), np.uint64)
    return keys, checks, ranks, documents


def _meeting(keys: np.ndarray) -> np.ndarray:
    """Where keys are that occur more than once: most occur once, and need no second look."""
    order = np.argsort(keys)
    ordered = keys[order]
    same = ordered[1:] == ordered[:-1]
    meets = np.zeros(len(order), bool)
    meets[1:] |= same
    meets[:-1] |= same
    return order[meets]


def _new(*columns: np.ndarray) -> np.ndarray:
    """Where in ordered columns a group begins."""
    new = np.ones(len(columns[0]), bool)
    new[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return new


def _rows(
    documents: np.ndarray, ranks: np.ndarray, new: np.ndarray, most: int, from_number: int
) -> dict[str, np.ndarray]:
    starts = np.flatnonzero(new)
    sizes = np.diff(np.append(starts, len(new)))
    group = np.cumsum(new) - 1
    place = np.arange(len(new)) - starts[group] if len(starts) else np.zeros(0, np.int64)
    is_leader = (place < most) & (sizes[group] > 1) if len(starts) else np.zeros(0, bool)
    leader_starts = np.cumsum(np.append(0, np.minimum(sizes, most) * (sizes > 1)))
    asked = np.flatnonzero((place > 0) & (documents >= np.uint64(from_number)))
    asked = asked[np.argsort(documents[asked], kind="stable")]
    return {
        "documents": documents[asked],
        "starts": leader_starts[group[asked]].astype(np.uint32),
        "counts": np.minimum(place[asked], most).astype(np.uint32),
        "leaders": documents[is_leader],
        "leader_ranks": ranks[is_leader],
    }
