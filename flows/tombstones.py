"""Documents that were taken out of a store and must not come back: tombstones.jsonl at its root.

A line a document: its `id`, or the `url`, in its one spelling, of all that comes from it; `reason`, `when`, `who`; the
`results` that had seen it, with training steps, and its `duplicates` that had been removed because of it. Those that
can concern a stage's sources enter its key, as a source of their own, and reach it as the file `tombstones.json` in its
folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gristmill.flows.errors import UsageError
from gristmill.flows.identity import canonical
from gristmill.flows.manifest import write_json
from gristmill.flows.store import Store

TOMBSTONES = "tombstones.jsonl"
FILE = "tombstones.json"
SOURCE = "(tombstones)"  # among the sources in a key: no source can have this name

Row = dict[str, Any]


def read(store: Store) -> list[Row]:
    """Every tombstone of a store, oldest first.

    Raises:
        UsageError: a line is no JSON object with an id or a URL: nothing is run that may bring a document back.
    """
    if store.remote:
        data = store.far.read(TOMBSTONES) or b""
    else:
        path = store.local / TOMBSTONES
        data = path.read_bytes() if path.exists() else b""
    return [_parsed(line, number, store) for number, line in enumerate(data.splitlines(), 1)]


def _parsed(line: bytes, number: int, store: Store) -> Row:
    try:
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("id", row.get("url")), str):
            return row
        reason = "neither an id nor a url"
    except ValueError as error:
        reason = str(error)
    raise UsageError(
        f"line {number} of {TOMBSTONES} in store {store.uri!r} is damaged ({reason}): mend it, or take it from a copy; "
        f"without it a document that was taken out could come back"
    )


def record(store: Store, rows: Iterable[Row]) -> list[Row]:
    """Add tombstones that are not there yet, all at once; those that were added. The caller holds the store's lock."""
    before = read(store)
    known = {(row.get("id"), row.get("url") if "id" not in row else None) for row in before}
    new = [row for row in rows if (row.get("id"), row.get("url") if "id" not in row else None) not in known]
    if new:
        data = b"".join(canonical(row).encode() + b"\n" for row in [*before, *new])
        if store.remote:
            store.far.write(TOMBSTONES, data)
        else:
            store.local.mkdir(parents=True, exist_ok=True)
            _replace(store.local / TOMBSTONES, data)
    return new


def _replace(path: Path, data: bytes) -> None:
    import os

    part = path.with_name(f"{path.name}.tmp")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def applying(rows: Iterable[Row], config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Ids and URLs among tombstones that can concern a stage of this configuration; empty lists where none can.

    An id begins with the name of its source; a URL can come from any.
    """
    names = source_names(config)
    if not names:
        return {"ids": [], "urls": []}
    listed = list(rows)
    ids = {row["id"] for row in listed if "id" in row and row["id"].split("/", 1)[0] in names}
    urls = {row["url"] for row in listed if "id" not in row}
    return {"ids": sorted(ids), "urls": sorted(urls)}


def source_names(config: Mapping[str, Any]) -> set[str]:
    """Names of a configuration's `sources`; none where it is not of a stage that reads sources by name."""
    sources = config.get("sources")
    if not isinstance(sources, list) or not all(isinstance(s, dict) and "name" in s for s in sources):
        return set()
    return {s["name"] for s in sources}


def as_source(asked: Mapping[str, list[str]]) -> dict[str, str]:
    """What tombstones add to the sources in a stage's key: nothing where there are none."""
    if not asked["ids"] and not asked["urls"]:
        return {}
    return {SOURCE: hashlib.sha256(canonical(dict(asked)).encode()).hexdigest()}


def lay_down(store: Store, config: Mapping[str, Any], sources: Mapping[str, str], folder: Path) -> None:
    """Write tombstones.json into the folder of a stage in whose key they are, before it starts.

    Raises:
        RuntimeError: the store's tombstones are no longer those of the key.
    """
    if SOURCE not in sources:
        return
    asked = applying(read(store), config)
    if as_source(asked)[SOURCE] != sources[SOURCE]:
        raise RuntimeError("the store's tombstones changed since the run was planned: run again")
    write_json(folder / FILE, asked)
