"""C4's rules (Raffel et al. 2020, JMLR 21/140, section 2.2) and mC4's (Xue et al. 2021), with datatrove's verdicts.

C4 takes out lines and, for some words, documents. A line is judged by its words, its end, and phrases in it; what is
left of a document must still have sentences enough. Most lines are decided by arrays over all lines of a document;
one by one in Python go only those that have a citation mark or, in a document where it occurs, a phrase.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gristmill.data.filters.characters import character_table
from gristmill.data.filters.counting import (
    count_sentences,
    count_sentences_of,
    lines_that_end,
    lines_with_dots,
    measure_lines,
    split_at_breaks,
    split_at_line_feeds,
    strip_lines,
)
from gristmill.data.filters.rule import Prepared, Rule, RuleConfig
from gristmill.data.filters.words import Splitter, code_points
from gristmill.data.sieve import Edit, Verdict, edited, remove

CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
END_MARKS = (".", "?", "!", '"', "'")
END_CODES = np.array(sorted(map(ord, END_MARKS)), np.uint32)
LOREM, SCRIPT = "lorem ipsum", "javascript"
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
SPANS = 40

KEPT, LONG_WORD, NO_END, FEW_WORDS, HAS_LOREM, HAS_SCRIPT, HAS_CURLY, HAS_POLICY = range(8)
REASONS = (
    "",
    "too_long_word",
    "no_terminal_punct",
    "too_few_words",
    "lorem_ipsum",
    "javascript",
    "curly_bracket",
    "policy",
)
TIDY = "white space"
CITED = "citation"


class C4Quality(RuleConfig):
    """Lines that stay, and documents that go with all their lines. A bound that is null is off."""

    remove_citations: bool = Field(
        default=True, title="Remove citations", description="Take [1], [edit] and [citation needed] out of lines."
    )
    need_end_mark: bool = Field(
        default=True, title="Need an end mark", description="Drop lines that do not end in . ? ! \" or ', or end in ..."
    )
    least_sentences: int | None = Field(
        default=5, ge=0, title="Least sentences", description="In the lines that stay; fewer: the document goes."
    )
    least_words_a_line: int | None = Field(
        default=3, ge=0, title="Least words a line", description="Between white space; lines of fewer are dropped."
    )
    longest_word: int | None = Field(
        default=1000, ge=1, title="Longest word", description="Characters; lines with a longer word are dropped."
    )
    no_lorem_ipsum: bool = Field(
        default=True, title="No lorem ipsum", description="Documents with these words in a line that stays go."
    )
    no_javascript: bool = Field(default=True, title="No JavaScript", description="Lines with this word are dropped.")
    no_curly_bracket: bool = Field(
        default=True, title="No curly bracket", description="Documents with { in a line that stays go."
    )
    no_policy: bool = Field(
        default=True, title="No policy", description="Lines with phrases of cookies and terms of use are dropped."
    )

    def rule(self, exact: bool) -> Rule:
        return _C4(self)


class C4Paragraphs(RuleConfig):
    """mC4's rule: a document has several long lines."""

    least_paragraphs: int = Field(
        default=3, ge=1, title="Least paragraphs", description="Lines that are long enough; fewer: the document goes."
    )
    least_characters: int = Field(
        default=200, ge=0, title="Least characters", description="Of a line, to count as a paragraph."
    )

    def rule(self, exact: bool) -> Rule:
        return _Paragraphs(self)


class _Paragraphs:
    name = "c4_paragraphs"

    def __init__(self, config: C4Paragraphs) -> None:
        self.config = config

    def judge(self, document: Prepared) -> Verdict:
        starts, ends = split_at_line_feeds(document.codes, 0, len(document.codes), 1)
        # Runs of line feeds count as one here: the empty lines between them are no paragraphs (unless 0 characters do).
        lines = ends - starts
        blank = document.text.count("\n") + 1 - len(starts)
        found = int((lines >= self.config.least_characters).sum()) + (blank if self.config.least_characters == 0 else 0)
        if found < self.config.least_paragraphs:
            return remove(f"{self.name}: too few paragraphs", detail=f"{found} paragraphs")
        return Verdict()


@dataclass
class _Lines:
    """A document's lines: as they lie in it, stripped, and what becomes of each."""

    raw_starts: NDArray[np.int32]
    starts: NDArray[np.int32]
    ends: NDArray[np.int32]
    fates: NDArray[np.int8]
    changed: dict[int, str]  # what lines say without their citations


