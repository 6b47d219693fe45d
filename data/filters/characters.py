"""What each Unicode character is to the rules, as bits of one table over all code points.

The table is made once a process (0.2 s): of Python's own character database where a rule says `str.isspace` or
`str.isalpha`, and of datatrove's lists of punctuation, so that a loop over numbers sees what its filters see.
"""

from __future__ import annotations

import sys
import unicodedata
from functools import cache

import numpy as np
from numpy.typing import NDArray

SPACE = 1  # str.isspace
ALPHA = 2  # str.isalpha
SYMBOL = 4  # datatrove's PUNCTUATION_SET: a word of these alone is no word to Gopher's counts
CATEGORY_P = 8  # any punctuation of Unicode
TERMINAL = 16  # ends a sentence, in any script: datatrove's TERMINAL_PUNCTUATION
LINE_BREAK = 32  # str.splitlines
DIGIT = 64  # 0 to 9
LOWER = 128
UPPER = 256
OPENS = 512  # comes off the front of a word
CLOSES = 1024  # comes off the end of a word
HYPHEN = 2048
QUOTE = 4096
SENTENCE = 16384  # ends a sentence for spaCy's sentencizer
ALONE = 8192  # stands for a word by itself wherever it is: Han, Kana, pictures

FIRST_EMPTY, SPECIAL = 0x40000, 0xE0000
"""Beyond planes 0 to 3 Unicode has tags and variation selectors, in 0xE0000 to 0xE0FFF, and private use."""

NO_SENTENCE = (
    "\u061d\u061e\u0837\u0839\u083d\u083e\u17d4\u17d5\u17d6\u17d9\u17da\u1b7d\u1b7e\u2e53\u2e54"
    "\U00010f55\U00010f56\U00010f57\U00010f58\U00010f59\U00010f86\U00010f87\U00010f88\U00010f89"
    "\U00011944\U00011946\U00011ef7\U00011ef8\U00011f43\U00011f44\U00016e98"
)
"""Of the marks that end a sentence, those (of the newer versions of Unicode) that spaCy does not know."""

LINE_BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
QUOTES = "'\"”“`‘´’‚„»«「」『』（）〔〕【】《》〈〉⟦⟧"
MARKS = ",:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪…"
OPENING = "§%=—–+"
CLOSING = "—–%"
HYPHENS = "-–—~"


@cache
def character_table() -> NDArray[np.uint16]:
    """The bits of every code point; shape [0x110000]."""
    from datatrove.utils.text import PUNCTUATION_SET, TERMINAL_PUNCTUATION

    table = np.zeros(sys.maxunicode + 1, np.uint16)
    for code in [*range(FIRST_EMPTY), *range(SPECIAL, SPECIAL + 0x1000)]:
        table[code] = _bits(chr(code))
    for letters, bit in (
        (PUNCTUATION_SET, SYMBOL),
        (TERMINAL_PUNCTUATION, TERMINAL),
        (TERMINAL_PUNCTUATION - set(NO_SENTENCE), SENTENCE),
        (LINE_BREAKS, LINE_BREAK),
        ("0123456789", DIGIT),
        (QUOTES + MARKS, OPENS | CLOSES),
        (OPENING, OPENS),
        (CLOSING, CLOSES),
        (HYPHENS, HYPHEN),
        (QUOTES, QUOTE),
    ):
        for letter in letters:
            table[ord(letter)] |= bit
    return table


def _bits(letter: str) -> int:
    category = unicodedata.category(letter)
    bits = SPACE * letter.isspace() | ALPHA * letter.isalpha() | LOWER * letter.islower() | UPPER * letter.isupper()
    if category[0] == "P":
        bits |= CATEGORY_P
    if category == "Sc":
        bits |= OPENS
    if category == "So" or (category == "Lo" and _is_written_alone(ord(letter))):
        bits |= ALONE
    return bits


def _is_written_alone(code: int) -> bool:
    """Letters of scripts without spaces whose characters are words of their own: Han and Kana."""
    return (
        0x3041 <= code <= 0x30FF
        or 0x3400 <= code <= 0x4DBF
        or 0x4E00 <= code <= 0x9FFF
        or 0xF900 <= code <= 0xFAFF
        or 0x20000 <= code <= 0x3FFFF
    )
