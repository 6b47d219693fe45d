"""Texts out of opened files, one record at a time, with the place of each, or what is wrong there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from gristmill.data.sources.base import has_surrogate

ROWS_AT_ONCE = 1024
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Unreadable:
    """Why there is no text: something is wrong, or (`empty`) there is none."""

    reason: str
    empty: bool = False


Record = tuple[int, str | Unreadable]
"""Line or row, from 1, and the text there."""


def json_lines(lines: IO[bytes], text_field: str) -> Iterator[Record]:
    """A record a line that is not blank."""
    number = seen = 0
    for number, line in enumerate(lines, start=1):
        bare = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if bare.strip():
            seen += 1
            yield number, _json_text(bare, text_field)
    if not seen:
        yield max(number, 1), Unreadable("the file holds no rows", empty=True)


def _json_text(line: bytes, text_field: str) -> str | Unreadable:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unreadable(f"invalid UTF-8 at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return Unreadable(f"not JSON ({error.msg} at character {error.pos})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets thousands deep
        return Unreadable(f"not JSON that can be read ({error})")
    return text_of(row, text_field)


def text_of(row: object, text_field: str) -> str | Unreadable:
    """The text of a row."""
    if not isinstance(row, dict):
        return Unreadable(f"a {type(row).__name__} and no object with fields")
    if text_field not in row:
        return Unreadable(f"no field {text_field!r}")
    return _checked(row[text_field], text_field)


def _checked(value: object, text_field: str) -> str | Unreadable:
    if value is not None and not isinstance(value, str):
        return Unreadable(f"field {text_field!r} holds a {type(value).__name__} and no text")
    if not value or not value.strip():
        return Unreadable(f"field {text_field!r} holds no text", empty=True)
    if has_surrogate(value):
        return Unreadable(f"field {text_field!r} holds half a surrogate pair, which is no text")
    return value


def parquet_rows(raw: IO[bytes], text_field: str) -> Iterator[Record]:
    """A record a row; a file that is damaged or lacks the column is one unreadable record."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        table = pq.ParquetFile(raw)
        if text_field not in table.schema_arrow.names:
            yield 1, Unreadable(f"no column {text_field!r}")
            return
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=[text_field]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield number, _checked(value, text_field)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        yield number + 1, Unreadable(f"not a whole Parquet file ({str(error).splitlines()[0]})")
        return
    if not number:
        yield 1, Unreadable("the file holds no rows", empty=True)


def whole_text(raw: IO[bytes]) -> Iterator[Record]:
    """The file as one record; line 1, or the line at which it is no UTF-8."""
    data = raw.read().removeprefix(BYTE_ORDER_MARK)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        yield data[: error.start].count(b"\n") + 1, Unreadable(f"invalid UTF-8 at byte {error.start} of the file")
        return
    yield 1, text if text.strip() else Unreadable("the file is empty", empty=True)
