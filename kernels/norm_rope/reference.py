"""RMSNorm and rotary embedding in obvious torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight, of the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_D


def add_rms_norm_reference(x: Tensor, y: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and the norm of it."""
    total = x + y
    return total, rms_norm_reference(total, weight_D, eps)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pairs (x₀,x₁), (x₂,x₃), … turned; the result is half-split."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), -1)


def rotate_halves_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pairs (xᵢ, xᵢ₊ₕ) turned, h being half the width."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
