"""RMSNorm and rotary embedding in float32 on a CPU by `cpu.cpp`: one pass over the rows each way, slices uncopied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.kernels.compiled import needed
from gristmill.kernels.norm_rope.layout import Rows, in_rows

SOURCE = "norm_rope/cpu.cpp"
BLOCK_ROWS, BLOCKS = (
    64,
    64,
)  # whose share of the weight's gradient is summed first: at least so many rows, at most so many


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad):
        return NativeRMSNorm.apply(x, weight_D, eps)
    return _normed(*in_rows(x), weight_D, eps, None)


def _normed(x: Tensor, distance: int, weight_D: Tensor, eps: float, scale: Tensor | None) -> Tensor:
    """The result; each row's factor is written to scale."""
    y, width = x.new_empty(x.shape), x.shape[-1]
    rows = x.numel() // max(1, width)
    needed(SOURCE)("rms_norm", x, weight_D.contiguous(), y, scale, rows, width, distance, float(eps))
    return y


class NativeRMSNorm(torch.autograd.Function):
    """What is kept for the backward pass is x and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x, ctx.distance = in_rows(x)
        scale = x.new_empty(x.shape[:-1])
        ctx.save_for_backward(x, weight_D, scale)
        return _normed(x, ctx.distance, weight_D, eps, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        x, weight_D, scale = ctx.saved_tensors
        return *_gradients(x, ctx.distance, weight_D, scale, grad, None), None


def _gradients(
    x: Tensor, distance: int, weight_D: Tensor, scale: Tensor, grad: Tensor, more: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of x, that of another use added, and of the weight."""
    rows, width, more = scale.numel(), x.shape[-1], None if more is None else more.contiguous()
    block = max(BLOCK_ROWS, -(-rows // BLOCKS))
    grad_x, grad_weight = x.new_empty(x.shape), weight_D.new_empty(width)
    partial = x.new_empty(-(-rows // block), width)
    needed(SOURCE)(
        "rms_norm_backward", x, weight_D.contiguous(), scale, grad.contiguous(), more, grad_x, grad_weight, partial,
        rows, width, distance, block,
    )  # fmt: skip
    return grad_x, grad_weight


def add_rms_norm(x: Tensor, y: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or weight_D.requires_grad):
        return NativeAddRMSNorm.apply(x, y, weight_D, eps)
    return _summed(x, y, weight_D, eps, None)


def _summed(x: Tensor, y: Tensor, weight_D: Tensor, eps: float, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum and its norm; each row's factor is written to scale."""
    (x, x_row), (y, y_row), width = in_rows(x), in_rows(y), x.shape[-1]
    total, normed, rows = x.new_empty(x.shape), x.new_empty(x.shape), x.numel() // max(1, width)
    given = x, y, weight_D.contiguous(), total, normed, scale
    needed(SOURCE)("add_rms_norm", *given, rows, width, x_row, y_row, float(eps))
    return total, normed


class NativeAddRMSNorm(torch.autograd.Function):
    """What is kept for the backward pass is the sum, which is a result, and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        scale = x.new_empty(x.shape[:-1])
        total, normed = _summed(x, y, weight_D, eps, scale)
        ctx.save_for_backward(total, weight_D, scale)
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None):
        if grad_normed is None:
            return grad_total, grad_total, None, None
        total, weight_D, scale = ctx.saved_tensors
        grad, grad_weight = _gradients(total, total.shape[-1], weight_D, scale, grad_normed, grad_total)
        return grad, grad, grad_weight, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rows: Rows, interleaved: bool) -> Tensor:
    """x turned, its pairs interleaved or half a row apart; the result is half-split."""
    if torch.is_grad_enabled() and x.requires_grad:
        return NativeRotate.apply(x, cos, sin, rows, interleaved)
    return _rotated(x, cos, sin, rows, interleaved)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, rows: Rows, interleaved: bool) -> Tensor:
    y = x.new_empty(x.shape)
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
