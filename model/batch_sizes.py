"""How many sequences each step reads and which, as pure functions of the step: a batch that may grow at first."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Protocol


class Ramp(Protocol):
    """What is asked of a batch that grows: `BatchRampConfig`."""

    @property
    def start_sequences(self) -> int: ...

    @property
    def increment(self) -> int: ...

    @property
    def tokens(self) -> int: ...


@dataclass(frozen=True)
class Stretch:
    """Steps in a row whose batches are of one size."""

    first_step: int
    first_position: int
    sequences: int


class BatchSizes:
    """The steps of a run over the positions of its mixture: each position is read once, in its order.

    A batch grows by `increment` sequences whenever another equal part of the ramp's tokens has been read (V3 section
    4.2). The step that crosses such a border is still of the smaller size.
    """

    def __init__(self, sequences: int, sequence_length: int, ramp: Ramp | None) -> None:
        if ramp is None:
            self.stretches = [Stretch(0, 0, sequences)]
            return
        parts = (sequences - ramp.start_sequences) // ramp.increment
        step = position = 0
        self.stretches = []
        for part in range(parts):
            size = ramp.start_sequences + part * ramp.increment
            self.stretches.append(Stretch(step, position, size))
            border = -(-ramp.tokens * (part + 1) // (parts * sequence_length))
            taken = max(0, -(-(border - position) // size))
            step, position = step + taken, position + taken * size
        self.stretches.append(Stretch(step, position, sequences))

    def sequences(self, step: int) -> int:
        """Sequences of a step, over all ranks."""
        return self._stretch(step).sequences

    def first_position(self, step: int) -> int:
        """Sequences that all steps before this one read: the position where it begins."""
        stretch = self._stretch(step)
        return stretch.first_position + (step - stretch.first_step) * stretch.sequences

    def step_of(self, position: int) -> int:
        """The step that reads a position."""
        last = bisect.bisect_right(self.stretches, position, key=lambda stretch: stretch.first_position) - 1
        stretch = self.stretches[last]
        return stretch.first_step + (position - stretch.first_position) // stretch.sequences

    def refuse_ranks(self, ranks: int) -> None:
        """Check that every batch divides among the ranks.

        Raises:
            ValueError: one does not.
        """
        for stretch in self.stretches:
            if stretch.sequences % ranks:
                raise ValueError(
                    f"a batch of {stretch.sequences} sequences (from step {stretch.first_step} on) does not divide "
                    f"among {ranks} ranks: let batch_sequences, batch_ramp.start_sequences and batch_ramp.increment be "
                    f"multiples of {ranks}"
                )

    def _stretch(self, step: int) -> Stretch:
        return self.stretches[bisect.bisect_right(self.stretches, step, key=lambda stretch: stretch.first_step) - 1]
