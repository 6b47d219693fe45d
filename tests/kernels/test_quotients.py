"""The optimizer's roots and quotients by multiplications: the processor's own, to the bit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from gristmill.kernels.compiled import Compiled, needed

LANES = 16  # at most


@pytest.fixture(scope="module")
def library() -> Compiled:
    if not any(map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    return needed(str(Path(__file__).with_name("quotients.cpp")))


def test_all_roots(library: Compiled):
    assert library("roots") == 0


def test_all_reciprocals(library: Compiled):
    assert library("reciprocals") == 0


def numbers(seed: int, low: int, high: int) -> torch.Tensor:
    """2²² of them, from 2^low to 2^high; some with a mantissa of zeros, or of ones, but for the last bits."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(low + 127, high + 127, (1 << 22,), generator=generator, dtype=torch.int32)
    mantissa = torch.randint(0, 1 << 23, (1 << 22,), generator=generator, dtype=torch.int32)
    mantissa[::5] &= 7
    mantissa[1::5] |= 0x7FFFF8
    return (exponent << 23 | mantissa).view(torch.float32)


@pytest.mark.parametrize("eps", [0.0, 1e-8, 1.0])
@pytest.mark.parametrize(("low", "high"), [(-3, 3), (-100, 60), (-126, 127)])
def test_random_ones(library: Compiled, low: int, high: int, eps: float):
    a, x = numbers(0, low, high), numbers(1, low, high)
    a[::2] *= -1
    assert library("over_roots", a, x, len(a) // LANES, eps) == 0


def test_a_mantissa_of_ones(library: Compiled):
    """2 / (2 − 2⁻²³), whose reciprocal by Newton's steps is not the nearest; and others over it."""
    x = torch.full((1 << 10,), 1.0 - 2.0**-22)
    assert (x.sqrt() + 1.0 == 2.0 - 2.0**-23).all()
    a = torch.linspace(1.0, 2.0, len(x))
    assert library("over_roots", a, x, len(x) // LANES, 1.0) == 0


def test_numbers_that_are_none(library: Compiled):
    odd = torch.tensor([0.0, -0.0, 1e-45, 1e-38, 1e38, float("inf"), float("nan"), -1.0])
    a, x = torch.cartesian_prod(odd, odd).unbind(1)
    a, x = (t.repeat_interleave(LANES).contiguous() for t in (a, x))
    for eps in (0.0, 1e-8, 1e30):
        assert library("over_roots", a, x, len(a) // LANES, eps) == 0
