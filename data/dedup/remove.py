"""Last step, a task a shard: take out what was decided, and show pairs of near duplicates as diffs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gristmill.data.dedup.arrays import Arrays
from gristmill.data.dedup.decide import NEAR, PAIRS, REASONS
from gristmill.data.dedup.parts import Part, Parts
from gristmill.data.documents import Row, excerpt, write_json_lines
from gristmill.data.sieve import KEEP, Verdict, remove, sieve_shard

DIFFED = 50_000  # characters of each text in which a difference is looked for
BITS = 1 << 24  # documents looked at together when clusters are counted


def remove_duplicates(shard: Path, decided: Path, out: Path, shown: list[int], texts: Path) -> None:
    """Sieve a shard by its decisions; leave the beginnings of the texts at the places `shown` in `texts`."""
    with Arrays(decided) as arrays:
        places, reasons = arrays.read("places"), arrays.read("reasons")
        similarities, ends, ids = arrays.read("similarities"), arrays.read("id_ends"), arrays.read("ids").tobytes()
    wanted, held = set(shown), {}
    next_one = 0

    def judge(row: Row, place: int) -> Verdict:
        nonlocal next_one
        if place in wanted:
            held[place] = {"id": row["id"], "text": row["text"][:DIFFED]}
        if next_one == len(places) or place != places[next_one]:
            return KEEP
        i, next_one = next_one, next_one + 1
        of = ids[int(ends[i - 1]) if i else 0 : int(ends[i])].decode("utf-8", "surrogatepass")
        alike = round(float(similarities[i]), 4)
        if reasons[i] != NEAR:
            return remove(REASONS[reasons[i]], duplicate_of=of, similarity=alike)
        return remove(REASONS[NEAR], values={"similarity": alike}, duplicate_of=of, similarity=alike)

    sieve_shard(shard, out, judge)
    write_json_lines(texts, [held])


def least_alike(decided: list[Path], parts: Parts) -> list[tuple[int, int, float]]:
    """The near pairs of this run that are least alike: numbers of the removed and of the better one, similarity."""
    pairs: list[tuple[float, int, int]] = []
    for part, path in zip((p for p in parts.all if p.own), decided, strict=True):
        with Arrays(path) as arrays:
            columns = [arrays.read(f"pair_{name}").tolist() for name in ("similarities", "places", "of")]
        pairs += [(alike, part.offset + place, of) for alike, place, of in zip(*columns, strict=True)]
        pairs = sorted(pairs)[:PAIRS]
    return [(document, of, alike) for alike, document, of in pairs]


def shown_places(part: Part, pairs: list[tuple[int, int, float]]) -> list[int]:
    """Places of a part's documents that are among the pairs."""
    numbers = {number for document, of, _ in pairs for number in (document, of)}
    return sorted(number - part.offset for number in numbers if part.offset <= number < part.end)


def pair_rows(pairs: list[tuple[int, int, float]], parts: Parts, texts: list[Path]) -> Iterator[dict[str, Any]]:
    """The rows of pairs.jsonl: ids, similarity, both beginnings, and the words that differ."""
    held: dict[int, dict[str, str]] = {}
    for part, path in zip((p for p in parts.all if p.own), texts, strict=True):
        for place, text in json.loads(path.read_text(encoding="utf-8")).items():
            held[part.offset + int(place)] = text
    for document, of, alike in pairs:
        removed, kept = held[document], held[of]
        yield {
            "removed": removed["id"],
            "kept": kept["id"],
            "similarity": round(alike, 4),
            "differs": differing(kept["text"], removed["text"]),
            "removed_text": excerpt(removed["text"]),
            "kept_text": excerpt(kept["text"]),
        }


def differing(kept: str, removed: str, words: int = 400, most: int = 6) -> str:
    """The first runs of words in which two texts differ: −of the kept one, +of the removed one."""
    a, b = kept.split(), removed.split()
    same = next((i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))
    a, b = a[same : same + words], b[same : same + words]
    import difflib  # here, since only the process that writes pairs.jsonl needs it

    runs = []
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind != "equal":
            runs.append(f"−{' '.join(a[a0:a1][:8])} +{' '.join(b[b0:b1][:8])}")
    return " … ".join(runs[:most])


def changed_fates(part: Part, decided: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Of a part of an earlier index: documents that were kept and go now, and ones that were removed and stay now."""
    with Arrays(part.file("fate")) as arrays:
        before = arrays.read("removed")
    with Arrays(decided) as arrays:
        places, similarities = arrays.read("places").astype(np.int64), arrays.read("similarities")
        reasons, ends, ids = arrays.read("reasons"), arrays.read("id_ends"), arrays.read("ids").tobytes()
    now = np.zeros(part.documents, np.uint8)
    now[places] = 1
    with Arrays(part.file("keys")) as arrays:
        own_ids, own_ends = arrays.read("ids").tobytes(), arrays.read("id_ends")
    retracted = [
        {
            "id": _id(own_ids, own_ends, int(places[i])),
            "duplicate_of": _id(ids, ends, int(i)),
            "reason": REASONS[reasons[i]],
            "similarity": round(float(similarities[i]), 4),
        }
        for i in np.flatnonzero(before[places] == 0)
    ]
    restored = [{"id": _id(own_ids, own_ends, int(i))} for i in np.flatnonzero((before == 1) & (now == 0))]
    return retracted, restored


def _id(ids: bytes, ends: np.ndarray, place: int) -> str:
    return ids[int(ends[place - 1]) if place else 0 : int(ends[place])].decode("utf-8", "surrogatepass")


def clusters(decided: list[Path], parts: Parts) -> int:
    """How many documents that stay are the reason why others went; a bounded piece of the corpus at a time."""
    count = 0
    for start in range(0, parts.documents, BITS):
        stop = min(parts.documents, start + BITS)
        named = np.zeros(stop - start, bool)
        for path in decided:
            with Arrays(path) as arrays:
                numbers = arrays.mapped("named")
                first, last = np.searchsorted(numbers, np.array([start, stop], np.uint64))
                named[(numbers[first:last] - np.uint64(start)).astype(np.int64)] = True
        for part in parts.all:
            low, high = max(start, part.offset), min(stop, part.end)
            if low < high:
                with Arrays(part.file("fate")) as arrays:
                    named[low - start : high - start] &= (
                        arrays.read("removed", low - part.offset, high - part.offset) == 0
                    )
        count += int(named.sum())
    return count
