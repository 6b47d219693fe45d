"""SwiGLU on a CPU, compiled. Only its input is kept for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.kernels.compiled import Compiled


def swiglu(run: Compiled, gate_up: Tensor) -> Tensor:
    """silu(gate) · up of contiguous float32."""
    if torch.is_grad_enabled() and gate_up.requires_grad:
        return SwiGLU.apply(gate_up, run)
    return _forward(run, gate_up)


def _forward(run: Compiled, gate_up: Tensor) -> Tensor:
    hidden = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], hidden)
    if hidden:
        run("swiglu", gate_up, y, y.numel() // hidden, hidden)
    return y


class SwiGLU(torch.autograd.Function):
    """Forward and backward, a pass each."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, run: Compiled) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.run = run
        return _forward(run, gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        (gate_up,) = ctx.saved_tensors
        grad, hidden, grad_gate_up = grad.contiguous(), grad.shape[-1], torch.empty_like(gate_up)
        if hidden:
            ctx.run("swiglu_backward", gate_up, grad, grad_gate_up, grad.numel() // hidden, hidden)
        return grad_gate_up, None
