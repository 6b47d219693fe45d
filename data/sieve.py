"""One pass over a shard in which each document is kept, changed or removed; nothing is held but the document at hand.

    documents/<shard>   what goes on, in the order in which it came
    removed/<shard>     what does not: the whole row, with `reason` and `because`
    changed/<shard>     of what goes on with another text: id, source and the edits, at characters of the text before
    work/<shard>.json   the tally; written last, so it marks a shard that is done

A stage gives a judge, a function from a document to its verdict; the files, the funnel by source and reason, the
histograms and the samples that people look at come from here, and are alike for every stage. The first two folders
together hold every document that came in: a decision can be looked at, and taken back.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gristmill.data.documents import Row, RowWriter, open_rows, read_rows, utf8_size, write_json_lines
from gristmill.data.stage_types import Metrics

SHOWN = 20  # documents of each outcome among the samples
CHANGED_SHOWN = 10
EXCERPT = 320  # characters of a sample's text
LEAD = 80  # of these before the first place to see
BINS = 20  # of a histogram of values between 0 and 1
OPENS, CLOSES = "⟦", "⟧"  # around what is to be seen in a sample's text


@dataclass(frozen=True)
class Edit:
    """Characters [start, end) of a document's text before, which `now` takes the place of, and the rule that asked."""

    start: int
    end: int
    reason: str
    now: str = ""


@dataclass(frozen=True)
class Verdict:
    """What becomes of a document.

    Attributes:
        reason: the rule that removed it, from a small set (it is counted by); empty where the document goes on.
        because: what shows the reason to a person: `duplicate_of`, `similarity`, `spans` ([[start, end], …] of
            characters, shown highlighted), `detail`.
        edits: changes of its text, in ascending order and apart from each other; of a document that is removed, what
            samples of it must not show.
        metadata: what is added to the metadata of a document that goes on.
        values: numbers for the histograms, by name; between 0 and 1.
    """

    reason: str = ""
    because: Mapping[str, Any] = field(default_factory=dict)
    edits: Sequence[Edit] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)


KEEP = Verdict()


def remove(reason: str, *, values: Mapping[str, float] | None = None, **because: Any) -> Verdict:
    """The verdict that removes a document by the rule `reason`."""
    return Verdict(reason, because, values=values or {})


def edited(text: str, edits: Sequence[Edit]) -> str:
    """The text with its edits made.

    Raises:
        ValueError: an edit lies outside the text or reaches into the next.
    """
    parts, at = [], 0
    for edit in edits:
        if not at <= edit.start <= edit.end <= len(text):
            raise ValueError(f"the edit {edit} does not follow character {at} of a text of {len(text)}")
        parts += [text[at : edit.start], edit.now]
        at = edit.end
    return "".join([*parts, text[at:]])


Judge = Callable[[Row, int], Verdict]
"""From a row and its place in the shard, from 0, to what becomes of it."""

Hide = Callable[[Row], Sequence[Sequence[int]]]
"""From a row to the [start, end) of its text that no sample may show; asked for the few rows that become samples."""


def sieve_shard(shard: Path, out: Path, judge: Judge, hide: Hide | None = None) -> None:
    """Judge every document of a shard and write what becomes of it; the tally is work/<shard>.json.

    With `hide`, samples that show a text as it came in have a ■ in place of each character to hide.

    Raises:
        ValueError: the shard is damaged.
    """
    tally = Tally(hide)
    with ExitStack() as stack:
        writers: dict[str, RowWriter] = {"documents": stack.enter_context(open_rows(out / "documents" / shard.name))}

        def writer(kind: str) -> RowWriter:
            if kind not in writers:
                writers[kind] = stack.enter_context(open_rows(out / kind / shard.name))
            return writers[kind]

        for place, row in enumerate(read_rows(shard)):
            verdict = judge(row, place)
            if verdict.reason:
                writer("removed").write({**row, "reason": verdict.reason, "because": dict(verdict.because)})
                tally.add("removed", row, verdict, row["text"])
                continue
            if not verdict.edits and not verdict.metadata:
                writers["documents"].write(row)
                tally.add("kept", row, verdict, row["text"])
                continue
            text = edited(row["text"], verdict.edits) if verdict.edits else row["text"]
            metadata = {**row["metadata"], **verdict.metadata} if verdict.metadata else row["metadata"]
            writers["documents"].write({**row, "text": text, "metadata": metadata})
            if verdict.edits:
                edits = [vars(e) for e in verdict.edits]
                writer("changed").write({"id": row["id"], "source": row["metadata"]["source"], "edits": edits})
            tally.add("changed" if verdict.edits else "kept", row, verdict, text)
    write_json_lines(tally_path(out, shard), [tally.as_row()])