class _C4:
    name = "c4"

    def __init__(self, config: C4Quality) -> None:
        self.config = config

    def judge(self, document: Prepared) -> Verdict:
        lines = self._judge_lines(document)
        fatal = np.flatnonzero((lines.fates == HAS_LOREM) | (lines.fates == HAS_CURLY))
        if len(fatal):
            k = int(fatal[0])
            spans = [[int(lines.starts[k]), int(lines.ends[k])]]
            return remove(f"{self.name}: {REASONS[lines.fates[k]]}", spans=spans)
        least = self.config.least_sentences
        if least is not None:
            sentences = self._sentences(document, lines)
            if sentences < least:
                return remove(f"{self.name}: too_few_sentences", detail=f"{sentences} sentences in the lines that stay")
        return Verdict(edits=self._edits(document.text, lines))

    def _judge_lines(self, document: Prepared) -> _Lines:
        config, codes, table = self.config, document.codes, character_table()
        raw_starts, raw_ends = split_at_breaks(codes, table)
        starts, ends = strip_lines(codes, raw_starts, raw_ends, table)
        words, longest, curly, square = measure_lines(codes, starts, ends, table)
        fates = np.zeros(len(starts), np.int8)
        if config.no_curly_bracket:
            fates[curly] = HAS_CURLY
        if config.least_words_a_line is not None:
            fates[words < config.least_words_a_line] = FEW_WORDS
        if config.need_end_mark:
            ended = lines_that_end(codes, starts, ends, END_CODES) & ~lines_with_dots(codes, starts, ends)
            fates[~ended] = NO_END
        if config.longest_word is not None:
            fates[longest > config.longest_word] = LONG_WORD
        lines = _Lines(raw_starts, starts, ends, fates, {})
        doubtful = np.zeros(len(fates), bool)
        if self._has_phrase(document.text):
            doubtful |= (fates == KEPT) | (fates == HAS_CURLY)
        if config.remove_citations:
            doubtful |= square & (fates != LONG_WORD)
        for k in np.flatnonzero(doubtful).tolist():
            line = document.text[starts[k] : ends[k]]
            without = CITATION.sub("", line) if config.remove_citations else line
            fates[k] = self._fate(without, int(words[k]))
            if fates[k] == KEPT and without != line:
                lines.changed[k] = without
        return lines

    def _has_phrase(self, text: str) -> bool:
        """Whether a phrase that matters in a line occurs anywhere in the text."""
        config, lowered = self.config, text.lower()
        wanted = (LOREM,) * config.no_lorem_ipsum + (SCRIPT,) * config.no_javascript + POLICIES * config.no_policy
        return any(phrase in lowered for phrase in wanted)

    def _fate(self, line: str, words: int) -> int:
        """What becomes of a line without citations that had so many words with them; in the reference's order."""
        config, lowered = self.config, line.lower()
        if config.need_end_mark and (not line.endswith(END_MARKS) or line.endswith("...")):
            return NO_END
        if config.least_words_a_line is not None and words < config.least_words_a_line:
            return FEW_WORDS
        if config.no_lorem_ipsum and LOREM in lowered:
            return HAS_LOREM
        if config.no_javascript and SCRIPT in lowered:
            return HAS_SCRIPT
        if config.no_curly_bracket and "{" in line:
            return HAS_CURLY
        return HAS_POLICY if config.no_policy and any(p in lowered for p in POLICIES) else KEPT

    def _sentences(self, document: Prepared, lines: _Lines) -> int:
        """Sentences of the lines that stay."""
        kept = lines.fates == KEPT
        kept[list(lines.changed)] = False
        total = sum(_sentences_of(line, document.splitter) for line in lines.changed.values())
        if kept.any():
            words = document.words
            total += int(
                count_sentences_of(
                    document.codes, words.starts, words.ends, lines.starts, lines.ends, kept, character_table()
                ).sum()
            )
        return total

    def _edits(self, text: str, lines: _Lines) -> list[Edit]:
        """What makes of a text its kept lines, stripped, with a line feed between."""
        kept = np.flatnonzero(lines.fates == KEPT).tolist()
        edits = self._line_edits(text, lines, kept)
        if not lines.changed:
            return edits
        # Where a first or last line is nothing but citations, the reference strips its line feed as well.
        after = edited(text, edits)
        return edits if after == after.strip() else [Edit(0, len(text), f"{self.name}: {TIDY}", after.strip())]

    def _line_edits(self, text: str, lines: _Lines, kept: list[int]) -> list[Edit]:
        """One edit for lines in a row that go for one reason, and small ones in and around the lines that stay."""
        edits: list[Edit] = []
        bounds = [*lines.raw_starts.tolist(), len(text)]
        last = kept[-1] if kept else -1
        turns = np.flatnonzero((np.diff(lines.fates, prepend=-1) != 0) | (lines.fates == KEPT)).tolist()
        for k, after in zip(turns, [*turns[1:], len(lines.fates)], strict=True):
            fate = int(lines.fates[k])
            if fate == KEPT:
                edits += self._edits_of_kept(text, lines, k, bounds, "\n" if k != last else "")
            else:
                edits.append(Edit(bounds[k], bounds[after], f"{self.name}: {REASONS[fate]}"))
        return edits

    def _edits_of_kept(self, text: str, lines: _Lines, k: int, bounds: list[int], between: str) -> list[Edit]:
        """White space around a line that stays, and citations in it."""
        edits, start, end = [], int(lines.starts[k]), int(lines.ends[k])
        if start > bounds[k]:
            edits.append(Edit(bounds[k], start, f"{self.name}: {TIDY}"))
        if k in lines.changed:
            found = CITATION.finditer(text[start:end])
            edits += [Edit(start + m.start(), start + m.end(), f"{self.name}: {CITED}") for m in found]
        if text[end : bounds[k + 1]] != between:
            edits.append(Edit(end, bounds[k + 1], f"{self.name}: {TIDY}", between))
        return edits


def _sentences_of(line: str, splitter: Splitter) -> int:
    codes = code_points(line)
    words = splitter.split(line, codes)
    return count_sentences(codes, words.starts, words.ends, 0, len(codes), 0, len(words), character_table())
