"""What a rule is: a name, and a judgement of one document; and how the rules of a profile follow each other.

A rule's configuration is a section of a profile (a `RuleConfig`), made into a `Rule` once a shard by `rule(exact)`. A
rule sees the text as the rules before it left it, as in a pipeline of datatrove's filters; the edits of all of them
are composed into edits of the text that came in, and so are the spans that show why a document went.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gristmill.data.config import Config
from gristmill.data.documents import Row
from gristmill.data.filters.counting import joined_words
from gristmill.data.filters.edits import compose, original_spans
from gristmill.data.filters.words import Splitter, TooManyWords, Words, code_points
from gristmill.data.sieve import KEEP, Edit, Verdict, edited, remove


class Prepared:
    """One document, and what several rules need of it, each made once and only if asked for.

    Attributes:
        row: the document as it came in; its text is that before any edit.
        text: the text as the rules before left it.
    """

    def __init__(self, row: Row, text: str, splitter: Splitter) -> None:
        self.row, self.text, self._splitter = row, text, splitter

    @cached_property
    def codes(self) -> NDArray[np.uint32]:
        """The text's code points; index i is character i of `text`."""
        return code_points(self.text)

    @cached_property
    def words(self) -> Words:
        """The words, punctuation marks among them, as the profile's splitter gives them."""
        return self._splitter.split(self.text, self.codes)

    @cached_property
    def joined_words(self) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
        """Polynomial and length of the words before each word, joined; see `counting.py`."""
        return joined_words(self.codes, self.words.starts, self.words.ends)

    @property
    def splitter(self) -> Splitter:
        return self._splitter


class Rule(Protocol):
    """A judgement of documents, one at a time; it holds nothing of a document when the next one comes.

    `judge` returns `KEEP`, `remove("name: reason", spans=…, detail=…)`, or a verdict with edits or metadata. Edits and
    spans are at characters of `document.text`. A removal with edits asks that no sample shows what they replace.
    """

    @property
    def name(self) -> str: ...

    def judge(self, document: Prepared) -> Verdict: ...


class RuleConfig(Config, ABC):
    """A section of a profile: the thresholds of one rule, each with its source's default."""

    @abstractmethod
    def rule(self, exact: bool) -> Rule:
        """The rule with these thresholds; `exact` asks for the reference's own verdicts where a faster way differs."""


def judge_in_turn(rules: Sequence[Rule], row: Row, splitter: Splitter) -> Verdict:
    """What becomes of a document under rules one after the other: removed by the first that says so.

    A rule that edits gives its text to the rules after it. Metadata and values of all rules that were asked add up.
    A document of more words than memory is meant for goes by the first rule that asks for them.
    """
    document = Prepared(row, row["text"], splitter)
    edits: Sequence[Edit] = ()
    metadata: dict[str, object] = {}
    values: dict[str, float] = {}
    for rule in rules:
        try:
            verdict = rule.judge(document)
        except TooManyWords as error:
            verdict = remove(f"{rule.name}: too many words", detail=str(error))
        values |= verdict.values
        if verdict.reason:
            because = dict(verdict.because)
            if because.get("spans") and edits:
                because["spans"] = original_spans(edits, because["spans"])
            hidden = compose(edits, verdict.edits) if verdict.edits else ()
            return Verdict(verdict.reason, because, [replace(e, reason=verdict.reason) for e in hidden], values=values)
        metadata |= verdict.metadata
        if verdict.edits:
            text = edited(document.text, verdict.edits)
            edits = compose(edits, verdict.edits) if edits else verdict.edits
            document = Prepared(row, text, splitter)
    return Verdict(edits=edits, metadata=metadata, values=values) if edits or metadata or values else KEEP
