"""The grouped product in float32 on a CPU by `cpu.cpp`: a call a pass, in blocks of all groups' results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.kernels.blocks import empty
from gristmill.kernels.compiled import needed

SOURCE = "grouped_gemm/cpu.cpp"


class NativeGroupedGemm(torch.autograd.Function):
    """The product and both gradients; an empty group's gradient in w is zero."""

    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, w_EMK: Tensor, ends_E: Tensor, rounded: bool) -> Tensor:
        x_NK, w_EMK, ends_E = x_NK.contiguous(), w_EMK.contiguous(), ends_E.long().contiguous()
        ctx.save_for_backward(x_NK, w_EMK, ends_E)
        ctx.rounded, (groups, outer, inner) = int(rounded), w_EMK.shape
        y_NM = empty(len(x_NK), outer)
        needed(SOURCE)("product", x_NK, w_EMK, 1, inner, ends_E, y_NM, groups, outer, inner, ctx.rounded)
        return y_NM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NM: Tensor):
        (x_NK, w_EMK, ends_E), grad_NM = ctx.saved_tensors, grad_NM.contiguous()
        groups, outer, inner = w_EMK.shape
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = empty(*x_NK.shape)
            needed(SOURCE)("product", grad_NM, w_EMK, inner, 1, ends_E, grad_x, groups, inner, outer, ctx.rounded)
        if ctx.needs_input_grad[1]:
            grad_w = empty(*w_EMK.shape)
            needed(SOURCE)("weight_gradient", grad_NM, x_NK, ends_E, grad_w, groups, outer, inner, ctx.rounded)
        return grad_x, grad_w, None, None
