"""The documents that are compared, a part a shard: those of earlier indexes first, in order, and then this run's.

A document has one number, its part's offset and its place; numbers ascend in the order in which documents came.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from gristmill.data.dedup.arrays import Arrays, read_exactly
from gristmill.data.documents import write_json_lines

MAPS = 256  # memory maps held at a time


@dataclass(frozen=True)
class Part:
    """One shard's index: `stem` with the suffixes .keys, .shingles and .fate; `own` is of this run."""

    stem: str
    offset: int
    documents: int
    own: bool

    def file(self, suffix: str) -> Path:
        """Its file of keys, shingles or fate."""
        return Path(f"{self.stem}.{suffix}")

    @property
    def end(self) -> int:
        """The number behind its last document's."""
        return self.offset + self.documents


class Parts:
    """All parts, in order."""

    def __init__(self, parts: list[Part]) -> None:
        self.all = parts
        self._mapped: dict[int, np.ndarray] = {}

    @classmethod
    def listed(cls, earlier: list[Path], own: list[Path]) -> Parts:
        """The parts of these stems."""
        parts: list[Part] = []
        for stem in [*earlier, *own]:
            with Arrays(Path(f"{stem}.keys")) as arrays:
                count = arrays.count("id_ends")
            parts.append(Part(str(stem), parts[-1].end if parts else 0, count, len(parts) >= len(earlier)))
        return cls(parts)

    @classmethod
    def load(cls, path: Path) -> Parts:
        """What `save` wrote."""
        return cls([Part(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()])

    def save(self, path: Path) -> None:
        """A line a part: what every task reads to know where the others' files lie."""
        write_json_lines(path, (asdict(part) for part in self.all))

    @cached_property
    def offsets(self) -> list[int]:
        """The number of each part's first document."""
        return [part.offset for part in self.all]

    @cached_property
    def own_from(self) -> int:
        """The number of this run's first document."""
        return next((part.offset for part in self.all if part.own), self.documents)

    @property
    def documents(self) -> int:
        """How many there are in all."""
        return self.all[-1].end if self.all else 0

    def spread(self, numbers: np.ndarray) -> Iterator[tuple[Part, np.ndarray]]:
        """Ascending document numbers, part by part: the part, and which of them (slice bounds) lie in it."""
        at = 0
        while at < len(numbers):
            part = self.all[bisect.bisect_right(self.offsets, int(numbers[at])) - 1]
            stop = int(np.searchsorted(numbers, np.uint64(part.end)))
            yield part, np.arange(at, stop)
            at = stop

    def shingles(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sorted n-gram hashes of documents of ascending numbers, one after another, and their ends."""
        sizes, starts = self.shingle_counts(numbers)
        ends = np.cumsum(sizes)
        flat = np.empty(int(ends[-1]) if len(ends) else 0, np.uint32)
        for part, which in self.spread(numbers):
            path = part.file("shingles")
            with path.open("rb", buffering=0) as file:
                descriptor = file.fileno()
                for i in which.tolist():
                    own = flat[ends[i] - sizes[i] : ends[i]]
                    read_exactly(descriptor, own, 4 * int(starts[i]), path)
                    own.sort()
        return flat, ends

    def shingle_counts(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many n-gram hashes documents of ascending numbers have, and where theirs begin in their parts' files."""
        stops, starts = np.zeros(len(numbers), np.int64), np.zeros(len(numbers), np.int64)
        for part, which in self.spread(numbers):
            places = (numbers[which] - np.uint64(part.offset)).astype(np.int64)
            ends = self._shingle_ends(part)
            stops[which] = ends[places]
            starts[which] = np.where(places > 0, ends[places - 1], 0)
        return stops - starts, starts

    def _shingle_ends(self, part: Part) -> np.ndarray:
        """The map of a part's array; some are remembered, since opening one costs as much as a hundred look-ups."""
        found = self._mapped.get(part.offset)
        if found is None:
            if len(self._mapped) == MAPS:
                self._mapped.clear()
            with Arrays(part.file("keys")) as arrays:
                found = self._mapped[part.offset] = arrays.mapped("shingle_ends")
        return found

    def ids(self, numbers: np.ndarray) -> list[str]:
        """The ids of documents of ascending numbers."""
        found: list[str] = []
        for part, which in self.spread(numbers):
            places = (numbers[which] - np.uint64(part.offset)).astype(np.int64)
            with Arrays(part.file("keys")) as arrays:
                ends = arrays.mapped("id_ends")
                stops, starts = ends[places], np.where(places > 0, ends[places - 1], 0)
                found += [
                    arrays.read("ids", int(a), int(b)).tobytes().decode("utf-8", "surrogatepass")
                    for a, b in zip(starts, stops, strict=True)
                ]
        return found
