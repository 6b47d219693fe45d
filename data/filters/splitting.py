"""Words in one pass over code points: an own, small set of rules that counts as spaCy's English ones do.

Each run between white space loses its opening marks, then its closing marks, one by one; what is left is cut at
hyphens, commas, colons, slashes and the like between letters, and before n't. Characters of scripts without spaces
(Han, Kana) and pictures are words of their own. numba, since this is a state machine over characters that numpy cannot
say and Python runs 200 times slower.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from gristmill.data.filters.characters import (
    ALONE,
    ALPHA,
    CATEGORY_P,
    CLOSES,
    DIGIT,
    HYPHEN,
    LOWER,
    OPENS,
    QUOTE,
    SPACE,
    UPPER,
)

DOT, PLUS, MINUS, STAR, CARET, COMMA, APOSTROPHE, CURLY = 0x2E, 0x2B, 0x2D, 0x2A, 0x5E, 0x2C, 0x27, 0x2019
COLON, LESS, EQUAL, GREATER, SLASH = 0x3A, 0x3C, 0x3D, 0x3E, 0x2F
SMALL_D, SMALL_E, SMALL_L, SMALL_M, SMALL_N, SMALL_R = 0x64, 0x65, 0x6C, 0x6D, 0x6E, 0x72
SMALL_S, LARGE_S, SMALL_T, SMALL_V = 0x73, 0x53, 0x74, 0x76
AT, HASH, QUESTION, UNDERSCORE, LEFT, RIGHT = 0x40, 0x23, 0x3F, 0x5F, 0x28, 0x29

BEYOND = 4  # places beyond the most words: what is written before a loop looks at the count again


@njit(cache=True, nogil=True)
def split_fast(codes, table, most):
    """Starts and ends (int32) of the words of a text; where there are more than `most`, of a few more than that."""
    room = min(len(codes), most + BEYOND)
    starts, ends = np.empty(room, np.int32), np.empty(room, np.int32)
    count, at = 0, 0
    while at < len(codes) and count <= most:
        if table[codes[at]] & SPACE:
            at += 1
            continue
        end = at + 1
        while end < len(codes) and not table[codes[end]] & SPACE:
            end += 1
        count = _split_run(codes, table, at, end, starts, ends, count, most)
        at = end
    return starts[:count].copy(), ends[:count].copy()


@njit(cache=True, nogil=True, inline="always")
def _put(codes, starts, ends, first, count, start, end):
    """One more word of a run whose words begin at `first`; how many there are then.

    A parenthesis beside a colon is one word with it, as in the faces :) and (: and, so, at the end of Python's `f(x):`.
    """
    if count > first and end - start == 1 and ends[count - 1] - starts[count - 1] == 1:
        left, right = codes[starts[count - 1]], codes[start]
        if (left == COLON and (right in (LEFT, RIGHT))) or (right == COLON and (left in (LEFT, RIGHT))):
            ends[count - 1] = end
            return count
    starts[count], ends[count] = start, end
    return count + 1


@njit(cache=True, nogil=True)
def _split_run(codes, table, start, end, starts, ends, count, most):
    """The words of characters [start, end), none of them white space, into starts and ends from `count` on."""
    first = count
    while start < end and count <= most:
        size = _opening(codes, table, start, end)
        if size == 0:
            break
        count = _put(codes, starts, ends, first, count, start, start + size)
        start += size
    inner = end
    while start < inner:
        size = _closing(codes, table, start, inner)
        if size == 0:
            break
        inner -= size
    if start < inner:
        count = _split_inside(codes, table, start, inner, starts, ends, first, count, most)
    while inner < end and count <= most:  # the closing marks again, now from the left
        size = 1
        if codes[inner] == DOT:
            while inner + size < end and codes[inner + size] == DOT:
                size += 1
        elif _is_apostrophe(codes[inner]) and inner + 1 < end and _is_s(codes[inner + 1]):
            size = 2
        count = _put(codes, starts, ends, first, count, inner, inner + size)
        inner += size
    return count


@njit(cache=True, nogil=True)
def _opening(codes, table, start, end):
    """How many characters come off the front: dots in a row, or one mark; 0 for none."""
    code = codes[start]
    if code == DOT:
        size = 1
        while start + size < end and codes[start + size] == DOT:
            size += 1
        return size if size > 1 else 0
    if code == PLUS and start + 1 < end and table[codes[start + 1]] & DIGIT:
        return 0
    return 1 if table[code] & (OPENS | ALONE) else 0


@njit(cache=True, nogil=True)
def _closing(codes, table, start, end):
    """How many characters come off the end: dots in a row, 's, or one mark; 0 for none."""
    code = codes[end - 1]
    before = table[codes[end - 2]] if end - 2 >= start else 0
    if code == DOT:
        return _closing_dots(codes, table, start, end)
    if _is_s(code) and end - 2 >= start and _is_apostrophe(codes[end - 2]):
        return 2
    if code == PLUS:
        return 1 if before & DIGIT else 0
    return 1 if table[code] & (CLOSES | ALONE) else 0


@njit(cache=True, nogil=True)
def _closing_dots(codes, table, start, end):
    """Dots in a row, or one that ends a sentence and no abbreviation: after a word, a number, a mark, two capitals."""
    size = 1
    while end - size - 1 >= start and codes[end - size - 1] == DOT:
        size += 1
    if size > 1:
        return size
    if end - 2 < start:
        return 0
    before = table[codes[end - 2]]
    if end - 2 == start and before & ALPHA:
        return 0
    if before & UPPER:
        return 1 if end - 3 >= start and table[codes[end - 3]] & UPPER else 0
    if before & LOWER and end - 3 >= start and codes[end - 3] == DOT:
        return 0  # e.g. and i.e.
    return 1 if before & (ALPHA | DIGIT | QUOTE | CLOSES | CATEGORY_P | ALONE) or codes[end - 2] == PLUS else 0


@njit(cache=True, nogil=True)
def _split_inside(codes, table, start, end, starts, ends, first, count, most):
    """The words of a run without its outer marks; contractions at its end are words of their own."""
    inner = end
    while True:
        size = _contraction(codes, start, inner)
        if size == 0:
            break
        inner -= size
    count = _split_word(codes, table, start, inner, starts, ends, first, count, most)
    while inner < end and count <= most:  # the contractions again, now from the left
        size = 2 if _is_apostrophe(codes[inner]) and codes[inner + 1] in (SMALL_M, SMALL_D) else 3
        count = _put(codes, starts, ends, first, count, inner, inner + size)
        inner += size
    return count


@njit(cache=True, nogil=True)
def _split_word(codes, table, start, end, starts, ends, first, count, most):
    """The parts of a word without contractions."""
    if count > most:
        return count
    if _is_address(codes, table, start, end):
        return _put(codes, starts, ends, first, count, start, end)
    at = start
    for i in range(start, end):
        alone = table[codes[i]] & ALONE != 0
        if i < at or not (alone or (i > start and i + 1 < end and _cuts(codes, table, i))):
            continue
        size = 1
        if not alone:
            while i + size < end - 1 and codes[i] == codes[i + size] and (codes[i] == DOT or codes[i] == MINUS):
                size += 1
        if at < i:
            count = _put(codes, starts, ends, first, count, at, i)
        count = _put(codes, starts, ends, first, count, i, i + size)
        if count > most:
            return count
        at = i + size
    return _put(codes, starts, ends, first, count, at, end) if at < end else count


@njit(cache=True, nogil=True)
def _contraction(codes, start, end):
    """Characters of a contraction at the end of a word: n't, 're, 've, 'll, 'm, 'd; 0 for none."""
    last = codes[end - 1]
    if end - start > 3 and _is_apostrophe(codes[end - 3]):
        before_last = codes[end - 2]
        if last == SMALL_E and (before_last in (SMALL_R, SMALL_V)):
            return 3
        return 3 if last == SMALL_L and before_last == SMALL_L else 0
    if end - start > 2 and _is_apostrophe(codes[end - 2]):
        if last == SMALL_T and end - start > 3 and codes[end - 3] == SMALL_N:
            return 3
        return 2 if last in (SMALL_M, SMALL_D) else 0
    return 0


@njit(cache=True, nogil=True)
def _is_address(codes, table, start, end):
    """Whether a run is an address of the web: a scheme or not, names joined by dots, the last of small letters."""
    at = start
    for i in range(start + 2, min(end - 3, start + 12)):
        if codes[i] == COLON and codes[i + 1] == SLASH and codes[i + 2] == SLASH:
            at = i + 3
            break
    dot = -1
    for i in range(at, end):
        code = codes[i]
        if code == AT and i > start:
            dot = -1
            at = i + 1
        elif code == DOT:
            if i == at or not table[codes[i - 1]] & (ALPHA | DIGIT):
                return False
            dot = i
        elif code in (SLASH, COLON, HASH, QUESTION):
            end = i
            break
        elif not (table[code] & (ALPHA | DIGIT)) and code != MINUS and code != UNDERSCORE:
            return False
    if dot < 0 or end - dot < 3:
        return False
    small = True
    for i in range(dot + 1, end):
        small &= (table[codes[i]] & LOWER) != 0
    return small


@njit(cache=True, nogil=True)
def _cuts(codes, table, i):
    """Whether the character at i, inside a run, parts what is left and right of it."""
    code, left, right = codes[i], table[codes[i - 1]], table[codes[i + 1]]
    if code == DOT:
        return codes[i + 1] == DOT or ((left & (LOWER | QUOTE)) != 0 and (right & (UPPER | QUOTE)) != 0)
    if table[code] & HYPHEN and left & (ALPHA | DIGIT):
        return (right & ALPHA) != 0 or (code == MINUS and ((left & right & DIGIT) != 0 or codes[i + 1] == MINUS))
    if code == COMMA:
        return (left & ALPHA) != 0 and (right & ALPHA) != 0
    if code in (COLON, LESS, EQUAL, GREATER, SLASH):
        return (left & (ALPHA | DIGIT)) != 0 and (right & ALPHA) != 0
    if code in (PLUS, STAR, CARET):
        return (left & DIGIT) != 0 and (right & DIGIT) != 0
    return False


@njit(cache=True, nogil=True)
def _is_apostrophe(code):
    return code in (APOSTROPHE, CURLY)


@njit(cache=True, nogil=True)
def _is_s(code):
    return code in (SMALL_S, LARGE_S)
