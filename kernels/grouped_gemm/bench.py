"""What is timed of the grouped product."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.grouped_gemm import grouped_gemm
from gristmill.kernels.grouped_gemm.cpu import GroupedGemm
from gristmill.kernels.timing import Case, Goal, Work, both_ways, routed, stored, without_gradients

TORCH, DENSE = "torch.nn.functional.grouped_mm", "one dense product"


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """At V3's shape on a GPU."""
    sizes = [(8, 1024, 4, 128, 128), (32, 2048, 4, 256, 256), (64, 2048, 4, 512, 512)]
    if device == "cuda":
        sizes = [(256, tokens, 8, 7168, 2048) for tokens in (4096, 8192, 32_768)]
    for size in sizes:
        yield from _at(device, dtype, *size)


def _at(
    device: str, dtype: torch.dtype, experts: int, tokens: int, active: int, inner: int, outer: int
) -> Iterator[Case]:
    """Against torch's own grouped product, on a CPU also against a product a group, and on a GPU against the product of
    as many rows with one matrix."""
    kept, rounded = stored(device, dtype), stored(device, dtype) != dtype
    rows = tokens * active
    ends = routed(tokens, experts, active).flatten().bincount(minlength=experts).cumsum(0).to(device)
    x = torch.randn(rows, inner, device=device, dtype=kept)
    w = torch.empty(experts, outer, inner, device=device, dtype=kept).normal_(0, inner**-0.5)
    offsets, flops = ends.to(torch.int32), 2 * rows * inner * outer
    shape = f"{experts} × {outer}×{inner}, {tokens} tokens × {active}"

    def theirs(a: Tensor, b: Tensor) -> Tensor:
        return F.grouped_mm(a.to(dtype), b.to(dtype).transpose(-2, -1), offs=offsets).to(kept)

    goals = (Goal("speed", 1.2, (TORCH,)),) if device == "cuda" else ()
    if device == "cuda":
        peers = {TORCH: without_gradients(theirs, x, w), DENSE: without_gradients(torch.mm, x, w[0].t())}
        dense = Goal("share of the dense rate", 0.85, (DENSE,))
        ours = without_gradients(grouped_gemm, x, w, ends)
        yield Case("grouped_gemm forward", shape, flops, ours, peers, (dense, *goals))
    peers: dict[str, Work] = {TORCH: both_ways(theirs, x, w)}
    if device == "cpu" and not rounded:
        peers["torch.mm, group by group"] = both_ways(lambda a, b: GroupedGemm.apply(a, b, ends, False), x, w)
    ours = both_ways(partial(grouped_gemm, ends_E=ends, rounded=rounded), x, w)
    yield Case("grouped_gemm", shape, 3 * flops, ours, peers, goals)
