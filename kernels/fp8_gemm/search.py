"""What `bench --tune` tries of FP8: its product of long and of short groups, its gradient, and the quantisations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gristmill.kernels.fp8_gemm.gpu import (
    GRADIENT,
    PRODUCT,
    QUANTISED_COLUMNS,
    QUANTISED_ROWS,
    SHORT_PRODUCT,
    Strip,
    fp8_grouped_gemm,
    fp8_weight_gradient,
    quantise_blocks,
    quantise_columns,
    quantise_rows,
)
from gristmill.kernels.fp8_gemm.reference import BLOCK
from gristmill.kernels.grouped_gemm.gpu import Tiles
from gristmill.kernels.grouped_gemm.search import DEEPSEEK, Shape
from gristmill.kernels.tune import Search, Sizes

SMALL = Shape(2, 390, 40, 256, 256, 1)


def _tiles(rows: int, columns: int, warps: int, stages: int, programs: int = 1) -> Tiles:
    """Of steps of one block; a product's columns lie in one block of the matrix, which has one scale, or in two."""
    return Tiles(rows, columns, BLOCK, warps, stages, programs)


SIZES: dict[str, Sizes] = {
    "fp8_gemm.product": (
        PRODUCT,
        [
            _tiles(128, 128, 8, 4),
            _tiles(128, 64, 4, 4, programs=2),
            _tiles(64, 128, 4, 3, programs=2),
            _tiles(64, 128, 4, 4, programs=2),
            _tiles(256, 64, 8, 3),
            _tiles(128, 256, 8, 2),
            _tiles(128, 256, 8, 3),
            _tiles(64, 256, 4, 2, programs=2),
            _tiles(64, 128, 4, 2, programs=3),
        ],
    ),
    "fp8_gemm.short_product": (
        SHORT_PRODUCT,
        [
            _tiles(64, 128, 4, 3, programs=2),
            _tiles(64, 128, 4, 2, programs=3),
            _tiles(64, 64, 4, 4, programs=3),
            _tiles(128, 64, 4, 4, programs=2),
            _tiles(128, 128, 8, 3),
        ],
    ),
    "fp8_gemm.gradient": (
        GRADIENT,
        [
            _tiles(128, 128, 8, 3),
            _tiles(64, 128, 4, 4),
            _tiles(64, 128, 4, 3, programs=2),
            _tiles(128, 64, 4, 3, programs=2),
            _tiles(64, 64, 4, 3, programs=3),
        ],
    ),
    "fp8_gemm.quantise_rows": (
        QUANTISED_ROWS,
        [Strip(*sizes) for sizes in ((8, 1), (16, 2), (16, 4), (32, 8), (64, 8))],
    ),
    "fp8_gemm.quantise_columns": (
        QUANTISED_COLUMNS,
        [Strip(*sizes) for sizes in ((32, 4), (64, 8), (128, 8), (128, 16))],
    ),
}


def searches(device: str, shape: Shape = DEEPSEEK) -> Iterator[Search]:
    experts, inner, outer = shape.experts, shape.inner, shape.outer

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device, dtype=torch.bfloat16)

    x, long, short = drawn(experts * shape.long, inner), shape.ends(shape.long, device), shape.ends(shape.short, device)
    few = x[: experts * shape.short]
    name = "fp8_gemm.quantise_rows"
    yield Search(name, *SIZES[name], lambda strip: [*quantise_rows(few, strip=strip)])
    name = "fp8_gemm.quantise_columns"
    yield Search(name, *SIZES[name], lambda strip: [*quantise_columns(few, short, strip)])
    w = quantise_blocks(drawn(experts, outer, inner))
    yield _product("fp8_gemm.product", x, w, long)
    yield _product("fp8_gemm.short_product", few, w, short)
    sides = *quantise_columns(drawn(len(x), outer), long), *quantise_columns(x, long)
    name = "fp8_gemm.gradient"
    yield Search(name, *SIZES[name], lambda tiles: [fp8_weight_gradient(*sides, long, tiles)])


def _product(name: str, x_NK: Tensor, w: tuple[Tensor, Tensor], ends_E: Tensor) -> Search:
    sides = *quantise_rows(x_NK), *w
    return Search(name, *SIZES[name], lambda tiles: [fp8_grouped_gemm(*sides, ends_E, torch.bfloat16, tiles)])
