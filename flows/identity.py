"""What a stage's key is made of, and why two keys differ."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

KEY_CHARACTERS = 16


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text, on every machine.

    Raises:
        ValueError: a number is not finite, or a value is none of JSON's.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"{error}: only JSON's own values can be hashed") from error


def dumped(config: BaseModel) -> dict[str, Any]:
    """A configuration in JSON's own values, defaults included; a set is a sorted list, its order no accident."""
    return {name: _plain(getattr(config, name)) for name in type(config).model_fields}


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return dumped(value)
    if isinstance(value, dict):
        return {str(to_jsonable_python(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain(v) for v in value), key=canonical)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return to_jsonable_python(value)


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
        return {prefix: value} if prefix else {}
    return {
        k: v for name, part in parts for k, v in flattened(part, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def first_difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first version, field, seed, source or input in which two identities differ, in words; none if equal.

    A field is named as in a recipe, `rl.optimizer.adam_learning_rate 0.0001 → 0.0002`.
    """
    if before["version"] != now["version"]:
        return f"version {before['version']} → {now['version']}"
    return _config_difference(before, now) or _origin_difference(before, now)


def _config_difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    old, new = flattened(before["config"]), flattened(now["config"])
    for field in [*new, *(f for f in old if f not in new)]:
        name = f"{now['stage']}.{field}"
        if field not in old:
            return f"{name} was not there → {shown(new[field])}"
        if field not in new:
            return f"{name} {shown(old[field])} → is not there"
        if old[field] != new[field] or type(old[field]) is not type(new[field]):
            return f"{name} {shown(old[field])} → {shown(new[field])}"
    return None


def _origin_difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    if before["seed"] != now["seed"]:
        return f"seed {before['seed']} → {now['seed']}"
    for name, content in now["sources"].items():
        if name not in before["sources"]:
            return f"source {name} is new"
        if before["sources"][name] != content:
            return f"source {name} changed"
    for name in before["sources"]:
        if name not in now["sources"]:
            return f"source {name} is gone"
    if name := changed_input(before, now):
        entry = now["inputs"][name]
        return f"input {name} changed ({entry['stage']} {entry['key']})"
    gone = [name for name in before["inputs"] if name not in now["inputs"]]
    return f"input {gone[0]} is gone" if gone else None


def changed_input(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first input that is another result than before; none where all are the same."""
    for name, entry in now["inputs"].items():
        old = before["inputs"].get(name)
        if old is None or (old["stage"], old["key"]) != (entry["stage"], entry["key"]):
            return name
    return None


def likeness(before: dict[str, Any], now: dict[str, Any]) -> int:
    """How many fields, inputs and sources two identities have in common: the nearest earlier run has most."""
    old, new = flattened(before), flattened(now)
    return sum(name in old and old[name] == value for name, value in new.items())


def shown(value: Any) -> str:
    """A value as it would be written in a recipe, shortened."""
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
