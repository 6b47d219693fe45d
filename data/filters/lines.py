"""Two small rules of this pipeline's own: how long a document may be, and what its lines may be like."""

from __future__ import annotations

from pydantic import Field, model_validator

from gristmill.data.filters.characters import character_table
from gristmill.data.filters.counting import repeated_pieces, split_at_breaks, strip_lines
from gristmill.data.filters.rule import Prepared, Rule, RuleConfig
from gristmill.data.sieve import KEEP, Verdict, remove

SPANS = 40


class Length(RuleConfig):
    """Characters of a document between two bounds."""

    least_characters: int = Field(default=50, ge=0, title="Least characters", description="Shorter documents go.")
    most_characters: int | None = Field(default=None, ge=1, title="Most characters", description="Longer documents go.")

    @model_validator(mode="after")
    def _ordered(self) -> Length:
        if self.most_characters is not None and self.most_characters < self.least_characters:
            raise ValueError(
                f"most_characters {self.most_characters} is below least_characters {self.least_characters}: "
                "no document would stay"
            )
        return self

    def rule(self, exact: bool) -> Rule:
        return _Length(self)


class Lines(RuleConfig):
    """Lines that repeat, and lines too long to have been written by hand (generated code, data). White space at the
    ends of a line and blank lines do not count."""

    most_duplicate_lines: float | None = Field(
        default=0.5, ge=0, le=1, title="Duplicate lines", description="Largest share of lines that occurred before."
    )
    longest_line: int | None = Field(default=1000, ge=1, title="Longest line", description="In characters.")

    def rule(self, exact: bool) -> Rule:
        return _Lines(self)


class _Length:
    name = "length"

    def __init__(self, config: Length) -> None:
        self.config = config

    def judge(self, document: Prepared) -> Verdict:
        size, most = len(document.text), self.config.most_characters
        if size < self.config.least_characters:
            return remove("length: too short", detail=f"{size} characters")
        return remove("length: too long", detail=f"{size} characters") if most and size > most else KEEP


class _Lines:
    name = "lines"

    def __init__(self, config: Lines) -> None:
        self.config = config

    def judge(self, document: Prepared) -> Verdict:
        codes, table = document.codes, character_table()
        starts, ends = strip_lines(codes, *split_at_breaks(codes, table), table)
        written = ends > starts
        starts, ends = starts[written], ends[written]
        longest = self.config.longest_line
        if longest is not None:
            long = ends - starts > longest
            if long.any():
                spans = list(zip(starts[long][:SPANS].tolist(), ends[long][:SPANS].tolist(), strict=True))
                return remove("lines: line too long", detail=f"{int((ends - starts).max())} characters", spans=spans)
        most = self.config.most_duplicate_lines
        if most is not None and len(starts):
            repeated = repeated_pieces(codes, starts, ends)
            if len(repeated) / len(starts) > most:
                spans = list(zip(starts[repeated][:SPANS].tolist(), ends[repeated][:SPANS].tolist(), strict=True))
                return remove("lines: duplicate lines", detail=f"{len(repeated) / len(starts):.3f}", spans=spans)
        return KEEP
