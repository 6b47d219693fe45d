"""The running Python's own standard library: its source files, and its docstrings as prose."""

from __future__ import annotations

import ast
import itertools
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from gristmill.data.sources.base import BadRecord, Kind, Row, SourceBase, hash_of

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
FILES_A_PART = 150


@cache
def library_files() -> tuple[str, ...]:
    """Paths of the library's modules below its folder, sorted, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return tuple(
        sorted(
            p.relative_to(root).as_posix() for p in root.rglob("*.py") if not LEFT_OUT & set(p.relative_to(root).parts)
        )
    )


@cache
def _library_hash() -> str:
    root = Path(sysconfig.get_paths()["stdlib"])
    return hash_of(sys.version, *(part for f in library_files() for part in (f, (root / f).read_bytes())))


class StdlibSource(SourceBase):
    """The standard library as code documents, one a module, or as prose documents, its docstrings."""

    type: Literal["stdlib"] = "stdlib"
    name: str = Field(default="stdlib", title="Name", description="Names the token stream.")
    kind: Kind = Field(default="code", title="Kind", description="Which filter profile its documents pass.")
    docstrings: bool = Field(default=False, title="Docstrings", description="Take the docstrings instead of the code.")

    def check(self) -> None:
        if not library_files():
            raise ValueError(
                f"source {self.name!r}: this Python's standard library has no .py files: use another source"
            )

    def fingerprint(self) -> str:
        return _library_hash()

    def parts(self, seed: int) -> list[tuple[int, int]]:
        count = len(library_files())
        if self.docstrings and self.max_documents:
            return [(0, count)]  # how many docstrings a module has is seen on reading it
        count = min(count, self.max_documents or count)
        return [(first, min(first + FILES_A_PART, count)) for first in range(0, count, FILES_A_PART)]

    def read(self, part: tuple[int, int], seed: int) -> Iterator[Row | BadRecord]:
        return itertools.islice(self._rows(part), self.max_documents)

    def _rows(self, part: tuple[int, int]) -> Iterator[Row | BadRecord]:
        root = Path(sysconfig.get_paths()["stdlib"])
        for file in library_files()[part[0] : part[1]]:
            try:
                text = (root / file).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a few modules of the library's own are written in other encodings on purpose
            if not self.docstrings:
                if text.strip():
                    yield self.row(text, file)
                continue
            yield from (self.row(doc, f"{file}#{name}") for name, doc in _docstrings(text))


def _docstrings(code: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module and what it defines, those of a few sentences and more."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return
    waiting: list[tuple[str, ast.AST]] = [("module", tree)]
    while waiting:
        name, node = waiting.pop(0)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc and len(doc.split()) >= 40:
                yield name, doc
            waiting += [
                (f"{name}.{child.name}@{child.lineno}", child)
                for child in node.body
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            ]
