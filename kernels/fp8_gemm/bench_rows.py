"""What `kernels/bench.py` measures of the FP8 products: against our own grouped product in 16 bits, on equal inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.fp8_gemm import (
    fp8_grouped_gemm,
    fp8_weight_gradient,
    quantise_blocks,
    quantise_columns,
    quantise_rows,
    swiglu_quantise,
)
from gristmill.kernels.grouped_gemm import grouped_gemm

GOAL = 1.5  # of the grouped product, over bfloat16


@dataclass(frozen=True)
class Row:
    """One operation at one shape: ours, a peer, and the ratio that is aimed at (None: none is)."""

    op: str
    shape: str
    flops: int
    ours: Callable[[], Any]
    peer: str
    theirs: Callable[[], Any]
    goal: float | None = None


def rows(device: str) -> Iterator[Row]:
    """At V3's shape on a GPU, at a small one on a CPU (where the products are an emulation)."""
    sizes = [(256, tokens, 8, 7168, 2048) for tokens in (4096, 8192, 32_768)]
    for size in sizes if device == "cuda" else [(8, 1024, 4, 128, 128)]:
        yield from _at(device, *size)


def _at(device: str, experts: int, tokens: int, active: int, inner: int, outer: int) -> Iterator[Row]:
    """Tokens choose their experts evenly at random."""
    count, shape = tokens * active, f"{experts} × {outer}×{inner}, {tokens} tokens × {active}"
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(tokens, experts, generator=generator).topk(active, 1).indices
    ends = chosen.flatten().bincount(minlength=experts).cumsum(0).to(device)
    x = torch.randn(count, inner, device=device, dtype=torch.bfloat16)
    w = torch.empty(experts, outer, inner, device=device, dtype=torch.bfloat16).normal_(0, inner**-0.5)
    flops = 2 * count * inner * outer
    yield from _products(shape, flops, x, w, ends)
    if device == "cuda":
        yield _gradient(shape, flops, x, torch.randn(count, outer, device=device, dtype=torch.bfloat16), ends)
    h = torch.randn(count, 2 * outer, device=device, dtype=torch.bfloat16)

    def apart() -> tuple[Tensor, Tensor]:
        gate, up = h.chunk(2, 1)
        return quantise_rows(F.silu(gate) * up)

    size = f"{count} × {2 * outer}"
    yield Row("swiglu_quantise", size, 8 * count * outer, lambda: swiglu_quantise(h), "in two operations", apart, 1.0)


def _products(shape: str, flops: int, x_NK: Tensor, w_EMK: Tensor, ends_E: Tensor) -> Iterator[Row]:
    """The product alone, and with the quantisation of its rows; that of the weights is once a step."""
    sides, peer = (*quantise_rows(x_NK), *quantise_blocks(w_EMK)), "grouped_gemm in bfloat16"

    def in_bfloat16() -> Tensor:
        return grouped_gemm(x_NK, w_EMK, ends_E)

    def from_bfloat16() -> Tensor:
        return fp8_grouped_gemm(*quantise_rows(x_NK), *sides[2:], ends_E)

    yield Row("fp8_grouped_gemm", shape, flops, lambda: fp8_grouped_gemm(*sides, ends_E), peer, in_bfloat16, GOAL)
    yield Row("quantise_rows, product", shape, flops, from_bfloat16, peer, in_bfloat16)


def _gradient(shape: str, flops: int, x_NK: Tensor, grad_NM: Tensor, ends_E: Tensor) -> Row:
    from gristmill.kernels.grouped_gemm.gpu import weight_gradient

    sides = (*quantise_columns(grad_NM, ends_E), *quantise_columns(x_NK, ends_E))
    return Row(
        "fp8_weight_gradient",
        shape,
        flops,
        lambda: fp8_weight_gradient(*sides, ends_E),
        "gradient in w in bfloat16",
        lambda: weight_gradient(grad_NM, x_NK, ends_E),
    )
