"""What partitions answer: which keys were asked more than once, and where each was asked first.

A table of fixed size takes keys in the order of the corpus until it is full; the answers to the keys in it are
written, and what is left waits for the next pass over the questions. So a partition needs the same memory whatever
it is asked, be it a billion times the same, and its answers do not depend on the table's size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import IO

import numpy as np
from numba import njit

from gristmill.data.spans.exchange import SHIFT, Exchange, answer_all

KEYS = 1 << 22  # keys in a table; half of its slots
AGAIN = np.uint64(1 << 63)  # in the place of a line: the line stands further up in its document

# Columns of the table of lines, after the two of the key.
_PLACE, _SPAN, _DOCUMENTS, _LAST = 2, 3, 4, 5


@njit(cache=True)
def _slot(keys, first, second):
    """The slot that holds a key, or the free one where it would go. No key is (0, 0)."""
    mask = len(keys) - 1
    at = np.int64(first & np.uint64(mask))
    while (keys[at, 0] != 0 or keys[at, 1] != 0) and (keys[at, 0] != first or keys[at, 1] != second):
        at = (at + 1) & mask
    return at


@njit(cache=True)
def _count_anchors(keys, times, room, asked, answers):
    """Take in anchors (key, place); what room is left, and how many found none."""
    mask, left = len(keys) - 1, 0
    for i in range(len(asked)):
        if answers[i, 0] != 0:
            continue
        at = np.int64(asked[i, 0] & np.uint64(mask))
        while keys[at] != 0 and keys[at] != asked[i, 0]:
            at = (at + 1) & mask
        if keys[at] != 0:
            times[at] = 2
        elif room > 0:
            keys[at], times[at] = asked[i, 0], 1
            room -= 1
        else:
            left += 1
    return room, left


@njit(cache=True)
def _answer_anchors(keys, times, asked, answers):
    mask = len(keys) - 1
    for i in range(len(asked)):
        at = np.int64(asked[i, 0] & np.uint64(mask))
        while keys[at] != 0 and keys[at] != asked[i, 0]:
            at = (at + 1) & mask
        if keys[at] != 0:
            answers[i, 0] = times[at]


@njit(cache=True)
def _answer_windows(keys, firsts, room, asked, answers):
    """Windows (key, key, place): the first place of each, plus one. Questions come in the order of places."""
    left = 0
    for i in range(len(asked)):
        if answers[i, 0] != 0:
            continue
        at = _slot(keys, asked[i, 0], asked[i, 1])
        if keys[at, 0] == 0 and keys[at, 1] == 0:
            if room == 0:
                left += 1
                continue
            keys[at, 0], keys[at, 1], firsts[at] = asked[i, 0], asked[i, 1], asked[i, 2]
            room -= 1
        answers[i, 0] = firsts[at] + np.uint64(1)
    return room, left


@njit(cache=True)
def _count_lines(table, room, asked, answers):
    """Take in lines (key, key, document, span): the first of each, and how many documents hold it."""
    left = 0
    for i in range(len(asked)):
        if answers[i, 0] != 0:
            continue
        document = asked[i, 2] & ~AGAIN
        at = _slot(table, asked[i, 0], asked[i, 1])
        if table[at, 0] == 0 and table[at, 1] == 0:
            if room == 0:
                left += 1
                continue
            table[at, 0], table[at, 1], table[at, _PLACE], table[at, _SPAN] = (
                asked[i, 0],
                asked[i, 1],
                document,
                asked[i, 3],
            )
            table[at, _DOCUMENTS], table[at, _LAST] = 1, document
            room -= 1
        elif table[at, _LAST] != document:
            table[at, _DOCUMENTS] += np.uint64(1)
            table[at, _LAST] = document
    return room, left


@njit(cache=True)
def _answer_lines(table, asked, answers):
    for i in range(len(asked)):
        at = _slot(table, asked[i, 0], asked[i, 1])
        if table[at, 0] != 0 or table[at, 1] != 0:
            answers[i, 0] = table[at, _DOCUMENTS]
            answers[i, 1] = table[at, _PLACE]
            answers[i, 2] = table[at, _SPAN]


def answer_anchors(exchange: Exchange, partition: int) -> None:
    """To each anchor 2 where its key was asked more than once, else 1."""
    slots = _slots(exchange, partition)

    def begin() -> tuple[Callable, Callable]:
        keys, times = np.zeros(slots, np.uint64), np.zeros(slots, np.uint8)
        return (
            lambda room, asked, answers: _count_anchors(keys, times, room, asked, answers),
            lambda asked, answers: _answer_anchors(keys, times, asked, answers),
        )

    _in_passes(exchange, partition, begin)


def answer_windows(exchange: Exchange, partition: int) -> None:
    """To each window the place, plus one, where its key was asked first."""
    slots = _slots(exchange, partition)

    def begin() -> tuple[Callable, None]:
        keys, firsts = np.zeros((slots, 2), np.uint64), np.zeros(slots, np.uint64)
        return lambda room, asked, answers: _answer_windows(keys, firsts, room, asked, answers), None

    _in_passes(exchange, partition, begin)


def answer_lines(exchange: Exchange, partition: int) -> None:
    """To each line the number of documents that hold it, and the place and span where it was asked first."""
    slots = _slots(exchange, partition)

    def begin() -> tuple[Callable, Callable]:
        table = np.zeros((slots, 6), np.uint64)
        return (
            lambda room, asked, answers: _count_lines(table, room, asked, answers),
            lambda asked, answers: _answer_lines(table, asked, answers),
        )

    _in_passes(exchange, partition, begin)


def _slots(exchange: Exchange, partition: int) -> int:
    """A power of two, at least twice the keys that a table takes."""
    keys = min(KEYS, sum(exchange.asked_of(partition)))
    return 1 << max(4, (2 * keys - 1).bit_length())


def _in_passes(exchange: Exchange, partition: int, begin: Callable[[], tuple]) -> None:
    """Fill tables and write answers until no question is without one.

    Args:
        begin: gives, for a pass, (take, answer): `take(room, questions, answers)` returns the room left and how many
            questions found none; `answer(questions, answers)` fills in answers, or is none where `take` did.
    """

    def write(file: IO[bytes]) -> None:
        left = 1
        while left:
            take, answer = begin()
            room, left = KEYS, 0

            def taken(questions: np.ndarray, answers: np.ndarray, take: Callable = take) -> None:
                nonlocal room, left
                room, found_none = take(room, questions, answers)
                left += found_none

            _over_answers(exchange, partition, file, taken, changes=answer is None)
            if answer is not None:
                _over_answers(exchange, partition, file, answer, changes=True)

    answer_all(exchange, partition, write)


def _over_answers(
    exchange: Exchange, partition: int, file: IO[bytes], use: Callable[[np.ndarray, np.ndarray], None], *, changes: bool
) -> None:
    """`use` every block of questions with its answers so far, and write these back where it changes them."""
    at = 0
    for questions in exchange.questions(partition):
        size = len(questions) * exchange.answer_bytes
        file.seek(at)
        answers = np.frombuffer(bytearray(file.read(size)), exchange.answer).reshape(-1, exchange.answers)
        use(questions, answers)
        if changes:
            file.seek(at)
            file.write(answers.data)
        at += size


def shard_of(places: np.ndarray) -> np.ndarray:
    """The shards of places."""
    return (places >> np.uint64(SHIFT)).astype(np.int64)
