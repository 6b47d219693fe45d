"""The kernels' tests on the GPU's code, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LEFT_OUT = {"test_interpreted.py", "test_model.py", "test_operations.py"}  # which take minutes there
FILES = [p.name for p in sorted(HERE.glob("test_*.py")) if p.name not in LEFT_OUT and "INTERPRETED" in p.read_text()]
FILES += [
    f"test_operations.py::{test}"
    for test in (
        "test_the_operation_gives_the_same_bits_by_itself",
        "test_opcheck_of_what_recomputation_keeps_on_a_gpu",
    )
]


outside = pytest.mark.skipif(os.environ.get("GRISTMILL_KERNELS") == "gpu", reason="this is the run inside")


@outside
@pytest.mark.parametrize("part", [0, 1, 2])
def test_triton_code(part: int) -> None:
    """In processes of their own, since Triton reads the variable at import; one for several files, as it starts long."""
    files = FILES[part::3]
    assert len(files) >= 3
    passes("not slow", *files)


@outside
@pytest.mark.slow
def test_triton_code_at_length() -> None:
    passes("slow", *FILES)


def passes(marked: str, *files: str) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-cov", "-x", "-m", marked, *files],
        capture_output=True,
        text=True,
        cwd=HERE,
        env={**os.environ, "TRITON_INTERPRET": "1", "GRISTMILL_KERNELS": "gpu"},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
