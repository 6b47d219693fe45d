"""FineWeb's own rules of quality (Penedo et al. 2024, arXiv 2406.17557, section 3.6), with datatrove's verdicts."""

from __future__ import annotations

import numpy as np
from pydantic import Field, field_validator

from gristmill.data.filters.characters import TERMINAL, character_table
from gristmill.data.filters.counting import (
    lines_that_are_blank,
    lines_that_end,
    repeated_pieces,
    split_at_line_feeds,
)
from gristmill.data.filters.rule import Prepared, Rule, RuleConfig
from gristmill.data.sieve import Verdict, remove

SPANS = 40


class FineWebQuality(RuleConfig):
    """Bounds on lines that end, short lines, repeated characters and line breaks."""

    least_ended_lines: float = Field(
        default=0.12,
        ge=0,
        le=1,
        title="Least ended lines",
        description="Share of lines that end in a stop character.",
    )
    allow_no_ended_line: bool = Field(
        default=False,
        title="Allow no ended line",
        description="Whether a document stays in which not one line ends with a stop character.",
    )
    stop_characters: tuple[str, ...] | None = Field(
        default=None,
        title="Stop characters",
        description="Single characters that end a sentence; null takes those of all scripts.",
    )
    most_short_lines: float = Field(
        default=0.67, ge=0, le=1, title="Most short lines", description="Share of lines that are short."
    )
    short_line: int = Field(default=30, ge=0, title="Short line", description="A line of so many characters is short.")
    most_duplicate_characters: float = Field(
        default=0.01, ge=0, le=1, title="Most duplicate characters", description="Share in lines that occurred before."
    )
    most_line_breaks: float = Field(default=0.3, ge=0, title="Most line breaks", description="Line feeds a word.")

    @field_validator("stop_characters")
    @classmethod
    def _single(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        longer = [mark for mark in value or () if len(mark) != 1]
        if longer:
            raise ValueError(f"stop_characters are single characters, and {longer[0]!r} is not")
        return value

    def rule(self, exact: bool) -> Rule:
        return _FineWeb(self)


class _FineWeb:
    name = "fineweb"

    def __init__(self, config: FineWebQuality) -> None:
        self.config = config
        if config.stop_characters is None:
            self._stops = np.flatnonzero(character_table() & TERMINAL).astype(np.uint32)
        else:
            self._stops = np.array(sorted(map(ord, set(config.stop_characters))), np.uint32)

    def judge(self, document: Prepared) -> Verdict:
        config, codes = self.config, document.codes
        starts, ends = split_at_line_feeds(codes, 0, len(codes), 1)
        written = ~lines_that_are_blank(codes, starts, ends, character_table())
        starts, ends = starts[written], ends[written]
        if not len(starts):
            return remove(f"{self.name}: empty")
        ended = lines_that_end(codes, starts, ends, self._stops)
        share = int(ended.sum()) / len(starts)
        if share < config.least_ended_lines and not (share == 0 and config.allow_no_ended_line):
            return self._remove("line_punct_ratio", share, starts[~ended], ends[~ended])
        short = ends - starts <= config.short_line
        short_share = int(short.sum()) / len(starts)
        if short_share > config.most_short_lines:
            return self._remove("short_line_ratio", short_share, starts[short], ends[short])
        repeated = repeated_pieces(codes, starts, ends)
        line_feeds = document.text.count("\n")
        duplicate_share = int((ends[repeated] - starts[repeated]).sum()) / (len(codes) - line_feeds)
        if duplicate_share > config.most_duplicate_characters:
            return self._remove("char_dup_ratio", duplicate_share, starts[repeated], ends[repeated])
        breaks = line_feeds / len(document.words)
        if breaks > config.most_line_breaks:
            return self._remove("list_ratio", breaks, starts[:0], ends[:0])
        return Verdict(values={"ended lines": share, "short lines": short_share})

    def _remove(self, reason: str, ratio: float, starts: np.ndarray, ends: np.ndarray) -> Verdict:
        spans = np.stack([starts[:SPANS], ends[:SPANS]], 1).tolist()
        return remove(f"{self.name}: {reason}", detail=f"{ratio:.3f}", spans=spans)
