"""A profile: the rules for one kind of document, in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self

from pydantic import Field, model_validator

from gristmill.data.config import Config
from gristmill.data.documents import Row
from gristmill.data.filters.blocklist import BlocklistConfig
from gristmill.data.filters.c4 import C4Paragraphs, C4Quality
from gristmill.data.filters.classifier import QualityConfig
from gristmill.data.filters.fineweb import FineWebQuality
from gristmill.data.filters.gopher import GopherQuality, GopherRepetition
from gristmill.data.filters.hub_classifier import HubClassifierConfig
from gristmill.data.filters.language import Language
from gristmill.data.filters.lines import Length, Lines
from gristmill.data.filters.pii import PiiConfig
from gristmill.data.filters.rule import Rule, RuleConfig, judge_in_turn
from gristmill.data.filters.words import FastSplitter, Splitter, SplitterOnDemand, check_words
from gristmill.data.sieve import Verdict


class Profile(Config):
    """Rules for one kind of document; a rule whose section is null is off.

    They are tried in the order of these sections, or in that of `order`; the first that fails decides, and one that
    edits the text gives it to those after it.
    """

    mode: Literal["exact", "fast"] = Field(
        default="exact",
        title="Mode",
        description="exact splits words by spaCy's rules, as datatrove does, and gives its verdicts; fast splits them "
        "in one pass for all scripts, which is several times quicker and differs in few verdicts of a thousand.",
    )
    words: str = Field(
        default="en",
        title="Words of",
        description="Language whose rules split words in mode exact (ISO 639-1; with its script where it has several, "
        "such as ar_Arab).",
    )
    order: tuple[str, ...] = Field(
        default=(),
        title="Order",
        description="Rules that come first, by the names of their sections; the others follow in the order below.",
    )
    blocklist: BlocklistConfig | None = Field(
        default=None, title="Blocklists", description="Of domains, URLs and words: documents that a list excludes."
    )
    length: Length | None = Field(default=None, title="Length", description="Characters of a document.")
    lines: Lines | None = Field(default=None, title="Lines", description="Repeated lines and long ones.")
    language: Language | None = Field(default=None, title="Language", description="Identified by fastText.")
    gopher_repetition: GopherRepetition | None = Field(
        default=None, title="Gopher repetition", description="Rae et al. 2021, table A1: repeated lines, n-grams."
    )
    gopher_quality: GopherQuality | None = Field(
        default=None, title="Gopher quality", description="Rae et al. 2021, section A.1.1."
    )
    c4: C4Quality | None = Field(default=None, title="C4", description="Raffel et al. 2020, section 2.2; edits lines.")
    c4_paragraphs: C4Paragraphs | None = Field(
        default=None, title="mC4 paragraphs", description="Xue et al. 2021, section 3.1."
    )
    fineweb: FineWebQuality | None = Field(
        default=None, title="FineWeb quality", description="Penedo et al. 2024, section 3.6."
    )
    quality: QualityConfig | None = Field(
        default=None, title="Quality classifier", description="Trained on examples of good and bad documents."
    )
    hub_classifier: HubClassifierConfig | None = Field(
        default=None, title="Hugging Face classifier", description="Any model that classifies sequences."
    )
    pii: PiiConfig | None = Field(
        default=None, title="Personal data", description="Addresses, numbers and keys: redacted, or their documents go."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        unknown = [name for name in self.order if name not in sections()]
        if unknown:
            raise ValueError(f"order names {unknown[0]!r}, which is no rule: there are {', '.join(sections())}")
        if len(set(self.order)) < len(self.order):
            raise ValueError(f"order names a rule twice: {', '.join(self.order)}")
        return self

    def rules(self) -> list[Rule]:
        """The rules that are on, in order."""
        names = [*self.order, *(name for name in sections() if name not in self.order)]
        found: list[RuleConfig | None] = [getattr(self, name) for name in names]
        return [section.rule(self.mode == "exact") for section in found if section is not None]

    def splitter(self) -> Splitter:
        """What splits words for these rules; it loads nothing before the first word is asked for."""
        return SplitterOnDemand(self.words) if self.mode == "exact" else FastSplitter()

    def check(self) -> None:
        """Refuse a language whose words these rules cannot split.

        Raises:
            ValueError: the mode is exact and the words of the language are not split by spaCy's rules.
        """
        if self.mode == "exact":
            check_words(self.words)

    def judge(self) -> Callable[[Row], Verdict]:
        """From a document to what becomes of it under these rules; models are loaded once, by this call."""
        rules, splitter = self.rules(), self.splitter()
        return lambda row: judge_in_turn(rules, row, splitter)


def sections() -> list[str]:
    """Names of the rules, in the order in which they are tried."""
    return [name for name in Profile.model_fields if name not in ("mode", "words", "order")]
