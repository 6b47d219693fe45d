"""The errors that the command line turns into exit codes."""

from __future__ import annotations


class UsageError(ValueError):
    """Bad input, found before anything ran or was written: exit code 2 and one sentence."""


class StageFailed(RuntimeError):
    """A stage raised; the message says which, why, where its log lies and how to resume."""
