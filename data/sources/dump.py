"""Dumps of wikis in MediaWiki's export format: XML of pages, plain or under gzip, bzip2, xz or Zstandard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import quote
from xml.parsers import expat

from pydantic import Field

from gristmill.data.sources.base import Cursor, Found, Skipped
from gristmill.data.sources.fields import Unreadable, fact, iso_date, wrong_with
from gristmill.data.sources.records import Record, too_large, until_damage
from gristmill.data.sources.storage import Entry, StoredSource
from gristmill.data.sources.streams import Stream
from gristmill.data.sources.wikitext import CATEGORIES, PICTURES, plain_text

DEEPEST = 64  # elements in elements; the format has six
LONGEST_FIELD = 4096  # characters of a title, a date, …
TEXT_BUFFER = 1 << 16
FILE_SPACE, CATEGORY_SPACE = "6", "14"


class DumpSource(StoredSource):
    """A wiki's dump: the articles, as plain text. After a stop, pages that are done are read over, not converted."""

    type: Literal["dump"] = "dump"
    namespaces: tuple[int, ...] = Field(
        default=(0,), min_length=1, title="Namespaces", description="Kinds of pages taken; 0 are the articles."
    )

    @property
    def ids_are_given(self) -> bool:
        """The wiki's own page numbers are the ids."""
        return True

    def records(self, entry: Entry, cursor: Cursor, most: int) -> Iterator[Record]:
        """A record a page."""
        before = cursor.record
        with self.stream(entry, Cursor()) as stream:
            cursor.record = 0
            for page in until_damage(self._pages(stream, most, cursor), cursor):
                if cursor.record > before:
                    yield page if not isinstance(page, _Page) else self._page(page)

    def place(self, entry: Entry, number: int) -> str:
        """The file's name and the page's number."""
        return f"{entry.name}#{number}"

    def _pages(self, stream: Stream, most: int, cursor: Cursor) -> Iterator[Record | _Page]:
        reader = _Reader(most)
        try:
            while block := stream.some():
                reader.feed(block)
                for page in reader.taken():
                    cursor.record += 1
                    yield page
            reader.end()
        except (expat.ExpatError, _Refused) as error:
            for page in reader.taken():
                cursor.record += 1
                yield page
            cursor.record += 1
            reason = error.reason if isinstance(error, _Refused) else "not XML"
            yield Unreadable(reason, f"{error}; what follows is not read")
            return
        if not cursor.record:
            cursor.record = 1
            yield Unreadable("no text", "the file holds no pages", empty=True)

    def _page(self, page: _Page) -> Record:
        space = page.space()
        if space not in self.namespaces:
            return Skipped(f"namespace {space}")
        if "redirect" in page.fields or page.fields.get("text", "").lstrip()[:9].lower() == "#redirect":
            return Skipped("redirect")
        if page.fields.get("model", "wikitext") != "wikitext":
            return Skipped(f"content model {fact(page.fields['model'][:40])}")
        if page.too_long:
            return too_large(page.most)
        text = plain_text(page.fields.get("text", ""), page.site.named(FILE_SPACE, PICTURES), page.site.categories)
        if not text:
            return Skipped("a page without text")
        title = page.fields.get("title", "")
        number = page.fields.get("id", "")
        extra = {"title": title} if fact(title) else {}
        date = iso_date(page.fields.get("timestamp"))
        found = Found(
            text, number if number.isascii() and number.isdigit() else None, page.site.url(title), date, None, extra
        )
        return wrong_with(text) or found


class _Refused(Exception):
    """XML that is not read further."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass
class _Site:
    """What stands before the pages: the wiki's address, and its namespaces' names by number."""

    base: str = ""
    spaces: dict[str, str] = field(default_factory=dict)

    def named(self, number: str, known: frozenset[str]) -> frozenset[str]:
        """The names of a namespace, in lower case: the English ones serve in every wiki."""
        own = self.spaces.get(number, "").lower()
        return known | {own} if own else known

    @property
    def categories(self) -> frozenset[str]:
        return self.named(CATEGORY_SPACE, CATEGORIES)

    def url(self, title: str) -> str | None:
        """A page's address."""
        if not self.base.startswith("http") or not title:
            return None
        return self.base.rpartition("/")[0] + "/" + quote(title.replace(" ", "_"), safe="/:(),!'*")


