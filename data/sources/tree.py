"""Trees of source code: folders of files, or archives (zip; tar, plain or compressed), with licence and language.

A file's licence is what its own SPDX line says, else that of the licence file in its folder or the nearest above.
"""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Literal

import fsspec
from pydantic import Field, model_validator

from gristmill.data.sources.base import Cursor, Found, Kind, Skipped
from gristmill.data.sources.fields import Unreadable
from gristmill.data.sources.languages import LANGUAGES, NOT_CODE, language_of
from gristmill.data.sources.licences import WHOLE, is_licence_name, licence_of_text, stated_licence
from gristmill.data.sources.records import Record, decoded, too_large
from gristmill.data.sources.storage import Entry, StoredSource
from gristmill.data.sources.streams import DamagedError

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
ARCHIVES = (".zip", *TARS)
PASSED = frozenset({".git", ".hg", ".svn", "node_modules", "__pycache__", ".venv", ".tox", ".idea", ".mypy_cache"})
HEAD = 256
# NotImplementedError is what zipfile raises for a compression or encryption that it does not know
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, DamagedError, zlib.error, EOFError, NotImplementedError)


@dataclass(frozen=True)
class TreeEntry(Entry):
    """A file of a tree, and (address, stamp) of the licence files in its folder and above, the nearest first."""

    licences: tuple[tuple[str, str], ...] = ()


