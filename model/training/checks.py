"""What is asked of a model in training now and then: its held-out loss, and what it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gristmill.model.training.engine import Engine
from gristmill.model.training.text_samples import TextSamples

Row = dict[str, Any]


@dataclass(frozen=True)
class Checks:
    """Checks every so many steps and at the last one; `look` and `write` are what the loop calls at each step."""

    every: int
    steps: int
    loss: Callable[[Engine], Row]
    texts: TextSamples

    def look(self, step: int, engine: Engine) -> Row:
        """The numbers that a check adds to the step's row; all ranks call it."""
        return self.loss(engine) if self._due(step) else {}

    def write(self, step: int) -> list[Row]:
        """What the model writes at a check; the first rank calls it."""
        return self.texts.rows(step) if self._due(step) else []

    def _due(self, step: int) -> bool:
        return (step + 1) % self.every == 0 or step + 1 == self.steps
