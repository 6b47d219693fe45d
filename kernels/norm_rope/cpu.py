"""RMSNorm and rotary embedding on a CPU, compiled: a pass over the rows each way, and no copy of a slice."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.kernels.compiled import Compiled, compiled

BLOCK_ROWS, BLOCKS = 64, 64  # whose share of the weight's gradient is summed first: at least so many rows, at most so many


def _distance(x: Tensor, dimensions: int) -> int | None:
    """From one row to the next over the first dimensions, where that is one number."""
    distance, span = 0, None
    for size, stride in zip(x.shape[dimensions - 1 :: -1], x.stride()[dimensions - 1 :: -1], strict=True):
        if size == 1:
            continue
        if span is None:
            distance = stride
        elif stride != span:
            return None
        span = stride * size
    return distance


def library(*operands: Tensor) -> Compiled | None:
    """The compiled functions, if there are any for such operands."""
    plain = all(x.dtype == torch.float32 and x.stride(-1) == 1 and x.numel() > 0 for x in operands)
    return compiled("norm_rope/cpu.cpp") if plain else None


def rms_norm(run: Compiled, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm of float32 whose rows are each in one piece."""
    if torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad):
        return RMSNorm.apply(x, weight_D, eps, run)
    return _normed(run, x, weight_D, eps)[0]


def _normed(run: Compiled, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, int]:
    """The result, each row's factor, and x with the distance of its rows."""
    distance = _distance(x, x.ndim - 1)
    if distance is None:
        x = x.contiguous()
        distance = x.shape[-1]
    width, y = x.shape[-1], x.new_empty(x.shape)
    rows = y.numel() // width
    scale = x.new_empty(rows)
    run("rms_norm", x, weight_D, y, scale, rows, width, distance, eps)
    return y, scale, x, distance


class RMSNorm(torch.autograd.Function):
    """Forward and backward, a pass each; kept are x and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, run: Compiled) -> Tensor:
        y, scale, x, ctx.distance = _normed(run, x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, scale)
        ctx.run = run
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        x, weight_D, scale = ctx.saved_tensors
        grad, rows, width = grad.contiguous(), len(scale), x.shape[-1]
        block = max(BLOCK_ROWS, -(-rows // BLOCKS))
        grad_x, grad_weight = torch.empty_like(grad), torch.empty_like(weight_D)
        partial = x.new_empty(-(-rows // block), width)
        ctx.run(
            "rms_norm_backward", x, weight_D, scale, grad, grad_x, grad_weight, partial, rows, width, ctx.distance,
            block,
        )  # fmt: skip
        return grad_x, grad_weight, None, None


class Rows(NamedTuple):
    """What is turned: tokens of some heads, how far those of x and the angles' rows are from the next, and by what."""

    run: Compiled
    tokens: int
    heads: int
    token_distance: int
    head_distance: int
    angle_distance: int


def rotated_rows(x: Tensor, cos: Tensor, sin: Tensor) -> Rows | None:
    """The rows of float32 operands where the compiled pass can take them: angles of each row, or of all heads of it."""
    run = library(x, cos, sin)
    if run is None or cos.requires_grad or sin.requires_grad or cos.stride() != sin.stride():
        return None
    dimensions = x.ndim - 1
    if cos.shape[:-1] == x.shape[:-1]:
        heads, head_distance = 1, 0
    elif dimensions and cos.shape[:-1] == (*x.shape[:-2], 1):
        dimensions -= 1
        heads, head_distance = x.shape[dimensions], x.stride(dimensions)
    else:
        return None
    token_distance, angle_distance = _distance(x, dimensions), _distance(cos, dimensions)
    if token_distance is None or angle_distance is None:
        return None
    tokens = x.numel() // (heads * x.shape[-1])
    return Rows(run, tokens, heads, token_distance, head_distance, angle_distance)


def rotate(rows: Rows, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x turned, its pairs interleaved or half a row apart; the result is half-split."""
    if torch.is_grad_enabled() and x.requires_grad:
        return Rotate.apply(x, cos, sin, rows, interleaved)
    return _rotated(rows, x, cos, sin, interleaved)


def _rotated(rows: Rows, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    y = x.new_empty(x.shape)
    rows.run(
        "rotate", x, cos, sin, y, rows.tokens, rows.heads, x.shape[-1] // 2, rows.token_distance, rows.head_distance,
        rows.angle_distance, int(interleaved),
    )  # fmt: skip
    return y


class Rotate(torch.autograd.Function):
    """Forward and backward, a pass each; kept are the angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, rows: Rows, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.rows, ctx.interleaved = rows, interleaved
        return _rotated(rows, x, cos, sin, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        cos, sin = ctx.saved_tensors
        rows, grad = ctx.rows, grad.contiguous()
        grad_x = torch.empty_like(grad)
        rows.run(
            "rotate_backward", grad, cos, sin, grad_x, rows.tokens, rows.heads, grad.shape[-1] // 2,
            rows.angle_distance, int(ctx.interleaved),
        )  # fmt: skip
        return grad_x, None, None, None, None
