"""The routed experts in obvious torch: the specification (V3 equation 12, without the shared experts)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def moe_mlp_reference(
    x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Each expert's SwiGLU of the tokens that chose it, added to them by their gates; differentiable by autograd."""
    out_TD = torch.zeros_like(x_TD)
    for e, (gate_up_2FD, down_DF) in enumerate(zip(gate_up_E2FD, down_EDF, strict=True)):
        token, choice = torch.where(expert_TK == e)
        a, b = (x_TD[token] @ gate_up_2FD.T).chunk(2, -1)
        y = (F.silu(a) * b) @ down_DF.T
        out_TD = out_TD.index_add(0, token, gate_TK[token, choice, None].to(y.dtype) * y)
    return out_TD
