"""What the stage is asked to remove."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from gristmill.data.config import Config


class LinesConfig(Config):
    """Lines or paragraphs that stand in several documents.

    FineWeb tried removing all but one of each line, with and without a least length, on text deduplicated by MinHash,
    and found models no better for it (arXiv 2406.17557, section 3.4); CCNet removes every repeated one after folding
    it (arXiv 1911.00359). So this is off unless asked for, and looks at long paragraphs first.
    """

    unit: Literal["line", "paragraph"] = Field(
        default="paragraph", title="Unit", description="A line, or lines up to a blank one."
    )
    compare: Literal["exact", "folded"] = Field(
        default="exact",
        title="Compare",
        description="exact: all but the white space around; folded: in lower case, digits as 0, without punctuation, "
        "as CCNet does.",
    )
    least_characters: int = Field(
        default=40, ge=1, le=1_000_000, title="Least characters", description="Shorter ones stay, whatever repeats."
    )
    least_words: int = Field(
        default=0,
        ge=0,
        le=100_000,
        title="Least words",
        description="Of words between white space; leave it 0 for scripts written without blanks.",
    )
    least_documents: int = Field(
        default=2, ge=2, le=1_000_000_000, title="Least documents", description="How many documents must hold it."
    )
    keep: Literal["first", "none"] = Field(
        default="first",
        title="Keep",
        description="first: the first document that holds it keeps it; none: it goes everywhere, as boilerplate does.",
    )
    within_documents: bool = Field(
        default=False,
        title="Within documents",
        description="Also remove what stands further up in the same document, however few documents hold it.",
    )


class SubstringConfig(Config):
    """Spans of tokens that stand in an earlier document, as Lee et al. (arXiv 2107.06499) and RefinedWeb do it."""

    tokens: int = Field(
        default=50,
        ge=2,
        le=10_000,
        title="Tokens",
        description="Least length of a span: words, or single characters of punctuation and of scripts written "
        "without blanks. Lee et al. use 50 tokens of a byte-pair encoding.",
    )
    within_documents: bool = Field(
        default=False,
        title="Within documents",
        description="Also remove a span that stands further up in the same document without overlapping it.",
    )


class SpansConfig(Config):
    """Lines first, then spans of tokens in what is left; at least one of them."""

    lines: LinesConfig | None = Field(default=None, title="Lines", description="Repeated lines or paragraphs.")
    substring: SubstringConfig | None = Field(
        default_factory=SubstringConfig, title="Substring", description="Repeated spans of tokens."
    )
    kinds: list[Literal["prose", "code", "lessons"]] = Field(
        default_factory=lambda: ["prose", "code"],
        min_length=1,
        title="Kinds",
        description="Kinds of documents that are looked at. Others pass whole, and nothing is removed because of them.",
    )
    least_characters_left: int = Field(
        default=20,
        ge=0,
        le=1_000_000,
        title="Least characters left",
        description="A document that loses a span and has fewer characters left is removed; RefinedWeb uses 20.",
    )

    @model_validator(mode="after")
    def _asks_for_something(self) -> SpansConfig:
        if self.lines is None and self.substring is None:
            raise ValueError("spans: neither lines nor substring is asked for; set one, or leave the stage out")
        return self
