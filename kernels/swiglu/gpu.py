"""SwiGLU in Triton: one pass each way, in float32, rounded once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

COLUMNS = 1024  # of a row that a program takes


@triton.jit(do_not_specialize=["blocks"])
def _swiglu(x_ptr, y_ptr, hidden, blocks, COLUMNS: tl.constexpr):
    row, f = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    gate = tl.load(x_ptr + row * 2 * hidden + f, mask=f < hidden, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * hidden + hidden + f, mask=f < hidden, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * hidden + f, y.to(y_ptr.dtype.element_ty), mask=f < hidden)


@triton.jit(do_not_specialize=["blocks"])
def _swiglu_backward(x_ptr, grad_ptr, grad_x_ptr, hidden, blocks, COLUMNS: tl.constexpr):
    row, f = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    gate = tl.load(x_ptr + row * 2 * hidden + f, mask=f < hidden, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * hidden + hidden + f, mask=f < hidden, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * hidden + f, mask=f < hidden, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    of_gate, of_up = grad * up * (sigmoid + silu * (1.0 - sigmoid)), grad * silu
    out = grad_x_ptr + row * 2 * hidden + f
    tl.store(out, of_gate.to(grad_x_ptr.dtype.element_ty), mask=f < hidden)
    tl.store(out + hidden, of_up.to(grad_x_ptr.dtype.element_ty), mask=f < hidden)


def _grid(hidden: int, rows: int) -> tuple[tuple[int], int, int]:
    """Programs, blocks of a row, and columns of a block."""
    columns = min(COLUMNS, triton.next_power_of_2(hidden))
    blocks = triton.cdiv(hidden, columns)
    return (rows * blocks,), blocks, columns


class TritonSwiGLU(torch.autograd.Function):
    """What is kept for the backward pass is the input."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        hidden = gate_up.shape[-1] // 2
        y = gate_up.new_empty(*gate_up.shape[:-1], hidden)
        if y.numel():
            grid, blocks, columns = _grid(hidden, y.numel() // hidden)
            _swiglu[grid](gate_up, y, hidden, blocks, COLUMNS=columns)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        (gate_up,) = ctx.saved_tensors
        hidden, grad_gate_up = grad.shape[-1], torch.empty_like(gate_up)
        if grad.numel():
            grid, blocks, columns = _grid(hidden, grad.numel() // hidden)
            _swiglu_backward[grid](gate_up, grad.contiguous(), grad_gate_up, hidden, blocks, COLUMNS=columns)
        return grad_gate_up
