"""RMSNorm and rotary embedding in float32 on a CPU by `cpu.cpp`: one pass over the rows each way, slices uncopied."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.kernels.compiled import needed

SOURCE = "norm_rope/cpu.cpp"
BLOCK_ROWS, BLOCKS = (
    64,
    64,
)  # whose share of the weight's gradient is summed first: at least so many rows, at most so many


def _distance(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """From one row to the next over these dimensions, where that is one number."""
    distance, span = 0, None
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if span is None:
            distance = stride
        elif stride != span:
            return None
        span = stride * size
    return distance


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad):
        return NativeRMSNorm.apply(x, weight_D, eps)
    return _normed(*_in_rows(x), weight_D, eps, None)


def _in_rows(x: Tensor) -> tuple[Tensor, int]:
    """x, copied where its rows do not lie equally far apart, and how far they do."""
    if not x.is_contiguous() and x.stride(-1) == 1:
        distance = _distance(x.shape[:-1], x.stride()[:-1])
        if distance is not None:
            return x, distance
    return x.contiguous(), x.shape[-1]


def _normed(x: Tensor, distance: int, weight_D: Tensor, eps: float, scale: Tensor | None) -> Tensor:
    """The result; each row's factor is written to scale."""
    y, width = torch.empty(x.shape), x.shape[-1]
    rows = x.numel() // max(1, width)
    needed(SOURCE)("rms_norm", x, weight_D.contiguous(), y, scale, rows, width, distance, float(eps))
    return y


class NativeRMSNorm(torch.autograd.Function):
    """What is kept for the backward pass is x and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x, ctx.distance = _in_rows(x)
        scale = torch.empty(x.shape[:-1])
        ctx.save_for_backward(x, weight_D, scale)
        return _normed(x, ctx.distance, weight_D, eps, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        x, weight_D, scale = ctx.saved_tensors
        grad, rows, width = grad.contiguous(), scale.numel(), x.shape[-1]
        block = max(BLOCK_ROWS, -(-rows // BLOCKS))
        grad_x, grad_weight = x.new_empty(x.shape), weight_D.new_empty(width)
        partial = x.new_empty(-(-rows // block), width)
        needed(SOURCE)(
            "rms_norm_backward", x, weight_D.contiguous(), scale, grad, grad_x, grad_weight, partial, rows, width,
            ctx.distance, block,
        )  # fmt: skip
        return grad_x, grad_weight, None


class Rows(NamedTuple):
    """What is turned: tokens of some heads; and how far tokens of x, heads of x and tokens of the angles lie apart."""

    tokens: int
    heads: int
    token_distance: int
    head_distance: int
    angle_distance: int


def rows_of(x: Tensor, cos: Tensor, sin: Tensor) -> Rows | None:
    """The rows, where operands lie so that they can be walked; angles are of each row, or of all heads of a token."""
    if cos.requires_grad or sin.requires_grad or not cos.dtype == sin.dtype == torch.float32:
        return None
    strides = cos.stride()
    return _rows(x.shape, x.stride(), cos.shape, strides) if sin.stride() == strides else None


@functools.lru_cache(maxsize=256)
def _rows(
    shape: tuple[int, ...], strides: tuple[int, ...], angle_shape: tuple[int, ...], angle_strides: tuple[int, ...]
) -> Rows | None:
    *leading, _ = shape
    heads, head_distance, dimensions = 1, 0, len(leading)
    if leading and angle_shape[:-1] == (*leading[:-1], 1):
        dimensions -= 1
        heads, head_distance = leading[-1], strides[dimensions]
    elif angle_shape[:-1] != tuple(leading):
        return None
    token_distance = _distance(shape[:dimensions], strides[:dimensions])
    angle_distance = _distance(angle_shape[:dimensions], angle_strides[:dimensions])
    if strides[-1] != 1 or angle_strides[-1] != 1 or token_distance is None or angle_distance is None:
        return None
    return Rows(math.prod(leading) // max(1, heads), heads, token_distance, head_distance, angle_distance)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rows: Rows, interleaved: bool) -> Tensor:
    """x turned, its pairs interleaved or half a row apart; the result is half-split."""
    if torch.is_grad_enabled() and x.requires_grad:
        return NativeRotate.apply(x, cos, sin, rows, interleaved)
    return _rotated(x, cos, sin, rows, interleaved)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, rows: Rows, interleaved: bool) -> Tensor:
    y = torch.empty(x.shape)
    needed(SOURCE)("rotate", x, cos, sin, y, x.shape[-1] // 2, *rows, int(interleaved))
    return y


class NativeRotate(torch.autograd.Function):
    """What is kept for the backward pass are the angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, rows: Rows, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.rows, ctx.interleaved = rows, interleaved
        return _rotated(x, cos, sin, rows, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        (cos, sin), rows, half = ctx.saved_tensors, ctx.rows, grad.shape[-1] // 2
        grad, grad_x = grad.contiguous(), grad.new_empty(grad.shape)
        sizes = (half, rows.tokens, rows.heads, rows.angle_distance)
        needed(SOURCE)("rotate_backward", grad, cos, sin, grad_x, *sizes, int(ctx.interleaved))
        return grad_x, None, None, None, None
