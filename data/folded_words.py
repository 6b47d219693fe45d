"""Words of a text as comparing sees them, and a fast search for given runs of them.

Two texts that differ in case, accents, compatibility forms, white space and punctuation have the same words:

- a word is a run of letters and digits after NFKD and full case folding, without marks and invisible characters;
- in scripts written without blanks (Han, kana, Thai, Lao, Burmese, Khmer) each character is a word of its own;
- a sign of arithmetic (+ - * / = < > ^ %) that stands between two numbers is a word: 5-1+9 is not 5+1-9. Elsewhere
  signs are punctuation, so that well-known is "well known".

One numba loop over the characters folds, hashes and looks up: Python's regular expressions and dictionaries run at a
few megabytes a second here. Hits are compared word for word, so a collision of hashes never counts.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit

WORD, OWN, DIGIT, THROUGH, SPACE, SIGN, MANY = 1, 2, 4, 8, 16, 32, 64
SIGNS = {"+": "+", "-": "-", "*": "*", "/": "/", "=": "=", "<": "<", ">": ">", "^": "^", "%": "%"} | {
    "−": "-",  # minus sign
    "–": "-",  # en dash, which typesetting makes of a minus
    "×": "*",
    "·": "*",
    "÷": "/",
}
# Scripts whose words no blank parts: Thai, Lao; Burmese; Khmer; kana with its phonetic extensions; Han.
UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x31F0, 0x31FF))
HAN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0x20000, 0x2F7FF), (0x30000, 0x323AF))
LOOKED_AT = ((0, 0x3400), (0xA000, 0xD800), (0xF900, 0x20000), (0x2F800, 0x2FA20), (0xE0000, 0xE01F0))

WORDS_AT_ONCE = 4096
KNOWN_AT_MOST = 4096  # pieces compared that the search remembers
RING = 128  # word ends remembered by the search, a power of two
MOST_WORDS = RING - 1  # of a run that is searched for
BASE = np.uint64(0x9E3779B97F4A7C15)


def folded(text: str) -> str:
    """A piece of text within one word, as words are compared."""
    if text.isascii():
        return text.lower() if text.isalnum() else "".join(filter(str.isalnum, text.lower()))
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c)[0] != "M")
    return "".join(c for c in unicodedata.normalize("NFKD", bare.casefold()) if c.isalnum())


@cache
def tables() -> tuple[np.ndarray, np.ndarray]:
    """(what each code point is, longer foldings): int32 (0x110000,) of `folding << 8 | flags`, and int32 (any,).

    With the flag MANY the folding is a place in the second array: a count and that many code points.
    """
    what = np.zeros(sys.maxunicode + 1, np.int32)
    longer: list[int] = []
    for low, high in HAN:
        what[low : high + 1] = np.arange(low, high + 1, dtype=np.int32) << 8 | WORD | OWN
    for code in (code for low, high in LOOKED_AT for code in range(low, high)):
        what[code] = _entry(chr(code), longer)
    return what, np.array(longer or [0], np.int32)


def _entry(char: str, longer: list[int]) -> int:
    category = unicodedata.category(char)
    if char in SIGNS or unicodedata.normalize("NFKC", char) in SIGNS:
        return ord(SIGNS.get(char) or SIGNS[unicodedata.normalize("NFKC", char)]) << 8 | SIGN
    if char.isspace():
        return SPACE
    if category[0] == "M" or category == "Cf":
        return THROUGH
    plain = folded(char)
    if not plain:
        return 0
    flags = WORD | (OWN if _unspaced(ord(plain[0])) else 0) | (DIGIT if plain[-1].isdecimal() else 0)
    if len(plain) == 1:
        return ord(plain) << 8 | flags
    place = len(longer)
    longer += [len(plain), *map(ord, plain)]
    return place << 8 | flags | MANY


def _unspaced(code: int) -> bool:
    return any(low <= code <= high for low, high in (*UNSPACED, *HAN))


def codes(text: str) -> np.ndarray:
    """The code points of a text: uint8 where it is ASCII, else uint32; places in it are places in the text."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@njit(cache=True)
def mixed(x: np.uint64) -> np.uint64:
    """The finaliser of MurmurHash3: every bit of a uint64 moves every bit of the result."""
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xFF51AFD7ED558CCD)
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


@njit(cache=True)
def _absorb(word, entry, longer):
    if entry & 64:
        place = entry >> 8
        for i in range(longer[place]):
            word = (word ^ np.uint64(longer[place + 1 + i])) * np.uint64(0x100000001B3)
        return word
    return (word ^ np.uint64(entry >> 8)) * np.uint64(0x100000001B3)


