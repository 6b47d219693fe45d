"""Spans of N tokens and more that stand somewhere before: exact, out of core, and in time that follows the text.

A *window* is N tokens that follow each other in one document. A window **repeats** if the same tokens stand in an
earlier document, or, where the search looks within documents, further up in its own without overlapping it. The
tokens that go are those of all windows that repeat. This says the same as "keep the first of every common substring of
N tokens or more and remove its later occurrences, at their full length" (Lee et al. 2022, arXiv 2107.06499, find them
by a suffix array), but says it window by window: what goes depends on no order of work. Every token that goes has an
equal one at an earlier place; following these leads to one that stays, so no text is lost from the corpus.

Six passes, each shard by shard or partition by partition (`exchange.py`):
    ask_anchors     every shard samples grams of N − w + 1 tokens by winnowing (Schleimer, Wilkerson, Aiken 2003): of
                    each w grams that follow each other it chooses the one of least hash. Equal windows choose equal
                    grams: a window that repeats has an anchor that is asked at least twice
    answer_anchors  which anchors these are
    ask_windows     the windows around them, by two 64-bit hashes
    answer_windows  the first place of each
    ask_links       windows that follow each other, and whose first places do, are one link
    answer_links    document and characters of the original, and a digest of its tokens as they are in the text
A span goes only if the SHA-256 of its own tokens is that of the original's (`cut.py`): no collision of the hashes here
can remove anything.

A suffix array needs random access to the whole corpus; sorting the hashes of all windows writes five times the text.
The anchors are a third of the text, and the windows cost only where something repeats.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numba import njit

from gristmill.data.folded_words import mixed
from gristmill.data.spans.exchange import BLOCK, SHIFT, WITHIN, Asker, answer_all, ask_all, keys_to, save_array
from gristmill.data.spans.search import Search
from gristmill.data.spans.tables import shard_of
from gristmill.data.spans.texts import Text, back, write_ids
from gristmill.data.spans.tokens import Tokeniser, hashed

BASES = 0xB5026F5AA96619E9, 0xD1342543DE82EF95  # odd, of good spectral quality (Steele and Vigna 2021)


@njit(cache=True)
def _grams(hashes, window, base, out):
    """The hash of every window of the token hashes: a polynomial in `base` modulo 2^64, mixed; never 0."""
    value, power = np.uint64(0), np.uint64(1)
    for i in range(window - 1):
        value = value * base + hashes[i]
        power *= base
    for i in range(len(hashes) - window + 1):
        value = value * base + hashes[i + window - 1]
        out[i] = max(mixed(value), np.uint64(1))
        value -= power * hashes[i]


@njit(cache=True)
def _winnow(grams, sample, chosen):
    """Where the least of each `sample` grams stands, the last of equal ones, kept while it is least; their number."""
    count, best = 0, -1
    for begin in range(len(grams) - sample + 1):
        last = begin + sample - 1
        if best < begin:
            best = begin
            for i in range(begin + 1, last + 1):
                if grams[i] <= grams[best]:
                    best = i
        elif grams[last] < grams[best]:
            best = last
        else:
            continue
        chosen[count] = best
        count += 1
    return count


@njit(cache=True)
def _around(anchors, windows, sample, chosen):
    """The windows that hold one of the anchors, which are sorted; their number."""
    count, at = 0, 0
    for window in range(windows):
        while at < len(anchors) and anchors[at] < window:
            at += 1
        if at == len(anchors):
            break
        if anchors[at] < window + sample:
            chosen[count] = window
            count += 1
    return count


def ask_anchors(search: Search, number: int, shard: Path) -> None:
    """Ask for the anchors of a shard; writes its ids and the tokens of its documents too."""
    tokeniser, starts = Tokeniser(), [0]

    def write(asker: Asker) -> None:
        with write_ids(search.ids(number)) as add_id:
            for text in search.texts(number, shard):
                add_id(text.row["id"])
                end = starts[-1]
                for rows, new in _anchors_of(search, tokeniser, text.text, (number << SHIFT) + end):
                    asker.ask(rows, keys_to(rows[:, 0], search.partitions))
                    end += new
                starts.append(end)

    ask_all(search.anchors, number, write)
    save_array(search.token_starts(number), np.array(starts, np.int64))


def _anchors_of(search: Search, tokeniser: Tokeniser, text: str, place: int) -> Iterator[tuple[np.ndarray, int]]:
    """Questions, and the number of tokens that are new."""
    last = -1
    for begin, new, first, _ in hashed(tokeniser, text, search.tokens):
        count = len(first) - search.gram + 1
        rows = np.empty((0, 2), np.uint64)
        if len(first) >= search.tokens:
            grams, chosen = np.empty(count, np.uint64), np.empty(count, np.int64)
            _grams(first, search.gram, np.uint64(BASES[0]), grams)
            chosen = chosen[: _winnow(grams, search.sample, chosen)]
            chosen = chosen[chosen + begin > last]  # one that lies in two stretches is asked once
            rows = np.stack([grams[chosen], (chosen + (place + begin)).astype(np.uint64)], 1)
            last = int(chosen[-1]) + begin if len(chosen) else last
        yield rows, new


def ask_windows(search: Search, number: int, shard: Path) -> None:
    """Ask for the first places of the windows around anchors that stand elsewhere too."""
    shared = _Shared(search, number)

    def write(asker: Asker) -> None:
        if shared.none_left():
            return
        tokeniser, starts = Tokeniser(), np.load(search.token_starts(number), mmap_mode="r")
        for text in search.texts(number, shard):
            start = int(starts[text.number])
            anchors = shared.before(int(starts[text.number + 1])) - start
            if len(anchors):
                for rows in _windows_of(search, tokeniser, text.text, anchors, (number << SHIFT) + start):
                    asker.ask(rows, keys_to(rows[:, 0], search.partitions))

    ask_all(search.windows, number, write)


class _Shared:
    """The anchors of a shard that stand elsewhere too, as numbers of tokens in the shard, in order."""

    def __init__(self, search: Search, number: int) -> None:
        self._runs = search.anchors.replies(number)
        self._held = np.empty(0, np.int64)

    def none_left(self) -> bool:
        while not len(self._held) and self._more():
            pass
        return not len(self._held)

    def before(self, token: int) -> np.ndarray:
        """Those before a token, which no later call gives again."""
        while (not len(self._held) or self._held[-1] < token) and self._more():
            pass
        count = int(np.searchsorted(self._held, token))
        found, self._held = self._held[:count], self._held[count:]
        return found

    def _more(self) -> bool:
        run = next(self._runs, None)
        if run is None:
            return False
        questions, times = run
        more = np.sort((questions[times[:, 0] == 2, 1] & np.uint64(WITHIN)).astype(np.int64))
        self._held = np.concatenate([self._held, more])
        return True


def _windows_of(
    search: Search, tokeniser: Tokeniser, text: str, anchors: np.ndarray, place: int
) -> Iterator[np.ndarray]:
    for begin, _, first, second in hashed(tokeniser, text, search.tokens):
        count = len(first) - search.tokens + 1
        own = anchors[np.searchsorted(anchors, begin) : np.searchsorted(anchors, begin + len(first))] - begin
        if count < 1 or not len(own):
            continue
        chosen = np.empty(count, np.int64)
        chosen = chosen[: _around(own, count, search.sample, chosen)]
        keys = np.empty((2, count), np.uint64)
        for key, hashes, base in zip(keys, (first, second), BASES, strict=True):
            _grams(hashes, search.tokens, np.uint64(base), key)
        yield np.stack([keys[0, chosen], keys[1, chosen], (chosen + (place + begin)).astype(np.uint64)], 1)


def ask_links(search: Search, number: int) -> None:
    """Join the windows that repeat to links, and ask the shards of the originals what these are."""

    def write(asker: Asker) -> None:
        starts = np.load(search.token_starts(number), mmap_mode="r")
        waiting = np.empty((0, 3), np.uint64)  # the last link: the next run may go on with it
        for questions, answers in search.windows.replies(number):
            order = np.argsort(questions[:, 2])
            places, firsts = questions[order, 2], answers[order, 0] - np.uint64(1)
            repeats = _repeats(search, number, starts, places, firsts)
            links = np.concatenate([waiting, _links(places[repeats], firsts[repeats], search.tokens)])
            links = _rejoined(links, search.tokens) if len(waiting) else links
            links, waiting = links[:-1], links[-1:]
            asker.ask(links, shard_of(links[:, 0]))
        asker.ask(waiting, shard_of(waiting[:, 0]))

    ask_all(search.links, number, write)


def _repeats(search: Search, number: int, starts: np.ndarray, places: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    """Which windows, at `places` of a shard and first at `firsts`, repeat; bool."""
    base = np.uint64(number << SHIFT)
    own = (places - base).astype(np.int64)
    begins = starts[np.searchsorted(starts, own, "right") - 1].astype(np.uint64) + base  # of their documents
    elsewhere = firsts < begins
    if not search.within_documents:
        return elsewhere
    return elsewhere | (firsts + np.uint64(search.tokens) <= places)


def _links(places: np.ndarray, firsts: np.ndarray, tokens: int) -> np.ndarray:
    """Links (place of the original, own first token, tokens) of windows in order, uint64 (links, 3)."""
    follows = (places[1:] == places[:-1] + np.uint64(1)) & (firsts[1:] == firsts[:-1] + np.uint64(1))
    begins = np.flatnonzero(np.concatenate([[True], ~follows])) if len(places) else np.empty(0, np.int64)
    windows = np.diff(np.append(begins, len(places)))
    own = places[begins] & np.uint64(WITHIN)
    return np.stack([firsts[begins], own, (windows + tokens - 1).astype(np.uint64)], 1)


def _rejoined(links: np.ndarray, tokens: int) -> np.ndarray:
    """The same links, the second joined to the first where it goes on with it."""
    if len(links) > 1:
        windows = links[0, 2] - np.uint64(tokens - 1)
        if (links[1, :2] == links[0, :2] + windows).all():
            joined = links[1].copy()
            joined[:2], joined[2] = links[0, :2], links[1, 2] + windows
            return np.concatenate([joined[None], links[2:]])
    return links


def answer_links(search: Search, number: int, shard: Path) -> None:
    """Say what the originals in a shard are: one pass over it for as many questions as are held at once."""

    def write(file: IO[bytes]) -> None:
        held: list[np.ndarray] = []
        for questions in search.links.questions(number):
            held.append(questions)
            if sum(map(len, held)) >= BLOCK:
                file.write(_originals(search, number, shard, np.concatenate(held)).data)
                held = []
        if held:
            file.write(_originals(search, number, shard, np.concatenate(held)).data)

    answer_all(search.links, number, write)


def _originals(search: Search, number: int, shard: Path, questions: np.ndarray) -> np.ndarray:
    """Answers to links, uint64 (n, 8)."""
    asked = np.stack([(questions[:, 0] & np.uint64(WITHIN)).astype(np.int64), questions[:, 2].astype(np.int64)], 1)
    spans, which, copies = np.unique(asked, axis=0, return_inverse=True, return_counts=True)
    starts = np.load(search.token_starts(number), mmap_mode="r")
    documents = np.searchsorted(starts, spans[:, 0], "right") - 1
    found = np.empty((len(spans), 8), np.uint64)
    tokeniser, at = Tokeniser(), 0
    for text in search.texts(number, shard):
        end = int(np.searchsorted(documents, text.number, "right"))
        if end > at:
            own = spans[at:end] - [[int(starts[text.number]), 0]]
            found[at:end, 0] = text.number
            found[at:end, 1:3], found[at:end, 4:] = _described(tokeniser, text, own)
            at = end
            if at == len(spans):
                break
    found[:, 3] = copies
    return found[which.reshape(-1)]


def _described(tokeniser: Tokeniser, text: Text, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Characters of the document, and SHA-256 as four numbers, of spans given by first token and number of tokens."""
    places = tokeniser.locate(text.text, [(first, first + count) for first, count in spans.tolist()])
    digests = [np.frombuffer(tokeniser.digest(text.text, *span), "<u8") for span in places]
    originals = [back([span], text.gone) for span in places]
    return np.array([(parts[0][0], parts[-1][1]) for parts in originals], np.uint64), np.stack(digests)
