"""Fill-in-the-middle: a document rearranged so that a left-to-right model learns to fill a gap (V3 section 4.1).

Prefix-suffix-middle (PSM), on whole documents before packing, as V3 does with a rate of 0.1:

    <｜fim▁begin｜> prefix <｜fim▁hole｜> suffix <｜fim▁end｜> middle

The two cuts lie between characters, drawn evenly over the document (Bavarian et al. 2022, "Efficient training of
language models to fill in the middle"). Which documents, and where they are cut, are functions of (seed, document id).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from gristmill.data.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE


def cuts(text: str, seed: int, identifier: str, rate: float) -> tuple[int, int] | None:
    """Where the middle begins and ends, in characters; None for a document that stays as it is.

    Of all documents a part of `rate` is cut. A text of fewer than three characters has no three parts and stays.
    """
    digest = hashlib.sha256(f"{seed}/fim/{identifier}".encode()).digest()
    chosen, first, second = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8, 16))
    if chosen >= rate * 2**64 or len(text) < 3:
        return None
    a, b = first % (len(text) + 1), second % (len(text) + 1)
    return min(a, b), max(a, b)


def parts(text: str, start: int, end: int) -> tuple[str, str, str]:
    """Prefix, suffix and middle, in the order in which they are written."""
    return text[:start], text[end:], text[start:end]


def rearranged(prefix: Sequence[int], suffix: Sequence[int], middle: Sequence[int], marks: Marks) -> list[int]:
    """The tokens of a rearranged document, without bos and eos."""
    return [marks.begin, *prefix, marks.hole, *suffix, marks.end, *middle]


def restored(tokens: Sequence[int], marks: Marks) -> list[int]:
    """The tokens of prefix, middle and suffix in the order of the text: `rearranged` backwards.

    A document that was not rearranged comes back as it is. The marks occur in no document's own text (the tokenize
    stage reads them there as plain text), so the first of each is the one that was set.
    """
    tokens = list(tokens)
    if not tokens or tokens[0] != marks.begin:
        return tokens
    hole, end = tokens.index(marks.hole), tokens.index(marks.end)
    return [*tokens[1:hole], *tokens[end + 1 :], *tokens[hole + 1 : end]]


class Marks:
    """Ids of the three marks in a tokenizer.

    Raises:
        ValueError: the tokenizer lacks one.
    """

    def __init__(self, tokenizer) -> None:
        found = [tokenizer.token_to_id(name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END)]
        if None in found:
            raise ValueError(f"the tokenizer lacks one of {FIM_BEGIN}, {FIM_HOLE}, {FIM_END}: train it here")
        self.begin, self.hole, self.end = found
