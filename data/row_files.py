"""Small local files that a recipe names: rows of JSON lines and Parquet, whole or packed; and their hashes."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import orjson
import zstandard

from gristmill.data.documents import WholeZstd

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DAMAGED = (EOFError, OSError, zlib.error, zstandard.ZstdError)
BLOCK = 1 << 20


def open_packed(path: Path) -> IO[bytes]:
    """A file's bytes, unpacked where its name ends in .gz or .zst; one that is cut short raises on reading."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return io.BufferedReader(WholeZstd(path.open("rb"))) if path.suffix == ".zst" else path.open("rb")


def read_lines(path: Path, what: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of a text file's lines that are not blank, without the white space around them.

    Raises:
        ValueError: the file cannot be read, is cut short or no UTF-8; `what` names its place in the recipe.
    """
    number = 0
    try:
        with open_packed(path) as lines:
            for number, line in enumerate(lines, start=1):
                bare = (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).strip()
                if bare:
                    yield number, bare.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what}: {path}, line {number}, is no UTF-8 (byte {error.start} of it): mend it") from error
    except DAMAGED as error:
        raise ValueError(f"{what}: {path} cannot be read after line {number} ({error}): replace it") from error


def read_objects(path: Path, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of a file of JSON lines (plain, .gz, .zst) or Parquet.

    Raises:
        ValueError: another kind of file; it is damaged, or a line is no JSON object.
    """
    if path.suffix == ".parquet":
        yield from _parquet_objects(path, what)
        return
    if not path.name.endswith(JSON_LINES):
        raise ValueError(f"{what}: {path} is none of {', '.join(JSON_LINES)} and .parquet: convert it")
    for number, line in read_lines(path, what):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"{what}: {path}, line {number}, is not JSON ({error}): mend or remove it") from error
        if not isinstance(row, dict):
            raise ValueError(f"{what}: {path}, line {number}, holds a {type(row).__name__} and no object: mend it")
        yield number, row


def _parquet_objects(path: Path, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"{what}: {path} is not a whole Parquet file ({said}): replace it") from error


def files_of(patterns: Sequence[str], what: str) -> list[Path]:
    """The local files that paths, folders (all files below) and glob patterns name, each once, in order.

    Raises:
        ValueError: one of them names no file.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        paths = path.rglob("*") if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))
        files = sorted(p for p in paths if p.is_file()) or ([path] if path.is_file() else [])
        if not files:
            raise ValueError(f"{what}: {pattern!r} names no file: correct it")
        found |= dict.fromkeys(files)
    return list(found)


def sha256_of(path: Path) -> str:
    """The hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
