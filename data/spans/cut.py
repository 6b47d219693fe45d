"""The last pass over a shard: spans are compared with their originals, and removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gristmill.data.documents import Row, excerpt, open_rows, write_json_lines
from gristmill.data.sieve import KEEP, Edit, Verdict, edited, remove, sieve_shard
from gristmill.data.spans.exchange import SHIFT, WITHIN
from gristmill.data.spans.search import Search
from gristmill.data.spans.texts import Ids, Span, Text, Texts, back, united
from gristmill.data.spans.tokens import Tokeniser

SHOWN = 20  # repeats among the samples
REASON = "spans: too little left"
SPANS_NAMED = 1000  # of a removed document
OPEN = 64  # shards whose ids are at hand
NO_LINKS = np.empty((0, 11), np.uint64)


@dataclass(frozen=True)
class Cut:
    """What the last pass needs beside the search.

    Attributes:
        unit: of lines.
        drops_all_from: documents that must hold a line which none of them keeps; 0 where the first one keeps it.
        substring: whether spans of tokens were looked for.
        least_characters_left: of a document that goes on.
    """

    unit: str
    drops_all_from: int
    substring: bool
    least_characters_left: int


def cut_marker(out: Path, number: int) -> Path:
    """What a shard that is done adds to the metrics and samples."""
    return out / "work" / "cut" / f"{number:06d}.json"


def cut_shard(search: Search, cut: Cut, number: int, shard: Path, out: Path) -> None:
    """Write documents/, removed/, changed/ and repeats/ of a shard."""
    path = out / "repeats" / shard.name
    with ExitStack() as stack:
        knife = stack.enter_context(closing(_Knife(search, cut, number)))
        repeats = stack.enter_context(open_rows(path))
        knife.write = repeats.write
        sieve_shard(shard, out, knife.judge)
    if not repeats.count:
        path.unlink()
    write_json_lines(cut_marker(out, number), [{"counts": knife.counts, "samples": knife.samples}])


def most_frequent(repeats: Iterable[Row]) -> list[Row]:
    """The repeats to show: the most frequent first, one of each original."""
    found: dict[tuple, Row] = {}
    for repeat in sorted(repeats, key=lambda r: (-r["count"], r["id"], r["start"], r["end"])):
        kept = repeat["kept_id"], repeat["kept_start"], repeat["kept_end"]
        found.setdefault(kept if repeat["kept_id"] is not None else (repeat["text"],), repeat)
    return list(found.values())[:SHOWN]


class _Links:
    """The links of a shard with their answers, by document."""

    def __init__(self, search: Search, number: int) -> None:
        self._starts = np.load(search.token_starts(number), mmap_mode="r")
        self._runs = self._sorted(search, number)
        self._held = NO_LINKS

    @staticmethod
    def _sorted(search: Search, number: int) -> Iterator[np.ndarray]:
        for questions, answers in search.links.replies(number):
            links = np.concatenate([questions, answers], 1)
            yield links[np.lexsort((links[:, 2], links[:, 1]))]

    def of(self, document: int) -> np.ndarray:
        """Rows (original's place, first token in the document, tokens, then the answer)."""
        start, end = int(self._starts[document]), int(self._starts[document + 1])
        while not len(self._held) or int(self._held[-1, 1]) < end:
            run = next(self._runs, None)
            if run is None:
                break
            self._held = np.concatenate([self._held, run])
        count = int(np.searchsorted(self._held[:, 1], np.uint64(end)))
        own, self._held = self._held[:count].copy(), self._held[count:]
        own[:, 1] -= np.uint64(start)
        return own


class _Knife:
    """Judges the documents of a shard and writes down what repeats what."""

    def __init__(self, search: Search, cut: Cut, number: int) -> None:
        self._search, self._cut = search, cut
        self._texts = Texts(search.kinds, search.lines_that_go(number) if search.lines else None)
        self._links = _Links(search, number) if cut.substring else None
        self._tokeniser = Tokeniser()
        self._ids: dict[int, Ids] = {}
        self.counts = {"lines": 0, "line_characters": 0, "substrings": 0, "substring_characters": 0, "collisions": 0}
        self.samples: list[Row] = []
        self.write: Callable[[Row], None] = lambda _: None

    def judge(self, row: Row, number: int) -> Verdict:
        text = self._texts.of(number, row)
        links = self._links.of(number) if self._links else NO_LINKS
        if not len(text.lines) and not len(links):
            return KEEP
        share: dict[str, int] = {}  # characters that go, by the document that keeps them
        for line in self._lines(text):
            self._note(row["text"], line, share)
        substrings, spans = self._substrings(text, links)
        for substring in substrings:
            self._note(row["text"], substring, share)
        edits = self._edits(text, spans)
        if not edits:
            return KEEP
        values = {"removed_share": sum(e.end - e.start for e in edits) / len(row["text"])}
        left = len(edited(row["text"], edits).strip())
        if left >= self._cut.least_characters_left:
            return Verdict(edits=edits, values=values)
        return remove(
            REASON,
            values=values,
            detail=f"{left} characters are left of {len(row['text'])}",
            spans=[[e.start, e.end] for e in edits[:SPANS_NAMED]],
            **({"duplicate_of": min(share, key=lambda i: (-share[i], i))} if share else {}),
        )

    def _lines(self, text: Text) -> Iterator[Row]:
        for _, start, end, place, kept_start, kept_end, documents in text.lines.tolist():
            kept = not (self._cut.drops_all_from and documents >= self._cut.drops_all_from)
            self.counts["lines"] += 1
            self.counts["line_characters"] += end - start
            yield {
                "unit": self._cut.unit,
                "id": text.row["id"],
                "start": start,
                "end": end,
                "kept_id": self._id(place) if kept else None,
                "kept_start": kept_start if kept else None,
                "kept_end": kept_end if kept else None,
                "count": documents,
            }

    def _substrings(self, text: Text, links: np.ndarray) -> tuple[Iterator[Row], list[Span]]:
        """The links whose tokens are those of their originals, and the characters of `text` that they cover."""
        if not len(links):
            return iter(()), []
        tokens = [(first, first + count) for first, count in links[:, 1:3].tolist()]
        places = self._tokeniser.locate(text.text, tokens)
        alike = [
            self._tokeniser.digest(text.text, *place) == link[7:].astype("<u8").tobytes()
            for link, place in zip(links, places, strict=True)
        ]
        self.counts["substrings"] += sum(alike)
        self.counts["collisions"] += len(alike) - sum(alike)
        chosen = [i for i, same in enumerate(alike) if same]
        starts, ends = ({tokens[i][side]: places[i][side] for i in chosen} for side in (0, 1))
        # united as tokens: two spans with nothing but white space between are one
        spans = [(starts[first], ends[last]) for first, last in united([tokens[i] for i in chosen])]
        return (self._repeat(text, links[i], places[i]) for i in chosen), spans

    def _repeat(self, text: Text, link: np.ndarray, place: Span) -> Row:
        parts = back([place], text.gone)
        return {
            "unit": "substring",
            "id": text.row["id"],
            "start": parts[0][0],
            "end": parts[-1][1],
            "kept_id": self._id(int(link[0]) & ~WITHIN | int(link[3])),
            "kept_start": int(link[4]),
            "kept_end": int(link[5]),
            "count": int(link[6]),
            "tokens": int(link[2]),
        }

    def _edits(self, text: Text, spans: list[Span]) -> list[Edit]:
        """All that goes, in characters of the document."""
        substrings = back(spans, text.gone)
        self.counts["substring_characters"] += sum(end - start for start, end in substrings)
        edits = [Edit(start, end, self._cut.unit) for start, end in united(text.gone)]
        return sorted([*edits, *(Edit(start, end, "substring") for start, end in substrings)], key=lambda e: e.start)

    def _id(self, place: int) -> str:
        shard = place >> SHIFT
        if shard not in self._ids:
            if len(self._ids) == OPEN:
                self._ids.pop(next(iter(self._ids))).close()
            self._ids[shard] = Ids(self._search.ids(shard))
        return self._ids[shard].of(place & WITHIN)

    def _note(self, text: str, repeat: Row, share: dict[str, int]) -> None:
        """Write a repeat down, and keep it as a sample if it is among the most frequent."""
        self.write(repeat)
        if repeat["kept_id"] is not None:
            share[repeat["kept_id"]] = share.get(repeat["kept_id"], 0) + repeat["end"] - repeat["start"]
        held = self.samples
        if len(held) < SHOWN or repeat["count"] > held[-1]["count"]:
            self.samples = most_frequent([*held, {**repeat, "text": excerpt(text[repeat["start"] : repeat["end"]])}])

    def close(self) -> None:
        for ids in self._ids.values():
            ids.close()
