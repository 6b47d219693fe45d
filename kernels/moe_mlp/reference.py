"""The routed experts in obvious torch: the specification (V3 equation 12, without the shared experts)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.linear.reference import linear_reference


def moe_mlp_reference(
    x_TD: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    *,
    rounded: bool = False,
) -> Tensor:
    """Each expert's SwiGLU of the tokens that chose it, added to them by their gates; differentiable by autograd.

    The gate goes before the down product, which is linear: rounded, its operand holds it.
    """
    out_TD = torch.zeros_like(x_TD)
    for e, (gate_up_2FD, down_DF) in enumerate(zip(gate_up_E2FD, down_EDF, strict=True)):
        token, choice = torch.where(expert_TK == e)
        a, b = linear_reference(x_TD[token], gate_up_2FD, rounded=rounded).chunk(2, -1)
        h = gate_TK[token, choice, None].to(a.dtype) * (F.silu(a) * b)
        out_TD = out_TD.index_add(0, token, linear_reference(h, down_DF, rounded=rounded))
    return out_TD
