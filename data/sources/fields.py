"""What is taken out of a row of JSON, Parquet or a dataset: its text, and what is known of it."""

from __future__ import annotations

import datetime
import email.utils
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from gristmill.data.sources.base import Found, SourceBase, has_surrogate

LONGEST_ID = 1024
LONGEST_FACT = 8192  # characters of a URL or licence; a longer one is none
YEARS_OF_SECONDS = 1e11  # a number of seconds beyond is one of milliseconds (the year 5138)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Why there is no text: something is wrong, or (`empty`) there is none."""

    reason: str
    detail: str = ""
    empty: bool = False


class RowFields(SourceBase):
    """Which fields of a row hold what. A field is looked for in the row, then in its `metadata`."""

    text_field: str = Field(default="text", title="Text field", description="Field of a row with the text.")
    id_field: str | None = Field(
        default=None,
        title="Id field",
        description="Field with an id that no other row of this source has; without it, ids are made of file and row.",
    )
    url_field: str = Field(default="url", title="URL field", description="Field with the address it came from.")
    date_field: str = Field(
        default="date", title="Date field", description="Field with its date: text, a timestamp, or Unix seconds."
    )
    licence_field: str = Field(default="license", title="Licence field", description="Field with its licence.")
    keep_fields: tuple[str, ...] = Field(
        default=(), title="Kept fields", description="Other fields of text or numbers that go into the metadata."
    )

    @property
    def ids_are_given(self) -> bool:
        """Whether a field names the rows."""
        return self.id_field is not None

    @property
    def columns(self) -> tuple[str, ...]:
        """Every field that is looked at."""
        named = (self.text_field, self.id_field, self.url_field, self.date_field, self.licence_field)
        return tuple(dict.fromkeys(n for n in (*named, "metadata", *self.keep_fields) if n))

    def found(self, row: object, *, clean: bool = False) -> Found | Unreadable:
        """The text of a row, and what it says of it.

        Args:
            clean: the row comes from a reader that lets no half surrogate pair through.
        """
        if not isinstance(row, dict):
            return Unreadable("no text field", f"the record is a {type(row).__name__} and no object with fields")
        if self.text_field not in row:
            return Unreadable("no text field", f"no field {self.text_field!r}")
        text = row[self.text_field]
        if text is not None and not isinstance(text, str):
            return Unreadable("no text field", f"field {self.text_field!r} holds a {type(text).__name__} and no text")
        if (wrong := wrong_with(text, clean=clean)) is not None:
            return wrong
        identifier = None
        if self.id_field is not None:
            identifier = _identifier(_looked_up(row, self.id_field))
            if identifier is None:
                return Unreadable("no id", f"field {self.id_field!r} holds no short text or whole number")
        url = _looked_up(row, self.url_field)
        date = _looked_up(row, self.date_field)
        licence = _looked_up(row, self.licence_field)
        return Found(
            text or "",
            identifier,
            None if url is None else fact(url),
            None if date is None else iso_date(date),
            None if licence is None else fact(licence),
            {name: kept for name in self.keep_fields if (kept := _kept(_looked_up(row, name))) is not None},
        )


def wrong_with(text: str | None, *, clean: bool = False) -> Unreadable | None:
    """What makes a text none: it is empty, or holds what no text holds (a `clean` one no half surrogate pair)."""
    if not text or text.isspace():
        return Unreadable("no text", "the text is empty", empty=True)
    if "\0" in text:
        return Unreadable("NUL character", f"the text holds a NUL at character {text.index(chr(0))}")
    if not clean and has_surrogate(text):
        return Unreadable("lone surrogate", "the text holds half a surrogate pair, which is no text")
    return None


def _looked_up(row: dict[str, Any], name: str) -> Any:
    value = row.get(name)
    if value is None and isinstance(inner := row.get("metadata"), dict):
        return inner.get(name)
    return value


def _identifier(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    name = str(value)
    return name if 0 < len(name) <= LONGEST_ID and name.isprintable() else None


def _kept(value: Any) -> str | int | float | None:
    if isinstance(value, str):
        return fact(value)
    return value if isinstance(value, bool | int | float) and abs(value) < 1 << 62 else None


def fact(value: Any) -> str | None:
    """A short text, such as a URL or a licence; none for anything else. The first of a list stands for it."""
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_FACT or "\0" in value or has_surrogate(value):
        return None
    return value.strip() or None


def iso_date(value: Any) -> str | None:
    """A date in ISO 8601; none if it is not known as one.

    Taken are dates and times of Python and Arrow, text in ISO 8601 or as in mails (RFC 2822), Unix seconds and
    milliseconds.
    """
    if isinstance(value, datetime.date):  # a datetime is one
        return value.isoformat()
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            seconds = value / 1000 if abs(value) > YEARS_OF_SECONDS else value
            return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()
        if isinstance(value, str) and len(value) <= 64:
            return _iso_text(value.strip())
    except (ValueError, OverflowError, OSError):
        pass
    return None


def _iso_text(value: str) -> str:
    try:
        datetime.datetime.fromisoformat(value)
        return value
    except ValueError:
        return email.utils.parsedate_to_datetime(value).isoformat()
