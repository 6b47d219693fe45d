"""The average of the weights: its formula, its state, and that it leaves the weights alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gristmill.model.training.ema import WeightAverage


def made(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.zeros(3, 5, dtype=dtype), torch.ones(7, dtype=dtype)]


def walk(tensors: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape, generator=generator))


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_it_is_the_corrected_exponential_average(decay: float) -> None:
    """Against Adam's way: from zero, divided by the sum of the weights; in float64."""
    tensors = made()
    average = WeightAverage(tensors, decay)
    sums = [torch.zeros(t.shape, dtype=torch.float64) for t in tensors]
    for step in range(1, 30):
        walk(tensors, step)
        average.update()
        sums = [decay * s + (1 - decay) * t.double() for s, t in zip(sums, tensors, strict=True)]
        for tensor, whole in zip(tensors, sums, strict=True):
            # float32, 29 interpolations of numbers of order one.
            torch.testing.assert_close(
                average.average[tensor].double(), whole / (1 - decay**step), rtol=1e-4, atol=1e-5
            )


def test_the_first_weights_are_the_average_and_the_initial_ones_have_no_part() -> None:
    tensors = made()
    average = WeightAverage(tensors, 0.999)
    walk(tensors, 1)
    average.update()
    for tensor in tensors:
        torch.testing.assert_close(average.average[tensor], tensor, rtol=1e-6, atol=1e-6)  # one interpolation


def test_swapped_twice_all_is_as_before() -> None:
    tensors = made()
    average = WeightAverage(tensors, 0.9)
    for step in range(3):
        walk(tensors, step)
        average.update()
    before, averaged = [t.clone() for t in tensors], [average.average[t].clone() for t in tensors]
    average.swap()
    assert all(torch.equal(t, a) for t, a in zip(tensors, averaged, strict=True))
    assert not any(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    average.swap()
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert all(torch.equal(average.average[t], a) for t, a in zip(tensors, averaged, strict=True))


def test_lower_precision_is_averaged_in_float32() -> None:
    tensors = made(torch.bfloat16)
    average = WeightAverage(tensors, 0.999)
    for step in range(2):
        walk(tensors, step)
        average.update()
    assert all(a.dtype == torch.float32 for a in average.average.values())
    assert not torch.equal(average.average[tensors[0]].bfloat16().float(), average.average[tensors[0]])
