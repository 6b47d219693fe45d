"""Attention in Triton as an operation of torch's, so that selective recomputation can keep what it gave."""

from __future__ import annotations

import torch
from torch import Tensor

from gristmill.kernels.operations import within_passes


def attend_directly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_second: Tensor | None,
    k_second: Tensor | None,
    seen: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `attend` in gpu.py."""
    from gristmill.kernels.mla_attention import gpu

    return gpu.attend(gpu.Sides(q, k, v, q_second, k_second), scale, seen)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, q_second: Tensor | None, k_second: Tensor | None, seen: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    out = v.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(batch, heads, length, dtype=torch.float32)


attend = within_passes("attention_in_triton", attend_directly, _fake)
