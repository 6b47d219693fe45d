"""Gopher's rules of quality and repetition (Rae et al. 2021, arXiv 2112.11446, section A.1.1), as datatrove has them.

Both see words that include punctuation marks, and lengths in characters, as datatrove's filters do; the reasons have
its names. A document without words goes by the first rule of quality, where datatrove, told to have no least number
of words, would divide by zero.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gristmill.data.filters.characters import character_table
from gristmill.data.filters.counting import (
    count_words,
    different_words,
    n_grams_like,
    piece_hashes,
    repeated_n_grams,
    repeated_pieces,
    split_at_breaks,
    split_at_line_feeds,
    strip,
    strip_lines,
    top_n_gram,
)
from gristmill.data.filters.rule import Prepared, Rule, RuleConfig
from gristmill.data.filters.words import Words, code_points
from gristmill.data.sieve import Verdict, remove

SPANS = 40  # places of a removed document that are shown
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
BULLETS = ("•", "-")
ELLIPSES = ("...", "…")


class GopherQuality(RuleConfig):
    """Bounds on words, symbols and lines (section A.1.1, quality filtering). A bound that is null is off."""

    least_words: int | None = Field(
        default=50,
        ge=1,
        title="Least words",
        description="Words that are not symbols alone; fewer: the document goes.",
    )
    most_words: int | None = Field(
        default=100_000, ge=1, title="Most words", description="Of words that are not symbols alone."
    )
    least_mean_length: float | None = Field(
        default=3, ge=0, title="Least mean length", description="Mean characters of a word that is not symbols alone."
    )
    most_mean_length: float | None = Field(
        default=10, ge=0, title="Most mean length", description="Mean characters of a word that is not symbols alone."
    )
    most_symbols: float | None = Field(
        default=0.1, ge=0, title="Most symbols", description="Hash signs a word, and ellipses a word, each at most."
    )
    most_bullet_lines: float | None = Field(
        default=0.9,
        ge=0,
        le=1,
        title="Most bullet lines",
        description="Share of lines that begin with a bullet or dash.",
    )
    most_ellipsis_lines: float | None = Field(
        default=0.3, ge=0, le=1, title="Most ellipsis lines", description="Share of lines that end in an ellipsis."
    )
    least_lettered_words: float | None = Field(
        default=0.8, ge=0, le=1, title="Least lettered words", description="Share of words with a letter in them."
    )
    least_stop_words: int | None = Field(
        default=2, ge=0, title="Least stop words", description="Different stop words that occur."
    )
    stop_words: tuple[str, ...] = Field(
        default=STOP_WORDS, title="Stop words", description="In the language of the documents, as they are written."
    )

    def rule(self, exact: bool) -> Rule:
        return _Quality(self)


class GopherRepetition(RuleConfig):
    """Bounds on repeated lines, paragraphs and n-grams: table A1. A bound that is null is off."""

    most_duplicate_lines: float | None = Field(
        default=0.3, ge=0, le=1, title="Duplicate lines", description="Share of lines that occurred before."
    )
    most_duplicate_paragraphs: float | None = Field(
        default=0.3, ge=0, le=1, title="Duplicate paragraphs", description="Share of paragraphs that occurred before."
    )
    most_duplicate_line_characters: float | None = Field(
        default=0.2, ge=0, le=1, title="Characters of duplicate lines", description="Share of the text's characters."
    )
    most_duplicate_paragraph_characters: float | None = Field(
        default=0.2,
        ge=0,
        le=1,
        title="Characters of duplicate paragraphs",
        description="Share of the text's characters.",
    )
    top_n_grams: tuple[tuple[int, float], ...] = Field(
        default=((2, 0.2), (3, 0.18), (4, 0.16)),
        title="Top n-grams",
        description="n, and the largest share of characters that the commonest n-gram of words may have.",
    )
    duplicate_n_grams: tuple[tuple[int, float], ...] = Field(
        default=((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.1)),
        title="Duplicate n-grams",
        description="n, and the largest share of characters in n-grams of words that occurred before.",
    )

    def rule(self, exact: bool) -> Rule:
        return _Repetition(self)


class _Quality:
    name = "gopher_quality"

    def __init__(self, config: GopherQuality) -> None:
        self.config = config
        stop_words = sorted(set(config.stop_words) - {""})
        lengths = np.array([len(word) for word in stop_words], np.int32)
        ends = np.cumsum(lengths, dtype=np.int32)
        self._stop_hashes = np.sort(piece_hashes(code_points("".join(stop_words)), ends - lengths, ends))
        self._longest_stop_word = int(lengths.max(initial=0))

    def judge(self, document: Prepared) -> Verdict:
        config, words = self.config, document.words
        real, characters, lettered = count_words(document.codes, words.starts, words.ends, character_table())
        if len(words) == 0 or (config.least_words and real < config.least_words):
            return self._remove("gopher_short_doc", f"{real} words")
        if config.most_words and real > config.most_words:
            return self._remove("gopher_long_doc", f"{real} words")
        mean = float(characters) / real if real else float("nan")
        if config.least_mean_length and mean < config.least_mean_length:
            return self._remove("gopher_below_avg_threshold", f"{mean:.2f} characters a word")
        if config.most_mean_length is not None and mean > config.most_mean_length:
            return self._remove("gopher_above_avg_threshold", f"{mean:.2f} characters a word")
        return self._symbols(document, len(words)) or self._lines(document) or self._kinds(document, words, lettered)

    def _symbols(self, document: Prepared, words: int) -> Verdict | None:
        most, text = self.config.most_symbols, document.text
        if most is None:
            return None
        for reason, symbols in (("gopher_too_many_hashes", ("#",)), ("gopher_too_many_ellipsis", ELLIPSES)):
            ratio = sum(text.count(s) for s in symbols) / words
            if ratio > most:
                spans = [span for s in symbols for span in _occurrences(text, s)]
                return self._remove(reason, f"{ratio:.3f} a word", sorted(spans)[:SPANS])
        return None

    def _lines(self, document: Prepared) -> Verdict | None:
        text, config = document.text, self.config
        if not ("-" in text or "•" in text or "…" in text or "..." in text):
            return None
        starts, ends = split_at_breaks(document.codes, character_table())
        starts, ends = strip_lines(document.codes, starts, ends, character_table())
        lines = list(zip(starts.tolist(), ends.tolist(), strict=True))
        if config.most_bullet_lines is not None:
            found = [span for span in lines if text.startswith(BULLETS, *span)]
            if len(found) / len(lines) > config.most_bullet_lines:
                return self._remove("gopher_too_many_bullets", f"{len(found)} of {len(lines)} lines", found[:SPANS])
        if config.most_ellipsis_lines is not None:
            found = [span for span in lines if text.endswith(ELLIPSES, *span)]
            if len(found) / len(lines) > config.most_ellipsis_lines:
                return self._remove(
                    "gopher_too_many_end_ellipsis", f"{len(found)} of {len(lines)} lines", found[:SPANS]
                )
        return None

    def _kinds(self, document: Prepared, words: Words, lettered: int) -> Verdict:
        config, share = self.config, lettered / len(words)
        if config.least_lettered_words and share < config.least_lettered_words:
            return self._remove("gopher_below_alpha_threshold", f"{share:.3f} of the words have a letter")
        if config.least_stop_words:
            found = different_words(
                document.codes, words.starts, words.ends, self._stop_hashes, self._longest_stop_word
            )
            if found < config.least_stop_words:
                return self._remove("gopher_enough_stop_words", f"{found} stop words")
        return Verdict(values={"words with a letter": share})

    def _remove(self, reason: str, detail: str, spans: Iterable[tuple[int, int]] = ()) -> Verdict:
        return remove(f"{self.name}: {reason}", detail=detail, spans=[list(s) for s in spans])


def _occurrences(text: str, symbol: str) -> list[tuple[int, int]]:
    """The first places of a symbol."""
    found, at = [], text.find(symbol)
    while at >= 0 and len(found) < SPANS:
        found.append((at, at + len(symbol)))
        at = text.find(symbol, at + len(symbol))
    return found


class _Repetition:
    name = "gopher_repetition"

    def __init__(self, config: GopherRepetition) -> None:
        self.config = config

    def judge(self, document: Prepared) -> Verdict:
        if not document.text:
            return remove(f"{self.name}: empty")
        return self._pieces(document) or self._n_grams(document)

    def _pieces(self, document: Prepared) -> Verdict | None:
        config, codes = self.config, document.codes
        bounds = strip(codes, 0, len(codes), character_table())
        for pieces, name, share, share_of_characters in (
            (
                split_at_line_feeds(codes, *bounds, 2),
                "para",
                config.most_duplicate_paragraphs,
                config.most_duplicate_paragraph_characters,
            ),
            (
                split_at_line_feeds(codes, 0, len(codes), 1),
                "line",
                config.most_duplicate_lines,
                config.most_duplicate_line_characters,
            ),
        ):
            starts, ends = pieces
            repeated = repeated_pieces(codes, starts, ends)
            characters = int((ends[repeated] - starts[repeated]).sum())
            for reason, ratio, most in (
                (f"dup_{name}_frac", len(repeated) / len(starts), share),
                (f"dup_{name}_char_frac", characters / len(codes), share_of_characters),
            ):
                if most is not None and ratio > most:
                    return self._remove(reason, ratio, starts[repeated], ends[repeated])
        return None

    def _n_grams(self, document: Prepared) -> Verdict:
        words, size, values = document.words, len(document.codes), {}
        before, lengths = document.joined_words
        for n, most in self.config.top_n_grams:
            if n > len(words):
                continue
            first, characters, count = top_n_gram(before, lengths, n)
            ratio = int(characters) * int(count) / size
            values[f"top {n}-gram"] = ratio
            if ratio > most:
                spans = _n_grams_like(document, int(first), n)
                return self._remove(f"top_{n}_gram", ratio, *spans)
        for n, most in self.config.duplicate_n_grams:
            repeated = repeated_n_grams(before, lengths, n)
            ratio = int((lengths[repeated + n] - lengths[repeated]).sum()) / size
            values[f"repeated {n}-grams"] = ratio
            if ratio > most:
                return self._remove(
                    f"duplicated_{n}_n_grams", ratio, words.starts[repeated], words.ends[repeated + n - 1]
                )
        return Verdict(values=values)

    def _remove(self, reason: str, ratio: float, starts: NDArray[np.int32], ends: NDArray[np.int32]) -> Verdict:
        spans = np.stack([starts[:SPANS], ends[:SPANS]], 1).tolist()
        return remove(f"{self.name}: {reason}", detail=f"{ratio:.3f}", spans=spans)


def _n_grams_like(document: Prepared, first: int, n: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Where the n-gram of words that begins at word `first` occurs: the first places, as many as are shown."""
    words, found = document.words, n_grams_like(*document.joined_words, first, n, SPANS)
    return words.starts[found], words.ends[found + n - 1]
