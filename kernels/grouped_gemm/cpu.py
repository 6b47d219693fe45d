"""The grouped product on a CPU in torch: one library product a group, written straight into its rows.

It takes any floating dtype and any layout of gradients, and runs where the compiled path does not. A group's product is
one call with a fixed order of sums, so two runs with as many threads give equal bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gristmill.kernels.linear.reference import nearest


class GroupedGemm(torch.autograd.Function):
    """y[rows of e] = x[rows of e] · w[e]ᵀ; dx and dw group by group, an empty group's dw being zero."""

    @staticmethod
    def forward(ctx, x_NK: Tensor, w_EMK: Tensor, ends_E: Tensor, rounded: bool) -> Tensor:
        if rounded:
            x_NK, w_EMK = nearest(x_NK), nearest(w_EMK)
        bounds = [0, *ends_E.tolist()]
        ctx.save_for_backward(x_NK, w_EMK)
        ctx.bounds, ctx.rounded = bounds, rounded
        y_NM = x_NK.new_empty(x_NK.shape[0], w_EMK.shape[1])
        for e in range(w_EMK.shape[0]):
            a, b = bounds[e], bounds[e + 1]
            if b > a:
                torch.mm(x_NK[a:b], w_EMK[e].t(), out=y_NM[a:b])
        return y_NM

    @staticmethod
    def backward(ctx, grad_NM: Tensor):
        x_NK, w_EMK = ctx.saved_tensors
        grad_NM = nearest(grad_NM.contiguous()) if ctx.rounded else grad_NM.contiguous()
        of_x, of_w = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x_NK, memory_format=torch.contiguous_format) if of_x else None
        grad_w = torch.zeros_like(w_EMK) if of_w else None
        for e in range(w_EMK.shape[0]):
            a, b = ctx.bounds[e], ctx.bounds[e + 1]
            if b > a and grad_x is not None:
                torch.mm(grad_NM[a:b], w_EMK[e], out=grad_x[a:b])
            if b > a and grad_w is not None:
                torch.mm(grad_NM[a:b].t(), x_NK[a:b], out=grad_w[e])
        return grad_x, grad_w, None, None
