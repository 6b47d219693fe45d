"""Counts of words, lines and repetitions, as loops over a text's code points; numba.

Pieces of text are compared by 64-bit hashes of their characters: two different ones of n pieces are taken for equal
with probability n²/2⁶⁵, 10⁻⁷ for a document of a million words. A hash is a polynomial in an odd base modulo 2⁶⁴, so
that the hash of words joined without anything between follows from the hashes of the words.

Legend: W words, L lines.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from gristmill.data.filters.characters import ALPHA, CATEGORY_P, LINE_BREAK, SENTENCE, SPACE, SYMBOL

BASE = np.uint64(0x9E3779B97F4A7C15)
JOINT = np.uint64(0xC2B2AE3D27D4EB4F)
SCATTER = np.uint64(0xFF51AFD7ED558CCD)
HALF = np.uint64(33)
FEW = 1 << 9  # n-grams that a table has room for at first
LINE_FEED, CARRIAGE_RETURN, BLANK, DOT = 0x0A, 0x0D, 0x20, 0x2E
CURLY_BRACKET, SQUARE_BRACKET = 0x7B, 0x5B


@njit(cache=True, nogil=True, inline="always")
def _scattered(value):
    value = (value ^ (value >> HALF)) * SCATTER
    return value ^ (value >> HALF)


@njit(cache=True, nogil=True)
def _power(exponent):
    """The base to that power."""
    value, factor = np.uint64(1), BASE
    while exponent:
        if exponent & 1:
            value *= factor
        factor *= factor
        exponent >>= 1
    return value


@njit(cache=True, nogil=True)
def piece_hashes(codes, starts, ends):
    """Hash of each piece of a text, its length in it; uint64."""
    hashes = np.empty(len(starts), np.uint64)
    for w in range(len(starts)):
        value = np.uint64(0)
        for i in range(starts[w], ends[w]):
            value = value * BASE + _scattered(np.uint64(codes[i]) + np.uint64(1))
        hashes[w] = _with_length(value, ends[w] - starts[w])
    return hashes


@njit(cache=True, nogil=True, inline="always")
def _with_length(value, length):
    return _scattered(value + np.uint64(length) * JOINT)


@njit(cache=True, nogil=True)
def joined_words(codes, starts, ends):
    """Of the words before each, joined with nothing between, the polynomial (uint64) and the length; shapes [W + 1].

    Polynomial and length of words i to j, joined, follow from those before i and before j.
    """
    before, lengths = np.zeros(len(starts) + 1, np.uint64), np.zeros(len(starts) + 1, np.int32)
    value = np.uint64(0)
    for w in range(len(starts)):
        for i in range(starts[w], ends[w]):
            value = value * BASE + _scattered(np.uint64(codes[i]) + np.uint64(1))
        before[w + 1] = value
        lengths[w + 1] = lengths[w] + ends[w] - starts[w]
    return before, lengths


@njit(cache=True, nogil=True)
def _powers():
    """The base to the powers that words need most, so that they are looked up."""
    powers = np.ones(256, np.uint64)
    for i in range(1, len(powers)):
        powers[i] = powers[i - 1] * BASE
    return powers


@njit(cache=True, nogil=True, inline="always")
def _hash_of_words(before, lengths, powers, i, j):
    """Hash of words i to j, joined."""
    length = lengths[j] - lengths[i]
    power = powers[length] if length < len(powers) else _power(length)
    return _with_length(before[j] - before[i] * power, length)


@njit(cache=True, nogil=True)
def _empty_table(entries):
    """Places for that many entries of an open hash table, −1 where free; a power of two at most half full."""
    size = 16
    while size < 2 * entries:
        size *= 2
    return np.full(size, -1, np.int32)


@njit(cache=True, nogil=True, inline="always")
def _place(table, keys, key):
    """Where the entry of a key is in the table, or the free place where it belongs."""
    mask = len(table) - 1
    at = np.int64(key & np.uint64(mask))
    while table[at] >= 0 and keys[table[at]] != key:
        at = (at + 1) & mask
    return at


@njit(cache=True, nogil=True)
def repeated_pieces(codes, starts, ends):
    """Indexes (int32) of the pieces of a text that occurred before."""
    keys = piece_hashes(codes, starts, ends)
    table, found, count = _empty_table(len(keys)), np.empty(len(keys), np.int32), 0
    for i in range(len(keys)):
        at = _place(table, keys, keys[i])
        if table[at] >= 0:
            found[count] = i
            count += 1
        else:
            table[at] = i
    return found[:count].copy()


@njit(cache=True, nogil=True)
def _table_of(keys, size):
    """A hash table of that size, a power of two, with places for these keys."""
    table = np.full(size, -1, np.int32)
    for i in range(len(keys)):
        table[_place(table, keys, keys[i])] = i
    return table


@njit(cache=True, nogil=True)
def _twice(array):
    """The array with as much room again."""
    larger = np.empty(2 * len(array), array.dtype)
    larger[: len(array)] = array
    return larger


@njit(cache=True, nogil=True, inline="always")
def _hash_of_gram(before, lengths, powers, i, n):
    """Hash of the n words from i on, each by itself."""
    key = np.uint64(0)
    for j in range(i, i + n):
        key = key * JOINT + _hash_of_words(before, lengths, powers, j, j + 1)
    return _scattered(key)


@njit(cache=True, nogil=True)
def top_n_gram(before, lengths, n):
    """(first word, characters with a space between words, occurrences) of the commonest n-gram, the first of several.

    There are at least n words; `before` and `lengths` come from `joined_words`. The memory is that of the different
    n-grams: a text of millions of words says the same over and over.
    """
    powers, table = _powers(), np.full(2 * FEW, -1, np.int32)
    keys, firsts, counts, held = np.empty(FEW, np.uint64), np.empty(FEW, np.int32), np.empty(FEW, np.int32), 0
    for i in range(len(before) - n):
        key = _hash_of_gram(before, lengths, powers, i, n)
        at = _place(table, keys, key)
        if table[at] >= 0:
            counts[table[at]] += 1
            continue
        if held == len(keys):
            table = _table_of(keys, 2 * len(table))
            keys, firsts, counts = _twice(keys), _twice(firsts), _twice(counts)
            at = _place(table, keys, key)
        table[at] = held
        keys[held], firsts[held], counts[held] = key, i, 1
        held += 1
    most = np.argmax(counts[:held])
    best = np.int64(firsts[most])
    return best, lengths[best + n] - lengths[best] + n - 1, counts[most]


@njit(cache=True, nogil=True)
def n_grams_like(before, lengths, first, n, most):
    """First words (int32) of the n-grams equal to that of words `first` and on, at most so many, none overlapping."""
    powers, found, count, i = _powers(), np.empty(most, np.int32), 0, 0
    wanted = _hash_of_gram(before, lengths, powers, first, n)
    while i < len(before) - n and count < most:
        if _hash_of_gram(before, lengths, powers, i, n) == wanted:
            found[count] = i
            count += 1
            i += n
        else:
            i += 1
    return found[:count].copy()


@njit(cache=True, nogil=True)
def repeated_n_grams(before, lengths, n):
    """First words (int32) of the n-grams that occurred before, not counting those that overlap a repeated one.

    Words are joined with nothing between, as in the reference; `before` and `lengths` come from `joined_words`.
    """
    grams = max(0, len(before) - n)
    powers, table, keys, held = _powers(), np.full(2 * FEW, -1, np.int32), np.empty(FEW, np.uint64), 0
    found, count, i = np.empty(grams // n + 1, np.int32), 0, 0
    while i < grams:
        key = _hash_of_words(before, lengths, powers, i, i + n)
        at = _place(table, keys, key)
        if table[at] >= 0:
            found[count] = i
            count += 1
            i += n
            continue
        if held == len(keys):
            table, keys = _table_of(keys, 2 * len(table)), _twice(keys)
            at = _place(table, keys, key)
        table[at] = held
        keys[held] = key
        held += 1
        i += 1
    return found[:count].copy()


@njit(cache=True, nogil=True)
def different_words(codes, starts, ends, wanted, longest):
    """How many of the wanted words, sorted hashes of words of at most `longest` characters, occur."""
    found, count = np.zeros(len(wanted), np.bool_), 0
    for w in range(len(starts)):
        if ends[w] - starts[w] > longest or count == len(wanted):
            continue
        value = np.uint64(0)
        for i in range(starts[w], ends[w]):
            value = value * BASE + _scattered(np.uint64(codes[i]) + np.uint64(1))
        value = _with_length(value, ends[w] - starts[w])
        at = np.searchsorted(wanted, value)
        if at < len(wanted) and wanted[at] == value and not found[at]:
            found[at] = True
            count += 1
    return count


@njit(cache=True, nogil=True)
def count_words(codes, starts, ends, table):
    """(words that are not symbols alone, characters of these, words with a letter)."""
    real, characters, lettered = 0, 0, 0
    for w in range(len(starts)):
        symbols, letter = True, False
        for i in range(starts[w], ends[w]):
            bits = table[codes[i]]
            symbols = symbols and (bits & SYMBOL) != 0
            letter = letter or (bits & ALPHA) != 0
        if not symbols:
            real += 1
            characters += ends[w] - starts[w]
        if letter:
            lettered += 1
    return real, characters, lettered


@njit(cache=True, nogil=True)
def split_at_breaks(codes, table):
    """Starts and ends (int32) of lines as str.splitlines cuts them, without their breaks."""
    count = 1
    for i in range(len(codes)):
        if table[codes[i]] & LINE_BREAK:
            count += 1
    starts, ends = np.empty(count, np.int32), np.empty(count, np.int32)
    count, at, i = 0, 0, 0
    while i < len(codes):
        if table[codes[i]] & LINE_BREAK:
            starts[count], ends[count] = at, i
            count += 1
            if codes[i] == CARRIAGE_RETURN and i + 1 < len(codes) and codes[i + 1] == LINE_FEED:
                i += 1
            at = i + 1
        i += 1
    if at < len(codes):
        starts[count], ends[count] = at, len(codes)
        count += 1
    return starts[:count].copy(), ends[:count].copy()


@njit(cache=True, nogil=True)
def split_at_line_feeds(codes, start, end, least):
    """Starts and ends of the pieces of [start, end) between runs of at least that many line feeds; at least one."""
    count = 1
    for i in range(start, end):
        if codes[i] == LINE_FEED:
            count += 1
    starts, ends = np.empty(count, np.int32), np.empty(count, np.int32)
    count, at, i = 0, start, start
    while i < end:
        size = 0
        while i + size < end and codes[i + size] == LINE_FEED:
            size += 1
        if size >= least:
            starts[count], ends[count] = at, i
            count += 1
            at = i + size
        i += max(size, 1)
    starts[count], ends[count] = at, end
    count += 1
    return starts[:count].copy(), ends[:count].copy()


@njit(cache=True, nogil=True)
def strip(codes, start, end, table):
    """[start, end) without the white space at both ends."""
    while start < end and table[codes[start]] & SPACE:
        start += 1
    while end > start and table[codes[end - 1]] & SPACE:
        end -= 1
    return start, end


@njit(cache=True, nogil=True)
def strip_lines(codes, starts, ends, table):
    """Lines without the white space at both ends."""
    stripped_starts, stripped_ends = np.empty_like(starts), np.empty_like(ends)
    for k in range(len(starts)):
        stripped_starts[k], stripped_ends[k] = strip(codes, starts[k], ends[k], table)
    return stripped_starts, stripped_ends


@njit(cache=True, nogil=True)
def measure_lines(codes, starts, ends, table):
    """Of each stripped line: words between white space, characters of the longest, and whether { and [ are in it."""
    words, longest = np.zeros(len(starts), np.int32), np.zeros(len(starts), np.int32)
    curly, square = np.zeros(len(starts), np.bool_), np.zeros(len(starts), np.bool_)
    for k in range(len(starts)):
        size = 0
        for i in range(starts[k], ends[k]):
            if table[codes[i]] & SPACE:
                words[k] += size > 0
                longest[k] = max(longest[k], size)
                size = 0
            else:
                size += 1
                curly[k] |= codes[i] == CURLY_BRACKET
                square[k] |= codes[i] == SQUARE_BRACKET
        words[k] += size > 0
        longest[k] = max(longest[k], size)
    return words, longest, curly, square


@njit(cache=True, nogil=True)
def count_sentences(codes, word_starts, word_ends, start, end, low, high, table):
    """Sentences of characters [start, end), which hold the words low to high, as spaCy's sentencizer counts them.

    A sentence begins with the first token after an end mark that is no punctuation. White space is a token, except
    for a single blank after another token.
    """
    count, seen, before = 1, False, start
    for w in range(low, high):
        gap = word_starts[w] - before
        if seen and gap > 0 and (gap > 1 or codes[before] != BLANK):
            count += 1
            seen = False
        marks = True
        for i in range(word_starts[w], word_ends[w]):
            marks = marks and (table[codes[i]] & CATEGORY_P) != 0
        before = word_ends[w]
        ends_sentence = word_ends[w] - word_starts[w] == 1 and (table[codes[word_starts[w]]] & SENTENCE) != 0
        if ends_sentence:
            seen = True
        elif seen and not marks:
            count += 1
            seen = False
    gap = end - before
    if seen and gap > 0 and (gap > 1 or codes[before] != BLANK):
        count += 1
    return count


@njit(cache=True, nogil=True)
def count_sentences_of(codes, word_starts, word_ends, starts, ends, chosen, table):
    """Sentences of the chosen lines (bool of shape [L]), 0 for the others; int32 of shape [L]."""
    counts = np.zeros(len(starts), np.int32)
    w = 0
    for k in range(len(starts)):
        while w < len(word_starts) and word_starts[w] < starts[k]:
            w += 1
        high = w
        while high < len(word_starts) and word_starts[high] < ends[k]:
            high += 1
        if chosen[k]:
            counts[k] = count_sentences(codes, word_starts, word_ends, starts[k], ends[k], w, high, table)
        w = high
    return counts


@njit(cache=True, nogil=True)
def lines_that_end(codes, starts, ends, marks):
    """Whether each line's last character is one of `marks`, sorted code points."""
    found = np.zeros(len(starts), np.bool_)
    for k in range(len(starts)):
        if ends[k] > starts[k]:
            at = np.searchsorted(marks, codes[ends[k] - 1])
            found[k] = at < len(marks) and marks[at] == codes[ends[k] - 1]
    return found


@njit(cache=True, nogil=True)
def lines_that_are_blank(codes, starts, ends, table):
    """Whether each line is white space alone."""
    found = np.ones(len(starts), np.bool_)
    for k in range(len(starts)):
        for i in range(starts[k], ends[k]):
            if not table[codes[i]] & SPACE:
                found[k] = False
                break
    return found


@njit(cache=True, nogil=True)
def lines_with_dots(codes, starts, ends):
    """Whether each line ends in three dots."""
    found = np.zeros(len(starts), np.bool_)
    for k in range(len(starts)):
        end = ends[k]
        found[k] = end - starts[k] >= 3 and codes[end - 1] == DOT and codes[end - 2] == DOT and codes[end - 3] == DOT
    return found
