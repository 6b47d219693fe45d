"""Softmax attention and MLA's in obvious torch: every product whole, in the dtype of the inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from gristmill.kernels.norm_rope.reference import rotate_reference


def joined(
    q_BSHQ: Tensor, kv_BSHX: Tensor, key_BSR: Tensor, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries, keys with the rotated part that all heads share, and values: (B, S, H, ·)."""
    heads, turning = q_BSHQ.shape[2], key_BSR.shape[-1]
    width = q_BSHQ.shape[-1] - turning
    cos, sin = rotary
    q_BSHN, q_BSHR = q_BSHQ.split([width, turning], -1)
    k_BSHN, v_BSHW = kv_BSHX.split([width, kv_BSHX.shape[-1] - width], -1)
    q_BSHR = rotate_reference(q_BSHR, cos[:, :, None], sin[:, :, None]).to(q_BSHN.dtype)
    key_BSR = rotate_reference(key_BSR, cos, sin).to(k_BSHN.dtype)
    k_BSHQ = torch.cat((k_BSHN, key_BSR[:, :, None].expand(-1, -1, heads, -1)), -1)
    return torch.cat((q_BSHN, q_BSHR), -1), k_BSHQ, v_BSHW


def mask_from_first(first_BS: Tensor) -> Tensor:
    """True where a query (row) sees a key (column): from its first one up to its own, (B, S, S)."""
    place_S = torch.arange(first_BS.shape[1], device=first_BS.device)
    return (place_S >= first_BS[:, :, None]) & (place_S <= place_S[:, None])


def attention_reference(
    q_BSHN: Tensor,
    k_BSGN: Tensor,
    v_BSGW: Tensor,
    scale: float,
    mask_BSS: Tensor | None = None,
    first_BS: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) v of each head, (B, S, H, W); a query that sees no key has zeros."""
    shared = q_BSHN.shape[2] // k_BSGN.shape[2]
    k_BSHN, v_BSHW = k_BSGN.repeat_interleave(shared, 2), v_BSGW.repeat_interleave(shared, 2)
    if mask_BSS is None:
        causal_BS = q_BSHN.new_zeros(1, q_BSHN.shape[1], dtype=torch.int64)
        mask_BSS = mask_from_first(causal_BS if first_BS is None else first_BS)
    score_BHSS = torch.einsum("bshn,bthn->bhst", q_BSHN, k_BSHN) * scale
    seen_BHSS = mask_BSS[:, None]
    weight_BHSS = score_BHSS.masked_fill(~seen_BHSS, -torch.inf).softmax(-1)
    weight_BHSS = weight_BHSS.masked_fill(~seen_BHSS.any(-1, keepdim=True), 0.0)
    return torch.einsum("bhst,bthw->bshw", weight_BHSS, v_BSHW)


def latent_attention_reference(
    q_BSHQ: Tensor,
    kv_BSHX: Tensor,
    key_BSR: Tensor,
    rotary: tuple[Tensor, Tensor],
    scale: float,
    mask_BSS: Tensor | None = None,
    first_BS: Tensor | None = None,
) -> Tensor:
    """Attention of MLA's projections (V3 equations 8 to 10), (B, S, H, W)."""
    return attention_reference(*joined(q_BSHQ, kv_BSHX, key_BSR, rotary), scale, mask_BSS, first_BS)
