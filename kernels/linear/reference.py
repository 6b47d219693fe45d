"""x·wᵀ in obvious torch, of operands as they are or rounded to bfloat16: the specification."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_reference(x: Tensor, w_MK: Tensor, bias_M: Tensor | None = None, *, rounded: bool = False) -> Tensor:
    """x·wᵀ + bias; rounded, each product of both passes takes the bfloat16 numbers nearest to its operands."""
    if not rounded:
        return F.linear(x, w_MK, bias_M)
    y = RoundedLinear.apply(x, w_MK)
    return y if bias_M is None else y + bias_M


def nearest(x: Tensor) -> Tensor:
    """The bfloat16 numbers nearest to x, in x's dtype."""
    return x.bfloat16().to(x.dtype)


class RoundedLinear(torch.autograd.Function):
    """The product of rounded operands. Rounding has no slope of its own: gradients pass it as they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_MK: Tensor) -> Tensor:
        ctx.save_for_backward(x, w_MK)
        return F.linear(nearest(x), nearest(w_MK))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        x, w_MK = ctx.saved_tensors
        grad, grad_x, grad_w = nearest(grad), None, None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ nearest(w_MK)
        if ctx.needs_input_grad[1]:
            grad_w = grad.flatten(0, -2).t() @ nearest(x).flatten(0, -2)
        return grad_x, grad_w
