"""What `bench --tune` tries of decoding: the reading of the cache alone, for few queries a row and for many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.kernels.mla_decode.gpu import FEW, MANY, Tiles, attend
from gristmill.kernels.tune import Search, Sizes


@dataclass(frozen=True)
class Shape:
    """Rows and heads where a row has few queries and where it has many; places, and a place's numbers."""

    few: tuple[int, int]
    many: tuple[int, int]
    places: int
    latent: int
    turning: int


DEEPSEEK = Shape((64, 16), (16, 128), 4096, 512, 64)  # heads of the 16B and of the 671B model
SMALL = Shape((1, 16), (1, 20), 300, 32, 16)

# Queries, places, warps, buffers, and places a row that fill the multiprocessors once.
SIZES: dict[str, Sizes] = {
    "mla_decode.few": (
        FEW,
        [
            Tiles(16, 64, 8, 3),
            Tiles(16, 64, 8, 2),
            Tiles(16, 64, 8, 3, 2048),
            Tiles(16, 64, 4, 3, 2048),
            Tiles(16, 64, 4, 3, 8192),
            Tiles(16, 32, 4, 4),
            Tiles(16, 32, 4, 3),
            Tiles(16, 32, 4, 4, 2048),
            Tiles(16, 32, 8, 4),
        ],
    ),
    "mla_decode.many": (
        MANY,
        [
            Tiles(64, 32, 8, 3),
            Tiles(64, 32, 8, 2),
            Tiles(32, 64, 8, 2),
            Tiles(32, 32, 8, 3),
            Tiles(32, 32, 4, 3),
            Tiles(64, 64, 8, 2, 2048),
            Tiles(64, 64, 8, 2, 8192),
            Tiles(64, 32, 8, 3, 2048),
        ],
    ),
}


def searches(device: str, shape: Shape = DEEPSEEK) -> Iterator[Search]:
    """A new token a row, at the last place; rows lie in slots."""
    for name, (batch, heads) in (("mla_decode.few", shape.few), ("mla_decode.many", shape.many)):
        yield _at(name, device, shape, batch, heads)


def _at(name: str, device: str, shape: Shape, batch: int, heads: int) -> Search:
    places, latent, turning = shape.places, shape.latent, shape.turning

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, dtype=torch.bfloat16)

    q_HTC, turned_THR = drawn(heads, batch, latent), drawn(batch, heads, turning)
    cache_BPC, start_B = drawn(batch, places, latent + turning), torch.full((batch,), places - 1, device=device)
    scale = (latent + turning) ** -0.5

    def results(tiles: Tiles | None) -> list[Tensor]:
        return [*attend(q_HTC, turned_THR, cache_BPC, start_B, places, scale, tiles)]

    return Search(name, *SIZES[name], results)
