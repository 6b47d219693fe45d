"""Tokens of a text as spans are measured in them, and the places and hashes of these tokens.

A token is a word (a run of letters, digits, marks and connectors such as _), or one character of anything else that is
seen: punctuation, symbols; a rule drawn with one symbol (-----) is one token, as byte-pair encodings have it. Scripts
written without blanks between words (Han, kana, Thai, Lao, Khmer, Burmese, Tai) give a token a letter, so that 50
tokens are about as much text in every language. White space, the zero-width space and the byte-order mark only
separate: a text wrapped in another way has the same tokens. Letters are compared as they are, without case folding or
normalisation. A token beyond 1,024 characters is cut into tokens of that length.

The loops run over code points in numba: on the PEPs at 175 MB a second a core, where this definition as a regular
expression makes three.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from gristmill.data.folded_words import mixed

SPACE, WORD, SINGLE, ALONE, EXTEND = range(5)
LONGEST = 1024  # code points of a token
PIECE = 1 << 17  # code points in hand at once: a text of any length needs the same memory
BETWEEN = 0x110000  # no code point: stands between two tokens where a span's tokens are digested

# In this order: a later class takes characters from an earlier one. `regex` carries its own Unicode tables, so that
# classes change with its pinned version and not with Python's.
_CLASSES = (
    (WORD, r"[\p{L}\p{N}\p{Pc}]+"),
    (
        ALONE,
        r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
        r"\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}\p{Javanese}\p{Balinese}]+",
    ),
    (EXTEND, r"[\p{M}\p{Cf}]+"),
    (SPACE, r"[\s\u200b\ufeff]+"),
)


@functools.cache
def classes() -> np.ndarray:
    """The class of every code point, uint8 (0x110000)."""
    import regex

    every = "".join(map(chr, range(0x110000)))
    table = np.full(0x110000, SINGLE, np.uint8)
    for number, pattern in _CLASSES:
        for found in regex.finditer(pattern, every):
            table[found.start() : found.end()] = number
    return table


@njit(cache=True)
def _tokenise(codes, classes, starts, ends, first, second):
    """Places and two independent hashes of the tokens; their number."""
    count, at, size = 0, 0, len(codes)
    while at < size:
        kind = classes[codes[at]]
        if kind == SPACE:
            at += 1
            continue
        begin, most = at, min(size, at + LONGEST)
        word, symbol = kind in (WORD, EXTEND), codes[at]
        a = (np.uint64(0xCBF29CE484222325) ^ np.uint64(codes[at])) * np.uint64(0x100000001B3)
        b = (np.uint64(0x9E3779B97F4A7C15) + np.uint64(codes[at])) * np.uint64(0xD6E8FEB86659FD93)
        at += 1
        while at < most:
            previous, kind = kind, classes[codes[at]]
            again = kind == SINGLE and previous == SINGLE and codes[at] == symbol
            if kind != EXTEND and not again and not (word and kind == WORD):
                break
            a = (a ^ np.uint64(codes[at])) * np.uint64(0x100000001B3)
            b = ((b ^ (b >> np.uint64(29))) + np.uint64(codes[at])) * np.uint64(0xD6E8FEB86659FD93)
            at += 1
        starts[count], ends[count], first[count], second[count] = begin, at, mixed(a), mixed(b)
        count += 1
    return count


@njit(cache=True)
def _joined(codes, starts, ends, count, out):
    """The code points of the tokens, each followed by BETWEEN; their number."""
    size = 0
    for token in range(count):
        for at in range(starts[token], ends[token]):
            out[size] = codes[at]
            size += 1
        out[size] = BETWEEN
        size += 1
    return size


@dataclass(frozen=True)
class Piece:
    """The tokens of a part of a text; the arrays are good until the next piece is asked for."""

    at: int  # where the part begins, in characters of the text
    codes: np.ndarray
    starts: np.ndarray  # of tokens, in code points from `at`
    ends: np.ndarray
    first: np.ndarray  # hashes
    second: np.ndarray


class Tokeniser:
    """Cuts texts into tokens, a piece at a time, in buffers of its own."""

    def __init__(self) -> None:
        self._classes = classes()
        self._starts, self._ends = np.empty(PIECE, np.int64), np.empty(PIECE, np.int64)
        self._first, self._second = np.empty(PIECE, np.uint64), np.empty(PIECE, np.uint64)
        self._out = np.empty(2 * PIECE, np.uint32)

    def pieces(self, text: str, start: int = 0, end: int | None = None) -> Iterator[Piece]:
        """The tokens of characters [start, end), which begin and end where tokens do."""
        end = len(text) if end is None else end
        while start < end:
            codes = np.frombuffer(text[start : min(end, start + PIECE)].encode("utf-32-le", "surrogatepass"), np.uint32)
            count = int(_tokenise(codes, self._classes, self._starts, self._ends, self._first, self._second))
            onward = start + len(codes)
            if onward < end and self._classes[codes[-1]] != SPACE:
                count -= 1  # the last token may go on: it is the next piece's first
                onward = start + int(self._starts[count])
            own = slice(0, count)
            yield Piece(start, codes, self._starts[own], self._ends[own], self._first[own], self._second[own])
            start = onward

    def digest(self, text: str, start: int, end: int) -> bytes:
        """SHA-256 of the tokens in characters [start, end): equal for equal tokens, whatever lies between them."""
        sha = hashlib.sha256()
        for piece in self.pieces(text, start, end):
            size = _joined(piece.codes, piece.starts, piece.ends, len(piece.starts), self._out)
            sha.update(self._out[:size].data)
        return sha.digest()

    def locate(self, text: str, tokens: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Characters [start, end) of spans given as tokens [first, last + 1)."""
        wanted = np.array(tokens, np.int64).reshape(-1, 2)
        found = np.zeros(wanted.shape, np.int64)
        before = 0
        for piece in self.pieces(text):
            after = before + len(piece.starts)
            begins = (wanted[:, 0] >= before) & (wanted[:, 0] < after)
            found[begins, 0] = piece.at + piece.starts[wanted[begins, 0] - before]
            closes = (wanted[:, 1] > before) & (wanted[:, 1] <= after)
            found[closes, 1] = piece.at + piece.ends[wanted[closes, 1] - 1 - before]
            before = after
        return [(int(a), int(b)) for a, b in found]


def hashed(tokeniser: Tokeniser, text: str, window: int) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """Token hashes of a text in stretches that overlap by `window` − 1 tokens: every window lies in just one of them.

    Yields:
        the number of the stretch's first token, how many of its tokens are new, and both hashes of its tokens.
    """
    kept = window - 1
    tails = np.empty(0, np.uint64), np.empty(0, np.uint64)
    begin = 0
    for piece in tokeniser.pieces(text):
        first, second = piece.first, piece.second
        if len(tails[0]):
            first, second = np.concatenate([tails[0], first]), np.concatenate([tails[1], second])
        yield begin, len(piece.starts), first, second
        tails = first[max(0, len(first) - kept) :].copy(), second[max(0, len(second) - kept) :].copy()
        begin += len(first) - len(tails[0])