def tally_path(out: Path, shard: Path) -> Path:
    """Where the tally of a shard lies while the stage works."""
    return out / "work" / f"{shard.name}.json"


class Tally:
    """Counts, histograms and samples of one shard; sums and choices that do not depend on the shards' order."""

    def __init__(self, hide: Hide | None = None) -> None:
        self._hide = hide
        self.counts: dict[tuple[str, str, str], list[int]] = {}
        self.bins: dict[tuple[str, str, float], int] = {}
        self.samples: dict[str, list[tuple[str, dict[str, Any]]]] = {}

    def add(self, outcome: str, row: Row, verdict: Verdict, text_after: str) -> None:
        """Count a document; `outcome` is kept, changed or removed."""
        text = row["text"]
        size = utf8_size(text)
        after = 0 if outcome == "removed" else size if text_after is text else utf8_size(text_after)
        # a document changed by two rules is one document: it counts under the first of them by name
        reason = verdict.reason or min((e.reason for e in verdict.edits), default="")
        self._count(row["metadata"]["source"], outcome, reason, size, after)
        self._bin("characters", outcome, float(1 << max(0, len(text).bit_length() - 1)))
        for name, value in verdict.values.items():
            self._bin(name, outcome, min(BINS - 1, int(max(0.0, value) * BINS)) / BINS)
        self._sample(outcome, row, verdict)

    def _count(self, source: str, outcome: str, reason: str, before: int, after: int) -> None:
        count = self.counts.setdefault((source, outcome, reason), [0, 0, 0])
        count[0] += 1
        count[1] += before
        count[2] += after

    def _bin(self, name: str, outcome: str, low: float) -> None:
        self.bins[name, outcome, low] = self.bins.get((name, outcome, low), 0) + 1

    def _sample(self, outcome: str, row: Row, verdict: Verdict) -> None:
        """Keep the documents whose ids hash lowest: a fair draw that no order of work changes."""
        reason = verdict.reason
        if verdict.edits and not reason:
            reason = ", ".join(sorted({e.reason for e in verdict.edits}))
        held = self.samples.setdefault(f"{outcome}/{reason}", [])
        draw = hashlib.sha256(row["id"].encode()).hexdigest()[:16]
        most = SHOWN if outcome != "changed" else CHANGED_SHOWN
        if len(held) < most or draw < held[-1][0]:
            if self._hide is not None and not _shows_what_follows(verdict):
                row = {**row, "text": _covered(row["text"], self._hide(row))}
            held.append((draw, _sample_row(outcome, reason, row, verdict)))
            held.sort(key=lambda entry: entry[0])
            del held[most:]

    def as_row(self) -> Row:
        """JSON's own values, in an order of their own."""
        return {
            "counts": [[*key, *count] for key, count in sorted(self.counts.items())],
            "bins": [[*key, count] for key, count in sorted(self.bins.items())],
            "samples": {name: [list(entry) for entry in held] for name, held in sorted(self.samples.items())},
        }

    def merge(self, row: Row) -> None:
        """Take in another tally, as `as_row` gave it."""
        for source, outcome, reason, *numbers in row["counts"]:
            count = self.counts.setdefault((source, outcome, reason), [0, 0, 0])
            for i, number in enumerate(numbers):
                count[i] += number
        for name, outcome, low, number in row["bins"]:
            self.bins[name, outcome, low] = self.bins.get((name, outcome, low), 0) + number
        for name, entries in row["samples"].items():
            held = self.samples.setdefault(name, [])
            held += [(draw, sample) for draw, sample in entries]
            held.sort(key=lambda entry: (entry[0], entry[1]["id"]))
            del held[SHOWN if not name.startswith("changed/") else CHANGED_SHOWN :]


def _sample_row(outcome: str, reason: str, row: Row, verdict: Verdict) -> Row:
    text, spans = row["text"], verdict.because.get("spans") or [[e.start, e.end] for e in verdict.edits]
    if _shows_what_follows(verdict):
        text, spans = edited(text, verdict.edits), _places_after(verdict.edits)
    shown = {k: v for k, v in verdict.because.items() if k != "spans" and isinstance(v, str | int | float)}
    return {
        "outcome": outcome,
        "reason": reason,
        "source": row["metadata"]["source"],
        "id": row["id"],
        **shown,
        "text": highlighted(text, spans),
    }


