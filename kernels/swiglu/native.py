"""SwiGLU in float32 on a CPU by `cpu.cpp`: one pass each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.kernels.blocks import empty
from gristmill.kernels.compiled import needed

SOURCE = "swiglu/cpu.cpp"


def swiglu(gate_up: Tensor) -> Tensor:
    if torch.is_grad_enabled() and gate_up.requires_grad:
        return NativeSwiGLU.apply(gate_up)
    return _activated(gate_up.contiguous())


def _activated(gate_up: Tensor) -> Tensor:
    *rows, both = gate_up.shape
    y = empty(*rows, both // 2)
    needed(SOURCE)("swiglu", gate_up, y, gate_up.numel() // max(1, both), both // 2)
    return y


class NativeSwiGLU(torch.autograd.Function):
    """What is kept for the backward pass is the input."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        return _activated(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        (gate_up,) = ctx.saved_tensors
        hidden, grad_gate_up = grad.shape[-1], empty(*gate_up.shape)
        needed(SOURCE)(
            "swiglu_backward", gate_up, grad.contiguous(), grad_gate_up, grad.numel() // max(1, hidden), hidden
        )
        return grad_gate_up
