"""A user's own files: text, JSON lines (plain, gzip, Zstandard) and Parquet, on a disk or any fsspec address."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import IO, Any, Literal

import fsspec
import zstandard
from pydantic import Field

from gristmill.data.documents import WholeZstd
from gristmill.data.sources.base import BadRecord, Contents, Held, Row, SourceBase
from gristmill.data.sources.records import Record, Unreadable, json_lines, parquet_rows, whole_text

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst", ".json.gz", ".json.zst")
PART_BYTES = 32 << 20
PART_FILES = 1000
LOOKED_INTO = 20  # files of which the first records are read to see that a source holds any text


@dataclass(frozen=True)
class Entry:
    """A file as it was listed: where it is, its name inside the source, its size in bytes, and what marks a change."""

    address: str
    name: str
    size: int
    stamp: str


class FilesSource(SourceBase):
    """Files by path or pattern; a JSON or Parquet row gives a document, any other file is one document of text."""

    type: Literal["files"] = "files"
    paths: list[str] = Field(
        min_length=1,
        title="Paths",
        description="Paths, folders or patterns, local or s3://…; all files below a folder.",
    )
    text_field: str = Field(
        default="text", title="Text field", description="Field of a JSON or Parquet row with the text."
    )

    def check(self) -> None:
        """Refuse what does not exist, holds no text or cannot be reached.

        Raises:
            ValueError: with the path and what to do.
        """
        entries = self.entries()
        if not any(e.size for e in entries) or not self._some_text(entries):
            raise ValueError(
                f"source {self.name!r}: the {len(entries)} files of {self.paths} hold no text: give it some, or "
                f"correct paths or text_field"
            )

    def held(self, contents: Contents) -> Held:
        """Hash of each local file's content; elsewhere the store's version or etag."""
        return Held(
            {e.name: contents.sha256(Path(e.address)) if is_local(e.address) else e.stamp for e in self.entries()}
        )

    def expected_bytes(self) -> int | None:
        """Bytes of text, by the sizes of the files; a compressed byte is taken for four of text."""
        packed = (".gz", ".zst", ".parquet")
        return self.bounded(sum(e.size * (4 if e.address.endswith(packed) else 1) for e in self.entries()))

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

    def read(self, part: list[Entry], seed: int) -> Iterator[Row | BadRecord]:
        """The documents of some files.

        Raises:
            ValueError: a file is no longer what it was when it was listed.
        """
        for entry in part:
            self._refuse_changed(entry)
            for number, found in self._records(entry):
                if isinstance(found, str):
                    place = f"{entry.name}#{number}" if is_rows(entry.address) else entry.name
                    yield self.row(found, place, file=entry.name)
                else:
                    yield BadRecord(entry.address, entry.name, number, found.reason, found.empty)
            self._refuse_changed(entry)

    def entries(self) -> list[Entry]:
        """Every file that the paths name, by address.

        Raises:
            ValueError: a path names no file, or cannot be reached.
        """
        found: dict[str, dict[str, Any]] = {}
        for pattern in self.paths:
            found |= self._listed(pattern)
        addresses = sorted(found)
        shared = common_folder(addresses)
        return [Entry(a, a[len(shared) :], found[a]["size"] or 0, stamp_of(a, found[a])) for a in addresses]

    def _listed(self, pattern: str) -> dict[str, dict[str, Any]]:
        try:
            filesystem, path = fsspec.core.url_to_fs(os.path.expanduser(pattern))
            filesystem.invalidate_cache()  # a listing of before would hide a change
            if not is_pattern(pattern) and filesystem.isdir(path):
                path = f"{path.rstrip('/')}/**"
            listed = filesystem.glob(path, detail=True) if is_pattern(path) else {path: filesystem.info(path)}
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
        return {filesystem.unstrip_protocol(p).removeprefix("file://"): entry for p, entry in files.items()}

    def _some_text(self, entries: list[Entry]) -> bool:
        """Whether the first files' first records hold text, or something that is for the run to judge."""
        local = [e for e in entries if is_local(e.address)]
        for entry in local[:LOOKED_INTO]:
            records = list(islice(self._records(entry), LOOKED_INTO))
            if len(records) == LOOKED_INTO or any(isinstance(r, str) or not r.empty for _, r in records):
                return True
        return len(local) < len(entries) or len(local) > LOOKED_INTO

    def _records(self, entry: Entry) -> Iterator[Record]:
        with opened(entry.address) as raw:
            if entry.address.endswith(".parquet"):
                yield from parquet_rows(raw, self.text_field)
            elif is_rows(entry.address):
                yield from _until_damage(json_lines(raw, self.text_field))
            else:
                yield from _until_damage(whole_text(raw))

    def _refuse_changed(self, entry: Entry) -> None:
        try:
            filesystem, path = fsspec.core.url_to_fs(entry.address)
            filesystem.invalidate_cache()
            found = filesystem.info(path)
        except FileNotFoundError:
            found = None
        if found is None or (found["size"] or 0, stamp_of(entry.address, found)) != (entry.size, entry.stamp):
            raise ValueError(
                f"source {self.name!r}: {entry.address} {'changed' if found else 'went away'} while it was read: "
                f"run again when it is at rest"
            )


def _until_damage(records: Iterator[Record]) -> Iterator[Record]:
    """The records before a compressed file's end that came too early, and then that end."""
    number = 0
    try:
        for number, found in records:
            yield number, found
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        yield number + 1, Unreadable(f"the file is cut short or damaged ({type(error).__name__}: {error})")


def opened(address: str) -> IO[bytes]:
    """A file's bytes, decompressed where its name says that they are compressed."""
    filesystem, path = fsspec.core.url_to_fs(address)
    raw = filesystem.open(path, "rb")
    if address.endswith(".gz"):
        return io.BufferedReader(_Gzip(raw))
    if address.endswith(".zst"):
        return io.BufferedReader(WholeZstd(raw))
    return raw


class _Gzip(gzip.GzipFile):
    """A gzip file that closes what it reads from, which the library's does not."""

    def __init__(self, raw: IO[bytes]) -> None:
        super().__init__(fileobj=raw, mode="rb")
        self._whole = raw

    def close(self) -> None:
        super().close()
        self._whole.close()


def is_rows(address: str) -> bool:
    """Whether a file holds rows, and not one text."""
    return address.endswith((".parquet", *JSON_LINES))


def is_local(address: str) -> bool:
    return "://" not in address


def is_pattern(path: str) -> bool:
    """Whether it has a pattern's marks, and is not a file or folder that is called so."""
    return any(c in path for c in "*?[") and not os.path.exists(path)


def common_folder(addresses: list[str]) -> str:
    """The folder, with its last slash, that all addresses share."""
    folders = [a.rpartition("/")[0].split("/") for a in addresses]
    levels = zip(*folders, strict=False)
    shared = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels)]
    return "/".join([*shared, ""]) if shared else ""


def stamp_of(address: str, entry: dict[str, Any]) -> str:
    """What changes when a file does: its time of change on a disk, version or etag in an object store."""
    if is_local(address):
        return str(os.stat(address).st_mtime_ns)
    found = next(
        (entry[n] for n in ("VersionId", "ETag", "etag", "mtime", "LastModified", "created") if entry.get(n)), ""
    )
    return str(found).strip('"')
