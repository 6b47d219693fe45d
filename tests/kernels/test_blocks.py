"""Large tensors whose memory waits for the next of their size."""

from __future__ import annotations

import gc

import pytest
import torch

from gristmill.kernels import blocks

NUMBERS = blocks.LEAST // 4


@pytest.fixture(autouse=True)
def _none_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    monkeypatch.setattr(blocks, "_free", type(blocks._free)(blocks._free.default_factory))


def test_memory_returns_when_the_last_view_is_gone() -> None:
    whole = blocks.empty(NUMBERS // 8, 8).fill_(3.0)
    assert whole.is_contiguous()
    assert whole.dtype == torch.float32
    at, part = whole.data_ptr(), whole[5:, :2]
    del whole
    assert blocks.waiting() == 0
    assert bool((part == 3).all())
    del part
    assert blocks.waiting() == 4 * NUMBERS
    assert blocks.empty(NUMBERS).data_ptr() == at
    assert blocks.waiting() == 4 * NUMBERS


def test_two_tensors_never_share_memory() -> None:
    held = [blocks.empty(NUMBERS).fill_(i) for i in range(3)]
    del held[1]
    held.insert(1, blocks.empty(NUMBERS).fill_(1))
    assert [float(t.min()) for t in held] == [float(t.max()) for t in held] == [0, 1, 2]


def test_a_gradient_is_taken_over_as_it_is() -> None:
    """Autograd copies what it does not own; a copy would be a second block."""
    leaf = torch.zeros(NUMBERS, requires_grad=True)

    class Given(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            made = blocks.empty(NUMBERS).fill_(1.0)
            ctx.at = made.data_ptr()
            places.append(made.data_ptr())
            return made

    places: list[int] = []
    Given.apply(leaf).backward()
    assert leaf.grad is not None
    assert [leaf.grad.data_ptr()] == places


def test_no_more_than_a_bound_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MOST_FREE", 2 * blocks.LEAST)
    held = [blocks.empty(NUMBERS) for _ in range(4)]
    del held
    assert blocks.waiting() == 2 * blocks.LEAST


def test_small_ones_are_the_allocators() -> None:
    small = blocks.empty(NUMBERS - 1)
    del small
    assert blocks.waiting() == 0
    assert blocks.empty(0, 5).shape == (0, 5)
