"""A user's own files: text, JSON lines (plain, gzip, Zstandard) and Parquet, on a disk or any fsspec address."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import posixpath
import zlib
from collections.abc import Iterator
from typing import IO, Any, Literal

import fsspec
import zstandard
from pydantic import Field

from gristmill.data.documents import WholeZstd
from gristmill.data.sources.base import BadRecord, Row, SourceBase, hash_of

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".ndjson")
ROWS_AT_ONCE = 1024


class FilesSource(SourceBase):
    """Files by path or pattern; a JSON or Parquet row gives a document, any other file is one document of text."""

    type: Literal["files"] = "files"
    paths: list[str] = Field(min_length=1, title="Paths", description="Paths or patterns, local or s3://…")
    text_field: str = Field(
        default="text", title="Text field", description="Field of a JSON or Parquet row with the text."
    )

    def check(self) -> None:
        """Refuse what does not exist, holds nothing or cannot be reached.

        Raises:
            ValueError: with the path and what to do.
        """
        sizes = [entry["size"] or 0 for _, entry in self._files()]
        if not any(sizes):
            raise ValueError(f"source {self.name!r}: all {len(sizes)} files of {self.paths} are empty: give it text")

    def fingerprint(self) -> str:
        """Hash of the local files' contents, or of S3's version or etag of each."""
        parts: list[str] = []
        for path, entry in self._files():
            parts += [path.rsplit("/", 1)[-1], str(entry["size"])]
            remote = entry.get("VersionId") or entry.get("ETag")
            parts.append(str(remote) if remote else _content(path))
        return hash_of(*parts)

    def parts(self, seed: int) -> list[list[tuple[str, str]]]:
        """Lists of (path, name below the folder that all have in common); one list where the source is cut short."""
        paths = [path for path, _ in self._files()]
        common = posixpath.commonpath([posixpath.dirname(p) for p in paths])
        named = [(path, path[len(common) :].lstrip("/")) for path in paths]
        return [named] if self.max_documents else [[one] for one in named]

    def read(self, part: list[tuple[str, str]], seed: int) -> Iterator[Row | BadRecord]:
        found = (
            item if isinstance(item, BadRecord) else self.row(item[1], f"{name}#{item[0]}", file=name)
            for path, name in part
            for item in self._records(path)
        )
        return itertools.islice(found, self.max_documents)

    def _files(self) -> list[tuple[str, dict[str, Any]]]:
        """(address, listing) of every file, sorted."""
        found: dict[str, dict[str, Any]] = {}
        for pattern in self.paths:
            try:
                filesystem, path = fsspec.core.url_to_fs(pattern)
                if not glob_like(pattern) and filesystem.isdir(path):
                    path = f"{path.rstrip('/')}/**"
                listed = filesystem.glob(path, detail=True)
            except FileNotFoundError:
                listed = {}
            except Exception as error:  # botocore has many kinds for missing or wrong credentials
                raise ValueError(
                    f"source {self.name!r}: {pattern!r} cannot be reached ({type(error).__name__}: {error}): check the "
                    f"address and, for s3://, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                ) from error
            files = (
                {filesystem.unstrip_protocol(p): e for p, e in listed.items() if e["type"] == "file"} if listed else {}
            )
            if not files:
                raise ValueError(f"source {self.name!r}: {pattern!r} names no file: correct ingest.sources")
            found |= {p.removeprefix("file://"): e for p, e in files.items()}
        return sorted(found.items())

    def _records(self, path: str) -> Iterator[tuple[int, str] | BadRecord]:
        if path.endswith(".parquet"):
            yield from self._parquet(path)
        elif path.endswith(JSON_LINES):
            yield from self._json_lines(path)
        else:
            yield from _whole_text(path)

    def _json_lines(self, path: str) -> Iterator[tuple[int, str] | BadRecord]:
        number = 0
        try:
            with _opened(path) as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield self._json_record(path, number, line)
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            yield BadRecord(path, number + 1, f"the file is cut short or damaged ({type(error).__name__}: {error})")

    def _json_record(self, path: str, number: int, line: bytes) -> tuple[int, str] | BadRecord:
        try:
            text = json.loads(line.decode("utf-8"))[self.text_field]
        except UnicodeDecodeError as error:
            return BadRecord(path, number, f"invalid UTF-8 at byte {error.start}")
        except json.JSONDecodeError as error:
            return BadRecord(path, number, f"not JSON ({error.msg} at character {error.pos})")
        except (ValueError, RecursionError) as error:
            return BadRecord(path, number, f"not JSON that can be read ({error})")
        except (KeyError, TypeError):
            return BadRecord(path, number, f"no field {self.text_field!r}")
        if not isinstance(text, str) or not text.strip():
            return BadRecord(path, number, f"field {self.text_field!r} holds no text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return BadRecord(path, number, f"a lone surrogate at character {error.start}")
        return number, text

    def _parquet(self, path: str) -> Iterator[tuple[int, str] | BadRecord]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with _raw(path) as raw:
                table = pq.ParquetFile(raw)
                if self.text_field not in table.schema_arrow.names:
                    yield BadRecord(path, 1, f"no column {self.text_field!r}")
                    return
                number = 0
                for batch in table.iter_batches(ROWS_AT_ONCE, columns=[self.text_field]):
                    for text in batch.column(0).to_pylist():
                        number += 1
                        good = isinstance(text, str) and text.strip()
                        yield (
                            (number, text) if good else BadRecord(path, number, f"{self.text_field!r} holds no text")
                        )
        except pa.ArrowInvalid as error:
            yield BadRecord(path, 1, f"not a whole Parquet file ({error})")


def glob_like(path: str) -> bool:
    return any(c in path for c in "*?[")


def _raw(path: str) -> IO[bytes]:
    filesystem, place = fsspec.core.url_to_fs(path)
    return filesystem.open(place, "rb")


def _opened(path: str) -> IO[bytes]:
    raw = _raw(path)
    if path.endswith(".gz"):
        return gzip.open(raw)  # type: ignore[return-value]
    if path.endswith(".zst"):
        return io.BufferedReader(WholeZstd(raw))
    return raw


def _whole_text(path: str) -> Iterator[tuple[int, str] | BadRecord]:
    with _raw(path) as raw:
        data = raw.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        yield BadRecord(path, data[: error.start].count(b"\n") + 1, f"invalid UTF-8 at byte {error.start}")
        return
    if text.strip():
        yield 1, text
    else:
        yield BadRecord(path, 1, "the file is empty")


def _content(path: str) -> str:
    import hashlib

    digest = hashlib.sha256()
    with _raw(path) as raw:
        while block := raw.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
