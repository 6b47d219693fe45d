"""The routed experts on a CPU: expert after expert, so that its rows stay in the cache from one step to the next.

The gate is multiplied into the activation, not into the output: h' = gate · silu(a) · b. Then a token's result is the
plain sum of its rows, which one pass gathers and adds in the order of its choices, and the gate's gradient is the row's
sum of silu(a) · b · dh', of width F and not D. Every product is one library call with a fixed order of sums.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.kernels.expert_rows import places, rows_by_expert
from gristmill.kernels.linear.reference import nearest


class MoeMlp(torch.autograd.Function):
    """The operation with its four gradients; an expert without rows has zeros."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        expert_TK: Tensor,
        gate_TK: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
        load_E: Tensor,
        order_M: Tensor | None,
        rounded: bool,
    ) -> Tensor:
        operand = nearest if rounded else _as_it_is
        order_M = rows_by_expert(expert_TK) if order_M is None else order_M
        token_M, gate_M1 = _by_row(order_M, gate_TK, x_TD.dtype)
        ctx.bounds = bounds = [0, *load_E.cumsum(0).tolist()]
        most, hidden = _longest(bounds), down_EDF.shape[2]
        pre_M2F, y_MD = x_TD.new_empty(len(order_M), 2 * hidden), x_TD.new_empty(len(order_M), x_TD.shape[1])
        x_RD, h_RF = x_TD.new_empty(most, x_TD.shape[1]), x_TD.new_empty(most, hidden)
        for e, (begin, end) in enumerate(pairwise(bounds)):
            if begin == end:
                continue
            rows, here = slice(begin, end), slice(end - begin)
            torch.index_select(x_TD, 0, token_M[rows], out=x_RD[here])
            torch.mm(operand(x_RD[here]), operand(gate_up_E2FD[e]).t(), out=pre_M2F[rows])
            a, b = pre_M2F[rows].chunk(2, -1)
            h = torch.ops.aten.silu.out(a, out=h_RF[here]).mul_(b).mul_(gate_M1[rows])
            torch.mm(operand(h), operand(down_EDF[e]).t(), out=y_MD[rows])
        ctx.operand = operand
        ctx.save_for_backward(x_TD, gate_TK, gate_up_E2FD, down_EDF, order_M, pre_M2F)
        return _summed(y_MD, places(order_M).view(gate_TK.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor):
        x_TD, gate_TK, gate_up_E2FD, down_EDF, order_M, pre_M2F = ctx.saved_tensors
        operand = ctx.operand
        token_M, gate_M1 = _by_row(order_M, gate_TK, x_TD.dtype)
        most, width, hidden = _longest(ctx.bounds), x_TD.shape[1], down_EDF.shape[2]
        grad_gate_up, grad_down = (w.new_empty(w.shape) for w in (gate_up_E2FD, down_EDF))
        grad_x_MD, grad_gate_M = x_TD.new_empty(len(order_M), width), x_TD.new_empty(len(order_M))
        gathered_RD, slope_R2F = x_TD.new_empty(most, width), x_TD.new_empty(most, 2 * hidden)
        grad_h_RF, h_RF = x_TD.new_empty(most, hidden), x_TD.new_empty(most, hidden)
        for e, (begin, end) in enumerate(pairwise(ctx.bounds)):
            if begin == end:
                grad_gate_up[e].zero_()
                grad_down[e].zero_()
                continue
            rows, here = slice(begin, end), slice(end - begin)
            grad = operand(torch.index_select(grad_TD, 0, token_M[rows], out=gathered_RD[here]))
            grad_h = torch.mm(grad, operand(down_EDF[e]), out=grad_h_RF[here])
            h, slope = h_RF[here], slope_R2F[here]
            torch.sum(_swiglu_backward(pre_M2F[rows], gate_M1[rows], grad_h, h, slope), -1, out=grad_gate_M[rows])
            torch.mm(grad.t(), operand(h), out=grad_down[e])
            x, slope = operand(torch.index_select(x_TD, 0, token_M[rows], out=gathered_RD[here])), operand(slope)
            torch.mm(slope.t(), x, out=grad_gate_up[e])
            torch.mm(slope, operand(gate_up_E2FD[e]), out=grad_x_MD[rows])
        place_M = places(order_M)
        grad_gate_TK = grad_gate_M[place_M].view(gate_TK.shape).to(gate_TK.dtype)
        grad_x = _summed(grad_x_MD, place_M.view(gate_TK.shape))
        return grad_x, None, grad_gate_TK, grad_gate_up, grad_down, None, None, None


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _longest(bounds: list[int]) -> int:
    """Rows of the expert that has most."""
    return max((end - begin for begin, end in pairwise(bounds)), default=0)


def _by_row(order_M: Tensor, gate_TK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Token and gate of each row, expert by expert: (M,) and (M, 1)."""
    token_M = order_M.div(gate_TK.shape[1], rounding_mode="floor") if len(order_M) else order_M
    return token_M, gate_TK.reshape(-1)[order_M].to(dtype)[:, None]


def _swiglu_backward(pre_R2F: Tensor, gate_R1: Tensor, grad_h_RF: Tensor, h_RF: Tensor, slope_R2F: Tensor) -> Tensor:
    """Write h' = gate · silu(a) · b to h and the gradient of (a, b) to slope; returned is silu(a) · b · dh', (R, F).

    What is returned lies where dh' lay, which is not needed after it.
    """
    (a, b), (slope_a, slope_b) = pre_R2F.chunk(2, -1), slope_R2F.chunk(2, -1)
    silu = torch.ops.aten.silu.out(a, out=h_RF)
    torch.mul(grad_h_RF, gate_R1, out=slope_b)
    torch.ops.aten.silu_backward.grad_input(slope_b * b, a, grad_input=slope_a)
    slope_b.mul_(silu)
    grad_h_RF.mul_(silu.mul_(b))
    silu.mul_(gate_R1)
    return grad_h_RF


def _summed(y_MD: Tensor, place_TK: Tensor) -> Tensor:
    """The sum of each token's rows, in the order of its choices, (T, D)."""
    if not y_MD.numel():
        return y_MD.new_zeros(place_TK.shape[0], y_MD.shape[1])
    return F.embedding_bag(place_TK, y_MD, mode="sum")