class TreeSource(StoredSource):
    """Source files of some languages, each a document."""

    type: Literal["tree"] = "tree"
    kind: Kind = Field(default="code", title="Kind", description="Which filter profile its documents pass.")
    languages: tuple[str, ...] = Field(
        default=(),
        title="Languages",
        description="Those taken, such as Python or C++; none means every programming language that is known.",
    )
    licences: tuple[str, ...] = Field(
        default=(),
        title="Licences",
        description="Those taken, by SPDX identifier; none means every one, and files without a known one too.",
    )

    @model_validator(mode="after")
    def _known(self) -> TreeSource:
        unknown = sorted(set(self.languages) - LANGUAGES)
        if unknown:
            raise ValueError(f"no language is called {unknown[0]!r}; known are {', '.join(sorted(LANGUAGES))}")
        return self

    @property
    def ids_are_given(self) -> bool:
        """An archive may hold two files of one name."""
        return True

    def entries(self) -> list[Entry]:
        """Every file, with the licence files above it; what version control and tools keep beside code is left out."""
        files = [e for e in super().entries() if not PASSED & set(PurePosixPath(e.name).parts)]
        if not files:
            raise ValueError(f"source {self.name!r}: {self.paths} holds no file of its own: correct ingest.sources")
        found: dict[str, tuple[str, str]] = {}
        for entry in files:
            folder, _, name = entry.address.rpartition("/")
            if is_licence_name(name):
                found.setdefault(folder, (entry.address, entry.stamp))
        return [TreeEntry(e.address, e.name, e.size, e.stamp, _above(e.address, found)) for e in files]

    def some_text(self, entries: list[Entry]) -> bool:
        """An archive is for the run to judge: looking into one means to read it through for its licences."""
        return any(e.address.endswith(ARCHIVES) for e in entries) or super().some_text(entries)

    def place(self, entry: Entry, number: int) -> str:
        """The file's name; a member of an archive is named by its own."""
        return entry.name

    def records(self, entry: Entry, cursor: Cursor, most: int) -> Iterator[Record]:
        """The one record of a file, or one for each file of an archive."""
        if entry.address.endswith(ARCHIVES):
            yield from self._members(entry, cursor, most)
        elif not cursor.record:
            cursor.record = 1
            above = entry.licences if isinstance(entry, TreeEntry) else ()
            with self.opened(entry) as raw:
                yield self._judged(entry.name, entry.size, raw.read, lambda: _first_known(above), most)

    def _judged(
        self, name: str, size: int, read: Callable[[int], bytes], above: Callable[[], str | None], most: int
    ) -> Record:
        head = read(HEAD)
        language = language_of(name, head)
        if language is None:
            return Skipped("no language is known by its name")
        if not (language in self.languages if self.languages else language not in NOT_CODE):
            return Skipped(f"language {language}")
        if size > most:
            return too_large(most, size)
        data = head + read(most + 1)
        if len(data) > most:
            return too_large(most)
        if not data.strip():
            return Skipped("an empty file")
        if b"\0" in data:
            return Skipped("a binary file")
        found = decoded(data)
        if isinstance(found, Unreadable):
            return found
        licence = stated_licence(found.text) or above() or self.licence
        if self.licences and licence not in self.licences:
            return Skipped(f"licence {licence or 'unknown'}")
        return Found(found.text, None, None, None, licence, {"language": language, "path": name})

    def _members(self, entry: Entry, cursor: Cursor, most: int) -> Iterator[Record]:
        """The files of an archive; its licence files first, which takes a pass of its own over a tar."""
        walk = self._zip if entry.address.endswith(".zip") else self._tar
        before, number = cursor.record, 0
        try:
            licences: dict[str, str | None] = {}
            for name, _, read in walk(entry):
                folder, _, base = name.rpartition("/")
                if is_licence_name(base) and folder not in licences:
                    licences[folder] = licence_of_text(read(WHOLE).decode("utf-8", "replace"))
            for name, size, read in walk(entry):
                number += 1
                if number <= before or PASSED & set(PurePosixPath(name).parts):
                    continue
                cursor.record = number
                above = _nearest(name, licences)
                record = self._judged(name, size, read, lambda above=above: above, most)
                yield _named(record, entry, name, number)
        except DAMAGED as error:
            cursor.record = number + 1
            detail = f"{str(error) or type(error).__name__}; what follows is not read"
            yield Unreadable("cut short or damaged", detail)
            return
        if not number:
            cursor.record = 1
            yield Unreadable("no text", "the archive holds no files", empty=True)

    def _zip(self, entry: Entry) -> Iterator[tuple[str, int, Callable[[int], bytes]]]:
        with self.random_access(entry) as raw, zipfile.ZipFile(raw) as archive:
            for member in archive.infolist():
                if member.flag_bits & 1:
                    raise zipfile.BadZipFile(f"{member.filename} is encrypted")
                if not member.is_dir():
                    with archive.open(member) as file:
                        yield member.filename, member.file_size, file.read

    def _tar(self, entry: Entry) -> Iterator[tuple[str, int, Callable[[int], bytes]]]:
        with self.stream(entry, Cursor()) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:  # type: ignore[call-overload]
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                if file is not None:
                    yield member.name.removeprefix("./"), member.size, file.read


def _named(record: Record, entry: Entry, name: str, number: int) -> Record:
    if isinstance(record, Found):
        return Found(record.text, f"{entry.name}/{name}", None, None, record.licence, record.extra)
    if isinstance(record, Unreadable):
        return Unreadable(record.reason, f"{name}: {record.detail}", record.empty)
    return record


def _above(address: str, found: dict[str, tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    folder, above = address.rpartition("/")[0], []
    while folder:
        if folder in found:
            above.append(found[folder])
        folder = folder.rpartition("/")[0]
    return tuple(above)


def _nearest(name: str, licences: dict[str, str | None]) -> str | None:
    folder = name.rpartition("/")[0]
    while True:
        if (licence := licences.get(folder)) is not None:
            return licence
        if not folder:
            return None
        folder = folder.rpartition("/")[0]


def _first_known(files: tuple[tuple[str, str], ...]) -> str | None:
    return next((found for file in files if (found := _licence_at(*file)) is not None), None)


@lru_cache(maxsize=1024)  # every file below asks for it
def _licence_at(address: str, stamp: str) -> str | None:
    """The licence of a licence file; `stamp` is of the version that is meant."""
    with fsspec.open(address, "rb") as file:
        return licence_of_text(file.read(WHOLE).decode("utf-8", "replace"))  # type: ignore[union-attr]