@njit(cache=True)
def _next_words(codes, at, after_number, what, longer, hashes, starts, ends):
    """Hashes and places of the words from character `at` on, as many as there is room for.

    Returns (words found, the character to go on from, whether the last word ended in a digit).
    """
    count, sign, sign_at, size = 0, 0, 0, len(codes)
    while at < size and count + 2 <= len(hashes):
        entry = what[codes[at]]
        if not entry & 1:
            if entry & 32 and after_number and sign == 0:
                sign, sign_at = entry, at
            elif not entry & 24:
                after_number, sign = False, 0
            at += 1
            continue
        if sign and entry & 4:
            hashes[count] = mixed(_absorb(np.uint64(0xCBF29CE484222325), sign, longer))
            starts[count], ends[count] = sign_at, sign_at + 1
            count += 1
        sign = 0
        starts[count] = at
        word = _absorb(np.uint64(0xCBF29CE484222325), entry, longer)
        at += 1
        end, last = at, entry
        if not entry & 2:
            while at < size:
                entry = what[codes[at]]
                if entry & 3 == 1:
                    word = _absorb(word, entry, longer)
                    end, last = at + 1, entry
                elif not entry & 8:
                    break
                at += 1
        hashes[count], ends[count] = mixed(word), end
        count += 1
        after_number = last & 4 != 0
    return count, at, after_number


@njit(cache=True)
def _all_words(codes, what, longer, hashes, starts, ends):
    count, _, _ = _next_words(codes, 0, False, what, longer, hashes, starts, ends)
    return count


@njit(cache=True)
def _search(codes, what, longer, lengths, powers, bits, keys, numbers, hits):
    """Runs of words whose hash is in the table: rows (number of the run, start, end) into `hits`; how many there are.

    H(n) = H(n-1)·B + word(n); the hash of the last L words is H(n) - H(n-L)·B^L, whatever L is: one pass serves
    all lengths. A bit map that fits the cache answers for nearly all words.
    """
    hashes = np.empty(WORDS_AT_ONCE, np.uint64)
    starts = np.empty(WORDS_AT_ONCE, np.int64)
    ends = np.empty(WORDS_AT_ONCE, np.int64)
    sums = np.zeros(RING, np.uint64)
    begun = np.zeros(RING, np.int64)
    bit_mask, key_mask = np.uint64(len(bits) * 8 - 1), np.uint64(len(keys) - 1)
    at, after_number, seen, found, total = 0, False, 0, 0, np.uint64(0)
    while at < len(codes):
        count, at, after_number = _next_words(codes, at, after_number, what, longer, hashes, starts, ends)
        for i in range(count):
            begun[seen & (RING - 1)] = starts[i]
            total = total * BASE + hashes[i]
            seen += 1
            sums[seen & (RING - 1)] = total
            for which in range(len(lengths)):
                length = lengths[which]
                if length > seen:
                    continue
                key = mixed((total - sums[(seen - length) & (RING - 1)] * powers[which]) ^ np.uint64(length))
                bit = key & bit_mask
                if not (bits[bit >> np.uint64(3)] >> np.uint8(bit & np.uint64(7))) & 1:
                    continue
                slot = (key >> np.uint64(32)) & key_mask
                while numbers[slot] >= 0 and keys[slot] != key:
                    slot = (slot + np.uint64(1)) & key_mask
                if numbers[slot] >= 0:
                    if found < len(hits):
                        hits[found, 0] = numbers[slot]
                        hits[found, 1] = begun[(seen - length) & (RING - 1)]
                        hits[found, 2] = ends[i]
                    found += 1
    return found


@njit(cache=True)
def _key(hashes):
    """The hash of a run by the hashes of its words, as `_search` has it."""
    total = np.uint64(0)
    for word in hashes:
        total = total * BASE + word
    return mixed(total ^ np.uint64(len(hashes)))


@njit(cache=True)
def _fill(wanted, bits, keys, numbers):
    bit_mask, key_mask = np.uint64(len(bits) * 8 - 1), np.uint64(len(keys) - 1)
    for number in range(len(wanted)):
        key = wanted[number]
        bit = key & bit_mask
        bits[bit >> np.uint64(3)] |= np.uint8(1) << np.uint8(bit & np.uint64(7))
        slot = (key >> np.uint64(32)) & key_mask
        while numbers[slot] >= 0:
            slot = (slot + np.uint64(1)) & key_mask
        keys[slot], numbers[slot] = key, number


