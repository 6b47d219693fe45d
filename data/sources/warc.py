"""Web archives: WARC files as crawlers leave them (ISO 28500), and the WET files of text that Common Crawl makes.

A record says its length itself, and two empty lines must follow it: where they do not, the length is wrong, the record
is set aside, and reading goes on at the next that begins with an empty line and `WARC/1.`.
"""

from __future__ import annotations

import email.parser
import email.policy
import re
import zlib
from collections.abc import Iterator
from email.message import Message
from typing import Any, Literal

from pydantic import Field

from gristmill.data.sources.base import Cursor, Found, Skipped
from gristmill.data.sources.fields import Unreadable, fact, iso_date, wrong_with
from gristmill.data.sources.html import MOST_HTML, MOST_TAGS, page_licence, page_text, web_text
from gristmill.data.sources.records import Record, decoded, too_large, until_damage
from gristmill.data.sources.storage import Entry, StoredSource
from gristmill.data.sources.streams import Stream

WARC_ENDINGS = (".warc", ".warc.gz", ".warc.zst", ".wet", ".wet.gz", ".wet.zst")
LONGEST_LINE = 1 << 16
LONGEST_TYPE = 1024  # characters of a Content-Type; the library takes time with the square of it
MOST_LINES = 1000  # of a record's header
# Bytes looked at again after wrong lengths, beside four times those before: a length may claim much in every few bytes
MOST_READ_AGAIN = 1 << 32
GIVEN_UP = -1
BETWEEN = b"\r\n\r\n"
NEXT = b"\r\n\r\nWARC/1."
HTML = ("text/html", "application/xhtml+xml")
PLAIN = "text/plain"
# Those that are counted by their names; others by the first half of them, so that there are few reasons
TYPES = frozenset({"warcinfo", "resource", "request", "metadata", "revisit", "continuation"})
FORMS = frozenset(
    [f"application/{n}" for n in ("javascript", "json", "octet-stream", "pdf", "rss+xml", "xml", "zip")]
    + [f"image/{n}" for n in ("gif", "jpeg", "png", "svg+xml", "webp")]
    + [f"text/{n}" for n in ("calendar", "css", "csv", "javascript", "xml")]
)
HALVES = frozenset({"application", "audio", "font", "image", "message", "model", "multipart", "text", "video"})


def is_warc(address: str) -> bool:
    """Whether a file is a web archive, by its ending."""
    return address.endswith(WARC_ENDINGS)


class WarcSource(StoredSource):
    """Web archives: the main text of each HTML page that was served well, and each text of a WET file."""

    type: Literal["warc"] = "warc"
    precise: bool = Field(
        default=True,
        title="Precise",
        description="Leave out what may not be main text (trafilatura's favour_precision), or keep it.",
    )

    def records(self, entry: Entry, cursor: Cursor, most: int) -> Iterator[Record]:
        """A record a response or conversion."""
        with self.stream(entry, cursor) as stream:
            yield from until_damage(warc_records(stream, cursor, most, precise=self.precise), cursor)

    def place(self, entry: Entry, number: int) -> str:
        """The file's name and the record's number."""
        return f"{entry.name}#{number}"


def warc_records(stream: Stream, cursor: Cursor, most: int, *, precise: bool = True) -> Iterator[Record]:
    """What each record of an archive gives; records that are no documents are skipped, by their kind.

    The cursor's state is the number of bytes that were read again, or `GIVEN_UP`.
    """
    while cursor.state != GIVEN_UP:
        at = stream.offset
        header = _header(stream)
        if header is None:
            break
        cursor.record += 1
        if isinstance(header, str):
            more = _next_record(stream)
            cursor.offset = stream.offset
            yield Unreadable("not a WARC record", f"{header}; at byte {at} of the archive")
            if not more:
                return
            continue
        found, again = _found(stream, header, at, most, precise)
        more = True
        if again is not None and isinstance(found, Unreadable):
            cursor.state = (cursor.state or 0) + again
            if cursor.state > MOST_READ_AGAIN + 4 * at:
                cursor.state = GIVEN_UP
                found = Unreadable(found.reason, f"{found.detail}; too many such: the rest of the archive is not read")
            more = cursor.state != GIVEN_UP and _next_record(stream)
        cursor.offset = stream.offset
        yield found
        if not more:
            return
    if not cursor.record:
        cursor.record = 1
        yield Unreadable("no text", "the file holds no records", empty=True)


def _header(stream: Stream) -> dict[str, str] | str | None:
    """The named fields of the next record; what is wrong with them; none at the end."""
    line = b"\r\n"
    while line in (b"\r\n", b"\n"):
        line = stream.line(LONGEST_LINE)
    if not line:
        return None
    if not line.startswith(b"WARC/1."):
        stream.unread(line)
        return f"it begins with {line[:24]!r} and not with WARC/1."
    fields: dict[str, str] = {}
    for _ in range(MOST_LINES):
        line = stream.line(LONGEST_LINE)
        if line in (b"\r\n", b"\n"):
            length = fields.get("content-length", "")
            return fields if length.isascii() and length.isdigit() and len(length) < 19 else "it states no length"
        name, colon, value = line.decode("utf-8", "replace").partition(":")
        if not colon or not line.endswith(b"\n"):
            break
        fields[name.strip().lower()] = value.strip()
    return "its header has no end"


