"""Words of any script: which characters make them, and the one pass that normalises a text and hashes its words.

A text is brought to NFKC, lower case and single blanks; that is what two exact duplicates have in common. Its words are
runs of letters, marks, digits and underscores. Scripts that are written without blanks (Chinese, Japanese, Thai, Lao,
Khmer, Burmese, …) have a word a letter, its marks with it, so that n-grams exist there at all. Vowel points of Arabic
and Hebrew, the Arabic elongation and invisible format characters belong to no word: with and without them a word is
the same.

The pass runs over code points in numba: word hash, n-gram hash and normalised bytes come out of one loop, at some
2 ns a character, where a regular expression and a dictionary of words take a hundred.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import cache

import numba
import numpy as np

LETTER, SPACE, OTHER, ALONE, MARK, UNSEEN = range(6)  # what a character is to words
KIND_SHIFT, CODE_MASK = np.uint32(24), np.uint32(0xFFFFFF)
ASCII_LETTERS = 0x80  # entries of the table below it are letters (kind 0) whose lower case is ASCII
ASSIGNED = 0x40000  # beyond are private use, variation selectors and nothing
CODE_POINTS = 0x110000
VARIATION_SELECTORS = range(0xE0100, 0xE01F0)
CATEGORIES = (
    "Cn", "Lo", "So", "Ll", "Lu", "Mn", "Co", "Cs", "Sm", "Po", "No", "Lm", "Nl", "Mc", "Nd", "Cf", "Sk", "Lt", "Cc",
    "Ps", "Pe", "Sc", "Pd", "Zs", "Me", "Pi", "Pf", "Pc", "Zl", "Zp",
)  # fmt: skip
LOWERED = ("Lu", "Lt", "Nl", "So")  # all others are their own lower case
ELONGATION = 0x640
WITHOUT_BLANKS = (
    "CJK UNIFIED", "CJK COMPATIBILITY", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER",
    "MYANMAR", "TAI LE", "NEW TAI LUE", "TAI THAM", "TAI VIET", "BALINESE", "JAVANESE", "YI", "TANGUT", "NUSHU",
    "KHITAN", "CUNEIFORM", "EGYPTIAN HIEROGLYPH",
)  # fmt: skip

# What NFKC often changes in ordinary text. A text without any of these is mostly NFKC already, which Python sees
# quickly, where its full normalisation runs at 40 MB/s. Replacing one by its own NFKC changes no result: NFKC is
# a function of the full decomposition.
COMMON = tuple(
    (c, unicodedata.normalize("NFKC", c)) for c in "\u00a0…，（）：；！？\u3000™²³½ºª\u2009\u202f\u2003\u2002ﬁﬂ％．～"
)
LOWER_IN_CONTEXT = ("Σ", "İ")  # lower case by what is around, or two characters: left to Python

PIECE = 1 << 12  # characters of a text that are normalised at a time: many pieces of one with a few accents are ASCII
BLOCK = 1 << 14  # characters in a pass, so that n-grams and what is made of them stay in the first cache
NO_WORD, WORD, LONE = 0, 1, 2  # where the pass stands: outside words, in one, in one of a script without blanks
INSIDE, HASH, COUNT, BLANK, BEGUN = range(5)  # what it carries from block to block
STATE_SIZE = 5
WORD_PRIME = np.uint64(0xC6A4A7935BD1E995)
GRAM_PRIME = np.uint64(0x9E3779B97F4A7C15)
ONE = np.uint64(1)
MIX = np.uint64(0xFF51AFD7ED558CCD)


def normalised(text: str) -> str:
    """NFKC, lower case, white space as single blanks: what "exactly equal" means here."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def pieces(text: str) -> Iterator[np.ndarray]:
    """A text as `prepared` gives it, a long one piece by piece: cut behind a blank and before an ASCII character.

    There a text can be cut without a change of its normal form; one without such places is not cut.
    """
    if text.isascii():
        yield np.frombuffer(text.encode(), np.uint8)
        return
    start = 0
    while len(text) - start > PIECE and (cut := _cut(text, start, start + PIECE)):
        yield prepared(text[start:cut])
        start = cut
    yield prepared(text[start:] if start else text)


