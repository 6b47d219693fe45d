"""The texts that spans are looked for in, and the way from their characters to those of the documents."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np

from gristmill.data.documents import Row, atomic, read_rows

Span = tuple[int, int]
LINE = np.dtype(
    [
        ("document", "<u8"),  # its number in the shard
        ("start", "<u4"),  # characters that go
        ("end", "<u4"),
        ("kept", "<u8"),  # shard and number of the document that holds it first
        ("kept_start", "<u4"),
        ("kept_end", "<u4"),
        ("documents", "<u8"),  # that hold it
    ]
)
AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Text:
    """A document, and its text without the lines that repeat.

    Attributes:
        number: of the document in its shard, from 0.
        text: what is left of the row's text; empty where its kind is not looked at.
        lines: the lines that are gone, of type LINE, in order and apart from each other.
    """

    number: int
    row: Row
    text: str
    lines: np.ndarray

    @property
    def gone(self) -> list[Span]:
        return list(zip(self.lines["start"].tolist(), self.lines["end"].tolist(), strict=True))


class Texts:
    """Makes texts of the rows of a shard, which come in order; `lines` is the file of the lines that go, if any."""

    def __init__(self, kinds: Collection[str], lines: Path | None) -> None:
        self._kinds, self._left = kinds, np.zeros(0, LINE)
        self._blocks = _blocks(lines) if lines else iter(())

    def of(self, number: int, row: Row) -> Text:
        text = Text(number, row, row["text"] if row["metadata"]["kind"] in self._kinds else "", self._lines(number))
        return replace(text, text=without(text.text, text.gone)) if len(text.lines) else text

    def _lines(self, number: int) -> np.ndarray:
        while not len(self._left) or self._left["document"][-1] <= number:
            block = next(self._blocks, None)
            if block is None:
                break
            self._left = np.concatenate([self._left, block])
        count = int(np.searchsorted(self._left["document"], number, "right")) if len(self._left) else 0
        own, self._left = self._left[:count], self._left[count:]
        return own


def read_texts(shard: Path, kinds: Collection[str], lines: Path | None) -> Iterator[Text]:
    """The texts of a shard."""
    texts = Texts(kinds, lines)
    for number, row in enumerate(read_rows(shard)):
        yield texts.of(number, row)


def _blocks(path: Path) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while held := file.read(AT_ONCE * LINE.itemsize):
            yield np.frombuffer(held, LINE)


def without(text: str, gone: Sequence[Span]) -> str:
    """The text without the spans, which are in order and apart from each other."""
    begins = [0, *(end for _, end in gone)]
    ends = [*(start for start, _ in gone), len(text)]
    return "".join(text[a:b] for a, b in zip(begins, ends, strict=True))


def back(spans: Sequence[Span], gone: Sequence[Span]) -> list[Span]:
    """Spans of a text from which others are gone, as spans of the text before: cut where something was gone."""
    if not gone:
        return list(spans)
    begins = [0, *(end for _, end in gone)]  # of what is kept, in the text before
    ends = [*(start for start, _ in gone)]
    at = [0, *accumulate(b - a for a, b in zip(begins[:-1], ends, strict=True))]  # of the same, in the text after
    found = []
    for start, end in spans:
        part = bisect_right(at, start) - 1
        while start < end:
            stop = min(end, at[part + 1]) if part + 1 < len(at) else end
            if start < stop:
                found.append((begins[part] + start - at[part], begins[part] + stop - at[part]))
            start, part = stop, part + 1
    return found


def united(spans: Sequence[Span]) -> list[Span]:
    """The same numbers in spans that are in order and do not touch."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


class Ids:
    """The ids of a shard's documents on disk, read one by one: a shard may hold more than fit in memory."""

    def __init__(self, path: Path) -> None:
        self._text, self._ends = path.open("rb"), path.with_suffix(".ends").open("rb")

    def of(self, number: int) -> str:
        self._ends.seek(8 * number)
        begin, end = np.frombuffer(self._ends.read(16), "<u8").tolist()
        self._text.seek(begin)
        return self._text.read(end - begin).decode("utf-8", "surrogatepass")

    def close(self) -> None:
        self._text.close()
        self._ends.close()


@contextmanager
def write_ids(path: Path) -> Iterator[Callable[[str], None]]:
    """A function that takes the ids in turn; the files are whole when the block ends well."""
    with (
        atomic(path) as text_part,
        atomic(path.with_suffix(".ends")) as ends_part,
        text_part.open("wb") as text,
        ends_part.open("wb") as ends,
    ):
        at = 0
        ends.write(np.uint64(0).tobytes())

        def add(identifier: str) -> None:
            nonlocal at
            at += text.write(identifier.encode("utf-8", "surrogatepass"))
            ends.write(np.uint64(at).tobytes())

        yield add
