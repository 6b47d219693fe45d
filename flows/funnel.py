"""Sums over the small tables that every corpus stage leaves: funnel.jsonl and histograms.jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Bins = dict[str, dict[str, dict[float, int]]]
OUTCOMES = ("kept", "changed", "removed")
IN, OUT = "_in", "_out"


def by_source(rows: Sequence[Row]) -> list[Row]:
    """A row a source, the largest first: documents in and by outcome, bytes and tokens in and out; then one for all."""
    units = _units(rows)
    sums: dict[str, Row] = {}
    total = _empty(units)  # apart from the sources, of which one may be named so too
    for row in rows:
        for own in (sums.setdefault(str(row.get("source", "")), _empty(units)), total):
            own["documents in"] += row["documents"]
            own[row["outcome"]] = own.get(row["outcome"], 0) + row["documents"]
            for unit in units:
                own[unit.replace("_", " ")] += row.get(unit) or 0
    ordered = sorted(sums.items(), key=lambda item: (-item[1]["documents in"], item[0]))
    found = [{"source": name, **own} for name, own in ordered]
    return [*found, {"source": "all", **total}] if len(found) > 1 else found


def by_reason(rows: Sequence[Row]) -> list[Row]:
    """A row an outcome and reason, what took most first; documents that went on as they were have none."""
    units = _units(rows)
    sums: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row["outcome"] == "kept":
            continue
        own = sums.setdefault((row["outcome"], row["reason"]), {"documents": 0, **dict.fromkeys(units, 0)})
        own["documents"] += row["documents"]
        for unit in units:
            own[unit] += row.get(unit) or 0
    ordered = sorted(sums.items(), key=lambda item: (-item[1]["documents"], item[0]))
    return [
        {"outcome": outcome, "reason": reason, **{k.replace("_", " "): v for k, v in own.items()}}
        for (outcome, reason), own in ordered
    ]


def _units(rows: Sequence[Row]) -> list[str]:
    """Bytes and tokens, in and out, as far as the rows count them."""
    names = dict.fromkeys(name for row in rows for name in row if name.endswith((IN, OUT)))
    return sorted(names, key=lambda name: (name.rpartition("_")[0], name.endswith(OUT)))


def _empty(units: Iterable[str]) -> Row:
    return {"documents in": 0, **dict.fromkeys(OUTCOMES, 0), **{u.replace("_", " "): 0 for u in units}}


def joined_histograms(rows: Iterable[Mapping[str, Any]]) -> Bins:
    """name → kept or removed → lower end of a bin → documents; what was changed went on, and counts as kept."""
    joined: Bins = {}
    for row in rows:
        outcome = "removed" if row["outcome"] == "removed" else "kept"
        bins = joined.setdefault(row["name"], {"kept": {}, "removed": {}})[outcome]
        bins[row["low"]] = bins.get(row["low"], 0) + row["documents"]
    return joined
