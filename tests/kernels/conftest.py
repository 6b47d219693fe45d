"""Fixtures of the kernels' tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest


@pytest.fixture
def under_the_interpreter() -> Callable[[str], str]:
    """Runs a file's tests on the GPU's code in Triton's interpreter; what pytest printed.

    In a process of its own, since Triton reads the variable at import.
    """

    def run(file: str) -> str:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "GRISTMILL_KERNELS": "gpu"}
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-cov", "-x", file],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    return run
