"""The grouped product in Triton: tiles find their group on the device, so nothing waits for the host.

One kernel serves the product and its gradient in x, which differ in the strides of w; another gives the gradient in w,
each expert's tile summing over the rows of its group in one fixed order, so two runs give equal bits.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS, BLOCK_OUT, BLOCK_IN = 64, 64, 32
WIDEN = os.environ.get("TRITON_INTERPRET") == "1"  # the interpreter's dot does not know bfloat16


@triton.jit
def _product(
    a_ptr, b_ptr, y_ptr, ends_ptr, inner, outer, groups,
    a_row, a_in, b_group, b_in, b_out, y_row,
    ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y[rows of e] = a[rows of e] · B_e, where B_e[i, o] lies at b + e·b_group + i·b_in + o·b_out."""
    wanted, column = tl.program_id(0), tl.program_id(1)
    first, last, group, tile, begin = 0, 0, -1, 0, 0
    for e in range(groups):
        end = tl.load(ends_ptr + e).to(tl.int32)
        tiles = (end - begin + ROWS - 1) // ROWS
        here = (wanted >= tile) & (wanted < tile + tiles)
        group = tl.where(here, e, group)
        first = tl.where(here, begin + (wanted - tile) * ROWS, first)
        last = tl.where(here, end, last)
        tile += tiles
        begin = end
    if group >= 0:
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        outs, ins = column * OUT + tl.arange(0, OUT), tl.arange(0, IN)
        total = tl.zeros((ROWS, OUT), dtype=tl.float32)
        base = b_ptr + group.to(tl.int64) * b_group
        for start in range(0, inner, IN):
            i = start + ins
            a = tl.load(
                a_ptr + rows[:, None] * a_row + i[None, :] * a_in,
                mask=(rows[:, None] < last) & (i[None, :] < inner),
                other=0.0,
            )
            b = tl.load(
                base + i[:, None] * b_in + outs[None, :] * b_out,
                mask=(i[:, None] < inner) & (outs[None, :] < outer),
                other=0.0,
            )
            if WIDE:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision="ieee")
        where = y_ptr + rows[:, None] * y_row + outs[None, :]
        tl.store(where, total.to(y_ptr.dtype.element_ty), mask=(rows[:, None] < last) & (outs[None, :] < outer))


@triton.jit
def _weight_gradient(
    grad_ptr, x_ptr, w_ptr, ends_ptr, outer, inner,
    ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dw[e] = grad[rows of e]ᵀ · x[rows of e]; zero for a group without rows. grad and x are contiguous."""
    group = tl.program_id(0)
    outs, ins = tl.program_id(1) * OUT + tl.arange(0, OUT), tl.program_id(2) * IN + tl.arange(0, IN)
    begin = tl.load(ends_ptr + group - 1, mask=group > 0, other=0).to(tl.int32)
    end = tl.load(ends_ptr + group).to(tl.int32)
    total = tl.zeros((OUT, IN), dtype=tl.float32)
    for start in range(begin, end, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        grad = tl.load(
            grad_ptr + rows[None, :] * outer + outs[:, None],
            mask=(rows[None, :] < end) & (outs[:, None] < outer),
            other=0.0,
        )
        x = tl.load(
            x_ptr + rows[:, None] * inner + ins[None, :],
            mask=(rows[:, None] < end) & (ins[None, :] < inner),
            other=0.0,
        )
        if WIDE:
            grad, x = grad.to(tl.float32), x.to(tl.float32)
        total = tl.dot(grad, x, total, input_precision="ieee")
    where = w_ptr + group.to(tl.int64) * outer * inner + outs[:, None].to(tl.int64) * inner + ins[None, :]
    tl.store(where, total.to(w_ptr.dtype.element_ty), mask=(outs[:, None] < outer) & (ins[None, :] < inner))


def product(a_NI: Tensor, w: Tensor, ends_E: Tensor, outer: int, w_in: int, w_out: int) -> Tensor:
    """Launch `_product`; `w_in` and `w_out` are the strides of w along what is summed and what is made."""
    rows, groups = a_NI.shape[0], w.shape[0]
    y = torch.empty(rows, outer, dtype=a_NI.dtype, device=a_NI.device)
    # Each group may end in a tile that is not full: there are at most this many tiles, known without the ends.
    grid = (triton.cdiv(rows, BLOCK_ROWS) + groups, triton.cdiv(outer, BLOCK_OUT))
    if rows:
        _product[grid](
            a_NI, w, y, ends_E, a_NI.shape[1], outer, groups,
            a_NI.stride(0), a_NI.stride(1), w.stride(0), w_in, w_out, y.stride(0),
            ROWS=BLOCK_ROWS, OUT=BLOCK_OUT, IN=BLOCK_IN, WIDE=WIDEN,
        )  # fmt: skip
    return y


class TritonGroupedGemm(torch.autograd.Function):
    """The grouped product with both gradients, on a GPU."""

    @staticmethod
    def forward(ctx, x_NK: Tensor, w_EMK: Tensor, ends_E: Tensor) -> Tensor:
        ends_E = ends_E.contiguous()  # the kernels read it by place
        ctx.save_for_backward(x_NK, w_EMK, ends_E)
        return product(x_NK, w_EMK, ends_E, w_EMK.shape[1], w_EMK.stride(2), w_EMK.stride(1))

    @staticmethod
    def backward(ctx, grad_NM: Tensor):
        x_NK, w_EMK, ends_E = ctx.saved_tensors
        grad_NM, x_NK = grad_NM.contiguous(), x_NK.contiguous()
        groups, outer, inner = w_EMK.shape
        grad_x = product(grad_NM, w_EMK, ends_E, inner, w_EMK.stride(1), w_EMK.stride(2))
        grad_w = torch.empty(w_EMK.shape, dtype=w_EMK.dtype, device=w_EMK.device)
        grid = (groups, triton.cdiv(outer, BLOCK_OUT), triton.cdiv(inner, BLOCK_OUT))
        _weight_gradient[grid](
            grad_NM, x_NK, grad_w, ends_E, outer, inner, ROWS=BLOCK_IN, OUT=BLOCK_OUT, IN=BLOCK_OUT, WIDE=WIDEN
        )
        return grad_x, grad_w, None
