"""A user's own files: text, JSON lines (plain, gzip, Zstandard, …), Parquet and WARC, told apart by their endings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from gristmill.data.sources.base import Cursor
from gristmill.data.sources.fields import RowFields
from gristmill.data.sources.records import Record, json_lines, parquet_rows, until_damage, whole_text
from gristmill.data.sources.storage import Entry, StoredSource
from gristmill.data.sources.warc import is_warc, warc_records

COMPRESSED = ("", ".gz", ".zst", ".bz2", ".xz")
JSON_LINES = (*(form + packed for form in (".jsonl", ".ndjson") for packed in COMPRESSED), ".json.gz", ".json.zst")


class FilesSource(RowFields, StoredSource):
    """Files by path or pattern; a JSON or Parquet row or a web page gives a document, any other file is one text."""

    type: Literal["files"] = "files"

    def records(self, entry: Entry, cursor: Cursor, most: int) -> Iterator[Record]:
        """The records of a file, by its ending."""
        if entry.address.endswith(".parquet"):
            with self.random_access(entry) as raw:
                yield from parquet_rows(raw, self, cursor, most)
            return
        with self.stream(entry, cursor) as stream:
            if is_warc(entry.address):
                records = warc_records(stream, cursor, most)
            elif entry.address.endswith(JSON_LINES):
                records = json_lines(stream, self, cursor, most)
            else:
                records = whole_text(stream, cursor, most)
            yield from until_damage(records, cursor)

    def place(self, entry: Entry, number: int) -> str:
        """The file's name; with the record's number where there may be several."""
        several = entry.address.endswith((".parquet", *JSON_LINES)) or is_warc(entry.address)
        return f"{entry.name}#{number}" if several else entry.name
