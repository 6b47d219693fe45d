"""From a result back to everything it was made of, and from a result forward to everything made of it."""

from __future__ import annotations

from typing import Any

from gristmill.flows.errors import UsageError
from gristmill.flows.manifest import Manifest
from gristmill.flows.store import Store


def lineage(store: Store, key: str) -> list[dict[str, Any]]:
    """The result of that key and all results it was made of, nearest first, each with its inputs and sources.

    Raises:
        UsageError: there is no such result in the store.
    """
    first = store.find(key)
    if first is None:
        raise UsageError(f"store {store.uri!r} has no finished result with the key {key!r}: see `gristmill runs`")
    found: dict[str, dict[str, Any]] = {}
    waiting: list[Manifest] = [first]
    while waiting:
        manifest = waiting.pop(0)
        if manifest["key"] in found:
            continue
        found[manifest["key"]] = {
            name: manifest[name] for name in ("stage", "key", "version", "seed", "content_hash", "inputs", "sources")
        }
        for entry in manifest["inputs"].values():
            above = store.manifest(entry["stage"], entry["key"])
            if above is not None:
                waiting.append(above)
            else:
                found.setdefault(entry["key"], {**entry, "inputs": {}, "sources": {}, "removed": True})
    return list(found.values())


def descendants(store: Store, key: str) -> list[dict[str, str]]:
    """Every finished result that was made of the result of that key, directly or through others; oldest first."""
    everything = [m for stage in store.stages() for m in store.manifests(stage)]
    reached, found = {key}, []
    for manifest in sorted(everything, key=lambda m: m["started"]):
        if any(entry["key"] in reached for entry in manifest["inputs"].values()):
            reached.add(manifest["key"])
            found.append({"stage": manifest["stage"], "key": manifest["key"]})
    return found
