"""SwiGLU in obvious torch: the specification."""

from __future__ import annotations

from torch import Tensor


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, of the last dimension's halves."""
    gate, up = gate_up.chunk(2, -1)
    return gate * gate.sigmoid() * up
