"""What a stage's key is made of, and why two keys differ."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

KEY_CHARACTERS = 16


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def key_of(identity: dict[str, Any]) -> str:
    """The stage's key: a hash of its name, version, configuration, seed, inputs' keys and sources' contents."""
    return hashlib.sha256(canonical(identity).encode()).hexdigest()[:KEY_CHARACTERS]


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists as dotted paths to leaves."""
    if isinstance(value, dict) and value:
        parts = value.items()
    elif isinstance(value, list) and value:
        parts = ((str(i), v) for i, v in enumerate(value))
    else:
        return {prefix: value}
    return {
        k: v for name, part in parts for k, v in flattened(part, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def first_difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first field, input, source or version in which two identities differ, as a sentence; none if equal."""
    if before["version"] != now["version"]:
        return f"version {before['version']} → {now['version']}"
    old, new = flattened(before["config"]), flattened(now["config"])
    for name in [*new, *(n for n in old if n not in new)]:
        if name not in old:
            return f"{name} was not there → {new[name]!r}"
        if name not in new:
            return f"{name} {old[name]!r} → is not there"
        if old[name] != new[name]:
            return f"{name} {old[name]!r} → {new[name]!r}"
    if before.get("seed") != now.get("seed"):
        return f"seed {before.get('seed')} → {now.get('seed')}"
    for name, content in now.get("sources", {}).items():
        if before.get("sources", {}).get(name) != content:
            return f"source {name} changed"
    for name in before.get("sources", {}):
        if name not in now.get("sources", {}):
            return f"source {name} is gone"
    for name, entry in now["inputs"].items():
        if before["inputs"].get(name, {}).get("key") != entry["key"]:
            return f"input {name} changed ({entry['stage']} {entry['key']})"
    return None


def likeness(before: dict[str, Any], now: dict[str, Any]) -> int:
    """How many fields, inputs and sources two identities have in common: the nearest earlier run has most."""
    old, new = flattened(before), flattened(now)
    return sum(old.get(name) == value for name, value in new.items())


def fingerprint(function: Callable[..., Any]) -> str:
    """A hash of the code behind a stage: its module and those of gristmill that it imports, and so on.

    Comments, docstrings and layout do not count. It is recorded beside a result, never part of its key.
    """
    seen: dict[str, str] = {}
    _gather(function.__module__, seen)
    return hashlib.sha256(canonical(seen).encode()).hexdigest()[:KEY_CHARACTERS]


def _gather(module: str, seen: dict[str, str]) -> None:
    if module in seen or module.startswith("gristmill.flows"):
        return
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return
    tree = _tree(spec.origin, Path(spec.origin).stat().st_mtime_ns)
    seen[module] = tree[0]
    for name in tree[1]:
        _gather(name, seen)


@cache
def _tree(path: str, _changed: int) -> tuple[str, tuple[str, ...]]:
    """Hash of a file's code and the gristmill modules it imports or names as `module:function`."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    imports: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gristmill."):
            imports |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.Import):
            imports |= {a.name for a in node.names if a.name.startswith("gristmill.")}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_entry(node.value):
            imports.add(node.value.partition(":")[0])
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), tuple(sorted(_existing(imports)))


def _is_entry(text: str) -> bool:
    module, colon, function = text.partition(":")
    return bool(colon) and module.startswith("gristmill.") and function.isidentifier()


def _existing(names: set[str]) -> list[str]:
    found = []
    for name in names:
        try:
            if importlib.util.find_spec(name) is not None:
                found.append(name)
        except ModuleNotFoundError:
            continue  # `from module import name` where the name is no module
    return found
