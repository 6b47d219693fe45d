"""Questions from shards to partitions and the answers on their way back, through files: what spreads the work.

Each shard asks, in rows of 64-bit numbers, and says which partition each question goes to. A partition reads what
every shard asked of it, in the order of the corpus, and writes an answer to each. A shard then reads the answers to
its own questions. Nothing is held but one run or one block of rows; a shard has one file of questions, whatever the
number of partitions, and a partition has one of answers.

    asked/<shard>.u64       runs of questions, each run sorted by partition
    asked/<shard>.npy       where in its run each partition begins, int64 (runs, partitions + 1); marks a finished shard
    answered/<partition>.bin   answers, in the order of the corpus
    answered/<partition>.npy   where each shard's answers begin, int64 (shards + 1); marks a finished partition
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from gristmill.data.documents import atomic

RUN = 1 << 19  # questions of a run
BLOCK = 1 << 18  # questions read at once
SHIFT = 40  # bits of a place within its shard
WITHIN = (1 << SHIFT) - 1


@dataclass(frozen=True)
class Exchange:
    """Where questions and answers lie, and their form.

    Attributes:
        asks: 64-bit numbers a question.
        answers: numbers an answer, of type `answer`.
    """

    folder: Path
    shards: int
    partitions: int
    asks: int
    answers: int = 1
    answer: str = "<u8"

    def asked(self, shard: int) -> Path:
        return self.folder / "asked" / f"{shard:06d}.npy"

    def answered(self, partition: int) -> Path:
        return self.folder / "answered" / f"{partition:06d}.npy"

    @property
    def question_bytes(self) -> int:
        return 8 * self.asks

    @property
    def answer_bytes(self) -> int:
        return np.dtype(self.answer).itemsize * self.answers

    def asked_of(self, partition: int) -> list[int]:
        """Questions of each shard to a partition."""
        return [int(_spans(np.load(self.asked(s), mmap_mode="r"), partition)[:, 1].sum()) for s in range(self.shards)]

    def questions(self, partition: int) -> Iterator[np.ndarray]:
        """What all shards ask of a partition, in the order of the corpus, uint64 (at most BLOCK, asks) at a time."""
        for shard in range(self.shards):
            spans = _spans(np.load(self.asked(shard), mmap_mode="r"), partition)
            if not spans[:, 1].any():
                continue
            with self.asked(shard).with_suffix(".u64").open("rb") as file:
                for begin, count in spans.tolist():
                    file.seek(begin * self.question_bytes)
                    for left in range(count, 0, -BLOCK):
                        yield _read(file, min(left, BLOCK), self.asks, "<u8")

    def replies(self, shard: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """A shard's questions and their answers, a run at a time; within a run in the order of partitions."""
        index = np.load(self.asked(shard))
        begins = [int(np.load(self.answered(p), mmap_mode="r")[shard]) for p in range(self.partitions)]
        with self.asked(shard).with_suffix(".u64").open("rb") as file:
            for offsets in index.tolist():
                questions = _read(file, offsets[-1], self.asks, "<u8")
                parts = []
                for partition in range(self.partitions):
                    count = offsets[partition + 1] - offsets[partition]
                    if count:
                        with self.answered(partition).with_suffix(".bin").open("rb") as answers:
                            answers.seek(begins[partition] * self.answer_bytes)
                            parts.append(_read(answers, count, self.answers, self.answer))
                        begins[partition] += count
                yield questions, np.concatenate(parts)


def _spans(index: np.ndarray, partition: int) -> np.ndarray:
    """Begin (in the shard's file) and number of the questions to a partition in every run, int64 (runs, 2)."""
    before = np.cumsum(index[:, -1]) - index[:, -1]
    return np.stack([before + index[:, partition], index[:, partition + 1] - index[:, partition]], 1)


def _read(file: IO[bytes], rows: int, width: int, kind: str) -> np.ndarray:
    size = rows * width * np.dtype(kind).itemsize
    held = file.read(size)
    if len(held) != size:
        raise ValueError(f"{file.name} is cut short: remove the stage's folder and run it again")
    return np.frombuffer(held, kind).reshape(rows, width)


class Asker:
    """Writes the questions of one shard."""

    def __init__(self, exchange: Exchange, file: IO[bytes]) -> None:
        self._exchange, self._file = exchange, file
        self._rows: list[np.ndarray] = []
        self._to: list[np.ndarray] = []
        self._waiting = 0
        self.index: list[np.ndarray] = []

    def ask(self, rows: np.ndarray, to: np.ndarray) -> None:
        """Questions, uint64 (n, asks), and the partition each goes to."""
        if len(rows):
            self._rows.append(rows)
            self._to.append(to)
            self._waiting += len(rows)
            if self._waiting >= RUN:
                self.flush()

    def flush(self) -> None:
        """End the run."""
        if not self._waiting:
            return
        to = np.concatenate(self._to)
        order = np.argsort(to, kind="stable")
        self._file.write(np.ascontiguousarray(np.concatenate(self._rows)[order], "<u8").data)
        self.index.append(np.concatenate([[0], np.cumsum(np.bincount(to, minlength=self._exchange.partitions))]))
        self._rows, self._to, self._waiting = [], [], 0


def ask_all(exchange: Exchange, shard: int, write: Callable[[Asker], None]) -> None:
    """Write a shard's questions; the index comes last, and marks that they are whole."""
    with atomic(exchange.asked(shard).with_suffix(".u64")) as part, part.open("wb") as file:
        asker = Asker(exchange, file)
        write(asker)
        asker.flush()
    index = np.array(asker.index, np.int64).reshape(-1, exchange.partitions + 1)
    save_array(exchange.asked(shard), index)


def answer_all(exchange: Exchange, partition: int, write: Callable[[IO[bytes]], None]) -> None:
    """Write a partition's answers into a file of the right size, all zero before; the index comes last."""
    counts = exchange.asked_of(partition)
    with atomic(exchange.answered(partition).with_suffix(".bin")) as part, part.open("w+b") as file:
        file.truncate(sum(counts) * exchange.answer_bytes)
        write(file)
    save_array(exchange.answered(partition), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def save_array(path: Path, array: np.ndarray) -> None:
    """One array as .npy, atomically."""
    with atomic(path) as part, part.open("wb") as file:
        np.save(file, array)


def keys_to(keys: np.ndarray, partitions: int) -> np.ndarray:
    """The partition of each 64-bit key, by its upper bits: the tables of a partition use the lower ones."""
    return ((keys >> np.uint64(33)) % np.uint64(partitions)).astype(np.int64)
