"""The GPU's code is compiled for one that is not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETER = ("TRITON_INTERPRET", "GRISTMILL_KERNELS")


@pytest.mark.parametrize("part", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_it_compiles_and_holds_what_it_should(part: str) -> None:
    pytest.importorskip("triton.backends.nvidia")
    command = ["pytest", "-q", "-p", "no:cacheprovider", "--no-cov", "-m", part, "compiled_for_a_gpu.py"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", *command],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env={name: value for name, value in os.environ.items() if name not in INTERPRETER},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