@dataclass
class _Page:
    """A page as it stands in the dump; of several revisions the last."""

    site: _Site
    most: int
    fields: dict[str, str] = field(default_factory=dict)
    too_long: bool = False

    def space(self) -> int:
        """Its namespace's number; by its title in dumps of before 2012, which do not state it."""
        stated = self.fields.get("ns", "")
        if stated.isascii() and stated.removeprefix("-").isdigit():
            return int(stated)
        prefix, colon, _ = self.fields.get("title", "").partition(":")
        return next((int(n) for n, name in self.site.spaces.items() if colon and name and name == prefix), 0)


class _Reader:
    """Pages out of XML as it comes, none of whose parts is held beyond a bound."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._site = _Site()
        self._done: list[_Page] = []
        self._page: _Page | None = None
        self._path: list[str] = []
        self._parts: list[str] | None = None
        self._size = 0
        self._key = ""
        self._quiet = 0  # bytes since something was understood
        self._parser = expat.ParserCreate()
        self._parser.buffer_text = True
        self._parser.buffer_size = TEXT_BUFFER
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._text
        self._parser.EntityDeclHandler = self._entity

    def feed(self, block: bytes) -> None:
        """Take in more.

        Raises:
            expat.ExpatError, _Refused: it is not XML, or XML that is not read.
        """
        self._quiet += len(block)
        self._parser.Parse(block, False)
        if self._quiet > self._most:
            raise _Refused("too large", f"a tag or comment of more than max_record_bytes ({self._most:,})")

    def end(self) -> None:
        """There is no more."""
        if self._path or self._done or self._quiet:
            self._parser.Parse(b"", True)

    def taken(self) -> list[_Page]:
        """The pages that ended since."""
        done, self._done = self._done, []
        return done

    def _entity(self, name: str, *_: object) -> None:
        raise _Refused(
            "entity declarations", f"the XML declares the entity {name[:40]!r}, which can grow without bound"
        )

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self._quiet = 0
        if len(self._path) >= DEEPEST:
            raise _Refused("not XML", f"elements lie more than {DEEPEST} deep in each other")
        self._path.append(tag)
        parent = self._path[-2] if len(self._path) > 1 else ""
        self._parts = None
        if tag == "page":
            self._page = _Page(self._site, self._most)
        elif tag == "redirect" and self._page is not None:
            self._page.fields["redirect"] = "yes"
        elif tag in ("base",) or (tag == "namespace" and parent == "namespaces"):
            self._key = attributes.get("key", "") if tag == "namespace" else ""
            self._parts, self._size = [], 0
        elif (parent == "page" and tag in ("title", "ns", "id")) or (
            parent == "revision" and tag in ("timestamp", "model", "text")
        ):
            self._parts, self._size = [], 0
            if tag == "text" and self._page is not None:
                self._page.too_long = False

    def _text(self, data: str) -> None:
        self._quiet = 0
        if self._parts is None:
            return
        self._size += len(data)
        bound = self._most if self._path[-1] == "text" else LONGEST_FIELD
        if self._size <= bound:
            self._parts.append(data)
            return
        self._parts = []
        if self._page is not None and self._path[-1] == "text":
            self._page.too_long = True

    def _end(self, tag: str) -> None:
        self._quiet = 0
        self._path.pop()
        if self._parts is not None:
            self._keep(tag, "".join(self._parts))
            self._parts = None
        if tag == "page" and self._page is not None:
            self._done.append(self._page)
            self._page = None

    def _keep(self, tag: str, value: str) -> None:
        if tag == "base":
            self._site.base = value.strip()
        elif tag == "namespace":
            self._site.spaces[self._key] = value
        elif self._page is not None:
            self._page.fields[tag] = value
