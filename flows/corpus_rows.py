"""Documents of a corpus stage for people: which were kept, changed or removed, and what in them decided."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gristmill.data.documents import id_hash
from gristmill.data.sieve import CLOSES, OPENS, highlighted
from gristmill.flows.corpus_results import Result, Row

OUTCOMES = ("removed", "changed", "kept")
BOLD, DIM, PLAIN = "\x1b[1;31m", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class Asked:
    """Which rows are wanted; what is empty is not asked for.

    Attributes:
        outcome: removed, changed or kept.
        reason: a part of the rule's name.
        source, identifier: as in the row.
    """

    outcome: str = "kept"
    reason: str = ""
    source: str = ""
    identifier: str = ""


def found_rows(result: Result, asked: Asked, shards: list[str] | None = None) -> Iterator[Row]:
    """Rows of a result, in order, streamed: `outcome`, `reason`, `source`, `id`, `because` or `edits`, and `text`.

    `spans` are the characters of the text that decided. A changed document's text is the one before, where its input
    is still in the store, and so are its spans; otherwise the text after, without spans.

    Args:
        shards: look in these alone; in all by default.
    """
    for name in result.shards if shards is None else shards:
        rows = _changed(result, name) if asked.outcome == "changed" else _stored(result, name, asked.outcome)
        for row in rows:
            if _fits(row, asked):
                yield row


def shards_with(chain: list[Result], identifier: str) -> list[str]:
    """The shards that may hold a document, by the indexes of ids: a few bytes a document are read, and no text."""
    import numpy as np

    wanted = np.uint64(id_hash(identifier))
    return [name for name in chain[0].shards if bool((chain[0].hashes(name) == wanted).any())]


def _fits(row: Row, asked: Asked) -> bool:
    return (
        asked.reason.lower() in row["reason"].lower()
        and asked.source in ("", row["source"])
        and asked.identifier in ("", row["id"])
    )


def _stored(result: Result, name: str, outcome: str) -> Iterator[Row]:
    """Rows as the shard has them, of documents/ or removed/."""
    for row in result.rows("removed" if outcome == "removed" else "documents", name):
        because = row.get("because") or {}
        yield {
            "outcome": outcome,
            "reason": row.get("reason", ""),
            "source": row["metadata"]["source"],
            "id": row["id"],
            "metadata": row["metadata"],
            "because": because,
            "spans": because.get("spans") or [],
            "text": row["text"],
        }


def _changed(result: Result, name: str) -> Iterator[Row]:
    before = result.input("documents")
    holder = before if before is not None and before.shard("documents", name) is not None else result
    rows = holder.rows("documents", name)
    for change in result.rows("changed", name):
        row = next((row for row in rows if row["id"] == change["id"]), None)
        if row is None:
            raise ValueError(
                f"{holder.name}: documents/{name} lacks {change['id']!r}, which {result.name} changed: verify the store"
            )
        yield {
            "outcome": "changed",
            "reason": ", ".join(sorted({edit["reason"] for edit in change["edits"]})),
            "source": change["source"],
            "id": change["id"],
            "metadata": row["metadata"],
            "edits": change["edits"],
            "spans": [[e["start"], e["end"]] for e in change["edits"]] if holder is before else [],
            "text": row["text"],
        }


def as_lines(row: Row, characters: int, colour: bool) -> list[str]:
    """A row for a terminal: what became of it, why, and the text around what decided.

    Args:
        characters: of the text.
        colour: mark with colours; with ⟦ and ⟧ otherwise.
    """
    head = visible(f"{row['outcome']}  {row['id']}  ({row['source']})")
    facts = [row["reason"]] if row["reason"] else []
    facts += [f"{k}: {_said(v)}" for k, v in row.get("because", {}).items() if k != "spans"]
    facts += [f"[{e['start']}, {e['end']}) → {e['now']!r} ({e['reason']})" for e in row.get("edits", [])[:8]]
    text = highlighted(row["text"], row["spans"], characters)
    return [
        f"{BOLD if row['outcome'] == 'removed' else DIM}{head}{PLAIN}" if colour else head,
        *(f"  {visible(fact)}" for fact in facts),
        f"  {coloured(visible(text)) + PLAIN if colour else visible(text)}",
    ]


def _said(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def visible(text: str) -> str:
    """A text without control characters: a document must not steer the terminal that shows it."""
    return "".join(c if c.isprintable() else "�" for c in text)


def coloured(text: str) -> str:
    """What stands between ⟦ and ⟧ in a terminal's colour."""
    return text.replace(OPENS, BOLD).replace(CLOSES, PLAIN)
