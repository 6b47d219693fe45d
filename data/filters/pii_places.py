"""Where in a text numbers and values stand that the patterns of `pii.py` are worth trying at.

Python's regular expressions look at each character for tens of nanoseconds; one numba loop at hundreds of megabytes a
second leaves them the few places that could match. What a place is, is a necessary condition of the pattern.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numba import njit

from gristmill.data.folded_words import codes

BEYOND = 2  # characters that a pattern looks at after its match
LEAST_VALUE = 20  # characters


def _character_set(characters: str) -> np.ndarray:
    held = np.zeros(128, np.uint8)
    held[[ord(c) for c in characters]] = 1
    return held


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
IN_NUMBERS = _character_set("0123456789 .()/+-")
IN_VALUES = _character_set(f"{LETTERS}0123456789+/_.~-")


@njit(cache=True)
def _stretches(points, held, least, least_digits, least_dots, found):
    """Longest runs of characters of a set, of some length and with so many digits and dots: [start, end) into `found`.

    Returns how many there are, of which `found` holds as many as it has room for.
    """
    count, start, digits, dots, size = 0, 0, 0, 0, len(points)
    for at in range(size + 1):
        code = points[at] if at < size else 0
        if code < 128 and held[code]:
            digits += 48 <= code <= 57
            dots += code == 46
            continue
        if digits >= least_digits and dots >= least_dots and at - start >= least:
            if count < len(found):
                found[count, 0], found[count, 1] = start, at
            count += 1
        start, digits, dots = at + 1, 0, 0
    return count


def _all_stretches(text: str, held: np.ndarray, least: int, digits: int, dots: int) -> Iterator[tuple[int, int]]:
    points, found = codes(text), np.empty((256, 2), np.int64)
    count = _stretches(points, held, least, digits, dots, found)
    if count > len(found):
        found = np.empty((count, 2), np.int64)
        _stretches(points, held, least, digits, dots, found)
    for row in found[:count]:
        start, end = row.tolist()
        yield start, end


def numbers(text: str, least_digits: int, least_dots: int = 0) -> Iterator[tuple[int, int]]:
    """[start, end) of runs of digits and what stands between those of one number, and of what a pattern sees after."""
    for start, end in _all_stretches(text, IN_NUMBERS, least_digits, least_digits, least_dots):
        yield start, min(len(text), end + BEYOND)


def values(text: str) -> Iterator[tuple[int, int]]:
    """[start, end) of runs without blanks of `LEAST_VALUE` characters and more, two digits among them."""
    yield from _all_stretches(text, IN_VALUES, LEAST_VALUE, 2, 0)


@njit(cache=True)
def _account(points, at):
    """The first place from `at` on where two capital letters and two digits follow each other, or -1."""
    for place in range(at, len(points) - 3):
        if (
            48 <= points[place + 3] <= 57
            and 48 <= points[place + 2] <= 57
            and 65 <= points[place + 1] <= 90
            and 65 <= points[place] <= 90
        ):
            return place
    return -1


def accounts(text: str) -> Iterator[int]:
    """Where two capital letters and two digits follow each other, as an IBAN begins."""
    points = codes(text)
    at = _account(points, 0)
    while at >= 0:
        yield at
        at = _account(points, at + 1)
