"""Attention in Triton as an operation of torch's, so that selective recomputation can keep what it gave."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("gristmill::attention_in_triton", mutates_args=())
def attend(
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
