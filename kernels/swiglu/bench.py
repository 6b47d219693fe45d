"""What is timed of SwiGLU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.swiglu import swiglu
from gristmill.kernels.timing import Case, both_ways


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Against torch's two operations, in bytes."""
    for rows, width in [(8192, 8192), (8192, 28_672)] if device == "cuda" else [(1, 1024), (2048, 1024)]:
        gate_up = torch.randn(rows, 2 * width, device=device, dtype=dtype)
        seen = torch.ones_like(gate_up[:, :width]) if device == "cuda" else None
        moved = 4 * gate_up.nbytes  # gate and up; the result; both again, the result's gradient and theirs
        ours, theirs = (both_ways(side, gate_up, seen=seen) for side in (swiglu, _in_torch))
        flops, peers = 8 * gate_up.numel(), {"silu and product": theirs}
        yield Case("swiglu", f"{rows} × {width}", flops, ours, peers, bytes=moved, captured=True)


def _in_torch(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
