"""Where the search for spans keeps its work, and what it looks for; sent to every task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gristmill.data.spans.exchange import Exchange
from gristmill.data.spans.texts import Text, read_texts


@dataclass(frozen=True)
class Search:
    """A search in the shards of a stage's input, which go by their number in the order of their names.

    Attributes:
        work: the folder of partial results.
        partitions: of hashed keys.
        tokens: least length of a span.
        within_documents: whether a span that repeats in its own document counts.
        kinds: of documents that are looked at.
        lines: whether lines were looked for before.
    """

    work: Path
    shards: int
    partitions: int
    kinds: tuple[str, ...]
    lines: bool
    tokens: int = 0
    within_documents: bool = False

    @property
    def sample(self) -> int:
        """Grams among which one is chosen as anchor: every window of `tokens` tokens has an anchor within."""
        return max(1, self.tokens // 2)

    @property
    def gram(self) -> int:
        """Tokens of an anchor: a window of `tokens` holds `sample` grams of this length."""
        return self.tokens - self.sample + 1

    @property
    def anchors(self) -> Exchange:
        """(key, place) → 2 where the key stands in another place too, else 1."""
        return Exchange(self.work / "anchors", self.shards, self.partitions, asks=2, answer="u1")

    @property
    def windows(self) -> Exchange:
        """(key, key, place) → the first place of the key, plus one."""
        return Exchange(self.work / "windows", self.shards, self.partitions, asks=3)

    @property
    def links(self) -> Exchange:
        """(place of the original, own first token, tokens) → document, start, end, copies, SHA-256 of the original.

        The partition that answers is the shard of the original.
        """
        return Exchange(self.work / "links", self.shards, self.shards, asks=3, answers=8)

    @property
    def line_keys(self) -> Exchange:
        """(key, key, document, start and end) → documents that hold the line; document, start and end of the first."""
        return Exchange(self.work / "lines", self.shards, self.partitions, asks=4, answers=3)

    def lines_that_go(self, shard: int) -> Path:
        """Of type `texts.LINE`, in order."""
        return self.work / "gone" / f"{shard:06d}.lines"

    def token_starts(self, shard: int) -> Path:
        """The number of each document's first token in the shard, and of all tokens at the end; int64."""
        return self.work / "tokens" / f"{shard:06d}.npy"

    def ids(self, shard: int) -> Path:
        return self.work / "ids" / f"{shard:06d}.ids"

    def texts(self, number: int, shard: Path) -> Iterator[Text]:
        """The documents of a shard, without the lines that go."""
        return read_texts(shard, self.kinds, self.lines_that_go(number) if self.lines else None)
