"""Fixtures of the kernels' tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture(scope="module", params=["compiled", "cpu"])
def cpu_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on both paths of a CPU, in C++ and in torch; on a GPU and under the interpreter, once."""
    path = request.param
    if path == "cpu":
        if torch.cuda.is_available() or os.environ.get("GRISTMILL_KERNELS") == "gpu":
            pytest.skip("there is one path on a GPU")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gristmill.kernels.compiled.TORCH_ALONE", True)
            yield path
    elif any(map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))):
        yield path
    else:
        pytest.skip("there is no C++ compiler")


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
