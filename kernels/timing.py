"""How an operation is timed beside its peers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

RUNS, WARM = 9, 2
Work = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One operation at one shape: our side, and each peer's with the ratio that is aimed at (None: none is)."""

    op: str
    shape: str
    flops: int
    ours: Work
    peers: dict[str, tuple[Work, float | None]]
    most_memory: int | None = None  # bytes that are aimed at, beyond the inputs
    bytes: int | None = None  # that have to be read and written, where memory is the bound
    least_share: float | None = None  # of a copy's bandwidth that is aimed at
    replayed: bool = (
        False  # on a GPU from a CUDA graph, as a server does: launches of some µs would be most of the time
    )


def seconds(sides: list[Work], device: str) -> list[float]:
    """Median seconds of each, run in turn so that a drift of the machine meets all."""
    times: list[list[float]] = [[] for _ in sides]
    for run in range(WARM + RUNS):
        for side, work in enumerate(sides):
            began = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            if run >= WARM:
                times[side].append(time.perf_counter() - began)
    return [median(t) for t in times]


def replayed(work: Work) -> Work:
    """The same from a CUDA graph, on the inputs as they lie."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM):  # what is compiled or chosen at first is none of the graph's
            work()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def memory(work: Work, device: str) -> int | None:
    """Most bytes that a GPU holds beyond what it held before."""
    if device != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


def both_ways(function: Callable[..., Tensor], *leaves: Tensor) -> Work:
    """Forward, and the gradients of the sum; by a gradient held whole, which torch's grouped product needs."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)

    def work() -> Any:
        out = function(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return work


def without_gradients(function: Work) -> Work:
    def work() -> Any:
        with torch.no_grad():
            return function()

    return work
