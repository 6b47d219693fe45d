"""Texts out of opened files, one record at a time, with the place of each, or what is wrong there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any, TypeVar

import orjson

from gristmill.data.sources.base import Cursor, Found, Skipped
from gristmill.data.sources.fields import RowFields, Unreadable, wrong_with
from gristmill.data.sources.streams import DamagedError, Stream

BATCH_BYTES = 8 << 20  # of text in a Parquet batch, by the mean size of a row
BATCH_ROWS = 1024
BUFFER = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Other = TypeVar("Other")
Record = Found | Unreadable | Skipped
"""What a reader of files gives; the cursor that it keeps tells the place: `record`, from 1."""


def too_large(most: int, size: int | None = None) -> Unreadable:
    """A record that is not read."""
    how = f"{size:,} bytes, more" if size is not None else "more"
    return Unreadable("too large", f"{how} than max_record_bytes ({most:,})")


def until_damage(records: Iterator[Record | Other], cursor: Cursor) -> Iterator[Record | Other]:
    """The records before a compressed file's end that came too early, and then that end."""
    try:
        yield from records
    except DamagedError as error:
        cursor.record += 1
        yield Unreadable("cut short or damaged", f"{error}; what follows is not read")


def json_lines(stream: Stream, fields: RowFields, cursor: Cursor, most: int) -> Iterator[Record]:
    """A record a line that is not blank; it is counted as the line it is."""
    seen = cursor.record
    for line, size in stream.lines(most):
        cursor.record += 1
        cursor.offset = stream.offset
        if line is None:
            seen += 1
            yield too_large(most, size)
            continue
        if cursor.record == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line or line.isspace():
            continue
        seen += 1
        try:
            found = fields.found(orjson.loads(line), clean=True)
        except orjson.JSONDecodeError:
            row = _leniently(line)
            found = row if isinstance(row, Unreadable) else fields.found(row)
        yield found
    if not seen:
        cursor.record = max(cursor.record, 1)
        yield Unreadable("no text", "the file holds no rows", empty=True)


def _leniently(line: bytes) -> Any:
    """A line that the strict reader refuses: NaN is taken, and what is wrong is told."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unreadable("invalid UTF-8", f"at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return Unreadable("not JSON", f"{error.msg} at character {error.pos}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets thousands deep
        return Unreadable("not JSON", f"not to be read ({error})")


def parquet_rows(raw: IO[bytes], fields: RowFields, cursor: Cursor, most: int) -> Iterator[Record]:
    """A record a row; a file that is damaged or lacks the column is one unreadable record.

    Row groups before the cursor's record are not read. A batch holds few rows where they are long, and the pages of a
    column are read one after the other, so memory does not grow with the row group.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        table = pq.ParquetFile(raw, buffer_size=BUFFER, pre_buffer=False)
        schema = table.schema_arrow
        if (wrong := _wrong_column(schema, fields.text_field)) is not None:
            cursor.record = 1
            yield wrong
            return
        columns = [name for name in fields.columns if name in schema.names]
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if number + rows <= cursor.record:
                number += rows
                continue
            for batch in table.iter_batches(_batch_rows(table, group), row_groups=[group], columns=columns):
                if number + batch.num_rows <= cursor.record:
                    number += batch.num_rows
                    continue
                for found in _batch_records(batch, fields, most):
                    number += 1
                    if number > cursor.record:
                        cursor.record = number
                        yield found
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise  # the disk's or the network's word, not Arrow's on the file
        cursor.record = number + 1
        yield Unreadable("not a whole Parquet file", f"{str(error).splitlines()[0]}; what follows is not read")
        return
    if not number:
        cursor.record = 1
        yield Unreadable("no text", "the file holds no rows", empty=True)


def _wrong_column(schema: Any, name: str) -> Unreadable | None:
    import pyarrow.types as pt

    if name not in schema.names:
        held = ", ".join(schema.names)
        return Unreadable("no text field", f"no column {name!r} (there are: {held}); no row of the file is read")
    form = schema.field(name).type
    form = form.value_type if pt.is_dictionary(form) else form
    if not (pt.is_string(form) or pt.is_large_string(form) or pt.is_string_view(form) or pt.is_null(form)):
        return Unreadable("no text field", f"column {name!r} holds {form} and no text; no row of the file is read")
    return None


def _batch_rows(table: Any, group: int) -> int:
    """Rows of which the mean text is a few megabytes."""
    about = table.metadata.row_group(group)
    mean = about.total_byte_size // max(about.num_rows, 1) + 1
    return max(1, min(BATCH_ROWS, BATCH_BYTES // mean))


def _batch_records(batch: Any, fields: RowFields, most: int) -> Iterator[Record]:
    column = batch.column(batch.schema.get_field_index(fields.text_field))
    sizes = _text_sizes(column)
    if max(sizes, default=0) <= most:
        try:
            yield from [fields.found(row, clean=True) for row in batch.to_pylist()]
            return
        except UnicodeDecodeError:
            pass  # one of the rows: tell which
    for place, size in enumerate(sizes):
        if size > most:
            yield too_large(most, size)
            continue
        try:
            row = batch.slice(place, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield Unreadable("invalid UTF-8", f"at byte {error.start} of a value")
            continue
        yield fields.found(row)


def _text_sizes(column: Any) -> list[int]:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_null(column.type):
        return [0] * len(column)
    plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    plain = plain.cast(pa.large_string()) if pa.types.is_string_view(plain.type) else plain
    return pc.fill_null(pc.binary_length(plain), 0).to_pylist()  # type: ignore[attr-defined]


def whole_text(stream: Stream, cursor: Cursor, most: int) -> Iterator[Record]:
    """The file as one record."""
    if cursor.record:
        return
    data = stream.read(most + 1)
    cursor.record = 1
    yield too_large(most) if len(data) > most else decoded(data)


def decoded(data: bytes) -> Found | Unreadable:
    """A text out of its bytes in UTF-8."""
    data = data.removeprefix(BYTE_ORDER_MARK)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        return Unreadable("invalid UTF-8", f"at byte {error.start} of the file, in its line {line}")
    return wrong_with(text) or Found(text)
