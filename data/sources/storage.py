"""Files on a disk or any fsspec address (s3://, https://, …): listed, opened, and refused if they change meanwhile."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import fsspec
from pydantic import Field

from gristmill.data.sources.base import BadRecord, Contents, Cursor, Found, Held, Item, SourceBase
from gristmill.data.sources.fields import Unreadable
from gristmill.data.sources.records import Record
from gristmill.data.sources.streams import Stream, compression

PART_BYTES = 32 << 20
PART_FILES = 1000
LOOKED_INTO = 20  # files of which the first records are read to see that a source holds any text
LOOKED_BYTES = 1 << 20  # of such a record
FETCHED = 8 << 20  # bytes of one range read
PACKED = (".gz", ".tgz", ".zst", ".parquet", ".bz2", ".xz", ".zip")
STAMPS = ("VersionId", "ETag", "etag", "mtime", "LastModified", "Last-Modified", "created")


@dataclass(frozen=True)
class Entry:
    """A file as it was listed: where it is, its name inside the source, its size in bytes, and what marks a change.

    The size is -1 where a web server does not tell it.
    """

    address: str
    name: str
    size: int
    stamp: str


class StoredSource(SourceBase):
    """A source of files; what a file holds is for the classes below."""

    paths: list[str] = Field(
        min_length=1,
        title="Paths",
        description="Paths, folders or patterns, local, s3://… or https://…; all files below a folder.",
    )

    @abstractmethod
    def records(self, entry: Entry, cursor: Cursor, most: int) -> Iterator[Record]:
        """The records of a file after the cursor's, which is kept up to date."""

    @abstractmethod
    def place(self, entry: Entry, number: int) -> str:
        """What names a record inside the source where nothing in it does."""

    def check(self) -> None:
        """Refuse what does not exist, holds no text or cannot be reached.

        Raises:
            ValueError: with the path and what to do.
        """
        entries = self.entries()
        if not any(e.size for e in entries) or not self.some_text(entries):
            raise ValueError(
                f"source {self.name!r}: the {len(entries)} files of {self.paths} hold no text: give it some, or "
                f"correct its paths or fields"
            )

    def held(self, contents: Contents) -> Held:
        """Hash of each local file's content; elsewhere the store's version or etag."""
        return Held(
            {e.name: contents.sha256(Path(e.address)) if is_local(e.address) else e.stamp for e in self.entries()}
        )

    def expected_bytes(self) -> int | None:
        """Bytes of text, by the sizes of the files; a compressed byte is taken for four of text."""
        return self.bounded(sum(max(e.size, 0) * (4 if e.address.endswith(PACKED) else 1) for e in self.entries()))

    def parts(self, seed: int) -> list[list[Entry]]:
        """Files in the order of their addresses, small ones together."""
        parts: list[list[Entry]] = []
        room = 0
        for entry in self.entries():
            if not parts or room < entry.size or len(parts[-1]) == PART_FILES:
                parts.append([])
                room = PART_BYTES
            parts[-1].append(entry)
            room -= entry.size
        return parts

    def read(self, part: list[Entry], seed: int, cursor: Cursor, most: int) -> Iterator[Item]:
        """The documents of some files.

        Raises:
            ValueError: a file is no longer what it was when it was listed.
        """
        for number in range(cursor.file, len(part)):
            entry = part[number]
            if number != cursor.file:
                cursor.begin(file=number)
            self.refuse_changed(entry)
            with self._one_version(entry):
                for found in self.records(entry, cursor, most):
                    yield self._item(entry, cursor.record, found)
            self.refuse_changed(entry)

    def _item(self, entry: Entry, number: int, found: Record) -> Item:
        if isinstance(found, Found):
            metadata = {**found.extra, "file": entry.name, "record": number}
            return self.row(found, found.identifier or self.place(entry, number), metadata)
        if isinstance(found, Unreadable):
            return BadRecord(entry.address, entry.name, number, found.reason, found.detail)
        return found

    def entries(self) -> list[Entry]:
        """Every file that the paths name, by address.

        A file's name inside the source begins its documents' ids. It depends on the path that found it alone, so that
        paths and files that come or go beside it change no id.

        Raises:
            ValueError: a path names no file, or cannot be reached; two files have one name.
        """
        found: dict[str, tuple[str, dict[str, Any]]] = {}
        for pattern in self.paths:
            found = self._listed(pattern) | found
        names: dict[str, str] = {}
        for address, (name, _) in sorted(found.items()):
            if name in names:
                raise ValueError(
                    f"source {self.name!r}: {names[name]} and {address} are both called {name!r} in it: name "
                    f"the folder above both in paths, or give each a source of its own"
                )
            names[name] = address
        return [Entry(a, name, size_of(entry), self._stamp(a, entry)) for a, (name, entry) in sorted(found.items())]

    def _listed(self, pattern: str) -> dict[str, tuple[str, dict[str, Any]]]:
        """Address → name below the path's own folder, and what the store says of the file."""
        try:
            filesystem, path = fsspec.core.url_to_fs(os.path.expanduser(pattern))
            filesystem.invalidate_cache()  # a listing of before would hide a change
            if not is_pattern(pattern) and is_folder(filesystem, path):
                path = f"{path.rstrip('/')}/**"
            root = own_folder(path)
            listed = filesystem.glob(path, detail=True) if is_pattern(path) else {path: filesystem.info(path)}
            if pattern.startswith("http"):  # a page's links come without size or stamp
                listed = {p: filesystem.info(p) for p in listed if not p.endswith("/")}
        except FileNotFoundError:
            listed = {}
        except Exception as error:  # each kind of store has kinds of its own for missing or wrong credentials
            raise ValueError(
                f"source {self.name!r}: {pattern!r} cannot be reached ({type(error).__name__}: {error}): check the "
                f"address and, for s3://, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from error
        files = {p: entry for p, entry in listed.items() if entry["type"] == "file"}
        if not files:
            raise ValueError(f"source {self.name!r}: {pattern!r} names no file: correct ingest.sources")
        return {
            filesystem.unstrip_protocol(p).removeprefix("file://"): (p.removeprefix(root), entry)
            for p, entry in files.items()
        }

    def _stamp(self, address: str, entry: dict[str, Any]) -> str:
        stamp = stamp_of(address, entry)
        if not stamp:
            raise ValueError(
                f"source {self.name!r}: the server of {address} gives neither ETag nor Last-Modified, by which a "
                f"change could be seen: copy the file to a disk"
            )
        return stamp

    def some_text(self, entries: list[Entry]) -> bool:
        """Whether the first files' first records hold text, or something that is for the run to judge."""
        local = [e for e in entries if is_local(e.address)]
        for entry in local[:LOOKED_INTO]:
            empty = 0
            for record in islice(self.records(entry, Cursor(), LOOKED_BYTES), LOOKED_INTO):
                empty += is_empty(record)
                if not is_empty(record) or empty == LOOKED_INTO:
                    return True
        return len(local) < len(entries) or len(local) > LOOKED_INTO

    @contextmanager
    def opened(self, entry: Entry) -> Iterator[IO[bytes]]:
        """A file's bytes as they are, all of one version where the store can tell."""
        filesystem, path = fsspec.core.url_to_fs(entry.address)
        if is_local(entry.address):
            raw: Any = filesystem.open(path, "rb")
        else:
            headers = {"headers": condition(entry)} if entry.address.startswith("http") else {}
            filesystem.invalidate_cache()
            raw = filesystem.open(path, "rb", block_size=FETCHED, cache_type="readahead", **headers)
        with closing(raw):
            details = getattr(raw, "details", None)
            # s3fs asks for each range under the etag of these details, so they must be the listed ones
            if isinstance(details, dict) and stamp_of(entry.address, details) not in ("", entry.stamp):
                raise self._changed(entry, "changed")
            yield raw

    @contextmanager
    def random_access(self, entry: Entry) -> Iterator[IO[bytes]]:
        """A file's bytes for a reader that goes to and fro.

        Raises:
            ValueError: a web server gives no ranges.
        """
        with self.opened(entry) as raw:
            if type(raw).__name__ == "HTTPStreamFile":
                raise ValueError(
                    f"source {self.name!r}: the server of {entry.address} gives no ranges of bytes, which this kind of "
                    f"file needs: copy it to a disk"
                )
            yield raw

    @contextmanager
    def stream(self, entry: Entry, cursor: Cursor) -> Iterator[Stream]:
        """A file's bytes, decompressed where its name says that they are compressed, from the cursor's offset on."""
        with self.opened(entry) as raw:
            stream = Stream(raw, compression(entry.address), cursor.start)
            stream.skip(cursor.offset - stream.offset)

            def look(cursor: Cursor) -> None:
                cursor.start = stream.restart(cursor.offset)

            cursor.look = look
            yield stream

    @contextmanager
    def _one_version(self, entry: Entry) -> Iterator[None]:
        """Turn a store's word that the object is another one by now into a sentence."""
        try:
            yield
        except Exception as error:
            if type(error).__name__ == "FileExpired" or getattr(error, "status", 0) == 412:  # s3fs; aiohttp
                raise self._changed(entry, "changed") from error
            raise

    def refuse_changed(self, entry: Entry) -> None:
        """Look whether a file is still the one that was listed.

        Raises:
            ValueError: it is not.
        """
        try:
            filesystem, path = fsspec.core.url_to_fs(entry.address)
            filesystem.invalidate_cache()
            found = filesystem.info(path)
        except FileNotFoundError:
            found = None
        if found is None or (size_of(found), stamp_of(entry.address, found)) != (entry.size, entry.stamp):
            raise self._changed(entry, "changed" if found else "went away")

    def _changed(self, entry: Entry, how: str) -> ValueError:
        return ValueError(
            f"source {self.name!r}: {entry.address} {how} while it was read: run again when it is at rest"
        )


def is_empty(record: Record) -> bool:
    """Whether there was nothing, and not something wrong."""
    return isinstance(record, Unreadable) and record.empty


def is_local(address: str) -> bool:
    """Whether it is a path on a disk."""
    return "://" not in address


def is_pattern(path: str) -> bool:
    """Whether it has a pattern's marks, and is not a file or folder that is called so; a URL's ? begins its query."""
    marks = "*" if path.startswith("http") else "*?["
    return any(c in path for c in marks) and not os.path.exists(path)


def is_folder(filesystem: Any, path: str) -> bool:
    """Whether there are files below; over HTTP every page with links would be a folder, so the last slash tells."""
    return path.endswith("/") if path.startswith("http") else filesystem.isdir(path)


def own_folder(path: str) -> str:
    """The folder, with its last slash, below which a path or pattern names files: all before its first mark."""
    before = path[: next((i for i, c in enumerate(path) if c in "*?["), len(path))] if is_pattern(path) else path
    return before[: before.rfind("/") + 1]


def size_of(entry: dict[str, Any]) -> int:
    """Bytes of a listed file; -1 where they are not known."""
    return -1 if entry["size"] is None else entry["size"]


def stamp_of(address: str, entry: dict[str, Any]) -> str:
    """What changes when a file does: its time of change on a disk, version or etag in an object store."""
    if is_local(address):
        return str(os.stat(address).st_mtime_ns)
    found = next((entry[n] for n in STAMPS if entry.get(n)), "")
    return str(found).strip('"')


def condition(entry: Entry) -> dict[str, str]:
    """Headers under which a web server gives a range of this version alone; servers may pass over them."""
    stamp = entry.stamp
    if stamp.startswith("W/"):  # a weak etag never satisfies If-Match
        return {}
    if stamp.endswith("GMT"):
        return {"If-Unmodified-Since": stamp}
    return {"If-Match": f'"{stamp}"'}
