"""The routed experts in float32 on a CPU by `cpu.cpp`: every step of an expert's rows in one pass of one thread."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.kernels.blocks import empty
from gristmill.kernels.compiled import needed

SOURCE = "moe_mlp/cpu.cpp"


class NativeMoeMlp(torch.autograd.Function):
    """The operation with its four gradients; an expert without rows has zeros."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor,
        order_M: Tensor | None, load_E: Tensor, rounded: bool,
    ) -> Tensor:  # fmt: skip
        (tokens, width), (experts, _, hidden), chosen = x_TD.shape, down_EDF.shape, expert_TK.shape[1]
        rows, library = tokens * chosen, needed(SOURCE)
        x_TD, gate_up_E2FD, down_EDF = (t.contiguous() for t in (x_TD, gate_up_E2FD, down_EDF))
        gate = gate_TK.float().contiguous()
        bounds_E = x_TD.new_zeros(experts + 1, dtype=torch.int64)
        if order_M is None:
            order_M = x_TD.new_empty(rows, dtype=torch.int64)
            library("sort_choices", expert_TK.long().contiguous(), order_M, bounds_E, rows, experts)
        else:
            order_M = order_M.contiguous()
            torch.cumsum(load_E, 0, out=bounds_E[1:])
        sizes = (tokens, chosen, experts, width, hidden)
        pre_M2F, y_MD, out_TD = empty(rows, 2 * hidden), empty(rows, width), torch.empty_like(x_TD)
        where = (order_M, *_places(order_M, chosen), bounds_E)
        library("forward", x_TD, gate, gate_up_E2FD, down_EDF, *where, pre_M2F, y_MD, out_TD, *sizes, int(rounded))
        ctx.save_for_backward(x_TD, gate, gate_up_E2FD, down_EDF, bounds_E, order_M, pre_M2F)
        ctx.sizes, ctx.rounded, ctx.gate_dtype = sizes, int(rounded), gate_TK.dtype
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor):
        *inputs, bounds_E, order_M, pre_M2F = ctx.saved_tensors
        where = (order_M, *_places(order_M, ctx.sizes[1]), bounds_E)
        grad_rows_MD = empty(len(order_M), grad_TD.shape[1])
        grad_x, grad_gate, grad_gate_up, grad_down = made = [empty(*t.shape) for t in inputs]
        given, how = (grad_TD.contiguous(), *inputs, *where, pre_M2F), (*ctx.sizes, ctx.rounded)
        needed(SOURCE)("backward", *given, grad_rows_MD, *made, *how)
        return grad_x, None, grad_gate.to(ctx.gate_dtype), grad_gate_up, grad_down, None, None, None


def is_other(order_M: Tensor, expert_TK: Tensor) -> bool:
    """Whether an order is not that of these choices."""
    return bool(needed(SOURCE)("is_other", order_M.contiguous(), expert_TK.long().contiguous(), len(order_M)))


def few_rows(x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """The operation for few rows an expert, without gradients."""
    (tokens, width), (experts, _, hidden), chosen = x_TD.shape, down_EDF.shape, expert_TK.shape[1]
    x_TD, gate_up_E2FD, down_EDF = (t.contiguous() for t in (x_TD, gate_up_E2FD, down_EDF))
    y_MD, out_TD = x_TD.new_empty(tokens * chosen, width), torch.empty_like(x_TD)
    choices = expert_TK.long().contiguous(), gate_TK.float().contiguous()
    sizes = (tokens, chosen, experts, width, hidden)
    needed(SOURCE)("few", x_TD, *choices, gate_up_E2FD, down_EDF, y_MD, out_TD, *sizes)
    return out_TD


def _places(order_M: Tensor, chosen: int) -> tuple[Tensor, Tensor]:
    """The token of each row, and where each choice lies."""
    token_M, place_M = torch.empty_like(order_M), torch.empty_like(order_M)
    needed(SOURCE)("places", order_M, token_M, place_M, len(order_M), chosen)
    return token_M, place_M
