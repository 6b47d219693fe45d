"""Fixtures of the kernels' tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch


def _patch_once_a_launch() -> None:
    """Spares up to a fifth of the interpreter's time, and changes nothing that it computes.

    It looks through all of Triton's language for what to patch when a kernel is launched, and again, when it is patched
    already and nothing is left to do, wherever one function of the kernel calls another.
    """
    from triton.runtime import interpreter

    patch, mark = interpreter._patch_builtin, "_is_patched"

    def once(part: Any, builder: Any, scope: Any) -> None:
        if mark not in vars(part):
            patch(part, builder, scope)
            scope.set_attr(part, mark, True)  # which goes with the patch

    interpreter._patch_builtin = once


if os.environ.get("TRITON_INTERPRET") == "1":
    _patch_once_a_launch()


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
