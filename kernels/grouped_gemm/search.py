"""What `bench --tune` tries of the grouped product in 16 bits, and of its gradient of long and of short groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.kernels.grouped_gemm.gpu import (
    GRADIENT,
    PRODUCT,
    SHORT_GRADIENT,
    SHORT_PRODUCT,
    Tiles,
    product,
    weight_gradient,
)
from gristmill.kernels.timing import routed
from gristmill.kernels.tune import Search, Sizes


@dataclass(frozen=True)
class Shape:
    """Experts, rows of each on the mean where they are many and where they are few, and both sides of a matrix."""

    experts: int
    long: int
    short: int
    inner: int
    outer: int
    active: int  # experts of a token

    def ends(self, rows: int, device: str) -> Tensor:
        """Of groups as tokens that choose at random make them: few fill their last tile."""
        chosen = routed(rows * self.experts // self.active, self.experts, self.active)
        return chosen.flatten().bincount(minlength=self.experts).cumsum(0).to(device)


# V3's matrices, a quarter of its experts and of a token's: each candidate's results are kept.
DEEPSEEK = Shape(64, 1024, 128, 7168, 2048, 2)
SMALL = Shape(2, 270, 40, 136, 264, 1)

# Rows, columns, terms, warps, buffers, programs.
_GRADIENT = [
    Tiles(256, 128, 32, 8, 4),
    Tiles(256, 128, 64, 8, 3),
    Tiles(128, 256, 64, 8, 3),
    Tiles(128, 128, 64, 4, 3, programs=2),
    Tiles(192, 256, 64, 8, 3),
    Tiles(192, 256, 32, 8, 4),
]
SIZES: dict[str, Sizes] = {
    "grouped_gemm.product": (
        PRODUCT,
        [Tiles(128, 128, 64, 8, 4), Tiles(256, 128, 64, 8, 3), Tiles(192, 256, 64, 8, 3), Tiles(192, 256, 32, 8, 4)],
    ),
    "grouped_gemm.short_product": (
        SHORT_PRODUCT,
        [
            Tiles(64, 256, 64, 4, 2, programs=2),
            Tiles(64, 256, 32, 4, 4, programs=2),
            Tiles(64, 256, 64, 4, 4),
            Tiles(64, 256, 64, 8, 4),
            Tiles(64, 128, 64, 4, 4, programs=2),
            Tiles(64, 128, 128, 4, 2, programs=2),
            Tiles(128, 128, 64, 8, 5),
            Tiles(192, 256, 64, 8, 3),
            Tiles(192, 128, 64, 4, 2, programs=2),
        ],
    ),
    "grouped_gemm.gradient": (GRADIENT, [tiles for tiles in _GRADIENT if tiles != GRADIENT]),
    "grouped_gemm.short_gradient": (SHORT_GRADIENT, _GRADIENT),
}


def searches(device: str, shape: Shape = DEEPSEEK) -> Iterator[Search]:
    experts, inner, outer = shape.experts, shape.inner, shape.outer
    w = torch.empty(experts, outer, inner, device=device, dtype=torch.bfloat16).normal_(0, inner**-0.5)

    def sides(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        x, grad = (torch.randn(rows * experts, n, device=device, dtype=torch.bfloat16) for n in (inner, outer))
        return x, grad, shape.ends(rows, device)

    x, grad, ends = sides(shape.long)
    name = "grouped_gemm.product"
    yield Search(name, *SIZES[name], lambda tiles: [product(x, w, ends, True, tiles)])
    name = "grouped_gemm.gradient"
    yield Search(name, *SIZES[name], lambda tiles: [weight_gradient(grad, x, ends, tiles)])
    few_x, few_grad, few_ends = sides(shape.short)
    name = "grouped_gemm.short_product"
    yield Search(name, *SIZES[name], lambda tiles: [product(few_x, w, few_ends, True, tiles)])
    name = "grouped_gemm.short_gradient"
    yield Search(name, *SIZES[name], lambda tiles: [weight_gradient(few_grad, few_x, few_ends, tiles)])
