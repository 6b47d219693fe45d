"""`gristmill checkpoint …` in the process of a test."""

from __future__ import annotations

from typer.testing import CliRunner

from gristmill.flows.cli import app
from gristmill.flows.errors import UsageError


def gristmill(*arguments: object) -> tuple[int, str]:
    """Its exit code and what it printed."""
    result = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])
    if isinstance(result.exception, UsageError):  # `main` prints it and ends with 2
        return 2, result.output + str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output
