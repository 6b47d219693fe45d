"""Fixtures of the kernels' tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

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
