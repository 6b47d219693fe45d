"""Reading a part of a source into shards, so that a stop loses at most the shard at hand.

    work/<part>-<shard>.jsonl.zst   documents
    work/<part>-<shard>.ids         their id hashes
    work/<part>-<shard>.quarantine  records set aside while the shard was filled
    work/<part>.state               how far the part is read, replaced after each shard
    work/<part>.json                the same at the part's end, which marks it done

A document that was taken down keeps its place: it counts towards the shard's size and the source's limits, so that
taking one down changes no other shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from gristmill.data.documents import Row, RowWriter, atomic, id_hash, open_rows, utf8_size, write_json_lines
from gristmill.data.sources import BadRecord, Cursor, Reader, Skipped
from gristmill.data.urls import normalised_url

TOMBSTONES = "tombstones.json"


@dataclass
class Intake:
    """What a part has given so far.

    Attributes:
        shards: how many there are. Of `emptied` ones every document was taken down: there is no file, and their
            number stays free; `rowless` ones hold records in quarantine at most, and get no number.
        set_aside: the shards beside which records lie in quarantine.
        seen, seen_bytes: documents and their text, those taken down included.
    """

    cursor: dict[str, Any] = field(default_factory=lambda: Cursor().as_row())
    ended: bool = False
    shards: int = 0
    emptied: list[int] = field(default_factory=list)
    rowless: list[int] = field(default_factory=list)
    set_aside: list[int] = field(default_factory=list)
    documents: int = 0
    bytes: int = 0
    seen: int = 0
    seen_bytes: int = 0
    taken_down: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)


class Tombstones:
    """Documents that must not come back, by id or by normalised URL, out of a file that may not be there."""

    def __init__(self, path: Path) -> None:
        listed = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"ids": [], "urls": []}
        self.ids, self.urls = frozenset(listed["ids"]), frozenset(listed["urls"])

    def hold(self, row: Row) -> bool:
        """Whether a document is among them."""
        if row["id"] in self.ids:
            return True
        url = row["metadata"]["url"] if self.urls else None
        return url is not None and normalised_url(url) in self.urls


def shard_name(part: int, shard: int) -> str:
    """What a shard is called while its stage works."""
    return f"{part:05d}-{shard:05d}"


def read_part(
    source: Reader, group: list[Any], work: Path, number: int, settings: tuple[str, int, int], seed: int
) -> None:
    """Read a part of a source into shards; goes on behind the last one that is there.

    Args:
        group: what the task reads, of the source's own parts.
        settings: `on_bad`, `documents_per_shard` and `max_record_bytes` of the stage.

    Raises:
        ValueError: a bad record, where bad ones are refused; a file changed.
    """
    state_path = work / f"{number:05d}.state"
    state = Intake(**json.loads(state_path.read_text(encoding="utf-8"))) if state_path.exists() else Intake()
    reading = _Reading(source, group, work, number, state, settings, seed)
    while not state.ended:
        reading.fill_shard()
        write_json_lines(state_path, [asdict(state)])
    write_json_lines(work / f"{number:05d}.json", [asdict(state)])


class _Reading:
    """A part that is being read."""

    def __init__(
        self,
        source: Any,
        group: list[Any],
        work: Path,
        number: int,
        state: Intake,
        settings: tuple[str, int, int],
        seed: int,
    ) -> None:
        self._source, self._work, self._number, self._state = source, work, number, state
        self._on_bad, self._a_shard, self._most = settings
        self._tombstones = Tombstones(work.parent / TOMBSTONES)
        self._cursor = Cursor.of_row(state.cursor)
        self._items = self._read(group, seed)

    def _read(self, group: list[Any], seed: int) -> Iterator[Any]:
        for place in range(self._cursor.part, len(group)):
            if place != self._cursor.part:
                self._cursor.begin(part=place)
            yield from self._source.read(group[place], seed, self._cursor, self._most)

    def fill_shard(self) -> None:
        """Read until a shard is full or the part ends."""
        state = self._state
        shard = _Shard(self._work / f"{shard_name(self._number, state.shards)}.jsonl.zst")
        in_shard = 0
        with shard.files:
            while in_shard < self._a_shard and not state.ended:
                item = next(self._items, None)
                if item is None:
                    state.ended = True
                elif isinstance(item, Skipped):
                    state.skipped[item.reason] = state.skipped.get(item.reason, 0) + 1
                elif isinstance(item, BadRecord):
                    shard.set_aside(self._line(item))
                elif self._fits(size := utf8_size(item["text"])):
                    in_shard += 1
                    self._take(item, size, shard)
        if shard.hashes:
            with atomic(shard.path("ids")) as part:
                part.write_bytes(shard.hashes)
        if shard.bad is not None:
            state.set_aside.append(state.shards)
        if not shard.hashes:
            (state.emptied if in_shard else state.rowless).append(state.shards)
        state.shards += 1
        state.cursor = self._cursor.as_row()

    def _fits(self, size: int) -> bool:
        """Count a document of so many bytes, if the source may still give it; else the part has ended."""
        state, source = self._state, self._source
        if source.max_bytes is not None and state.seen_bytes + size > source.max_bytes:
            state.ended = True
            return False
        state.seen += 1
        state.seen_bytes += size
        state.ended = state.seen == source.max_documents
        return True

    def _take(self, row: Row, size: int, shard: _Shard) -> None:
        if self._tombstones.hold(row):
            self._state.taken_down += 1
            return
        shard.write(row)
        self._state.documents += 1
        self._state.bytes += size

    def _line(self, record: BadRecord) -> bytes:
        if self._on_bad == "refuse":
            raise ValueError(
                f"source {self._source.name!r}: {record.address}, record {record.record}: {record.reason} "
                f"({record.detail}); mend it, or set ingest.on_bad to quarantine"
            )
        counts = self._state.quarantined
        counts[record.reason] = counts.get(record.reason, 0) + 1
        return quarantine_line(self._source.name, record.file, record.record, record.reason, record.detail)


class _Shard:
    """The files of a shard, begun when there is something for them."""

    def __init__(self, documents: Path) -> None:
        self.files = ExitStack()
        self.hashes = bytearray()
        self.bad: IO[bytes] | None = None
        self._documents = documents
        self._rows: RowWriter | None = None

    def path(self, kind: str) -> Path:
        """The file of a kind beside the documents."""
        return self._documents.with_name(self._documents.name.replace("jsonl.zst", kind))

    def write(self, row: Row) -> None:
        if self._rows is None:
            self._rows = self.files.enter_context(open_rows(self._documents))
        self._rows.write(row)
        self.hashes += id_hash(row["id"]).to_bytes(8, "little")

    def set_aside(self, line: bytes) -> None:
        if self.bad is None:
            self.bad = self.files.enter_context(self.files.enter_context(atomic(self.path("quarantine"))).open("wb"))
        self.bad.write(line)


def quarantine_line(source: str, file: str, record: int, reason: str, detail: str) -> bytes:
    """A record that is set aside, as a line of its file."""
    row = {"source": source, "file": file, "record": record, "reason": reason, "detail": detail}
    return (json.dumps(row, sort_keys=True) + "\n").encode()
