"""The grouped product in obvious torch: the specification."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from gristmill.kernels.linear.reference import linear_reference


def grouped_gemm_reference(x_NK: Tensor, w_EMK: Tensor, ends_E: Tensor, *, rounded: bool = False) -> Tensor:
    """Rows [ends[e-1], ends[e]) of x times the transpose of w[e], differentiable by autograd."""
    bounds = [0, *ends_E.tolist()]
    pairs = enumerate(itertools.pairwise(bounds))
    parts = [linear_reference(x_NK[a:b], w_EMK[e], rounded=rounded) for e, (a, b) in pairs]
    return torch.cat(parts) if parts else x_NK.new_zeros(0, w_EMK.shape[1])