def _shows_what_follows(verdict: Verdict) -> bool:
    """Whether a sample shows the text after the edits: what they replaced with something may be a secret."""
    return any(e.now.strip() for e in verdict.edits)


def _covered(text: str, spans: Sequence[Sequence[int]]) -> str:
    """The text with the characters of `spans` covered; every other one keeps its place."""
    parts, at = [], 0
    for start, end in spans:
        parts += [text[at:start], "■" * (end - start)]
        at = end
    return "".join([*parts, text[at:]])


def _places_after(edits: Sequence[Edit]) -> list[list[int]]:
    """Where, in the text after, stands what edits put there."""
    places, shift = [], 0
    for edit in edits:
        places.append([edit.start + shift, edit.start + shift + len(edit.now)])
        shift += len(edit.now) - (edit.end - edit.start)
    return places


def highlighted(text: str, spans: Iterable[Sequence[int]], characters: int = EXCERPT) -> str:
    """A piece of a text on one line, from a little before the first span, with its spans between ⟦ and ⟧."""
    ordered = sorted((int(a), int(b)) for a, b in spans)
    first = max(0, ordered[0][0] - LEAD) if ordered else 0
    last = min(len(text), first + characters)
    parts, at = ["…" if first else ""], first
    for start, end in ordered:
        start, end = max(start, at), min(end, last)
        if start < end:
            parts += [text[at:start], OPENS, text[start:end], CLOSES]
            at = end
    parts += [text[at:last], "…" if last < len(text) else ""]
    return " ".join("".join(parts).split())


def conclude(out: Path, shards: Sequence[Path]) -> Metrics:
    """Merge the tallies of all shards: writes funnel.jsonl, histograms.jsonl and samples.jsonl; the stage's metrics.

    The metrics are documents_in, documents_out, bytes_in, bytes_out, changed (documents that go on with another text)
    and the tables removed_by_reason, removed_by_source and changed_by_reason.
    """
    whole = Tally()
    for shard in shards:
        whole.merge(json.loads(tally_path(out, shard).read_text(encoding="utf-8")))
    names = ("documents", "bytes_in", "bytes_out")
    funnel = [
        {"source": source, "outcome": outcome, "reason": reason, **dict(zip(names, count, strict=True))}
        for (source, outcome, reason), count in sorted(whole.counts.items())
    ]
    write_json_lines(out / "funnel.jsonl", funnel)
    bins = [
        {"name": name, "outcome": outcome, "low": low, "documents": count}
        for (name, outcome, low), count in sorted(whole.bins.items())
    ]
    write_json_lines(out / "histograms.jsonl", bins)
    write_json_lines(
        out / "samples.jsonl", [*_chosen(whole, "removed"), *_chosen(whole, "changed"), *_chosen(whole, "kept")]
    )
    return _metrics(funnel)


def _chosen(whole: Tally, outcome: str) -> list[Row]:
    """Samples of an outcome, in turn by reason."""
    held = {name: entries for name, entries in sorted(whole.samples.items()) if name.startswith(f"{outcome}/")}
    turns = ((turn, name, sample) for name, entries in held.items() for turn, (_, sample) in enumerate(entries))
    most = SHOWN if outcome != "changed" else CHANGED_SHOWN
    return [sample for _, _, sample in heapq.nsmallest(most, turns, key=lambda entry: entry[:2])]


def _metrics(funnel: list[Row]) -> Metrics:
    def total(field: str, *outcomes: str) -> int:
        return sum(r[field] for r in funnel if r["outcome"] in outcomes)

    def table(outcome: str, by: str) -> dict[str, int]:
        found: dict[str, int] = dict.fromkeys(sorted({r[by] for r in funnel}), 0) if by == "source" else {}
        for row in funnel:
            if row["outcome"] == outcome:
                found[row[by]] = found.get(row[by], 0) + row["documents"]
        return dict(sorted(found.items()))

    every = ("kept", "changed", "removed")
    return {
        "documents_in": total("documents", *every),
        "documents_out": total("documents", "kept", "changed"),
        "bytes_in": total("bytes_in", *every),
        "bytes_out": total("bytes_out", *every),
        "changed": total("documents", "changed"),
        "removed_by_reason": table("removed", "reason"),
        "removed_by_source": table("removed", "source"),
        "changed_by_reason": table("changed", "reason"),
    }
