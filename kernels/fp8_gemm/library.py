"""Quantisation and products in E4M3 as operations of torch.library, which have no gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from gristmill.kernels import fp8_gemm as public
from gristmill.kernels.fp8_gemm.reference import BLOCK, most_tiles
from gristmill.kernels.operations import operation

E4M3 = torch.float8_e4m3fn


def _values(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=E4M3)


def _scales_by_column(x: Tensor, rows: int, blocks: int) -> Tensor:
    return x.new_empty(blocks, rows, dtype=torch.float32).t()


def _rows_fake(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    return _values(x_NK, *x_NK.shape), _scales_by_column(x_NK, x_NK.shape[0], x_NK.shape[1] // BLOCK)


@operation(_rows_fake)
def quantise_rows(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    values, scales = public.quantise_rows(x_NK)
    return values.contiguous(), scales


def _swiglu_fake(x_NG: Tensor) -> tuple[Tensor, Tensor]:
    return _rows_fake(x_NG[:, : x_NG.shape[1] // 2])


@operation(_swiglu_fake)
def swiglu_quantise(x_NG: Tensor) -> tuple[Tensor, Tensor]:
    values, scales = public.swiglu_quantise(x_NG)
    return values.contiguous(), scales


def _columns_fake(x_NK: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    columns, tiles = x_NK.shape[1], most_tiles(x_NK.shape[0], ends_E.shape[0])
    return _values(x_NK, columns, tiles * BLOCK), _scales_by_column(x_NK, columns, tiles)


@operation(_columns_fake)
def quantise_columns(x_NK: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    values, scales = public.quantise_columns(x_NK, ends_E)
    return values.contiguous(), scales


def _blocks_fake(w_EMK: Tensor) -> tuple[Tensor, Tensor]:
    groups, outer, inner = w_EMK.shape
    return _values(w_EMK, *w_EMK.shape), w_EMK.new_empty(groups, outer // BLOCK, inner // BLOCK, dtype=torch.float32)


@operation(_blocks_fake)
def quantise_blocks(w_EMK: Tensor) -> tuple[Tensor, Tensor]:
    values, scales = public.quantise_blocks(w_EMK)
    return values.contiguous(), scales


def _product_fake(
    x_NK: Tensor, x_scale_NC: Tensor, w_EMK: Tensor, w_scale_EBC: Tensor, ends_E: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    return x_NK.new_empty(x_NK.shape[0], w_EMK.shape[1], dtype=dtype)


@operation(_product_fake)
def fp8_grouped_gemm(
    x_NK: Tensor, x_scale_NC: Tensor, w_EMK: Tensor, w_scale_EBC: Tensor, ends_E: Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    return public.fp8_grouped_gemm(x_NK, x_scale_NC, w_EMK, w_scale_EBC, ends_E, dtype)


def _gradient_fake(grad_MP: Tensor, grad_scale_MQ: Tensor, x_KP: Tensor, x_scale_KQ: Tensor, ends_E: Tensor) -> Tensor:
    return grad_scale_MQ.new_empty(ends_E.shape[0], grad_MP.shape[0], x_KP.shape[0])


@operation(_gradient_fake)
def fp8_weight_gradient(
    grad_MP: Tensor, grad_scale_MQ: Tensor, x_KP: Tensor, x_scale_KQ: Tensor, ends_E: Tensor
) -> Tensor:
    return public.fp8_weight_gradient(grad_MP, grad_scale_MQ, x_KP, x_scale_KQ, ends_E)
