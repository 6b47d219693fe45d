"""Attention by torch's `scaled_dot_product_attention`, for GPUs, for other dtypes, and where nothing compiles."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.mla_attention.reference import joined, mask_from_first


def sdpa_attention(
    q_BSHN: Tensor,
    k_BSGN: Tensor,
    v_BSGW: Tensor,
    scale: float,
    mask_BSS: Tensor | None = None,
    first_BS: Tensor | None = None,
) -> Tensor:
    """As `attention`; what torch's takes is a mask, which is made here, whole, of the first keys that queries see."""
    if first_BS is not None:
        mask_BSS = mask_from_first(first_BS)
    q, k, v = (x.transpose(1, 2) for x in (q_BSHN, k_BSGN, v_BSGW))
    mask, shared = (None if mask_BSS is None else mask_BSS[:, None]), q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=shared
    )
    return out.transpose(1, 2)


def sdpa_latent_attention(
    q_BSHQ: Tensor,
    kv_BSHX: Tensor,
    key_BSR: Tensor,
    rotary: tuple[Tensor, Tensor],
    scale: float,
    mask_BSS: Tensor | None = None,
    first_BS: Tensor | None = None,
) -> Tensor:
    """As `latent_attention`: rotated, joined and spread over the heads first."""
    return sdpa_attention(*joined(q_BSHQ, kv_BSHX, key_BSR, rotary), scale, mask_BSS, first_BS)
