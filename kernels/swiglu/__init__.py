"""The activation of an FFN, SwiGLU (arXiv 2002.05202), as one pass each way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.compiled import compiled
from gristmill.kernels.dispatch import chosen, require
from gristmill.kernels.swiglu import cpu
from gristmill.kernels.swiglu.reference import swiglu_reference

__all__ = ["swiglu"]


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, (..., F), differentiable once.

    Args:
        gate_up: the gate and beside it what is gated, (..., 2F), of any floating dtype.

    Raises:
        TypeError: gate_up is not of a floating dtype.
        ValueError: its last dimension has no halves.
    """
    require(gate_up.is_floating_point(), TypeError, "swiglu: gate_up", gate_up.dtype, "a floating dtype")
    shape = gate_up.shape
    require(bool(shape) and shape[-1] % 2 == 0, ValueError, "swiglu: shape of gate_up", tuple(shape), "(..., 2F)")
    implementation = chosen("swiglu", gate_up)
    if implementation == "reference":
        return swiglu_reference(gate_up)
    plain = gate_up.dtype == torch.float32 and gate_up.is_contiguous()
    if implementation == "cpu" and plain and (run := compiled("swiglu/cpu.cpp")) is not None:
        return cpu.swiglu(run, gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
