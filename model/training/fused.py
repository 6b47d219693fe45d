"""Which rows of a stored matrix are matrices of their own: Muon may orthogonalise these apart.

Stored matrices hold several of V3's equations, so that one product makes them all: `gate_up_proj` the gate's and the
up-projection of an FFN or an expert, `kv_a_proj_with_mqa` W^DKV and W^KR (equations 1 and 3), `kv_b_proj` W^UK and
W^UV (2 and 5) and `q_proj` or `q_b_proj` W^UQ and W^QR (7 and 8), the last two head by head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.model.config import ModelConfig
from gristmill.model.training.config import OptimizerConfig


@dataclass(frozen=True)
class Fused:
    """So many rows of each of several matrices, one after the other, and that `times` over."""

    times: int
    rows: tuple[int, ...]

    def apart(self, stack: Tensor) -> list[Tensor]:
        """The matrices, each a stack (n, times · its rows, columns), of stored ones (n, all rows, columns)."""
        each = stack.unflatten(1, (self.times, sum(self.rows)))
        return [part.flatten(1, 2) for part in each.split(self.rows, 2)]

    def together(self, parts: list[Tensor]) -> Tensor:
        """Back from `apart`."""
        return torch.cat([part.unflatten(1, (self.times, -1)) for part in parts], 2).flatten(1, 2)


FusedOf = Callable[[str, tuple[int, ...]], Fused]
"""(name, shape) of a parameter to what its matrices hold."""


def as_stored(name: str, shape: tuple[int, ...]) -> Fused:
    """Every stored matrix is one."""
    return Fused(1, (shape[-2],))


def fused_of(config: OptimizerConfig, model: ModelConfig) -> FusedOf:
    """What Muon takes for a matrix, by `muon_matrices`."""
    if config.muon_matrices == "stored":
        return as_stored
    heads, rotary = model.num_attention_heads, model.qk_rope_head_dim
    latent = {
        "q_proj": Fused(heads, (model.qk_nope_head_dim, rotary)),
        "q_b_proj": Fused(heads, (model.qk_nope_head_dim, rotary)),
        "kv_a_proj_with_mqa": Fused(1, (model.kv_lora_rank, rotary)),
        "kv_b_proj": Fused(heads, (model.qk_nope_head_dim, model.v_head_dim)),
    }

    def as_in_the_equations(name: str, shape: tuple[int, ...]) -> Fused:
        module = name.removesuffix(".weight").rpartition(".")[2]
        if module == "gate_up_proj":
            return Fused(1, (shape[-2] // 2,) * 2)
        if model.attention == "mla" and module in latent:
            return latent[module]
        return as_stored(name, shape)

    return as_in_the_equations
