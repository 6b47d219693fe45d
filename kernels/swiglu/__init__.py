"""The activation of an FFN, SwiGLU (arXiv 2002.05202), as one pass each way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.dispatch import chosen
from gristmill.kernels.swiglu import library, native
from gristmill.kernels.swiglu.reference import swiglu_reference

__all__ = ["swiglu"]
TAKES = "float32, bfloat16 and float16"


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, (..., F), differentiable once.

    Args:
        gate_up: the gate and beside it what is gated, (..., 2F), of any floating dtype.

    Raises:
        TypeError: gate_up is not of a floating dtype.
        ValueError: its last dimension has no halves.
    """
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: shape of gate_up is {tuple(gate_up.shape)}; wanted a last dimension of two halves")
    if not gate_up.is_floating_point():
        raise TypeError(f"swiglu: gate_up is {gate_up.dtype}; wanted a floating dtype")
    implementation = chosen("swiglu", gate_up, native.SOURCE, triton=fits_triton(gate_up), takes=TAKES)
    if implementation == "compiled":
        return native.swiglu(gate_up)
    if implementation == "gpu":
        from gristmill.kernels.swiglu.gpu import TritonSwiGLU

        return TritonSwiGLU.apply(gate_up)
    if implementation == "operation":
        return library.swiglu(gate_up)
    if implementation == "reference":
        return swiglu_reference(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def fits_triton(gate_up: Tensor) -> bool:
    return gate_up.dtype != torch.float64
