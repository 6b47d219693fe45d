"""How rows are laid out expert by expert. M = T·K rows: row t·K + k is the k-th choice of token t."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_by_expert(expert_TK: Tensor) -> Tensor:
    """Rows in the order of their experts, those of one expert in the order of tokens, (M,)."""
    return expert_TK.reshape(-1).argsort(stable=True)


def places(order_M: Tensor) -> Tensor:
    """Where each row lies in that order: the inverse permutation, (M,)."""
    place_M = torch.empty_like(order_M)
    place_M[order_M] = torch.arange(len(order_M), device=order_M.device)
    return place_M
