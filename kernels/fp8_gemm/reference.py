"""Quantisation and products in E4M3 in obvious torch: the specification, and what runs on a CPU.

A value is x / scale rounded to the nearest E4M3 number, ties to even. A product takes 128 terms at a time:

    y = Σ over blocks c of  (x_scale[c] · w_scale[c]) · Σ over the 128 terms of c of  x · w

The inner sum is exact: a product of two E4M3 numbers is a multiple of 2⁻¹⁸ below 2¹⁸, so 128 of them need 43 bits and
float64 has 53. It is rounded once to float32; scaling and the outer sum, block after block, are float32. So the bits do
not depend on an order of sums, a number of threads or a library. A tensor core rounds inside a block as well, and a GPU
may fuse scaling into the sum: there the results agree to the rounding of those.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
LARGEST = 448.0  # of E4M3
SMALLEST_SCALE = 2.0**-126  # the smallest normal float32: a tile of zeros divides by it, and nothing overflows


def scale_of(largest: Tensor) -> Tensor:
    """The scale that makes the largest value of a tile 448; not a number if that is infinite or none."""
    # By a tensor: torch on CUDA multiplies by the inverse of a plain number, which rounds otherwise.
    scale = (largest / torch.full_like(largest, LARGEST)).clamp_min(SMALLEST_SCALE)
    return torch.where(largest.isfinite(), scale, torch.nan)


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale in E4M3. The clamp is there because torch versions differ in what a cast makes of larger values."""
    return (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def quantise_rows(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 (N, K) and scales (N, K/128) that lie column by column, as a tile of rows reads them."""
    tiles = x_NK.float().unflatten(1, (-1, BLOCK))
    scale_NC = scale_of(tiles.abs().amax(2))
    return rounded(tiles, scale_NC[:, :, None]).flatten(1), scale_NC.t().contiguous().t()


def tile_ends(ends_E: Tensor) -> Tensor:
    """Where the tiles of each group end, if each group begins a tile of 128 rows; int32, (E,)."""
    rows_E = ends_E.long().diff(prepend=ends_E.new_zeros(1, dtype=torch.int64))  # narrow integers would overflow below
    return ((rows_E + BLOCK - 1) // BLOCK).cumsum(0).to(torch.int32)


def most_tiles(rows: int, groups: int) -> int:
    """Tiles of 128 rows that so many rows in so many groups can take, known without the ends."""
    return (rows + groups * (BLOCK - 1)) // BLOCK


def quantise_columns(x_NK: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 (K, P) and scales (K, P/128): transposed, each group filled up with zeros to whole tiles."""
    rows, columns = x_NK.shape
    padded_PK = x_NK.new_zeros(most_tiles(rows, len(ends_E)) * BLOCK, columns, dtype=torch.float32)
    bounds = itertools.pairwise([0, *ends_E.tolist()])
    for (a, b), tile in zip(bounds, [0, *tile_ends(ends_E).tolist()], strict=False):
        padded_PK[tile * BLOCK : tile * BLOCK + b - a] = x_NK[a:b]
    q_KP, scale_KQ = quantise_rows(padded_PK.t())
    return q_KP, scale_KQ


def quantise_blocks(w_EMK: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 (E, M, K) and scales (E, M/128, K/128)."""
    blocks = w_EMK.float().unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
    scale = scale_of(blocks.abs().amax((2, 4)))
    return rounded(blocks, scale[:, :, None, :, None]).view(w_EMK.shape), scale


def swiglu_quantise(x_NG: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise_rows` of silu(gate) · up, which float32 holds in between; gate is the first half of x."""
    gate, up = x_NG.float().chunk(2, 1)
    return quantise_rows(F.silu(gate) * up)


def product(x_NK: Tensor, x_scale_NC: Tensor, w_MK: Tensor, w_scale_MC: Tensor) -> Tensor:
    """x · wᵀ in float32, of rows whose scales are given for each row and block of terms."""
    total = x_scale_NC.new_zeros(len(x_NK), len(w_MK))
    x_NK, w_KM = x_NK.double(), w_MK.double().t()
    for block in range(x_scale_NC.shape[1]):
        terms = slice(block * BLOCK, (block + 1) * BLOCK)
        exact = (x_NK[:, terms] @ w_KM[terms]).float()
        total += exact * (x_scale_NC[:, block, None] * w_scale_MC[None, :, block])
    return total


def fp8_grouped_gemm(
    x_NK: Tensor, x_scale_NC: Tensor, w_EMK: Tensor, w_scale_EBC: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """Rows [ends[e-1], ends[e]) of x times the transpose of w[e]."""
    y_NM = x_NK.new_empty(len(x_NK), w_EMK.shape[1], dtype=dtype)
    for e, (a, b) in enumerate(itertools.pairwise([0, *ends_E.tolist()])):
        if b > a:
            scale_MC = w_scale_EBC[e].repeat_interleave(BLOCK, 0)
            y_NM[a:b] = product(x_NK[a:b], x_scale_NC[a:b], w_EMK[e], scale_MC)
    return y_NM


def fp8_weight_gradient(
    grad_MP: Tensor, grad_scale_MQ: Tensor, x_KP: Tensor, x_scale_KQ: Tensor, ends_E: Tensor
) -> Tensor:
    """grad · xᵀ over the columns of each group, float32 (E, M, K)."""
    w_EMK = grad_scale_MQ.new_zeros(len(ends_E), len(grad_MP), len(x_KP))
    for e, (a, b) in enumerate(itertools.pairwise([0, *tile_ends(ends_E).tolist()])):
        own, tiles = slice(a * BLOCK, b * BLOCK), slice(a, b)
        w_EMK[e] = product(grad_MP[:, own], grad_scale_MQ[:, tiles], x_KP[:, own], x_scale_KQ[:, tiles])
    return w_EMK
