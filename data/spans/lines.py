"""Lines or paragraphs that stand in several documents: hashed, grouped by partitions, decided shard by shard.

The unit is a line, as in CCNet (arXiv 1911.00359, section 3.1, whose "paragraphs" are lines) and in FineWeb's trials
(arXiv 2406.17557, section 3.4), or a paragraph: lines up to a blank one. Units are equal if 128 bits of the SHA-256 of
what is compared agree; no two texts are known, or can be found in practice, of which that holds. A unit goes with the
line break that ends it (and, if a paragraph, with the blank lines after it); the last one of a document with the break
before it, so that what stays is as if it had never been there.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import regex

from gristmill.data.documents import atomic, read_rows
from gristmill.data.spans.config import LinesConfig
from gristmill.data.spans.exchange import SHIFT, Asker, ask_all, keys_to
from gristmill.data.spans.search import Search
from gristmill.data.spans.tables import AGAIN
from gristmill.data.spans.texts import LINE, Span, write_ids

HELD = 1 << 16  # questions of a shard before they are handed over
_SILENT = regex.compile(r"[^\w\s]+")
_DIGIT = regex.compile(r"\p{Nd}")


def units(text: str, unit: str) -> Iterator[tuple[int, int, int]]:
    """Lines or paragraphs that are not blank: where they begin, where what goes with them begins, where it ends."""
    yield from _ranges(text, _lines(text) if unit == "line" else _paragraphs(text))


def _ranges(text: str, found: Iterator[Span]) -> Iterator[tuple[int, int, int]]:
    for start, end in found:
        last = end == len(text) and text[end - 1] != "\n"
        yield start, start - (last and start > 0), end


def _lines(text: str) -> Iterator[Span]:
    start = 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        if not text[start:end].isspace():
            yield start, end
        start = end


def _paragraphs(text: str) -> Iterator[Span]:
    """A paragraph ends where the next begins: blank lines go with the one before them."""
    begin, blank, at = -1, True, 0
    while at < len(text):
        end = text.find("\n", at) + 1 or len(text)
        empty = text[at:end].isspace()
        if not empty and blank:
            if begin >= 0:
                yield begin, at
            begin = at
        blank, at = empty, end
    if begin >= 0:
        yield begin, len(text)


def compared(unit: str, config: LinesConfig) -> str:
    """What is compared of a line or paragraph; empty where it is too short to count."""
    shown = unit.strip() if config.compare == "exact" else folded(unit)
    if len(shown) < config.least_characters or (config.least_words and len(shown.split()) < config.least_words):
        return ""
    return shown


def folded(text: str) -> str:
    """NFKC, lower case, every digit a 0, neither punctuation nor symbols, white space as single blanks."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_SILENT.sub("", _DIGIT.sub("0", plain)).split())


def key(shown: str) -> bytes:
    """128 bits of SHA-256, neither half 0: tables know free slots by that."""
    digest = hashlib.sha256(shown.encode("utf-8", "surrogatepass")).digest()
    return bytes(digest[:16]) if any(digest[:8]) else b"\1" + bytes(digest[1:16])


def ask_lines(search: Search, config: LinesConfig, number: int, shard: Path) -> None:
    """Ask for every line of a shard that is long enough; writes the ids of its documents too."""

    def write(asker: Asker) -> None:
        keys, rest = bytearray(), []

        def hand_over() -> None:
            if rest:
                rows = np.concatenate(
                    [np.frombuffer(bytes(keys), "<u8").reshape(-1, 2), np.array(rest, np.uint64)], axis=1
                )
                asker.ask(rows, keys_to(rows[:, 0], search.partitions))
                keys.clear()
                rest.clear()

        with write_ids(search.ids(number)) as add_id:
            for place, row in enumerate(read_rows(shard)):
                add_id(row["id"])
                if row["metadata"]["kind"] not in search.kinds:
                    continue
                document, seen = (number << SHIFT) + place, set()
                for start, gone_from, end in units(row["text"], config.unit):
                    shown = compared(row["text"][start:end], config)
                    if shown:
                        own = key(shown)
                        keys += own
                        rest.append((document | (int(AGAIN) if own in seen else 0), gone_from << 32 | end))
                        seen.add(own)
                    if len(rest) >= HELD:
                        hand_over()
        hand_over()

    ask_all(search.line_keys, number, write)


def decide_lines(search: Search, config: LinesConfig, number: int) -> None:
    """Write which lines of a shard go."""
    with atomic(search.lines_that_go(number)) as part, part.open("wb") as file:
        last = np.zeros(1, LINE)
        for questions, answers in search.line_keys.replies(number):
            own = questions[:, 2] & ~AGAIN
            again = questions[:, 2] != own
            documents, kept = answers[:, 0], answers[:, 1]
            goes = documents >= np.uint64(config.least_documents)
            if config.keep == "first":
                goes &= kept != own
            if config.within_documents:
                goes |= again
            found = np.zeros(int(goes.sum()), LINE)
            found["document"] = own[goes] & np.uint64((1 << SHIFT) - 1)
            found["start"], found["end"] = _unpacked(questions[goes, 3])
            found["kept"], found["documents"] = kept[goes], documents[goes]
            found["kept_start"], found["kept_end"] = _unpacked(answers[goes, 2])
            found = found[np.lexsort((found["start"], found["document"]))]
            before = np.concatenate([last, found[:-1]])  # the last line's break may have gone with the line before it
            same = before["document"] == found["document"]
            found["start"] = np.where(same, np.maximum(found["start"], before["end"]), found["start"])
            file.write(found.tobytes())
            last = found[-1:] if len(found) else last


def _unpacked(spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return spans >> np.uint64(32), spans & np.uint64(0xFFFFFFFF)
