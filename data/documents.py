"""Document shards: JSON lines under Zstandard, the fields of a datatrove document, the same bytes for the same rows."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import zstandard

Row = dict[str, Any]
LEVEL = 3


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
        with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
            for line in io.TextIOWrapper(stream, encoding="utf-8"):
                yield json.loads(line)
    except (zstandard.ZstdError, json.JSONDecodeError) as error:
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
