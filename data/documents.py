"""Document shards: JSON lines under Zstandard, the fields of a datatrove document, the same bytes for the same rows."""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import orjson
import zstandard

Row = dict[str, Any]
LEVEL = 1  # results lie between stages: 3 takes almost three times as long for a tenth less disk
BLOCK = 1 << 16
FIRST_STEP, LEAST_STEP = 1 << 10, 1 << 8
BITE = 1 << 20  # bytes that one read of a compressed stream may give, about


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` when the block ends well.

    The name is the writer's own: a task that runs twice (its worker was taken for dead) never writes into the other
    one's file. What killed writers of the same path left behind is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield part
        try:
            os.replace(part, path)
        except FileNotFoundError:
            if not path.exists():  # else the other writer of the same bytes was first, and has tidied up
                raise
    finally:
        for name in os.listdir(path.parent):
            if name.startswith(f"{path.name}.") and name.endswith(".tmp"):
                path.with_name(name).unlink(missing_ok=True)


class RowWriter:
    """Writes a shard row by row, holding none; made by `open_rows`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.count = 0

    def write(self, row: Row) -> None:
        self._stream.write(encoded(row))
        self.count += 1


def encoded(row: Row) -> bytes:
    """A row as one line of JSON, keys sorted: equal rows give equal bytes. orjson is many times faster than json."""
    return orjson.dumps(row, option=orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)


@contextmanager
def open_rows(path: Path) -> Iterator[RowWriter]:
    """A shard to write row by row; it appears at `path` when the block ends well."""
    with (
        atomic(path) as part,
        part.open("wb") as raw,
        zstandard.ZstdCompressor(level=LEVEL).stream_writer(raw) as stream,
    ):
        yield RowWriter(stream)


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Write a shard atomically; the number of rows."""
    with open_rows(path) as shard:
        for row in rows:
            shard.write(row)
    return shard.count


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a shard.

    Raises:
        ValueError: the shard is cut short or not Zstandard.
    """
    try:
        with path.open("rb") as raw:
            # No line is held while its row is out: either may be of megabytes.
            yield from map(orjson.loads, io.BufferedReader(WholeZstd(raw), BLOCK))
    except (zstandard.ZstdError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole document shard ({error}): make its stage again") from error


NOTHING = memoryview(b"")  # in place of an empty view of megabytes


class WholeZstd(io.RawIOBase):
    """A Zstandard stream that notices when the file ends inside a frame, which the library's reader does not.

    Raises (on reading):
        EOFError: the file is cut short, or empty.
        zstandard.ZstdError: the file is not Zstandard, or damaged.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._waiting = NOTHING
        self._step = FIRST_STEP

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._waiting:
            block = self._raw.read(self._step)
            if not block:
                if not self._frame.eof:
                    raise EOFError("the Zstandard frame has no end")
                return 0
            self._waiting = memoryview(self._decompressed(block))
            # What compresses a thousandfold is taken in small bites, so that no bite fills the memory.
            self._step = min(BLOCK, max(LEAST_STEP, len(block) * BITE // max(1, len(self._waiting))))
        size = min(len(buffer), len(self._waiting))
        buffer[:size], self._waiting = self._waiting[:size], self._waiting[size:] or NOTHING
        return size

    def _decompressed(self, block: bytes) -> bytes:
        out = b""
        while block:
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            out += self._frame.decompress(block)
            block = self._frame.unused_data if self._frame.eof else b""
        return out


def shards(folder: Path, kind: str = "documents") -> list[Path]:
    """The shards of a stage's folder, in order; `kind` is documents, removed or changed (see `sieve.py`)."""
    return sorted((folder / kind).glob("*.jsonl.zst"))


def write_json_lines(path: Path, rows: Iterable[Row]) -> None:
    """Plain JSON lines, for small tables that people look at; atomic."""
    text = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def id_hash(identifier: str) -> int:
    """A document's id as an unsigned 64-bit number: how indexes beside shards (`*.ids`, little-endian) name it."""
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:8], "little")


def utf8_size(text: str) -> int:
    """Bytes of a text in UTF-8; half a surrogate pair counts three."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def excerpt(text: str, characters: int = 240) -> str:
    """The beginning of a text, on one line."""
    short = " ".join(text[: 2 * characters].split())
    return short if len(short) <= characters else f"{short[:characters]}…"
