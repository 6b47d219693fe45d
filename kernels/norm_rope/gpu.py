"""RMSNorm and rotary embedding in Triton: one pass over the rows each way, slices uncopied, sums in float32.

A program takes whole rows, several of narrow ones. Results and gradients are rounded once, when they are written.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.kernels.dispatch import INTERPRETED, require
from gristmill.kernels.norm_rope.layout import Rows, in_rows, rows_of

TILE = 4096  # numbers of an operand at a time
NARROWEST = 64  # narrower rows are padded to it, so that fewer widths are compiled
STAGES, SHARED = 3, 96 * 1024  # tiles that are on their way while one is summed, as many as fit so many bytes
PROGRAMS = 3 if INTERPRETED else 264
"""At most so many sums of a weight's gradient are added up last: two a multiprocessor of an H100, and as many
elsewhere, so that the order is that of the rows alone. Few under the interpreter, to have several tiles each."""
COLUMNS = 1024 if INTERPRETED else 16  # of those sums that a program adds up
MOST_ROWS = 1 << 30  # their number is one of 32 bits, which divides faster


@triton.jit(do_not_specialize=["rows"])
def _norm(
    x_ptr, weight_ptr, y_ptr, scale_ptr, rows, width, distance, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """y = x / √(mean x² + eps) · weight of some rows, and each row's factor."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    there, within = row < rows, column < width
    here = there[:, None] & within
    x = tl.load(x_ptr + (row * distance)[:, None] + column, mask=here, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=within, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / width + eps)
    tl.store(scale_ptr + row, scale, mask=there)
    y = x * scale[:, None] * weight
    tl.store(y_ptr + (row * width)[:, None] + column, y.to(y_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows"])
def _add_norm(
    x_ptr, other_ptr, weight_ptr, total_ptr, y_ptr, scale_ptr, rows, width, distance, other_distance, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """total = x + other, rounded, and `_norm` of it."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    there, within = row < rows, column < width
    here, at = there[:, None] & within, (row * width)[:, None] + column
    x = tl.load(x_ptr + (row * distance)[:, None] + column, mask=here, other=0.0).to(tl.float32)
    other = tl.load(other_ptr + (row * other_distance)[:, None] + column, mask=here, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=within, other=0.0).to(tl.float32)
    rounded = (x + other).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + at, rounded, mask=here)
    total = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, 1) / width + eps)
    tl.store(scale_ptr + row, scale, mask=there)
    y = total * scale[:, None] * weight
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows"])
def _norm_backward(
    x_ptr, weight_ptr, scale_ptr, grad_ptr, more_ptr, grad_x_ptr, partial_ptr, rows, width, distance, grad_distance,
    more_distance, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """The gradient of x, with that of another use added, tile after tile, and this program's share of the weight's."""
    column = tl.arange(0, WIDTH)[None, :]
    within = column < width
    weight = tl.load(weight_ptr + column, mask=within, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        there = row < rows
        here = there[:, None] & within
        x = tl.load(x_ptr + (row * distance)[:, None] + column, mask=here, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + (row * grad_distance)[:, None] + column, mask=here, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row, mask=there, other=0.0)
        slope = grad * weight
        along = tl.sum(slope * x, 1) * scale * scale / width
        grad_x = (slope - x * along[:, None]) * scale[:, None]
        if MORE:
            more = tl.load(more_ptr + (row * more_distance)[:, None] + column, mask=here, other=0.0)
            grad_x += more.to(tl.float32)
        tl.store(grad_x_ptr + (row * width)[:, None] + column, grad_x.to(grad_x_ptr.dtype.element_ty), mask=here)
        total += grad * (x * scale[:, None])
    share = partial_ptr + tl.program_id(0).to(tl.int64) * width + column
    tl.store(share, tl.sum(total, 0)[None, :], mask=within)


@triton.jit(do_not_specialize=["rows"])
def _total(partial_ptr, out_ptr, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of the rows, of some columns."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        here = (row < rows)[:, None] & (column < width)[None, :]
        total += tl.load(partial_ptr + row.to(tl.int64)[:, None] * width + column[None, :], mask=here, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["rows", "heads"])
def _turn(
    x_ptr, cos_ptr, sin_ptr, y_ptr, rows, heads, half, x_token, x_head, angle_token, direction,
    FROM_PAIRS: tl.constexpr, TO_PAIRS: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Heads turned by the angles of their token, or back; pairs lie side by side or half a row apart."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    i, both = tl.arange(0, HALF)[None, :], tl.arange(0, 2 * HALF)[None, :]
    there = (row < rows)[:, None]
    here, here_both = there & (i < half), there & (both < 2 * half)
    angle = (token * angle_token)[:, None] + i
    cos = tl.load(cos_ptr + angle, mask=here, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=here, other=0.0) * direction
    x = x_ptr + (token * x_token + head * x_head)[:, None]
    if FROM_PAIRS:
        pairs = tl.load(x + both, mask=here_both, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(pairs, (ROWS, HALF, 2)))
    else:
        first = tl.load(x + i, mask=here, other=0.0).to(tl.float32)
        second = tl.load(x + half + i, mask=here, other=0.0).to(tl.float32)
    turned_first, turned_second = first * cos - second * sin, second * cos + first * sin
    y = y_ptr + (row.to(tl.int64) * 2 * half)[:, None]
    if TO_PAIRS:
        pairs = tl.reshape(tl.join(turned_first, turned_second), (ROWS, 2 * HALF))
        tl.store(y + both, pairs.to(y_ptr.dtype.element_ty), mask=here_both)
    else:
        tl.store(y + i, turned_first.to(y_ptr.dtype.element_ty), mask=here)
        tl.store(y + half + i, turned_second.to(y_ptr.dtype.element_ty), mask=here)


def _tile(width: int, numbers: int) -> tuple[int, int]:
    """Rows a program takes, and their padded width."""
    padded = max(NARROWEST, triton.next_power_of_2(width))
    return max(1, numbers // padded), padded


def _check_rows(operation: str, x: Tensor) -> None:
    rows = x.shape[:-1].numel()
    require(rows < MOST_ROWS, ValueError, f"{operation}: rows of x", rows, "fewer than 2³⁰")


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As the public function, on a GPU; x is of 32 or 16 bits, and its rows fit a tile.

    Raises:
        ValueError: there are 2³⁰ rows or more.
    """
    _check_rows("rms_norm", x)
    if torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad):
        return TritonRMSNorm.apply(x, weight_D, eps)
    return _normed(*in_rows(x), weight_D, eps)[0]


def _normed(x: Tensor, distance: int, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result, and each row's factor."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if y.numel():
        rows, padded = _tile(x.shape[-1], TILE)
        _norm[(triton.cdiv(scale.numel(), rows),)](
            x, weight_D.contiguous(), y, scale, scale.numel(), x.shape[-1], distance, float(eps),
            ROWS=rows, WIDTH=padded, num_warps=min(16, rows * padded // 1024),
        )  # fmt: skip
    return y, scale


class TritonRMSNorm(torch.autograd.Function):
    """What is kept for the backward pass is x and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x, ctx.distance = in_rows(x)
        y, scale = _normed(x, ctx.distance, weight_D, eps)
        ctx.save_for_backward(x, weight_D, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        x, weight_D, scale = ctx.saved_tensors
        return *_gradients(x, ctx.distance, weight_D, scale, grad, None), None


def _gradients(
    x: Tensor, distance: int, weight_D: Tensor, scale: Tensor, grad: Tensor, more: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of x, that of another use added, and of the weight."""
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return grad_x, torch.zeros_like(weight_D)
    (grad, grad_distance), (also, also_distance) = in_rows(grad), in_rows(grad if more is None else more)
    (rows, padded), width = _tile(x.shape[-1], TILE), x.shape[-1]
    programs = min(PROGRAMS, triton.cdiv(scale.numel(), rows))
    loaded = x.element_size() + grad.element_size() + (0 if more is None else also.element_size())
    stages = max(1, min(STAGES, SHARED // (rows * padded * loaded)))
    partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    _norm_backward[(programs,)](
        x, weight_D.contiguous(), scale, grad, also, grad_x, partial, scale.numel(), width, distance, grad_distance,
        also_distance, ROWS=rows, WIDTH=padded, STAGES=stages, MORE=more is not None,
        num_warps=min(32, rows * padded // 512),
    )  # fmt: skip
    grad_weight = torch.empty(width, dtype=weight_D.dtype, device=x.device)
    _total[(triton.cdiv(width, COLUMNS),)](partial, grad_weight, programs, width, ROWS=128, COLUMNS=COLUMNS)
    return grad_x, grad_weight


def add_rms_norm(x: Tensor, y: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the public function, on a GPU, of what `rms_norm` takes."""
    _check_rows("add_rms_norm", x)
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or weight_D.requires_grad):
        return TritonAddRMSNorm.apply(x, y, weight_D, eps)
    return _summed(x, y, weight_D, eps)[:2]


def _summed(x: Tensor, y: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, its norm, and each row's factor."""
    (x, distance), (y, y_distance) = in_rows(x), in_rows(y)
    total, normed = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel():
        rows, padded = _tile(x.shape[-1], TILE)
        _add_norm[(triton.cdiv(scale.numel(), rows),)](
            x, y, weight_D.contiguous(), total, normed, scale, scale.numel(), x.shape[-1], distance, y_distance,
            float(eps), ROWS=rows, WIDTH=padded, num_warps=min(16, rows * padded // 1024),
        )  # fmt: skip
    return total, normed, scale


class TritonAddRMSNorm(torch.autograd.Function):
    """What is kept for the backward pass is the sum, which is a result, and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, normed, scale = _summed(x, y, weight_D, eps)
        ctx.save_for_backward(total, weight_D, scale)
        ctx.dtype = y.dtype
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None):
        if grad_normed is None:
            return grad_total, None if grad_total is None else grad_total.to(ctx.dtype), None, None
        total, weight_D, scale = ctx.saved_tensors
        grad, grad_weight = _gradients(total, total.shape[-1], weight_D, scale, grad_normed, grad_total)
        return grad, grad.to(ctx.dtype), grad_weight, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rows: Rows, interleaved: bool) -> Tensor:
    """x turned, its pairs interleaved or half a row apart; the result, float32 as the angles, is half-split.

    Raises:
        ValueError: there are 2³⁰ rows or more.
    """
    _check_rows("rotate" if interleaved else "rotate_halves", x)
    if torch.is_grad_enabled() and x.requires_grad:
        return TritonRotate.apply(x, cos, sin, rows, interleaved)
    return _turned(x, cos, sin, rows, torch.float32, 1.0, interleaved, False)


def _turned(
    x: Tensor, cos: Tensor, sin: Tensor, rows: Rows, dtype: torch.dtype, direction: float,
    from_pairs: bool, to_pairs: bool,
) -> Tensor:  # fmt: skip
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if y.numel():
        count, half = rows.tokens * rows.heads, x.shape[-1] // 2
        tile, padded = _tile(2 * half, TILE)
        _turn[(triton.cdiv(count, tile),)](
            x, cos, sin, y, count, rows.heads, half, rows.token_distance, rows.head_distance, rows.angle_distance,
            direction, FROM_PAIRS=from_pairs, TO_PAIRS=to_pairs, ROWS=tile, HALF=padded // 2,
            num_warps=min(16, tile * padded // 1024),
        )  # fmt: skip
    return y


class TritonRotate(torch.autograd.Function):
    """What is kept for the backward pass are the angles. A gradient that is a slice is read as it lies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, rows: Rows, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype, ctx.interleaved = x.dtype, interleaved
        return _turned(x, cos, sin, rows, torch.float32, 1.0, interleaved, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        grad, cos, sin, rows = _walkable(grad, *ctx.saved_tensors)
        grad_x = _turned(grad, cos, sin, rows, ctx.dtype, -1.0, False, ctx.interleaved)
        return grad_x, None, None, None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """Interleaved pairs turned, half-split, rounded to this dtype; without a gradient."""
    x, cos, sin, rows = _walkable(x, cos, sin)
    return _turned(x, cos, sin, rows, dtype, 1.0, True, False)


def turned_back(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient in front of `turned`."""
    x, cos, sin, rows = _walkable(x, cos, sin)
    return _turned(x, cos, sin, rows, dtype, -1.0, False, True)


def _walkable(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Rows]:
    """Operands, copied where they do not lie so that they can be walked."""
    rows = rows_of(x, cos, sin)
    if rows is None:
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        rows = rows_of(x, cos, sin)
        assert rows is not None  # angles are float32, of each row or of all heads of a token
    return x, cos, sin, rows
