"""Ids that records give themselves and that come twice in a source: found over all shards, the later ones taken out.

Hashes are compared in passes of bounded size, ids where hashes agree; only shards with a repeat are written anew.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gristmill.data.documents import Row, atomic, id_hash, open_rows, read_rows, write_json_lines
from gristmill.data.intake import quarantine_line

AT_ONCE = 1 << 23  # hashes compared in one pass: 400 MB with their places
REASON = "duplicate id"


@dataclass(frozen=True)
class Repeat:
    """A document whose id another one before it in the source has: where it lies, and both places in the files."""

    shard: str
    row: int
    id: str
    file: str
    record: int
    first_file: str
    first_record: int

    @property
    def detail(self) -> str:
        return f"its id {self.id!r} is that of record {self.first_record} of {self.first_file}"


def find_repeats(shards: Sequence[Path]) -> list[Repeat]:
    """Every document of a source, in its order, whose id came before.

    Args:
        shards: document shards in the source's order, each with its `.ids` beside it.
    """
    groups = _equal_hashes([_ids_of(shard) for shard in shards])
    wanted: dict[int, set[int]] = {}
    for group in groups:
        for shard, row in group:
            wanted.setdefault(shard, set()).add(row)
    rows = {(s, r): row for s, places in wanted.items() for r, row in _rows_at(shards[s], places).items()}
    found = []
    for group in groups:
        first: dict[str, Row] = {}
        for shard, row in sorted(group):
            here = rows[shard, row]
            before = first.setdefault(here["id"], here)
            if before is not here:
                found.append(Repeat(shards[shard].name, row, here["id"], *_place(here), *_place(before)))
    order = {shard.name: number for number, shard in enumerate(shards)}
    return sorted(found, key=lambda r: (order[r.shard], r.row))


def _equal_hashes(indexes: Sequence[Path]) -> list[list[tuple[int, int]]]:
    """Groups of places (shard, row) whose hashes are equal."""
    total = sum(path.stat().st_size // 8 for path in indexes)
    passes = max(1, -(-total // AT_ONCE))
    groups: list[list[tuple[int, int]]] = []
    for number in range(passes):
        hashes, of_shards, of_rows = [], [], []
        for shard, path in enumerate(indexes):
            held = np.fromfile(path, dtype="<u8")
            rows = np.flatnonzero(held % np.uint64(passes) == number)
            hashes.append(held[rows])
            of_shards.append(np.full(len(rows), shard, np.uint32))
            of_rows.append(rows.astype(np.uint32))
        if not hashes:
            continue
        one, order = _sorted(hashes)
        shard_of, row_of = np.concatenate(of_shards), np.concatenate(of_rows)
        for start in np.flatnonzero(one[1:] == one[:-1]):
            pair = [(int(shard_of[place]), int(row_of[place])) for place in order[start : start + 2]]
            if groups and groups[-1][-1] == pair[0]:
                groups[-1].append(pair[1])
            else:
                groups.append(pair)
    return groups


def _sorted(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The parts' numbers in order, equal ones as they came, and where each was; the parts are let go."""
    held = np.concatenate(parts)
    parts.clear()
    order = np.argsort(held, kind="stable")
    return held[order], order


def _rows_at(shard: Path, places: set[int]) -> dict[int, Row]:
    """Rows without their text."""
    last = max(places)
    found = {}
    for number, row in enumerate(read_rows(shard)):
        if number in places:
            found[number] = {"id": row["id"], "metadata": row["metadata"]}
        if number == last:
            break
    return found


def _place(row: Row) -> tuple[str, int]:
    metadata = row["metadata"]
    return metadata.get("file", metadata["source"]), metadata.get("record", 0)


def without_repeats(shard: Path, repeats: Path, marker: Path) -> None:
    """A task: write a shard without its repeats to <shard>.unique.jsonl.zst, these to quarantine, and count them.

    A shard in which none is left is written empty, and stays in work/. `marker` gets the number of documents and bytes
    of text that went, and of documents that are left.
    """
    listed = [Repeat(**row) for row in json.loads(repeats.read_text(encoding="utf-8"))]
    gone = {repeat.row: repeat for repeat in listed}
    size = 0
    hashes = bytearray()
    with open_rows(unique(shard)) as writer:
        for number, row in enumerate(read_rows(shard)):
            if number in gone:
                size += len(row["text"].encode())
                continue
            writer.write(row)
            hashes += id_hash(row["id"]).to_bytes(8, "little")
        source = row["metadata"]["source"]
    with atomic(_ids_of(unique(shard))) as part:
        part.write_bytes(hashes)
    lines = [quarantine_line(source, r.file, r.record, REASON, r.detail) for r in listed]
    with atomic(unique(shard).with_name(unique(shard).name.replace("jsonl.zst", "quarantine"))) as part:
        part.write_bytes(b"".join(lines))
    write_json_lines(marker, [{"documents": len(listed), "bytes": size, "left": len(hashes) // 8}])


def unique(shard: Path) -> Path:
    """What a shard without repeats is called."""
    return shard.with_name(shard.name.replace(".jsonl.zst", ".unique.jsonl.zst"))


def _ids_of(shard: Path) -> Path:
    return shard.with_name(shard.name.replace(".jsonl.zst", ".ids"))
