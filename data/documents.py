"""Document shards: JSON lines under Zstandard, the fields of a datatrove document, the same bytes for the same rows."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

Row = dict[str, Any]
LEVEL = 3


class WholeZstd(io.RawIOBase):
    """A Zstandard stream that notices when the file ends inside a frame, which the library's reader does not."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw, self.waiting = raw, b""
        self.frame = zstandard.ZstdDecompressor().decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.waiting:
            block = self.raw.read(1 << 16)
            if not block:
                if not self.frame.eof:
                    raise EOFError("the Zstandard frame has no end")
                return 0
            self.waiting = self._decompressed(block)
        size = min(len(buffer), len(self.waiting))
        buffer[:size], self.waiting = self.waiting[:size], self.waiting[size:]
        return size

    def _decompressed(self, block: bytes) -> bytes:
        out = b""
        while block:
            if self.frame.eof:
                self.frame = zstandard.ZstdDecompressor().decompressobj()
            out += self.frame.decompress(block)
            block = self.frame.unused_data if self.frame.eof else b""
        return out


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Write a shard atomically; the number of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.tmp")
    count = 0
    with part.open("wb") as raw, zstandard.ZstdCompressor(level=LEVEL).stream_writer(raw) as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False, sort_keys=True).encode() + b"\n")
            count += 1
    os.replace(part, path)
    return count


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a shard.

    Raises:
        ValueError: the shard is cut short or not Zstandard.
    """
    try:
        with path.open("rb") as raw:
            for line in io.TextIOWrapper(io.BufferedReader(WholeZstd(raw)), encoding="utf-8"):
                yield json.loads(line)
    except (EOFError, zstandard.ZstdError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole document shard ({error}): make its stage again") from error


def shards(folder: Path) -> list[Path]:
    """The document shards of a stage's folder, in order."""
    return sorted((folder / "documents").glob("*.jsonl.zst"))


def write_json_lines(path: Path, rows: Iterable[Row]) -> None:
    """Plain JSON lines, for small tables that people look at; atomic."""
    part = path.with_name(f"{path.name}.tmp")
    part.write_text("".join(json.dumps(r, ensure_ascii=False, sort_keys=True) + "\n" for r in rows), encoding="utf-8")
    os.replace(part, path)


def excerpt(text: str, characters: int = 240) -> str:
    """The beginning of a text, on one line."""
    short = " ".join(text[: 2 * characters].split())
    return short if len(short) <= characters else f"{short[:characters]}…"
