"""Who is told what happens in a run: a terminal, a log, Prefect, or nobody."""

from __future__ import annotations

from typing import Any, Protocol


class Watcher(Protocol):
    """Told of each stage's state, its progress, and what else a person should read."""

    def stage(self, name: str, state: str, **values: Any) -> None:
        """A stage changed its state.

        Args:
            state: cached (with `manifest`, `reason`), running (`reason`, `planned`), done (`manifest`), failed or
                cancelled (`error`).
        """
        ...

    def progress(self, name: str, done: int, total: int, **values: float) -> None:
        """A running stage has done so many of its units; called often."""
        ...

    def say(self, text: str) -> None:
        """A line for a person."""
        ...


class Silent:
    """A run that nobody watches."""

    def stage(self, name: str, state: str, **values: Any) -> None: ...

    def progress(self, name: str, done: int, total: int, **values: float) -> None: ...

    def say(self, text: str) -> None: ...
