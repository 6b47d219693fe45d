"""What the tokenizer is trained on: a sample of bounded size, whatever the size of the corpus.

One pass over every shard surveys the sources: bytes, documents on each side of the split, and the first of each side
in the order of hashes. A second takes the documents whose hash lies below a bound that gives each source about twice
its share of the sample; of these the ones with the lowest hashes are learned from, up to the share itself. Which
documents they are depends on their ids alone.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gristmill.data.documents import Row, read_rows, write_json_lines, write_rows

LONGEST = 1 << 18  # characters of one document in the sample
SHOWN = 2  # documents of a source that the card shows cut into tokens
SHOWN_CHARACTERS = 160
SLACK = 2.0  # documents are of different sizes: so much more than the share is taken, to fill it


def hashed(what: str, identifier: str) -> int:
    """A 64-bit number that is a pure function of its arguments; what the order and the split are made of."""
    return int.from_bytes(hashlib.sha256(f"{what}/{identifier}".encode()).digest()[:8], "little")


def side(identifier: str, seed: int, held_out: float) -> str:
    """The split that a document falls into."""
    return "held_out" if hashed(f"{seed}/held_out", identifier) < held_out * 2**64 else "train"


def survey_shard(shard: Path, result: Path, seed: int, held_out: float) -> None:
    """Bytes, documents by split, the first of each split and a few beginnings of texts, by source."""
    found: dict[str, dict[str, Any]] = {}
    for row in read_rows(shard):
        name = row["id"]
        source = found.setdefault(row["metadata"]["source"], {"bytes": 0, "splits": {}, "shown": []})
        source["bytes"] += len(row["text"].encode())
        split = source["splits"].setdefault(side(name, seed, held_out), {"documents": 0, "first": []})
        split["documents"] += 1
        order = [hashed(f"{seed}/order", name), name]
        split["first"] = min(split["first"], order) if split["first"] else order
        source["shown"] = heapq.nsmallest(SHOWN, [*source["shown"], [*order, row["text"][:SHOWN_CHARACTERS]]])
    write_json_lines(result, [found])


def merged(surveys: list[Path]) -> dict[str, dict[str, Any]]:
    """The surveys of all shards as one."""
    whole: dict[str, dict[str, Any]] = {}
    for path in surveys:
        for name, part in json.loads(path.read_text(encoding="utf-8")).items():
            source = whole.setdefault(name, {"bytes": 0, "splits": {}, "shown": []})
            source["bytes"] += part["bytes"]
            source["shown"] = heapq.nsmallest(SHOWN, [*source["shown"], *part["shown"]])
            for split, there in part["splits"].items():
                into = source["splits"].setdefault(split, {"documents": 0, "first": there["first"]})
                into["documents"] += there["documents"]
                into["first"] = min(into["first"], there["first"])
    return dict(sorted(whole.items()))


def moved(survey: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Documents that go to the other split, so that chance leaves neither side of a source of few documents empty.

    Training comes first: a source with one document holds nothing out. What moves is the first of its order.
    """
    changes = {}
    for source in survey.values():
        train, held = source["splits"].get("train"), source["splits"].get("held_out")
        if train is None and held is not None:
            changes[held["first"][1]] = "train"
        elif held is None and train is not None and train["documents"] > 1:
            changes[train["first"][1]] = "held_out"
    return changes


def draw_shard(shard: Path, result: Path, bounds: Mapping[str, float]) -> None:
    """Write a shard's part of the sample: the documents whose hash is below the bound of their source."""

    def drawn() -> Iterator[Row]:
        for row in read_rows(shard):
            source, draw = row["metadata"]["source"], hashed("sample", row["id"])
            if draw < bounds[source] * 2**64:
                yield {"source": source, "draw": draw, "text": row["text"][:LONGEST]}

    write_rows(result, drawn())


def bounds(survey: Mapping[str, Mapping[str, Any]], most_bytes: int) -> dict[str, float]:
    """The part of its documents that is drawn from each source: all sources alike in bytes."""
    share = most_bytes // max(1, len(survey))
    return {name: min(1.0, SLACK * share / max(1, source["bytes"])) for name, source in survey.items()}


def chosen(samples: list[Path], most_bytes: int, sources: int) -> list[str]:
    """The texts to learn from: of each source those drawn first, until they fill its share of `most_bytes`.

    What is held at a time is the sample itself.
    """
    share = most_bytes // max(1, sources)
    held: dict[str, list[tuple[int, str]]] = {}
    sizes: dict[str, int] = {}
    for path in samples:
        for row in read_rows(path):
            heap = held.setdefault(row["source"], [])
            heapq.heappush(heap, (-row["draw"], row["text"]))
            size = sizes.get(row["source"], 0) + len(row["text"].encode())
            while size - len(heap[0][1].encode()) >= share:
                size -= len(heapq.heappop(heap)[1].encode())
            sizes[row["source"]] = size
    return [text for _, heap in sorted(held.items()) for _, text in sorted(heap, reverse=True)]
