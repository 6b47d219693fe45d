"""How an operation is timed beside its peers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

RUNS, WARM, CAPTURED = 9, 2, 10
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
    bytes: int | None = None  # that have to be read and written, where memory sets the pace
    least_share: float | None = None  # of a copy's bandwidth that is aimed at
    captured: bool = False  # on a GPU: launches by Python would be most of the time


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


def memory(work: Work, device: str) -> int | None:
    """Most bytes that a GPU holds beyond what it held before."""
    if device != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


def both_ways(
    function: Callable[..., Tensor | tuple[Tensor, ...]], *leaves: Tensor, seen: Tensor | None = None
) -> Work:
    """Forward, and the gradients of each result's product with `seen`, or of their sum; by a gradient held whole, which
    torch's grouped product needs."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)

    def work() -> Any:
        given = function(*leaves)
        outs = given if isinstance(given, tuple) else (given,)
        return torch.autograd.grad(outs, leaves, [torch.ones_like(out) if seen is None else seen for out in outs])

    return work


def seconds_of_device(sides: list[Work]) -> list[float]:
    """Median seconds of each on a GPU, captured as graphs: without the time in which Python launches short kernels."""
    return [taken / CAPTURED for taken in seconds([_captured(side) for side in sides], "cuda")]


def _captured(work: Work) -> Work:
    """So many runs of the work as a CUDA graph."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):  # compiles, and takes the libraries' own memory
            work()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        for _ in range(CAPTURED):
            work()
    return graph.replay


def bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds([lambda: target.copy_(source)], device)[0]


def without_gradients(function: Work) -> Work:
    def work() -> Any:
        with torch.no_grad():
            return function()

    return work
