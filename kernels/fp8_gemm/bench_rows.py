"""What `kernels/bench.py` measures of the FP8 products: against our own grouped product in 16 bits, on equal inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
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
    """Each is freed before the next is made: the matrices of 256 experts are 7.5 GB in 16 bits."""
    count, shape = tokens * active, f"{experts} × {outer}×{inner}, {tokens} tokens × {active}"
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(tokens, experts, generator=generator).topk(active, 1).indices
    ends = chosen.flatten().bincount(minlength=experts).cumsum(0).to(device)
    x = torch.randn(count, inner, device=device, dtype=torch.bfloat16)
    w = torch.empty(experts, outer, inner, device=device, dtype=torch.bfloat16).normal_(0, inner**-0.5)
    flops, peer = 2 * count * inner * outer, "grouped_gemm in bfloat16"

    def in_bfloat16() -> Tensor:
        with torch.no_grad():
            return grouped_gemm(x, w, ends)

    sides = (*quantise_rows(x), *quantise_blocks(w))
    yield Row("fp8_grouped_gemm", shape, flops, lambda: fp8_grouped_gemm(*sides, ends), peer, in_bfloat16, GOAL)

    def quantised() -> Tensor:
        return fp8_grouped_gemm(*quantise_rows(x), *sides[2:], ends)

    yield Row("fp8_grouped_gemm + rows", shape, flops, quantised, peer, in_bfloat16)
    columns = (*quantise_columns(torch.randn(count, outer, device=device), ends), *quantise_columns(x, ends))

    def gradient() -> tuple[Tensor, ...]:
        leaf = w.detach().requires_grad_()
        return torch.autograd.grad(grouped_gemm(x, leaf, ends), leaf, torch.ones_like(x[:, :1]).expand(-1, outer))

    name = "grouped_gemm and its gradient in w, bfloat16"
    yield Row("fp8_weight_gradient", shape, flops, lambda: fp8_weight_gradient(*columns, ends), name, gradient)
    del columns
    h = torch.randn(count, 2 * outer, device=device, dtype=torch.bfloat16)

    def apart() -> tuple[Tensor, Tensor]:
        gate, up = h.chunk(2, 1)
        return quantise_rows(torch.nn.functional.silu(gate) * up)

    work = 8 * count * outer
    yield Row(
        "swiglu_quantise", f"{count} × {2 * outer}", work, lambda: swiglu_quantise(h), "written between", apart, 1.0
    )