def _cut(text: str, start: int, end: int, tries: int = 1000) -> int:
    for _ in range(tries):
        end = text.rfind(" ", start, end)
        if end < 0:
            return 0
        if text[end + 1] < "\x80":
            return end + 1
    return 0


def prepared(text: str) -> np.ndarray:
    """A text's characters in NFKC, lowered where that depends on context: uint8 if all are ASCII, else uint32."""
    if not text.isascii():
        if not unicodedata.is_normalized("NFKC", text):
            for common, instead in COMMON:
                text = text.replace(common, instead)
            text = unicodedata.normalize("NFKC", text)
        if any(c in text for c in LOWER_IN_CONTEXT):
            text = text.lower()
        if not text.isascii():
            return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return np.frombuffer(text.encode(), np.uint8)


@cache
def characters() -> np.ndarray:
    """Of each code point, uint32: its lower case, and in the highest byte what it is to words."""
    lower, kinds = np.arange(CODE_POINTS, dtype=np.uint32), np.full(CODE_POINTS, OTHER, np.uint8)
    every = np.arange(ASSIGNED, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
    numbers = {category: number for number, category in enumerate(CATEGORIES)}
    categories = np.frombuffer(bytes(map(numbers.__getitem__, map(unicodedata.category, every))), np.uint8)
    kinds[:ASSIGNED] = np.array([_kind_of_category(c) for c in CATEGORIES], np.uint8)[categories]
    for code in _of_categories(categories, *LOWERED):
        small = every[code].lower()
        if len(small) == 1:
            lower[code] = ord(small)
    for code in _of_categories(categories, "Cc", "Zs", "Zl", "Zp"):
        if every[code].isspace():
            lower[code], kinds[code] = 32, SPACE
    for code in _of_categories(categories, "Mn"):
        if unicodedata.name(every[code], "").startswith(("ARABIC", "HEBREW")):
            kinds[code] = UNSEEN
    for code in _of_categories(categories, "Lo", "Lm", "Nl"):
        if 0xAC00 <= code < 0xD800:  # Hangul syllables
            continue
        chinese = 0x3400 <= code < 0xA000 or code >= 0x20000  # most of the rest, and their names take long
        if chinese or unicodedata.name(every[code], "").startswith(WITHOUT_BLANKS):
            kinds[code] = ALONE
    kinds[[ELONGATION, *range(0xFE00, 0xFE10), *VARIATION_SELECTORS]] = UNSEEN
    kinds[ord("_")] = LETTER
    return lower | (kinds.astype(np.uint32) << KIND_SHIFT)


def _kind_of_category(category: str) -> int:
    if category == "Cf":
        return UNSEEN
    return {"M": MARK, "L": LETTER, "N": LETTER}.get(category[0], OTHER)


def _of_categories(categories: np.ndarray, *wanted: str) -> list[int]:
    return np.flatnonzero(np.isin(categories, [CATEGORIES.index(c) for c in wanted])).tolist()


@numba.njit(cache=True, nogil=True, inline="always")
def _put(text, size, code):
    """Write a character as UTF-8; the size then."""
    if code < 0x80:
        text[size] = code
        return size + np.uint64(1)
    if code < 0x800:
        text[size] = 0xC0 | (code >> 6)
        text[size + np.uint64(1)] = 0x80 | (code & 63)
        return size + np.uint64(2)
    if code < 0x10000:
        text[size] = 0xE0 | (code >> 12)
        text[size + np.uint64(1)] = 0x80 | ((code >> 6) & 63)
        text[size + np.uint64(2)] = 0x80 | (code & 63)
        return size + np.uint64(3)
    text[size] = 0xF0 | (code >> 18)
    text[size + np.uint64(1)] = 0x80 | ((code >> 12) & 63)
    text[size + np.uint64(2)] = 0x80 | ((code >> 6) & 63)
    text[size + np.uint64(3)] = 0x80 | (code & 63)
    return size + np.uint64(4)


@numba.njit(cache=True, nogil=True)
def scan(units, final, characters, ngram, state, words, grams, text):
    """One block of a document's characters: normalised UTF-8 into `text`, n-gram hashes into `grams`.

    Args:
        units: uint32 (at most BLOCK); the characters as `prepared` gives them.
        final: whether the document ends here.
        characters: as the function of this name makes it.
        state: uint64 (STATE_SIZE); zeros at a document's beginning.
        words: uint64 (ngram + BLOCK + 2); the first `ngram` are the words before this block.
        grams: uint64 (BLOCK + 2), text: uint8 (4 · BLOCK + 2); written to.

    Returns: how many n-grams and how many bytes were written.
    """
    inside, word, blank, begun = state[INSIDE], state[HASH], state[BLANK], state[BEGUN]
    new, size = np.uint64(0), np.uint64(0)
    for i in range(len(units)):
        entry = characters[units[i]]
        kind, code = entry >> KIND_SHIFT, entry & CODE_MASK
        if kind == SPACE:
            blank = begun
        else:
            if blank:
                text[size] = 32
                size += ONE
                blank = np.uint64(0)
            begun = np.uint64(1)
            size = _put(text, size, code)
        if kind == LETTER:
            ends = inside == LONE
        else:
            ends = inside != NO_WORD and kind <= ALONE
        if ends:
            words[np.uint64(ngram) + new] = word
            new += ONE
            inside, word = np.uint64(NO_WORD), np.uint64(0)
        if kind == LETTER or (kind >= ALONE and kind != UNSEEN):
            word = word * WORD_PRIME + np.uint64(code)
            if kind == ALONE:
                inside = np.uint64(LONE)
            elif inside == NO_WORD:
                inside = np.uint64(WORD)
    state[BLANK], state[BEGUN] = blank, begun
    return _grams(final, inside, word, new, ngram, state, words, grams), size


@numba.njit(cache=True, nogil=True)
def scan_ascii(units, final, characters, ngram, state, words, grams, text):
    """What `scan` does, for uint8 units below 128, without a branch: a mispredicted one costs five letters."""
    inside, word, size, new = state[INSIDE], state[HASH], state[BLANK], np.uint64(ngram)
    text[0] = 32  # the blank that waits, if one does
    blank = state[BLANK] | (state[BEGUN] ^ ONE)
    for i in range(len(units)):
        entry = characters[units[i]]
        is_letter = np.uint64(entry < ASCII_LETTERS)
        is_blank = np.uint64((entry >> KIND_SHIFT) == SPACE)
        text[size] = np.uint8(entry)
        size += ONE - (is_blank & blank)
        blank = is_blank
        words[new] = word
        new += inside & (is_letter ^ ONE)
        letter = np.uint64(0) - is_letter  # all bits of it
        word = word * (WORD_PRIME & letter) + (np.uint64(entry) & letter)
        inside = is_letter
    state[BLANK] = np.uint64(size > 0) & blank
    size -= state[BLANK]
    state[BEGUN] |= np.uint64(size > 0)
    new -= np.uint64(ngram)
    return _grams(final, inside, word, new, ngram, state, words, grams), size


@numba.njit(cache=True, nogil=True)
def _grams(final, inside, word, new, ngram, state, words, grams):
    """The n-grams that `new` words complete; the number of them. A word that the block cuts waits in the state."""
    before, new = np.int64(state[COUNT]), np.int64(new)
    if final and inside:
        words[ngram + new] = word
        new += 1
    state[INSIDE], state[HASH], state[COUNT] = inside, word, np.uint64(before + new)
    for i in range(ngram, ngram + new):
        whole = words[i]
        whole ^= whole >> np.uint64(32)
        whole *= MIX
        words[i] = whole ^ (whole >> np.uint64(29))
    first = max(0, ngram - before - 1)  # of the new words, the one that completes an n-gram
    gram, top = np.uint64(0), ONE
    for i in range(1, ngram):
        gram = gram * GRAM_PRIME + words[first + i]
        top *= GRAM_PRIME
    made = 0
    for last in range(first, new):  # a polynomial of the words: the first one leaves, the next one enters
        gram = gram * GRAM_PRIME + words[ngram + last]
        whole = gram ^ (gram >> np.uint64(32))
        whole *= MIX
        grams[made] = whole ^ (whole >> np.uint64(32))
        gram -= top * words[last + 1]
        made += 1
    for i in range(ngram):
        words[i] = words[new + i]
    return made
