"""The grouped product in obvious torch: the specification."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def grouped_gemm_reference(x_NK: Tensor, w_EMK: Tensor, ends_E: Tensor) -> Tensor:
    """Rows [ends[e-1], ends[e]) of x times the transpose of w[e], differentiable by autograd."""
    bounds = [0, *ends_E.tolist()]
    parts = [x_NK[a:b] @ w_EMK[e].T for e, (a, b) in enumerate(itertools.pairwise(bounds))]
    return torch.cat(parts) if parts else x_NK.new_zeros(0, w_EMK.shape[1])
