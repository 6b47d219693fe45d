"""Generated arithmetic lessons, a pure function of (seed, index)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from gristmill.data.arithmetic import lesson
from gristmill.data.sources.base import Contents, Cursor, Found, Held, Item, Kind, SourceBase

LESSONS_A_PART = 2500
BYTES_A_LESSON = 370  # mean over those of `tiny`


class LessonsSource(SourceBase):
    """Pages of worked problems and single conversations; no chain of the test is among them."""

    type: Literal["lessons"] = "lessons"
    name: str = Field(default="lessons", title="Name", description="Names the token stream.")
    kind: Kind = Field(default="lessons", title="Kind", description="Which filter profile its documents pass.")
    count: int = Field(default=10_000, ge=1, title="Count", description="Lessons to generate.")
    most_terms: int = Field(default=6, ge=2, le=20, title="Most terms", description="Numbers in the longest chain.")
    largest: int = Field(
        default=9, ge=2, le=49, title="Largest number", description="Largest number added or taken away."
    )

    def check(self) -> None:
        """Nothing to look for: lessons are made here."""

    def held(self, contents: Contents) -> Held:
        """Nothing from outside enters them."""
        return Held({"lessons": "generated"})

    def expected_bytes(self) -> int | None:
        """About the mean size of a lesson times their count."""
        return self.bounded(BYTES_A_LESSON * min(self.count, self.max_documents or self.count))

    def parts(self, seed: int) -> list[tuple[int, int]]:
        count = min(self.count, self.max_documents or self.count)
        return [(first, min(first + LESSONS_A_PART, count)) for first in range(0, count, LESSONS_A_PART)]

    def read(self, part: tuple[int, int], seed: int, cursor: Cursor, most: int) -> Iterator[Item]:
        first, end = part
        for index in range(first + cursor.record, end):
            cursor.record += 1
            text = lesson(seed, index, (2, self.most_terms), self.largest)
            yield self.row(Found(text), str(index), {})
