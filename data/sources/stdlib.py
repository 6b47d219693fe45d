"""The running Python's own standard library: its source files, and its docstrings as prose."""

from __future__ import annotations

import ast
import io
import os
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from gristmill.data.sources.base import BadRecord, Contents, Cursor, Found, Held, Item, Kind, SourceBase

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
FILES_A_PART = 150
LEAST_WORDS = 40  # a shorter docstring says little without its function


@cache
def library_files() -> tuple[str, ...]:
    """Paths of the library's modules below its folder, sorted, tests left out."""
    root, names = _root(), []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in LEFT_OUT]  # not walked: site-packages holds the most by far
        place = Path(folder).relative_to(root)
        names += [(place / name).as_posix() for name in files if name.endswith(".py")]
    return tuple(sorted(names))


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


class StdlibSource(SourceBase):
    """The standard library as code documents, one a module, or as prose documents, its docstrings."""

    type: Literal["stdlib"] = "stdlib"
    name: str = Field(default="stdlib", title="Name", description="Names the token stream.")
    kind: Kind = Field(default="code", title="Kind", description="Which filter profile its documents pass.")
    licence: str | None = Field(
        default="PSF-2.0", title="Licence", description="Of all its documents; an SPDX identifier."
    )
    docstrings: bool = Field(default=False, title="Docstrings", description="Take the docstrings instead of the code.")

    def check(self) -> None:
        """Refuse a Python that came without its library's sources.

        Raises:
            ValueError: there are none.
        """
        if not library_files():
            raise ValueError(
                f"source {self.name!r}: this Python's standard library has no .py files: use another source"
            )

    def held(self, contents: Contents) -> Held:
        """Hashes of the modules, and the version of the Python that reads them."""
        root = _root()
        return Held({"python": platform.python_version()} | {f: contents.sha256(root / f) for f in library_files()})

    def expected_bytes(self) -> int | None:
        """The sizes of the modules; docstrings are about a tenth of them."""
        size = sum((_root() / f).stat().st_size for f in library_files())
        return self.bounded(size // 10 if self.docstrings else size)

    def parts(self, seed: int) -> list[tuple[int, int]]:
        count = len(library_files())
        return [(first, min(first + FILES_A_PART, count)) for first in range(0, count, FILES_A_PART)]

    def read(self, part: tuple[int, int], seed: int, cursor: Cursor, most: int) -> Iterator[Item]:
        before = cursor.record
        for number, item in enumerate(self._items(part), start=1):
            if number > before:
                cursor.record = number
                yield item

    def _items(self, part: tuple[int, int]) -> Iterator[Item]:
        for file in library_files()[part[0] : part[1]]:
            try:
                text = _decoded((_root() / file).read_bytes())
                if not self.docstrings:
                    if text.strip():  # a package's empty __init__ is no document, and not a bad one
                        yield self.row(Found(text), file, {})
                    continue
                yield from (self.row(Found(doc), f"{file}#{name}", {}) for name, doc in docstrings(text))
            except (UnicodeDecodeError, SyntaxError) as error:
                yield BadRecord(str(_root() / file), file, 1, "not Python", str(error))


def _decoded(data: bytes) -> str:
    """A module's text in the encoding that it declares."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    return io.TextIOWrapper(io.BytesIO(data), encoding).read()


def docstrings(code: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module and what it defines, those of a few sentences and more.

    Raises:
        SyntaxError: it is not this Python's.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on escapes in other people's strings
        tree = ast.parse(code)
    waiting: list[tuple[str, ast.AST]] = [("module", tree)]
    while waiting:
        name, node = waiting.pop(0)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc and len(doc.split()) >= LEAST_WORDS:
                yield name, doc
            waiting += [
                (f"{name}.{child.name}@{child.lineno}", child)
                for child in node.body
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            ]
