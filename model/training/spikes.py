"""Losses that jump, and what becomes of their steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from gristmill.model.training.config import SpikeConfig

LEAST = 16  # losses before one can be called a spike
NORMAL = 1.4826  # median absolute deviations in a standard deviation, where errors are normal
FLAT = 1e-3  # of the median: a deviation that is taken where the losses hardly differ


class Spikes:
    """Judges each step's loss by those of the steps that were taken; its state is the curves' rows."""

    def __init__(self, config: SpikeConfig, curves: Sequence[dict[str, Any]]) -> None:
        self.config = config
        self.losses = [row["main_loss"] for row in curves if "spike" not in row][-config.window :]
        self.count = sum("spike" in row for row in curves)

    def judge(self, row: dict[str, Any]) -> str | None:
        """Why a step is not to be taken, or none: `loss` (no number), or `spike`."""
        losses = (value for name, value in row.items() if name.endswith("loss"))
        if not all(math.isfinite(value) for value in losses):
            return "loss"
        return "spike" if self.score(row["main_loss"]) > self.config.threshold else None

    def score(self, loss: float) -> float:
        """Robust z-score of a loss; 0 while there are too few before it."""
        if len(self.losses) < LEAST:
            return 0.0
        middle = statistics.median(self.losses)
        spread = NORMAL * statistics.median(abs(one - middle) for one in self.losses)
        return (loss - middle) / max(spread, FLAT * abs(middle))

    def taken(self, loss: float) -> None:
        """A step with this loss was taken."""
        self.losses = [*self.losses, loss][-self.config.window :]

    def left_out(self, step: int, row: dict[str, Any]) -> None:
        """A step was left out.

        Raises:
            FloatingPointError: by policy, or since it happened too often.
        """
        self.count += 1
        if self.config.policy != "stop" and self.count <= self.config.at_most:
            return
        told = {name: row[name] for name in sorted(row) if isinstance(row[name], float)}
        often = f" (the {self.count}th time, and spikes.at_most allows {self.config.at_most})"
        raise FloatingPointError(
            f"the loss or its gradient is not finite or far above those before it at step {step}"
            f"{'' if self.config.policy == 'stop' else often} ({told}): lower the rates and run again"
        )
