"""A fingerprint of the code behind a stage: what its function's module says and what that imports of Gristmill.

Comments, docstrings and layout do not count. It is recorded beside a result and never part of its key: where it
changed and the version did not, a plan warns. Files are found by path and parsed, never imported, so that a plan
stays free of torch. Parsing them all takes seconds: what they said is kept on disk as long as their bytes stay.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from gristmill.data.documents import atomic
from gristmill.flows.caches import CACHES

ROOMS = ("data", "model", "kernels", "flows", "infra")
# What it says of a file depends on the Python that parses it and on this module, as it was loaded.
RULES = sys.version.encode() + Path(__file__).read_bytes()


def fingerprint(function: Callable[..., Any]) -> str:
    """`<Python's minor version>:<hash>` of the code behind `function`; syntax trees differ from version to version."""
    source = inspect.getsourcefile(function)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if source is None or not Path(source).is_file():
        return f"{python}:unknown"
    seen: dict[str, str] = {}
    _gather(Path(source), "", function.__module__, seen)
    _known().save()
    text = "\n".join(f"{name} {digest}" for name, digest in sorted(seen.items()))
    return f"{python}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def drifted(recorded: str, now: str) -> bool:
    """Whether two fingerprints, of the same Python, are of different code."""
    return recorded.partition(":")[0] == now.partition(":")[0] and recorded != now


def _gather(file: Path, label: str, module: str, seen: dict[str, str]) -> None:
    digest, imported = _said(file, module, file.stat().st_mtime_ns, file.stat().st_size)
    seen[label] = digest
    for name in imported:
        if name not in seen and not _is_contract(name) and (found := _file_of(name)) is not None:
            _gather(found, name, name, seen)


def _is_contract(module: str) -> bool:
    """The stage contract itself (modules right below flows) is the house, not a stage's work; packages below it are."""
    parts = module.split(".")
    if parts[:2] != ["gristmill", "flows"] or len(parts) > 3:
        return False
    file = _file_of(module)
    return len(parts) == 2 or file is None or file.name != "__init__.py"


@cache
def _room(name: str) -> Path | None:
    spec = importlib.util.find_spec(f"gristmill.{name}")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


@cache
def _file_of(module: str) -> Path | None:
    """The file of a module of Gristmill; none for a name that is no module."""
    _, room, *rest = module.split(".")
    folder = _room(room) if room in ROOMS else None
    if folder is None:
        return None
    place = folder.joinpath(*rest)
    for candidate in (place / "__init__.py", place.with_name(f"{place.name}.py")):
        if candidate.is_file():
            return candidate
    return None


class _Known:
    """What modules' files said when they were parsed last: (hash of what that depends on, hash of code, imported)."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.changed = False
        self.entries: dict[str, tuple[str, str, list[str]]] = {}
        with suppress(OSError, ValueError):  # only a cache: it is made again
            kept = json.loads(file.read_text(encoding="utf-8"))
            rows = kept.items() if isinstance(kept, dict) else ()
            self.entries = {module: (*row,) for module, row in rows if isinstance(row, list) and len(row) == 3}

    def parsed(self, file: Path, module: str) -> tuple[str, list[str]]:
        """Hash of a file's code, and the modules of Gristmill that it imports or names as "module:function"."""
        content = file.read_bytes()
        key = hashlib.sha256(b"\0".join([RULES, module.encode(), file.name.encode(), content])).hexdigest()
        if self.entries.get(module, ("",))[0] != key:
            package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
            self.entries[module] = (key, *_parsed(content, package))
            self.changed = True
        _, digest, imported = self.entries[module]
        return digest, imported

    def save(self) -> None:
        """One that cannot be written is done without."""
        if self.changed:
            with suppress(OSError), atomic(self.file) as part:
                part.write_text(json.dumps(dict(self.entries), sort_keys=True), encoding="utf-8")
            self.changed = False


@cache
def _said(file: Path, module: str, _changed: int, _size: int) -> tuple[str, list[str]]:
    return _known().parsed(file, module)


@cache
def _known() -> _Known:
    return _Known(CACHES / f"parsed-{sys.implementation.cache_tag}.json")


def _parsed(content: bytes, package: list[str]) -> tuple[str, list[str]]:
    tree = ast.parse(content)
    imported = sorted({name for node in ast.walk(tree) for name in _named(node, package)})
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imported


def _named(node: ast.AST, package: list[str]) -> Iterator[str]:
    """Names that may be modules of Gristmill in one node of a syntax tree."""
    if isinstance(node, ast.ImportFrom):
        above = package[: len(package) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
    elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        name, colon, function = node.value.partition(":")
        names = [name] if colon and function.isidentifier() else []
    else:
        return
    yield from (name for name in names if name.startswith("gristmill."))
