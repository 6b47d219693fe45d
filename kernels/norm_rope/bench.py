"""What is timed of norm and rotation: against torch's operations one by one, in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.norm_rope import add_rms_norm, rms_norm, rotate, rotate_halves
from gristmill.kernels.norm_rope.reference import rotate_halves_reference, rotate_reference
from gristmill.kernels.timing import Case, Goal, both_ways

SHARE = 0.8  # of a large copy's bytes a second, on a GPU


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for rows, width in [(8192, 2048), (8192, 7168)] if device == "cuda" else [(1, 256), (2048, 256)]:
        yield from _norms(device, dtype, rows, width)
        yield from _rotations(device, dtype, rows, width)


def _norms(device: str, dtype: torch.dtype, rows: int, width: int) -> Iterator[Case]:
    x, residual = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(2))
    weight = torch.ones(width, device=device, dtype=dtype)

    def normed(a: Tensor, b: Tensor) -> Tensor:
        return F.rms_norm(a, (width,), b, 1e-6)

    def added(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        total = a + b
        return total, normed(total, c)

    shape, peer = f"{rows} × {width}", "torch.nn.functional.rms_norm"
    moved = 5 * x.nbytes  # x and the result; x, the result's gradient and its own
    yield _case("rms_norm", shape, 12 * x.numel(), moved, partial(rms_norm, eps=1e-6), peer, normed, x, weight)
    moved = 8 * x.nbytes  # both parts and both results; the sum, both results' gradients and that of the parts
    ours, peer = partial(add_rms_norm, eps=1e-6), f"sum, {peer}"
    yield _case("add_rms_norm", shape, 14 * x.numel(), moved, ours, peer, added, residual, x, weight)


def _rotations(device: str, dtype: torch.dtype, rows: int, width: int) -> Iterator[Case]:
    """Of 8 heads, of which half is turned."""
    x = torch.randn(rows, width, device=device, dtype=dtype).view(rows, 8, -1)[..., width // 16 :]
    angle = torch.rand(rows, 1, width // 32, device=device)
    cos, sin = angle.cos(), angle.sin()
    shape, peer = f"{rows} × {width // 2}", "slices and cat"
    moved = 2 * x.numel() * (x.element_size() + cos.element_size())  # the result has the angles' dtype
    moved += 4 * cos.nbytes
    for op, ours, theirs in (
        ("rotate", rotate, rotate_reference),
        ("rotate_halves", rotate_halves, rotate_halves_reference),
    ):
        ours, theirs = (partial(side, cos=cos, sin=sin) for side in (ours, theirs))
        yield _case(op, shape, 6 * x.numel(), moved, ours, peer, theirs, x, seen_in=cos.dtype)


def _case(
    op: str, shape: str, flops: int, moved: int, ours: Callable[..., Tensor | tuple[Tensor, ...]], peer: str,
    theirs: Callable[..., Tensor | tuple[Tensor, ...]], *leaves: Tensor, seen_in: torch.dtype | None = None,
) -> Case:  # fmt: skip
    first = leaves[0]
    seen = torch.ones_like(first, dtype=seen_in or first.dtype) if first.is_cuda else None  # a graph makes none itself
    sides = both_ways(ours, *leaves, seen=seen), both_ways(theirs, *leaves, seen=seen)
    goals = (Goal("share of copy", SHARE),) if first.is_cuda else ()
    return Case(op, shape, flops, sides[0], {peer: sides[1]}, goals, bytes=moved, captured=True)
