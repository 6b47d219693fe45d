"""Products of block-scaled E4M3 numbers, plain and grouped, and the quantisations that feed them (V3 section 3.3).

Activations have a scale for each row and 128 columns, weights one for each 128 × 128; a gradient in weights sums over
rows, so both its sides have a scale for each column and 128 rows. `reference.py` says what the numbers are to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gristmill.kernels.dispatch import chosen, require, require_device
from gristmill.kernels.expert_rows import check_ascent, check_ends
from gristmill.kernels.fp8_gemm import library, reference
from gristmill.kernels.fp8_gemm.linear import fp8_feed_forward, fp8_linear, is_whole
from gristmill.kernels.fp8_gemm.reference import BLOCK, LARGEST, most_tiles, tile_ends

__all__ = [
    "BLOCK",
    "LARGEST",
    "fp8_feed_forward",
    "fp8_gemm",
    "fp8_grouped_gemm",
    "fp8_linear",
    "fp8_weight_gradient",
    "is_whole",
    "most_tiles",
    "quantise_blocks",
    "quantise_columns",
    "quantise_rows",
    "swiglu_quantise",
    "tile_ends",
]

E4M3 = torch.float8_e4m3fn


def quantise_rows(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """x in tiles of 1 × 128: E4M3 (N, K) and float32 scales (N, K/128); x is about value · scale.

    The scale makes a tile's largest value 448. A tile with an infinity or a NaN becomes NaN throughout.

    Raises:
        TypeError: x is not floating.
        ValueError: x is no matrix, or K is no multiple of 128.
    """
    _check_values("quantise_rows", "x_NK", x_NK, 2)
    _check_blocks("quantise_rows: columns of x_NK", x_NK.shape[1])
    return _module("quantise_rows", x_NK).quantise_rows(x_NK)


def quantise_columns(x_NK: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    """x transposed, in tiles of 128 rows: E4M3 (K, P) and float32 scales (K, P/128), as `fp8_weight_gradient` reads it.

    Rows [ends[e-1], ends[e]) of a group begin at a whole tile and are filled up with zeros, so no tile is of two
    groups; P is 128 · `most_tiles(N, E)`, and what no group needs is zero.

    Raises:
        TypeError: x is not floating, or the ends are no integers.
        ValueError: x is no matrix, K is no multiple of 128, the ends are on another device or (on a CPU; on a GPU where
            GRISTMILL_KERNELS_CHECK=1) do not ascend to N.
    """
    _check_values("quantise_columns", "x_NK", x_NK, 2)
    _check_blocks("quantise_columns: columns of x_NK", x_NK.shape[1])
    require(ends_E.ndim == 1, ValueError, "quantise_columns: rank of ends_E", ends_E.ndim, 1)
    check_ends("quantise_columns", ends_E, len(ends_E), "x_NK", x_NK)
    return _module("quantise_columns", x_NK).quantise_columns(x_NK, ends_E)


def quantise_blocks(w_EMK: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices in blocks of 128 × 128: E4M3 (E, M, K) and float32 scales (E, M/128, K/128).

    Raises:
        TypeError: w is not floating.
        ValueError: w is no stack of matrices, or M or K is no multiple of 128.
    """
    _check_values("quantise_blocks", "w_EMK", w_EMK, 3)
    _check_blocks("quantise_blocks: rows of w_EMK", w_EMK.shape[1])
    _check_blocks("quantise_blocks: columns of w_EMK", w_EMK.shape[2])
    return _module("quantise_blocks", w_EMK).quantise_blocks(w_EMK)


