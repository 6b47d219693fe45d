"""The routed experts in Triton, on the grouped products of `grouped_gemm`.

Rows are gathered before a product and not by it, since the copy engine of a Hopper GPU takes tiles of neighbouring rows
alone; both products of a backward pass read the same gathered gradients, and no gathered rows are kept. Here are
the kernels between the products: SwiGLU with the gate, its slope with the gate's, and the sum of a token's rows, each
computed in float32 and rounded once. A token gathers its rows, so nothing is added by a race.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.kernels.dispatch import require
from gristmill.kernels.expert_rows import places, rows_by_expert
from gristmill.kernels.grouped_gemm.gpu import MOST_ROWS, product, weight_gradient

BLOCK, WARPS = 1024, 4
WHOLE_COLUMNS = 256  # a part of the columns is a multiple of these, a product's tile
PARTS_OF_INPUTS, PARTS_OF_GRADIENTS = 4, 8
"""In how many parts of their columns rows of x, and of its gradient, lie there at a time in the backward pass. More
would take less memory, and read the slopes more often; the second kind is there beside the whole gradient."""


@triton.jit
def _swiglu(pre_ptr, gate_ptr, order_ptr, h_ptr, hidden, BLOCK_F: tl.constexpr):
    """h' = gate · silu(a) · b of one row and one block of columns."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    a = tl.load(pre_ptr + row * 2 * hidden + f, mask=f < hidden, other=0.0).to(tl.float32)
    b = tl.load(pre_ptr + row * 2 * hidden + hidden + f, mask=f < hidden, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + tl.load(order_ptr + row)).to(tl.float32)
    h = gate * (a / (1.0 + tl.exp(-a))) * b
    tl.store(h_ptr + row * hidden + f, h.to(h_ptr.dtype.element_ty), mask=f < hidden)


@triton.jit
def _swiglu_backward(
    pre_ptr, gate_ptr, order_ptr, h_ptr, slope_ptr, grad_gate_ptr, hidden, BLOCK_F: tl.constexpr
):  # fmt: skip
    """One row: h' in place of dh', the gradient of (a, b), and of the gate in the place of its choice."""
    row = tl.program_id(0).to(tl.int64)
    choice = tl.load(order_ptr + row)
    gate = tl.load(gate_ptr + choice).to(tl.float32)
    total = tl.zeros((BLOCK_F,), dtype=tl.float32)
    for start in range(0, hidden, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        here = f < hidden
        a = tl.load(pre_ptr + row * 2 * hidden + f, mask=here, other=0.0).to(tl.float32)
        b = tl.load(pre_ptr + row * 2 * hidden + hidden + f, mask=here, other=0.0).to(tl.float32)
        grad = tl.load(h_ptr + row * hidden + f, mask=here, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-a))
        silu = a * sigmoid
        total += grad * silu * b
        slope_a = gate * grad * b * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(slope_ptr + row * 2 * hidden + f, slope_a.to(slope_ptr.dtype.element_ty), mask=here)
        slope_b = (gate * grad * silu).to(slope_ptr.dtype.element_ty)
        tl.store(slope_ptr + row * 2 * hidden + hidden + f, slope_b, mask=here)
        tl.store(h_ptr + row * hidden + f, (gate * silu * b).to(h_ptr.dtype.element_ty), mask=here)
    tl.store(grad_gate_ptr + choice, tl.sum(total, 0).to(grad_gate_ptr.dtype.element_ty))


@triton.jit
def _sum_of_rows(y_ptr, place_ptr, out_ptr, chosen, width, out_row, BLOCK_D: tl.constexpr):
    """One token and one block of columns: its rows, added in the order of its choices."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for k in range(chosen):
        row = tl.load(place_ptr + token * chosen + k).to(tl.int64)
        total += tl.load(y_ptr + row * width + d, mask=d < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * out_row + d, total.to(out_ptr.dtype.element_ty), mask=d < width)


def _activated(pre_M2F: Tensor, gate_TK: Tensor, order_M: Tensor) -> Tensor:
    """h' = gate · silu(a) · b, (M, F)."""
    rows, hidden = len(pre_M2F), pre_M2F.shape[1] // 2
    h_MF = pre_M2F.new_empty(rows, hidden)
    if h_MF.numel():
        block = min(BLOCK, triton.next_power_of_2(hidden))
        _swiglu[(rows, triton.cdiv(hidden, block))](pre_M2F, gate_TK, order_M, h_MF, hidden, BLOCK_F=block)
    return h_MF