class Words(NamedTuple):
    """The words of a text: hashes uint64, and characters [start, end) of each, int64."""

    hashes: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def words_of(text: str) -> Words:
    """The words of a text of moderate length: 24 bytes a character are held meanwhile."""
    points = codes(text)
    room = len(points) + 3
    words = Words(np.empty(room, np.uint64), np.empty(room, np.int64), np.empty(room, np.int64))
    count = _all_words(points, *tables(), *words)
    return Words(*(part[:count] for part in words))


def spelled(text: str, words: Words) -> list[str]:
    """The words themselves, folded."""
    pieces = (text[a:b] for a, b in zip(words.starts.tolist(), words.ends.tolist(), strict=True))
    return [folded(piece) or _sign(piece) for piece in pieces]


def _sign(piece: str) -> str:
    return SIGNS.get(piece) or SIGNS.get(unicodedata.normalize("NFKC", piece), "")


@dataclass(frozen=True)
class Run:
    """`length` words of a wanted text from its word `first` on."""

    text: int
    first: int
    length: int


class Hit(NamedTuple):
    """Characters [start, end) of a text that hold the words of the run of this number."""

    number: int
    start: int
    end: int


class RunIndex:
    """Runs of words to look for; `uses[number]` are the places among the wanted texts that a run has.

    Args:
        texts: the wanted texts.
        runs: which runs of their words are looked for, at most `MOST_WORDS` long.

    Raises:
        ValueError: two runs of different words have one hash, which chance gives to one in 10¹⁰ of a million runs.
    """

    def __init__(self, texts: Sequence[str], runs: Iterable[Run]) -> None:
        words = [words_of(text) for text in texts]
        self.spelled = [spelled(text, own) for text, own in zip(texts, words, strict=True)]
        self.uses: list[list[Run]] = []
        keys: dict[int, int] = {}
        for run in runs:
            own = self.words_of(run)
            key = int(_key(words[run.text].hashes[run.first : run.first + run.length]))
            number = keys.setdefault(key, len(self.uses))
            if number == len(self.uses):
                self.uses.append([])
            elif self.words_of(self.uses[number][0]) != own:
                raise ValueError(f"{own} and {self.words_of(self.uses[number][0])} have one hash: leave one out")
            self.uses[number].append(run)
        self._lengths = np.array(sorted({uses[0].length for uses in self.uses}), np.int64)
        self._powers = np.array([pow(int(BASE), int(n), 2**64) for n in self._lengths], np.uint64)
        self._bits = np.zeros(_power_of_two(2 * len(keys)), np.uint8)  # 16 bits and more a run
        self._keys = np.zeros(_power_of_two(2 * len(keys)), np.uint64)
        self._numbers = np.full(len(self._keys), -1, np.int32)
        _fill(np.array(list(keys), np.uint64), self._bits, self._keys, self._numbers)

    def words_of(self, run: Run) -> list[str]:
        """The words of a run."""
        return self.spelled[run.text][run.first : run.first + run.length]

    def hits(self, text: str) -> Iterator[Hit]:
        """Where runs stand in a text, by their last words; compared word for word."""
        if not self.uses:
            return
        points = codes(text)
        hits = np.empty((1024, 3), np.int64)
        found = self._search(points, hits)
        if found > len(hits):
            hits = np.empty((found, 3), np.int64)
            self._search(points, hits)
        same: dict[tuple[int, str], bool] = {}  # a text that repeats itself is compared once
        for row in hits[:found]:
            number, start, end = row.tolist()
            known = number, text[start:end]
            if known not in same:
                if len(same) >= KNOWN_AT_MOST:
                    same.clear()
                same[known] = _is_spelled(text[start:end], self.words_of(self.uses[number][0]))
            if same[known]:
                yield Hit(number, start, end)

    def _search(self, points: np.ndarray, hits: np.ndarray) -> int:
        return _search(points, *tables(), self._lengths, self._powers, self._bits, self._keys, self._numbers, hits)


def _is_spelled(piece: str, words: list[str]) -> bool:
    """Whether these are the words of a piece; a sign at its edge is one by the number beyond it."""
    if words[0] in SIGNS:
        return _sign(piece[0]) == words[0] and (len(words) == 1 or _is_spelled(piece[1:], words[1:]))
    if words[-1] in SIGNS:
        return _sign(piece[-1]) == words[-1] and _is_spelled(piece[:-1], words[:-1])
    return spelled(piece, words_of(piece)) == words


def _power_of_two(least: int) -> int:
    return 1 << max(6, (least - 1).bit_length())
