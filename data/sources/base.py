"""What the sources share: their fields, rows, the record of a bad one, and what they held when they were looked at."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from gristmill.data.config import Config
from gristmill.data.documents import atomic

Row = dict[str, Any]
Kind = Literal["prose", "code", "lessons"]
REMEMBERED_BYTES = 8 << 20  # smaller files are read as fast as a cache of many of them
RACY_NANOSECONDS = 2_000_000_000


@dataclass(slots=True)  # one a document: a frozen one takes three times as long to make
class Found:
    """A text, and what its record says of it; `identifier` is none where its place names it."""

    text: str
    identifier: str | None = None
    url: str | None = None
    date: str | None = None
    licence: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that could not be read: in which file, which one there (from 1: a line, row, page, …), and why.

    `address` finds the file on this machine, for messages; `file` is its name inside the source, the same everywhere.
    `reason` is one of a small set, which is counted by; `detail` says the rest.
    """

    address: str
    file: str
    record: int
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something whole that is no document of this source (a redirect, a picture), and why; it is only counted."""

    reason: str


@dataclass
class Cursor:
    """How far a part of a source has been read; from here its reader goes on after the row that it gave last.

    Attributes:
        part: place in the list of parts that one task reads.
        file: place in the part's list of files.
        record: number of the last record read, from 1.
        offset: bytes of the file, decompressed, up to the end of that record.
        start: (compressed, decompressed) bytes at which a decompressor can begin.
        state: what a library's own reader wants to know.
    """

    part: int = 0
    file: int = 0
    record: int = 0
    offset: int = 0
    start: tuple[int, int] = (0, 0)
    state: Any = None
    look: Callable[[Cursor], None] | None = None

    def begin(self, *, part: int | None = None, file: int = 0) -> None:
        """Go to the beginning of a part or of a file."""
        self.part = self.part if part is None else part
        self.file, self.record, self.offset, self.start, self.state, self.look = file, 0, 0, (0, 0), None, None

    def as_row(self) -> dict[str, Any]:
        """What is to be stored; `look`, if a reader set it, brings the rest up to date."""
        if self.look is not None:
            self.look(self)
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "look"}

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Cursor:
        """As `as_row` gave it."""
        return cls(**{**row, "start": tuple(row["start"])})


class Contents:
    """Hashes of local files, remembered by size and time of change, so that a file at rest is read once.

    A file changed less than two seconds before it was hashed is not remembered: it could change again within the
    file system's resolution of time and keep its size.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self.cache = cache
        self.known: dict[str, list[Any]] = {}
        self.changed = False
        if cache is not None and cache.exists():
            try:
                self.known = json.loads(cache.read_text(encoding="utf-8"))
            except ValueError:
                self.known = {}  # only a cache: it is made again

    def sha256(self, path: Path) -> str:
        """Hash of a file.

        Raises:
            ValueError: it is being written while it is read.
        """
        before = path.stat()
        stamp = [before.st_size, before.st_mtime_ns]
        entry = self.known.get(str(path))
        if entry and entry[:2] == stamp:
            return entry[2]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = path.stat()
        if [after.st_size, after.st_mtime_ns] != stamp:
            raise ValueError(f"{path} changes while it is read: run again when it is at rest")
        if before.st_size >= REMEMBERED_BYTES and time.time_ns() - before.st_mtime_ns > RACY_NANOSECONDS:
            self.known[str(path)] = [*stamp, digest]
            self.changed = True
        return digest

    def save(self) -> None:
        """Write the cache, if there is one and it has grown. One that cannot be written is done without."""
        if self.cache is not None and self.changed:
            with suppress(OSError), atomic(self.cache) as part:
                part.write_text(json.dumps(self.known, sort_keys=True), encoding="utf-8")


@dataclass(frozen=True)
class Held:
    """What a source held: the hash (or version, or revision) of each file, by its name inside the source."""

    files: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """One hash of it all."""
        return hash_of(*(part for name in sorted(self.files) for part in (name, self.files[name])))

    def first_change(self, now: Held) -> str | None:
        """The first file that another look shows to be new, gone or different."""
        names = sorted(self.files.keys() | now.files.keys())
        return next((n for n in names if self.files.get(n) != now.files.get(n)), None)


class SourceBase(Config):
    """Fields of every source."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", title="Name", description="Names the token stream.")
    kind: Kind = Field(default="prose", title="Kind", description="Which filter profile its documents pass.")
    max_documents: int | None = Field(
        default=None, ge=1, title="Most documents", description="The first so many are taken, in the listing's order."
    )
    max_bytes: int | None = Field(
        default=None,
        ge=1,
        title="Most text",
        description="Bytes of text (UTF-8): documents are taken in the listing's order until the next would pass it.",
    )

    licence: str | None = Field(
        default=None,
        min_length=1,
        title="Licence",
        description="Of all documents that state none themselves; an SPDX identifier such as CC-BY-SA-4.0.",
    )

    @property
    def ids_are_given(self) -> bool:
        """Whether ids come from the records, and so could come twice, and not from their places."""
        return False

    @property
    def limited(self) -> bool:
        """Whether only its beginning is taken."""
        return self.max_documents is not None or self.max_bytes is not None

    def bounded(self, size: int) -> int:
        """Bytes of text, at most those that the source may give."""
        return size if self.max_bytes is None else min(size, self.max_bytes)

    def row(self, found: Found, identifier: str, metadata: dict[str, Any]) -> Row:
        """A datatrove document as a row; takes the metadata over, and adds what every document has."""
        metadata["source"], metadata["kind"] = self.name, self.kind
        metadata["url"], metadata["date"], metadata["licence"] = found.url, found.date, found.licence or self.licence
        return {"text": found.text, "id": f"{self.name}/{identifier}", "metadata": metadata}


Item = Row | BadRecord | Skipped


class Reader(Protocol):
    """What a source can do. Its parts are plain values; any worker reads a part and gets the same rows.

    `read` keeps `cursor` up to date: at each item it stands behind that item, and begun with such a cursor again it
    goes on with the next. `most` bounds the bytes of one record; more is never held.
    """

    name: str
    max_documents: int | None
    max_bytes: int | None

    @property
    def limited(self) -> bool: ...
    @property
    def ids_are_given(self) -> bool: ...
    def check(self) -> None: ...
    def held(self, contents: Contents) -> Held: ...
    def expected_bytes(self) -> int | None: ...
    def parts(self, seed: int) -> list[Any]: ...
    def read(self, part: Any, seed: int, cursor: Cursor, most: int) -> Iterator[Item]: ...


def has_surrogate(text: str) -> bool:
    """Whether a text holds half a surrogate pair, which JSON can escape and UTF-8 cannot write."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def hash_of(*parts: bytes | str) -> str:
    """A hash of some parts, kept apart by their lengths."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