def _slopes_(pre_M2F: Tensor, gate_TK: Tensor, order_M: Tensor, grad_h_MF: Tensor, slope_M2F: Tensor) -> Tensor:
    """The gradients of the gates, (T, K); dh' becomes h', and `slope_M2F`, which may be `pre_M2F`, that of (a, b)."""
    grad_gate_TK = torch.zeros_like(gate_TK)
    if grad_h_MF.numel():
        hidden = grad_h_MF.shape[1]
        # Of fewer columns than threads, several would read what one of them writes over
        block = max(32 * WARPS, min(BLOCK, triton.next_power_of_2(hidden)))
        _swiglu_backward[(len(order_M),)](
            pre_M2F, gate_TK, order_M, grad_h_MF, slope_M2F, grad_gate_TK, hidden, BLOCK_F=block, num_warps=WARPS
        )
    return grad_gate_TK


def _sum(y_MD: Tensor, place_M: Tensor, out_TD: Tensor) -> None:
    """Put down the sum of each token's rows, (T, D); there may be more columns beside those of the result."""
    (tokens, width), rows = out_TD.shape, len(place_M)
    if not y_MD.numel():
        out_TD.zero_()
        return
    block = min(BLOCK, triton.next_power_of_2(width))
    grid = (tokens, triton.cdiv(width, block))
    _sum_of_rows[grid](y_MD, place_M, out_TD, rows // tokens, width, out_TD.stride(0), BLOCK_D=block)


def _parts(width: int, parts: int) -> list[slice]:
    """The columns in so many parts or a few less, all but the last of a multiple of WHOLE_COLUMNS."""
    step = max(1, triton.cdiv(width, parts * WHOLE_COLUMNS)) * WHOLE_COLUMNS
    return [slice(first, min(first + step, width)) for first in range(0, width, step)]


def _tokens(order_M: Tensor, chosen: int) -> Tensor:
    return order_M.div(max(chosen, 1), rounding_mode="floor")


class TritonMoeMlp(torch.autograd.Function):
    """The operation with its four gradients, on a GPU.

    Raises:
        ValueError: there are 2³⁰ rows or more.
    """

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
    ) -> Tensor:
        require(expert_TK.numel() < MOST_ROWS, ValueError, "moe_mlp: rows", expert_TK.numel(), "fewer than 2³⁰")
        order_M = rows_by_expert(expert_TK) if order_M is None else order_M.contiguous()
        gate_TK, ends_E = gate_TK.contiguous(), load_E.cumsum(0)
        x_MD = x_TD.index_select(0, _tokens(order_M, expert_TK.shape[1]))
        pre_M2F = product(x_MD, gate_up_E2FD, ends_E, transposed=True)
        del x_MD  # its room is the output's
        y_MD = product(_activated(pre_M2F, gate_TK, order_M), down_EDF, ends_E, transposed=True)
        ctx.save_for_backward(x_TD, gate_TK, gate_up_E2FD, down_EDF, ends_E, order_M, pre_M2F)
        ctx.spent = False
        out_TD = y_MD.new_empty(x_TD.shape)
        _sum(y_MD, places(order_M), out_TD)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor):
        *saved, pre_M2F = ctx.saved_tensors
        if ctx.spent:  # by a first backward pass through the same graph
            x_TD, gate_TK, gate_up_E2FD, _, ends_E, order_M = saved
            x_MD = x_TD.index_select(0, _tokens(order_M, gate_TK.shape[1]))
            pre_M2F = product(x_MD, gate_up_E2FD, ends_E, transposed=True)
        ctx.spent = True
        grad_x, grad_gate, grad_gate_up, grad_down = gradients(*saved, pre_M2F, pre_M2F, grad_TD)
        return grad_x, None, grad_gate, grad_gate_up, grad_down, None, None


def gradients(
    x_TD: Tensor, gate_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ends_E: Tensor, order_M: Tensor,
    pre_M2F: Tensor, slope_M2F: Tensor, grad_TD: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Those of x, the gates and both stacks. The slopes are put down where it is said, which may be over `pre_M2F`."""
    token_M, place_M = _tokens(order_M, gate_TK.shape[1]), places(order_M)
    grad_MD = grad_TD.index_select(0, token_M)
    h_MF = product(grad_MD, down_EDF, ends_E, transposed=False)  # dh', and h' after the next line
    grad_gate_TK = _slopes_(pre_M2F, gate_TK, order_M, h_MF, slope_M2F)
    grad_down = weight_gradient(grad_MD, h_MF, ends_E)
    del grad_MD, h_MF  # their room is that of the rows of x
    grad_gate_up = torch.empty_like(gate_up_E2FD, memory_format=torch.contiguous_format)
    for part in _parts(x_TD.shape[1], PARTS_OF_INPUTS):
        x_MP = x_TD[:, part].index_select(0, token_M)
        weight_gradient(slope_M2F, x_MP, ends_E, into=grad_gate_up[:, :, part])
        del x_MP
    grad_x_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    for part in _parts(x_TD.shape[1], PARTS_OF_GRADIENTS):
        grad_x_MP = product(slope_M2F, gate_up_E2FD[:, :, part], ends_E, transposed=False)
        _sum(grad_x_MP, place_M, grad_x_TD[:, part])
        del grad_x_MP
    return grad_x_TD, grad_gate_TK, grad_gate_up, grad_down
