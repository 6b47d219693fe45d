"""What is timed of the products outside the experts: against torch's own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.linear import linear
from gristmill.kernels.timing import Case, both_ways, cast_by_torch, stored, without_gradients

PEER = "torch.nn.functional.linear"


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """With gradients; and a step of decoding's few rows without."""
    sizes = [(2048, 256, 256), (2048, 512, 2048), (2048, 1024, 4096)]
    for size in [(8192, 7168, 2048)] if device == "cuda" else sizes:
        yield _both_ways(device, dtype, *size)
    if stored(device, dtype) == dtype:
        for size in [(64, 2048, 32_768)] if device == "cuda" else [(1, 256, 4096), (32, 256, 4096)]:
            yield _few_rows(device, dtype, *size)


def _both_ways(device: str, dtype: torch.dtype, rows: int, inner: int, outer: int) -> Case:
    x, w = _drawn(device, stored(device, dtype), rows, inner, outer)
    rounded = x.dtype != dtype
    theirs = both_ways(cast_by_torch(F.linear, dtype) if rounded else F.linear, x, w)
    ours = both_ways(partial(linear, rounded=rounded), x, w)
    return Case("linear", f"{rows} × {inner} → {outer}", 6 * rows * inner * outer, ours, {PEER: theirs})


def _few_rows(device: str, dtype: torch.dtype, rows: int, inner: int, outer: int) -> Case:
    x, w = _drawn(device, dtype, rows, inner, outer)
    sides = without_gradients(linear, x, w), without_gradients(F.linear, x, w)
    return Case("linear, few rows", f"{rows} × {inner} → {outer}", 2 * rows * inner * outer, sides[0], {PEER: sides[1]})


def _drawn(device: str, dtype: torch.dtype, rows: int, inner: int, outer: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, inner, device=device, dtype=dtype)
    return x, torch.empty(outer, inner, device=device, dtype=dtype).normal_(0, inner**-0.5)
