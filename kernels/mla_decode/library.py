"""Attention of new tokens over a cache of latents as an operation of torch.library, which writes the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gristmill.kernels import mla_decode as public
from gristmill.kernels.operations import operation


def _fake(
    q_BSHQ: Tensor, kv_BSY: Tensor, cache_BPC: Tensor, start_B: Tensor, reach: int, cos: Tensor, sin: Tensor,
    norm_C: Tensor, eps: float, up_HXC: Tensor, scale: float, table_BJ: Tensor | None = None,
) -> Tensor:  # fmt: skip
    batch, length, heads, wide = q_BSHQ.shape
    value = up_HXC.shape[1] + kv_BSY.shape[2] - norm_C.shape[0] - wide
    return q_BSHQ.new_empty(batch, length, heads * value)


def _with_log_fake(q_BSHQ: Tensor, *given: Any, **named: Any) -> tuple[Tensor, Tensor]:
    return _fake(q_BSHQ, *given, **named), q_BSHQ.new_empty(q_BSHQ.shape[:3], dtype=torch.float32)


@operation(_fake, mutates=("cache_BPC",))
def mla_decode(
    q_BSHQ: Tensor, kv_BSY: Tensor, cache_BPC: Tensor, start_B: Tensor, reach: int, cos: Tensor, sin: Tensor,
    norm_C: Tensor, eps: float, up_HXC: Tensor, scale: float, table_BJ: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return public.mla_decode(
        q_BSHQ, kv_BSY, cache_BPC, start_B, reach, (cos, sin), norm_C, eps, up_HXC, scale, table_BJ
    ).contiguous()  # fmt: skip


@operation(_with_log_fake, mutates=("cache_BPC",))
def mla_decode_with_log(
    q_BSHQ: Tensor, kv_BSY: Tensor, cache_BPC: Tensor, start_B: Tensor, reach: int, cos: Tensor, sin: Tensor,
    norm_C: Tensor, eps: float, up_HXC: Tensor, scale: float, table_BJ: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    given = q_BSHQ, kv_BSY, cache_BPC, start_B, reach, (cos, sin), norm_C, eps, up_HXC, scale, table_BJ
    out, log_BSH = public.mla_decode(*given, with_log=True)
    return out.contiguous(), log_BSH.contiguous()
