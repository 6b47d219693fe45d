"""What is timed of the FP8 products: against our own in 16 bits, on equal inputs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.fp8_gemm import (
    fp8_gemm,
    fp8_grouped_gemm,
    fp8_weight_gradient,
    quantise_blocks,
    quantise_columns,
    quantise_rows,
    swiglu_quantise,
)
from gristmill.kernels.grouped_gemm import grouped_gemm
from gristmill.kernels.linear import linear
from gristmill.kernels.timing import Case, Goal, Work, routed, without_gradients

IN_BFLOAT16 = "grouped_gemm in bfloat16"


def cases(device: str, _: torch.dtype) -> Iterator[Case]:
    """At V3's shape on a GPU, at a small one on a CPU, where the products are an emulation."""
    yield _plain(device, *((8192, 7168, 2048) if device == "cuda" else (1024, 128, 128)))
    sizes = [(256, tokens, 8, 7168, 2048) for tokens in (4096, 8192, 32_768)]
    for size in sizes if device == "cuda" else [(8, 1024, 4, 128, 128)]:
        yield from _grouped(device, *size)


def _plain(device: str, rows: int, inner: int, outer: int) -> Case:
    """Of what is quantised already."""
    x, w = (torch.randn(n, inner, device=device, dtype=torch.bfloat16) for n in (rows, outer))
    w_values, w_scale = quantise_blocks(w[None])
    ours = partial(fp8_gemm, *quantise_rows(x), w_values[0], w_scale[0])
    peers = {"linear in bfloat16": without_gradients(linear, x, w)}
    return Case("fp8_gemm", f"{rows} × {inner} → {outer}", 2 * rows * inner * outer, ours, peers)


def _grouped(device: str, experts: int, tokens: int, active: int, inner: int, outer: int) -> Iterator[Case]:
    """Tokens choose their experts evenly at random."""
    count, shape = tokens * active, f"{experts} × {outer}×{inner}, {tokens} tokens × {active}"
    ends = routed(tokens, experts, active).flatten().bincount(minlength=experts).cumsum(0).to(device)
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

    size, peers = f"{count} × {2 * outer}", {"in two operations": apart}
    moved = h.nbytes + h.numel() // 2 + 4 * (h.numel() // 256)  # gate and up; the values; a scale for each 128
    yield Case("swiglu_quantise", size, 8 * count * outer, partial(swiglu_quantise, h), peers, bytes=moved)


def _products(shape: str, flops: int, x_NK: Tensor, w_EMK: Tensor, ends_E: Tensor) -> Iterator[Case]:
    """The product alone, and with the quantisation of its rows; that of the weights is once a step."""
    sides = (*quantise_rows(x_NK), *quantise_blocks(w_EMK))
    peers = {IN_BFLOAT16: without_gradients(grouped_gemm, x_NK, w_EMK, ends_E)}

    def from_bfloat16() -> Tensor:
        return fp8_grouped_gemm(*quantise_rows(x_NK), *sides[2:], ends_E)

    goals = (Goal("speed", 1.5, (IN_BFLOAT16,)),) if x_NK.is_cuda else ()
    yield Case("fp8_grouped_gemm", shape, flops, partial(fp8_grouped_gemm, *sides, ends_E), peers, goals)
    yield Case("quantise_rows, product", shape, flops, from_bfloat16, peers)


def _gradient(shape: str, flops: int, x_NK: Tensor, grad_NM: Tensor, ends_E: Tensor) -> Case:
    from gristmill.kernels.grouped_gemm.gpu import weight_gradient

    sides = (*quantise_columns(grad_NM, ends_E), *quantise_columns(x_NK, ends_E))
    peers: dict[str, Work] = {"gradient in w in bfloat16": partial(weight_gradient, grad_NM, x_NK, ends_E)}
    return Case("fp8_weight_gradient", shape, flops, partial(fp8_weight_gradient, *sides, ends_E), peers)
