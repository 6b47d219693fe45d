"""What one run kept that another did not, and the rule that decided.

A document that was ingested and is not among the last documents was removed by exactly one stage, whose removed/ holds
it. So only the ids of the two ingests (where they differ) and the removed rows are read; they are divided by their
hash into files of a few megabytes, which are compared one after the other: memory does not grow with the corpus.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from gristmill.data.documents import id_hash
from gristmill.flows.corpus_results import Result, Row
from gristmill.flows.identity import canonical

PART_ENTRIES = 1 << 20  # of a partition, about: 26 bytes each
MOST_PARTS = 1024  # files open at once
NOT_INGESTED = "not ingested"
FIELDS = [("id", "<u8"), ("edits", "<u8"), ("rule", "<u2"), ("shard", "<u4"), ("place", "<u4")]


@dataclass
class Difference:
    """Documents that one side kept and the other did not.

    Attributes:
        kept_by: "first" or "second".
        counts: (stage, reason) of the other side → documents.
        edited: (stage, reason) of this side → documents that both kept and this side alone edited, or edited otherwise.
        examples: the first few of each rule, in the order of their shards: id, source, stage, reason, because, text.
    """

    kept_by: str
    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    edited: dict[tuple[str, str], int] = field(default_factory=dict)
    examples: list[Row] = field(default_factory=list)

    @property
    def documents(self) -> int:
        return sum(self.counts.values())


def difference(first: list[Result], second: list[Result], examples: int = 3) -> tuple[Difference, Difference]:
    """What the first chain kept and the second did not, and the other way round.

    Args:
        first, second: each from the sources to the last documents.
        examples: of each rule.
    """
    with tempfile.TemporaryDirectory(prefix="gristmill-diff-") as folder:
        sides = [_Side(chain, Path(folder) / str(i)) for i, chain in enumerate((first, second))]
        same_source = first[0].key == second[0].key
        parts = max(1, min(MOST_PARTS, sum(side.size() for side in sides) // PART_ENTRIES))
        for side in sides:
            side.divide(parts, with_ingested=not same_source)
        found = (Difference("first"), Difference("second"))
        places: tuple[dict[int, list[Any]], dict[int, list[Any]]] = ({}, {})
        for part in range(parts):
            entries = [side.entries(part) for side in sides]
            for kept, lost in ((0, 1), (1, 0)):
                _compare(sides, entries, kept, lost, same_source, found[kept], places[kept], examples)
                _compare_edits(sides[kept].rules, entries[kept], entries[lost], same_source, found[kept])
        for kept, lost in ((0, 1), (1, 0)):
            found[kept].examples = _examples(sides, kept, lost, places[kept])
    return found


class _Side:
    """One chain's removed documents (and ingested ones, where asked for), divided by hash into files."""

    def __init__(self, chain: list[Result], folder: Path) -> None:
        self.chain, self.folder = chain, folder
        self.rules: list[tuple[str, str]] = []
        self._numbers: dict[tuple[str, str], int] = {}
        self._parts = 1

    def size(self) -> int:
        return sum(result.manifest["metrics"].get("documents_in", 0) or 0 for result in self.chain[:2])

    def divide(self, parts: int, *, with_ingested: bool) -> None:
        self._parts = parts
        self.folder.mkdir()
        self._write("removed", self._removed())
        self._write("changed", self._changed())
        if with_ingested:
            self._write("ingested", self._ingested())

    def _write(self, kind: str, batches: Iterator[Any]) -> None:
        import numpy as np

        files = [(self.folder / f"{kind}-{part}").open("wb") for part in range(self._parts)]
        try:
            for batch in batches:
                order = np.argsort(batch["id"] % np.uint64(self._parts), kind="stable")
                ordered = batch[order]
                ends = np.searchsorted(ordered["id"] % np.uint64(self._parts), np.arange(self._parts + 1))
                for file, (start, end) in zip(files, pairwise(ends), strict=True):
                    file.write(ordered[start:end].tobytes())
        finally:
            for file in files:
                file.close()

    def _removed(self) -> Iterator[Any]:
        """Of each shard's removed rows: the id's hash, the rule, and where the row lies."""
        import numpy as np

        for result in self.chain:
            for number, name in enumerate(result.shards):
                rows = [
                    (id_hash(row["id"]), 0, self._rule(result.stage, row["reason"]), number, place)
                    for place, row in enumerate(result.rows("removed", name))
                ]
                if rows:
                    yield np.array(rows, dtype=FIELDS)

    def _changed(self) -> Iterator[Any]:
        """Of each shard's changed documents: the id's hash, that of the edits, and the first rule by name."""
        import numpy as np

        for result in self.chain:
            for number, name in enumerate(result.shards):
                rows = []
                for place, row in enumerate(result.rows("changed", name)):
                    rule = self._rule(result.stage, min(edit["reason"] for edit in row["edits"]))
                    rows.append((id_hash(row["id"]), id_hash(canonical(row["edits"])), rule, number, place))
                if rows:
                    yield np.array(rows, dtype=FIELDS)

    def _ingested(self) -> Iterator[Any]:
        import numpy as np

        for number, name in enumerate(self.chain[0].shards):
            hashes = self.chain[0].hashes(name)
            batch = np.zeros(len(hashes), dtype=FIELDS)
            batch["id"], batch["shard"], batch["place"] = hashes, number, np.arange(len(hashes))
            yield batch

    def _rule(self, stage: str, reason: str) -> int:
        number = self._numbers.setdefault((stage, reason), len(self.rules))
        if number == len(self.rules):
            self.rules.append((stage, reason))
        return number

    def entries(self, part: int) -> dict[str, Any]:
        import numpy as np

        paths = {kind: self.folder / f"{kind}-{part}" for kind in ("removed", "changed", "ingested")}
        return {kind: np.fromfile(path, dtype=FIELDS) for kind, path in paths.items() if path.exists()}


