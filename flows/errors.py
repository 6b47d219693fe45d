"""The errors that the command line turns into exit codes."""

from __future__ import annotations


class UsageError(ValueError):
    """Bad input, found before the work that it was given for began, or by a stage on its inputs: exit code 2."""


class StoreInUse(UsageError):
    """Another run holds the store; the message names it."""


class StageFailed(RuntimeError):
    """A stage raised; the message says which, why, where its log lies and how to resume."""

    def __init__(self, message: str, stage: str = "") -> None:
        super().__init__(message)
        self.stage = stage


class StoreDamaged(RuntimeError):
    """What the store holds is not what its manifests say; the message names the file."""
