"""x·wᵀ + b with its gradients: the products outside the routed experts.

On a CPU in float32 by `cpu.cpp`: where there are rows enough, weights are packed for them; for fewer, without
gradients, they are read as they lie. Elsewhere by torch's own. Products of rounded operands are for training on a CPU:
on a GPU one gives tensors in bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.kernels.blocks import empty
from gristmill.kernels.compiled import needed
from gristmill.kernels.dispatch import chosen, in_own_dtypes, require, require_device, require_dtype
from gristmill.kernels.linear import library
from gristmill.kernels.linear.reference import linear_reference

__all__ = ["linear", "multiply"]
SOURCE = "linear/cpu.cpp"
LEAST_ROWS = 96  # with fewer, packing the weights costs more than it saves
LEAST_PRODUCTS = 1 << 17  # with fewer, torch's product takes less than the preparation of a call here
TAKES = "float32 and a contiguous w_MK"


@in_own_dtypes
def linear(x: Tensor, w_MK: Tensor, bias_M: Tensor | None = None, *, rounded: bool = False) -> Tensor:
    """x·wᵀ + bias over the last dimension, (…, M), in x's dtype; differentiable once on the compiled path.

    Args:
        x: rows, (…, K).
        w_MK: a matrix as Hugging Face stores it, (out, in).
        bias_M: what is added to each row.
        rounded: whether the products of both passes take their operands rounded to bfloat16. Sums, results and
            gradients are in x's dtype either way; on a CPU that multiplies bfloat16 numbers it is faster.

    Raises:
        TypeError: x is not floating, or w or the bias has another dtype.
        ValueError: the inner sizes differ, w is no matrix, the bias is no number a row of it, or devices differ.
    """
    _check(x, w_MK, bias_M)
    many = has_many_rows(x)
    graded = torch.is_grad_enabled() and (x.requires_grad or w_MK.requires_grad)
    fits = many or (not graded and not rounded and x.numel() * len(w_MK) >= LEAST_PRODUCTS)
    source, takes = SOURCE if fits and fits_source(w_MK) else None, TAKES if fits else ""
    implementation = chosen("linear", x, source, triton=None, takes=takes)
    if implementation == "compiled":
        y = NativeLinear.apply(x, w_MK, rounded) if many else few(x, w_MK)
    elif implementation == "operation":
        y = library.linear(x, w_MK, rounded)
    else:
        return linear_reference(x, w_MK, bias_M, rounded=rounded)
    return y if bias_M is None else y + bias_M


def _check(x: Tensor, w_MK: Tensor, bias_M: Tensor | None) -> None:
    require(x.ndim > 0, ValueError, "linear: rank of x", x.ndim, "1 or more")
    require(w_MK.ndim == 2, ValueError, "linear: rank of w_MK", w_MK.ndim, 2)
    (rows, width), dtype = w_MK.shape, x.dtype
    require(x.shape[-1] == width, ValueError, "linear: inner size of w_MK", width, x.shape[-1])
    require(dtype.is_floating_point, TypeError, "linear: x", dtype, "a floating dtype")
    if bias_M is not None:
        require(bias_M.shape == (rows,), ValueError, "linear: shape of bias_M", bias_M.shape, (rows,))
    require_dtype("linear", dtype, "x", w_MK=w_MK, bias_M=bias_M)
    require_device("linear", "x", x, w_MK=w_MK, bias_M=bias_M)


def has_many_rows(x: Tensor) -> bool:
    return x.numel() >= LEAST_ROWS * x.shape[-1] > 0


def fits_source(w_MK: Tensor) -> bool:
    return w_MK.dtype == torch.float32 and w_MK.is_contiguous()


def few(x: Tensor, w_MK: Tensor) -> Tensor:
    """x·wᵀ of few rows by `cpu.cpp`, without a gradient."""
    y = x.new_empty(*x.shape[:-1], len(w_MK))
    needed(SOURCE)("few", x.contiguous(), w_MK, y, x.numel() // x.shape[-1], len(w_MK), x.shape[-1])
    return y


def multiply(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, rounded: bool = False) -> None:
    """out = a·b by `cpu.cpp`: float32 on a CPU, in each of a and b one stride 1, out contiguous.

    Rounded, it takes the bfloat16 numbers nearest to those of a and b.
    """
    sizes = (*a_MK.shape, b_KN.shape[1])
    strides = a_MK.stride(), b_KN.stride()
    how = sizes[0], sizes[2], sizes[1], int(rounded)
    needed(SOURCE)("multiply", a_MK, *strides[0], b_KN, *strides[1], out_MN, *how)


class NativeLinear(torch.autograd.Function):
    """The product without a bias, and both gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_MK: Tensor, rounded: bool) -> Tensor:
        x_NK = x.reshape(-1, x.shape[-1]).contiguous()
        ctx.save_for_backward(x_NK, w_MK)
        ctx.shape, ctx.rounded = x.shape, rounded
        y_NM = empty(len(x_NK), len(w_MK))
        multiply(x_NK, w_MK.t(), y_NM, rounded)
        return y_NM.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        x_NK, w_MK = ctx.saved_tensors
        grad_NM = grad.reshape(len(x_NK), len(w_MK)).contiguous()
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = empty(*x_NK.shape)
            multiply(grad_NM, w_MK, grad_x, ctx.rounded)
            grad_x = grad_x.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_w = empty(*w_MK.shape)
            multiply(grad_NM.t(), x_NK, grad_w, ctx.rounded)
        return grad_x, grad_w, None