def _compare(
    sides: list[_Side],
    entries: list[dict[str, Any]],
    kept: int,
    lost: int,
    same_source: bool,
    found: Difference,
    places: dict[int, list[Any]],
    examples: int,
) -> None:
    """One partition: what side `lost` removed or never had, and side `kept` has and did not remove."""
    import numpy as np

    removed = entries[lost]["removed"]
    mine = ~np.isin(removed["id"], entries[kept]["removed"]["id"])
    if not same_source:
        mine &= np.isin(removed["id"], entries[kept]["ingested"]["id"])
    _count(removed[mine], sides[lost].rules, found, places, examples)
    if not same_source:
        own = entries[kept]["ingested"]
        new = ~np.isin(own["id"], entries[lost]["ingested"]["id"])
        new &= ~np.isin(own["id"], entries[kept]["removed"]["id"])
        missing = own[new]
        if len(missing):
            found.counts["ingest", NOT_INGESTED] = found.counts.get(("ingest", NOT_INGESTED), 0) + len(missing)
            held = [*places.get(-1, []), *missing]
            places[-1] = sorted(held, key=lambda e: (e["shard"], e["place"]))[:examples]


def _compare_edits(
    rules: list[tuple[str, str]], mine: dict[str, Any], other: dict[str, Any], same_source: bool, found: Difference
) -> None:
    """One partition: the edits of this side, of documents that both kept, which the other did not make."""
    import numpy as np

    own = mine["changed"]
    made = ~np.isin(own["id"] ^ own["edits"], other["changed"]["id"] ^ other["changed"]["edits"])
    for side in (mine, other):
        made &= ~np.isin(own["id"], side["removed"]["id"])
    if not same_source:
        made &= np.isin(own["id"], other["ingested"]["id"])
    for rule, number in zip(*np.unique(own[made]["rule"], return_counts=True), strict=True):
        name = rules[int(rule)]
        found.edited[name] = found.edited.get(name, 0) + int(number)


def _count(
    entries: Any, rules: list[tuple[str, str]], found: Difference, places: dict[int, list[Any]], examples: int
) -> None:
    import numpy as np

    for rule in np.unique(entries["rule"]):
        own = entries[entries["rule"] == rule]
        name = rules[int(rule)]
        found.counts[name] = found.counts.get(name, 0) + len(own)
        first = own[np.lexsort((own["place"], own["shard"]))][:examples]
        held = [*places.get(int(rule), []), *first]
        places[int(rule)] = sorted(held, key=lambda e: (e["shard"], e["place"]))[:examples]


def _examples(sides: list[_Side], kept: int, lost: int, places: dict[int, list[Any]]) -> list[Row]:
    """The rows that were chosen, read again from where they lie."""
    found = []
    for rule, entries in sorted(places.items()):
        stage, reason = sides[lost].rules[rule] if rule >= 0 else ("ingest", NOT_INGESTED)
        holder = sides[kept].chain[0] if rule < 0 else next(r for r in sides[lost].chain if r.stage == stage)
        kind = "documents" if rule < 0 else "removed"
        for entry in entries:
            row = _row_at(holder, kind, int(entry["shard"]), int(entry["place"]))
            found.append(
                {
                    "outcome": "removed",
                    "stage": stage,
                    "reason": reason,
                    "source": row["metadata"]["source"],
                    "id": row["id"],
                    "because": row.get("because") or {},
                    "spans": (row.get("because") or {}).get("spans") or [],
                    "text": row["text"],
                }
            )
    return found


def _row_at(result: Result, kind: str, shard: int, place: int) -> Row:
    for number, row in enumerate(result.rows(kind, result.shards[shard])):
        if number == place:
            return row
    raise ValueError(f"{result.name}: {kind}/{result.shards[shard]} has no row {place}: verify the store")