def swiglu_quantise(x_NG: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise_rows` of silu(gate) · up, of which only the E4M3 values are written: gate is the first half of x.

    Raises:
        TypeError: x is not floating.
        ValueError: x is no matrix, or half its columns are no multiple of 128.
    """
    _check_values("swiglu_quantise", "x_NG", x_NG, 2)
    columns = x_NG.shape[1]
    require(columns % (2 * BLOCK) == 0, ValueError, "swiglu_quantise: columns of x_NG", columns, "a multiple of 256")
    return _module("swiglu_quantise", x_NG).swiglu_quantise(x_NG)


def fp8_gemm(
    x_NK: Tensor, x_scale_NC: Tensor, w_MK: Tensor, w_scale_BC: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """x · wᵀ, (N, M) in `dtype`; x by `quantise_rows`, w a matrix of `quantise_blocks`, in any layout.

    Raises:
        TypeError: values that are not E4M3, scales that are not float32, or results that are not floating.
        ValueError: shapes or devices that do not fit; K or M is no multiple of 128.
    """
    _check_operand("fp8_gemm", "x_NK", x_NK, x_scale_NC, 2, (1, BLOCK))
    _check_operand("fp8_gemm", "w_MK", w_MK, w_scale_BC, 2, (BLOCK, BLOCK))
    _check_pair("fp8_gemm", "w_MK", w_MK, "x_NK", x_NK)
    _check_result("fp8_gemm", dtype)
    ends_E = torch.full((1,), len(x_NK), device=x_NK.device)
    module = _module("fp8_gemm", x_NK)
    return module.fp8_grouped_gemm(x_NK, x_scale_NC, w_MK[None], w_scale_BC[None], ends_E, dtype)


def fp8_grouped_gemm(
    x_NK: Tensor,
    x_scale_NC: Tensor,
    w_EMK: Tensor,
    w_scale_EBC: Tensor,
    ends_E: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """y (N, M) in `dtype` with y[rows of e] = x[rows of e] · w[e]ᵀ; `ends_E` as `grouped_gemm` has it.

    Raises:
        TypeError: values that are not E4M3, scales that are not float32, ends that are no integers, or results that
            are not floating.
        ValueError: shapes or devices that do not fit; K or M is no multiple of 128; the ends do not ascend to N (on a
            CPU; on a GPU where GRISTMILL_KERNELS_CHECK=1); on a GPU, there are 2³⁰ rows or more.
    """
    _check_operand("fp8_grouped_gemm", "x_NK", x_NK, x_scale_NC, 2, (1, BLOCK))
    _check_operand("fp8_grouped_gemm", "w_EMK", w_EMK, w_scale_EBC, 3, (BLOCK, BLOCK))
    _check_pair("fp8_grouped_gemm", "w_EMK", w_EMK, "x_NK", x_NK)
    _check_result("fp8_grouped_gemm", dtype)
    check_ends("fp8_grouped_gemm", ends_E, len(w_EMK), "x_NK", x_NK)
    module = _module("fp8_grouped_gemm", x_NK)
    return module.fp8_grouped_gemm(x_NK, x_scale_NC, w_EMK, w_scale_EBC, ends_E, dtype)


def fp8_weight_gradient(
    grad_MP: Tensor, grad_scale_MQ: Tensor, x_KP: Tensor, x_scale_KQ: Tensor, ends_E: Tensor
) -> Tensor:
    """dw (E, M, K) in float32 with dw[e] = grad[rows of e]ᵀ · x[rows of e], both sides by `quantise_columns`.

    Raises:
        TypeError: values that are not E4M3, scales that are not float32, or ends that are no integers.
        ValueError: shapes or devices that do not fit, M or K is no multiple of 128, or (on a CPU; on a GPU where
            GRISTMILL_KERNELS_CHECK=1) the ends do not ascend or there are fewer tiles than the groups have.
    """
    _check_operand("fp8_weight_gradient", "grad_MP", grad_MP, grad_scale_MQ, 2, (1, BLOCK))
    _check_operand("fp8_weight_gradient", "x_KP", x_KP, x_scale_KQ, 2, (1, BLOCK))
    _check_pair("fp8_weight_gradient", "x_KP", x_KP, "grad_MP", grad_MP)
    _check_blocks("fp8_weight_gradient: rows of grad_MP", len(grad_MP))
    _check_blocks("fp8_weight_gradient: rows of x_KP", len(x_KP))
    if check_ascent("fp8_weight_gradient", ends_E, "grad_MP", grad_MP) is not None:
        tiles, wanted = grad_scale_MQ.shape[1], int(tile_ends(ends_E)[-1])
        require(tiles >= wanted, ValueError, "fp8_weight_gradient: tiles of grad_MP", tiles, f"at least {wanted}")
    module = _module("fp8_weight_gradient", grad_MP)
    return module.fp8_weight_gradient(grad_MP, grad_scale_MQ, x_KP, x_scale_KQ, ends_E)


def _module(operation: str, x: Tensor) -> Any:
    """What runs the operation: Triton, or the specification itself (on a CPU too); or what goes into a graph."""
    implementation = chosen(operation, x, traceable=False)
    if implementation == "gpu":
        from gristmill.kernels.fp8_gemm import gpu

        return gpu
    if implementation == "operation":
        return library
    return reference


def _check_values(operation: str, name: str, x: Tensor, rank: int) -> None:
    require(x.is_floating_point(), TypeError, f"{operation}: {name}", x.dtype, "a floating dtype")
    require(x.ndim == rank, ValueError, f"{operation}: rank of {name}", x.ndim, rank)


def _check_blocks(what: str, size: int) -> None:
    require(size % BLOCK == 0, ValueError, what, size, f"a multiple of {BLOCK}")


def _check_operand(operation: str, name: str, q: Tensor, scale: Tensor, rank: int, block: tuple[int, int]) -> None:
    require(q.dtype == E4M3, TypeError, f"{operation}: {name}", q.dtype, E4M3)
    require(scale.dtype == torch.float32, TypeError, f"{operation}: scales of {name}", scale.dtype, torch.float32)
    require(q.ndim == rank, ValueError, f"{operation}: rank of {name}", q.ndim, rank)
    for axis, size in zip((-2, -1), block, strict=True):
        if size > 1:
            _check_blocks(f"{operation}: {'rows' if axis == -2 else 'columns'} of {name}", q.shape[axis])
    wanted = (*q.shape[:-2], q.shape[-2] // block[0], q.shape[-1] // block[1])
    what = f"{operation}: shape of the scales of {name}"
    require(tuple(scale.shape) == wanted, ValueError, what, tuple(scale.shape), wanted)
    require_device(operation, name, q, **{f"the scales of {name}": scale})


def _check_result(operation: str, dtype: torch.dtype) -> None:
    require(dtype.is_floating_point, TypeError, f"{operation}: dtype", dtype, "a floating dtype")


def _check_pair(operation: str, name: str, w: Tensor, other: str, x: Tensor) -> None:
    require(w.shape[-1] == x.shape[-1], ValueError, f"{operation}: columns of {name}", w.shape[-1], x.shape[-1])
    require_device(operation, other, x, **{name: w})
