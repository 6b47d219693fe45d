"""What a stage's plain function and the runner that calls it agree on, for this room."""

from __future__ import annotations

from typing import Any, Protocol

Metrics = dict[str, Any]


class ConfigRefused(ValueError):
    """What a stage's configuration asks for cannot be had of its inputs, which only its work could show."""


class Progress(Protocol):
    """Called often and cheaply by a stage: `done` of `total` units, and the numbers to show beside them."""

    def __call__(self, done: int, total: int, **values: float) -> None: ...


def silent(done: int, total: int, **values: float) -> None:
    """A progress that nobody watches."""