def _found(
    stream: Stream, header: dict[str, str], at: int, most: int, precise: bool
) -> tuple[Record, None] | tuple[Unreadable, int]:
    """What a record gives; if its length is wrong, also how many bytes were read that the next record may lie in."""
    length, kind = int(header["content-length"]), header.get("warc-type", "")
    wanted = kind in ("response", "conversion")
    content = stream.read(length) if length <= most else b""
    passed = len(content) if length <= most else stream.skip(length)
    end = stream.read(len(BETWEEN))
    if passed == length and end in (BETWEEN, b"", b"\r\n", b"\n\n"):
        if not wanted:
            return Skipped(f"WARC record of type {kind if kind in TYPES else 'unknown'}"), None
        found = too_large(most, length) if length > most else _document(header, content, most, precise)
        return found, None
    held = len(content) < passed
    stream.unread(end if held else content + end)
    lost = f"; {passed:,} bytes after its header are not read" if held else ""
    what = f"the {kind or 'record'} at byte {at} states {length:,} bytes, after which no record ends{lost}"
    return Unreadable("wrong length", what), len(content)


def _next_record(stream: Stream) -> bool:
    """Go to the next record's first byte; false where none follows."""
    return stream.find(NEXT) and stream.skip(len(BETWEEN)) == len(BETWEEN)


def _document(header: dict[str, str], content: bytes, most: int, precise: bool) -> Record:
    url, date = fact(header.get("warc-target-uri", "").strip("<>")), iso_date(header.get("warc-date"))
    extra: dict[str, Any] = {"truncated": cut} if (cut := fact(header.get("warc-truncated"))) else {}
    if header["warc-type"] == "conversion":
        found = decoded(content)
        return found if isinstance(found, Unreadable) else Found(found.text, None, url, date, None, extra)
    message = _response(content, most)
    if not isinstance(message, tuple):
        return message
    fields, body, whole = message
    if not whole:
        extra.setdefault("truncated", "compressed body")
    form = fields.get_content_type()
    if form not in (*HTML, PLAIN):
        half = fields.get_content_maintype()
        return Skipped(f"served as {form if form in FORMS else half if half in HALVES else 'something unknown'}")
    if len(body) > MOST_HTML and form != PLAIN:
        return too_large(MOST_HTML, len(body))
    text, replaced = web_text(body, fields.get_content_charset())
    if replaced:
        extra["replaced_characters"] = replaced
    licence = None
    if form != PLAIN:
        if (tags := text.count("<")) > MOST_TAGS:
            return Unreadable("too large", f"a page of {tags:,} tags; its main text is looked for among {MOST_TAGS:,}")
        licence, text = page_licence(text), page_text(text, precise=precise)
        if not text:
            return Skipped("a page without main text")
    return wrong_with(text) or Found(text, None, url, date, licence, extra)


def _response(content: bytes, most: int) -> tuple[Message, bytes, bool] | Record:
    """The header fields of an HTTP response, its body as the server meant it, and whether that came whole."""
    head, between, body = content.partition(b"\r\n\r\n")
    if not between:
        head, between, body = content.partition(b"\n\n")
    status, _, lines = head.partition(b"\n")
    code = re.match(rb"HTTP/[\d.]{1,8} +(\d{3})", status)
    if not between or code is None:
        return Unreadable("not an HTTP response", f"it begins with {content[:24]!r}")
    if code[1] != b"200":
        return Skipped(f"HTTP status {code[1].decode()}")
    fields = email.parser.BytesParser(policy=email.policy.compat32).parsebytes(lines + b"\n\n", headersonly=True)
    _shortened(fields)
    if "chunked" in str(fields.get("Transfer-Encoding", "")).lower():
        body = _joined(body)
    encoding = str(fields.get("Content-Encoding", "")).strip().lower()
    if encoding not in ("", "identity"):
        return _decompressed(fields, body, encoding, most)
    return fields, body, True


def _shortened(fields: Message) -> None:
    stated = str(fields.get("Content-Type", ""))
    if len(stated) > LONGEST_TYPE:
        fields.replace_header("Content-Type", stated[:LONGEST_TYPE])


def _joined(body: bytes) -> bytes:
    """A chunked body's chunks; as it is where an archive joined them already, and left the header."""
    parts, at = [], 0
    while (line := re.compile(rb"([0-9A-Fa-f]{1,8})[^\r\n]{0,256}\r?\n").match(body, at)) is not None:
        size = int(line[1], 16)
        if not size:
            return b"".join(parts)
        parts.append(body[line.end() : line.end() + size])
        at = line.end() + size + 2
    return b"".join(parts) if parts else body


def _decompressed(fields: Message, body: bytes, encoding: str, most: int) -> tuple[Message, bytes, bool] | Record:
    if encoding in ("gzip", "x-gzip", "deflate"):
        if encoding != "deflate" and not body.startswith(b"\x1f\x8b"):
            return fields, body, True  # the archive holds it decompressed, and the header as it was
        for window in (47, -15):  # gzip or zlib; some servers send deflate without zlib's frame
            try:
                one = zlib.decompressobj(window)
                out = one.decompress(body, most + 1)
            except zlib.error:
                continue
            return (fields, out, one.eof) if len(out) <= most else too_large(most)
    elif encoding not in ("br", "zstd"):  # a word that is none, as servers send
        return fields, body, True
    return Skipped(f"content encoding {encoding[:20]}")
