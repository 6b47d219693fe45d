"""The same in torch, operation by operation, on any device and dtype."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.norm_rope.reference import rotate_reference


def mla_decode_reference(
    q_BSHQ: Tensor,
    kv_BSY: Tensor,
    cache_BPC: Tensor,
    start_B: Tensor,
    reach: int,
    rotary: tuple[Tensor, Tensor],
    norm_C: Tensor,
    eps: float,
    up_HXC: Tensor,
    scale: float,
    table_BJ: Tensor | None = None,
) -> Tensor:
    """`mla_decode`, all places up to the furthest token at once; scores in the queries' dtype, softmax in float32."""
    given = q_BSHQ, kv_BSY, cache_BPC, start_B, reach, rotary, norm_C, eps, up_HXC, scale, table_BJ
    return _attended(*given)[0]


def mla_decode_with_log_reference(q_BSHQ: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """`mla_decode_reference`, and log Σ exp of each head's scores, (B, S, H)."""
    out, scores_BMP = _attended(q_BSHQ, *given)
    return out, scores_BMP.logsumexp(-1).view(q_BSHQ.shape[:3])


def _attended(
    q_BSHQ: Tensor, kv_BSY: Tensor, cache_BPC: Tensor, start_B: Tensor, reach: int, rotary: tuple[Tensor, Tensor],
    norm_C: Tensor, eps: float, up_HXC: Tensor, scale: float, table_BJ: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result, and the scaled scores in float32, (B, S·H, P), minus infinity where a place is not seen."""
    (batch, length, heads, _), latent, turning = q_BSHQ.shape, len(norm_C), cache_BPC.shape[2] - len(norm_C)
    cos, sin = rotary
    key_BSR = rotate_reference(kv_BSY[..., latent:], cos, sin)
    new_BSC = torch.cat((F.rms_norm(kv_BSY[..., :latent], norm_C.shape, norm_C, eps), key_BSR), -1)
    position_BS = start_B[:, None] + torch.arange(length, device=start_B.device)
    if table_BJ is None:
        cache_BPC[torch.arange(batch, device=start_B.device)[:, None], position_BS] = new_BSC.to(cache_BPC.dtype)
        seen_BPC = cache_BPC[:, :reach]
    else:
        page = cache_BPC.shape[1]
        cache_BPC[table_BJ.gather(1, position_BS // page), position_BS % page] = new_BSC.to(cache_BPC.dtype)
        seen_BPC = cache_BPC[table_BJ.clamp(0, len(cache_BPC) - 1)].flatten(1, 2)[:, :reach]
    # What lies there may be no number, be another row's, or of no page at all: by a weight of zero it would still count
    unseen_BP = torch.arange(reach, device=start_B.device) > position_BS[:, -1:]
    seen_BPC = seen_BPC.masked_fill(unseen_BP[..., None], 0)
    hidden_BSP = torch.arange(seen_BPC.shape[1], device=start_B.device) > position_BS[..., None]
    plain, turned = q_BSHQ.split([q_BSHQ.shape[3] - turning, turning], -1)
    up_HNC, up_HWC = up_HXC.split([plain.shape[3], up_HXC.shape[1] - plain.shape[3]], 1)
    q_HTC = torch.bmm(plain.reshape(batch * length, heads, -1).transpose(0, 1), up_HNC)
    q_BSHC = q_HTC.transpose(0, 1).view(batch, length, heads, -1)
    q_BSHR = rotate_reference(turned, cos[:, :, None], sin[:, :, None])
    query_BMC = torch.cat((q_BSHC, q_BSHR.to(q_BSHC.dtype)), -1).view(batch, length * heads, -1)
    scores_BMP = torch.bmm(query_BMC, seen_BPC.transpose(1, 2)) * scale
    hidden_BMP = hidden_BSP.repeat_interleave(heads, 1)
    scores_BMP = scores_BMP.float().masked_fill_(hidden_BMP, -torch.inf)
    weight_BMP = scores_BMP.softmax(-1).to(seen_BPC.dtype)
    mixed_HTC = torch.bmm(weight_BMP, seen_BPC[..., :latent]).view(batch * length, heads, -1).transpose(0, 1)
    out_HTW = torch.bmm(mixed_HTC, up_HWC.transpose(1, 2))
    return out_HTW.transpose(0, 1).reshape(batch, length, -1), scores_BMP
