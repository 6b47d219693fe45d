"""How an operation is timed beside its peers, and what it is held against.

An operation's folder says in `bench.py` what is timed: its `cases` on a device, in a dtype.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

RUNS, WARM, CAPTURED = 9, 2, 10
LONG, FEW = 10.0, 3  # seconds of one round of all sides, from which on so few rounds are enough
PROCESS = Path("/proc/self")  # of Linux
MOST_KEPT = 31 << 20  # bytes; glibc's bound is 32 MiB
OURS = "ours"
Work = Callable[[], Any]
Metric = Literal["speed", "share of the dense rate", "share of copy", "memory"]


@dataclass(frozen=True)
class Goal:
    """What is aimed at, as a ratio.

    `speed` and `share of the dense rate`: seconds of the fastest of `peers` over ours, at least `value`.
    `share of copy`: seconds in which a large copy moves the case's bytes over ours, at least `value`.
    `memory`: ours over that of the first of `peers`, or over the number in `whole`, at most `value`.
    """

    metric: Metric
    value: float
    peers: tuple[str, ...] = ()
    whole: tuple[str, int] | None = None  # what it is called, bytes


@dataclass(frozen=True)
class Case:
    """One operation at one shape: our side, each peer's, and what is aimed at."""

    op: str
    shape: str
    flops: int
    ours: Work
    peers: dict[str, Work]
    goals: tuple[Goal, ...] = ()
    bytes: int | None = None  # that have to be read and written, where memory sets the pace
    captured: bool = False  # on a GPU: launches by Python would be most of the time
    results: int = 0  # bytes of results, which memory leaves out
    resident: Callable[[str], int | None] | None = None  # on a CPU: a side's memory, by OURS or the peer's name


def seconds(sides: list[Work], device: str) -> list[float]:
    """Median seconds of each, run in turn so that a drift of the machine meets all."""
    times: list[list[float]] = [[] for _ in sides]
    first = _round(sides, device)
    long = sum(first) >= LONG
    for run in range(FEW if long else WARM - 1 + RUNS):
        taken = _round(sides, device)
        if long or run >= WARM - 1:
            for kept, one in zip(times, taken, strict=True):
                kept.append(one)
    return [median(t) for t in times]


def _round(sides: list[Work], device: str) -> list[float]:
    """Seconds of each, run once."""
    taken = []
    for work in sides:
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return taken


def memory(work: Work) -> int:
    """Most bytes that a GPU holds beyond what it held before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


def resident(prepare: Callable[..., tuple[Work, Work]], *arguments: Any) -> int | None:
    """Most resident bytes of a fresh process while it works once, less those of its inputs and results; None where
    Linux does not count them. Results are taken to be there when most is held, as gradients are that are added up.

    Args:
        prepare: a function of a module that draws inputs and gives two works: a tiny one, which loads all code, and
            the one that is looked at, which returns its results.
        arguments: of it.
    """
    if not (PROCESS / "clear_refs").exists():
        return None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_resident, prepare, *arguments).result()


def _resident(prepare: Callable[..., tuple[Work, Work]], *arguments: Any) -> int:
    tiny, work = prepare(*arguments)
    tiny()
    (PROCESS / "clear_refs").write_text("5")  # the high-water mark begins again, at what is held now
    before = _most_held()
    results = work()
    return _most_held() - before - sum(result.nbytes for result in results)


def _most_held() -> int:
    """The high-water mark of this process's resident memory, bytes."""
    lines = (PROCESS / "status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


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


def without_gradients(function: Callable[..., Any], *arguments: Any) -> Work:
    def work() -> Any:
        with torch.no_grad():
            return function(*arguments)

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


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next who asks, as it does in a process that has trained a while.

    glibc gives blocks back to the system until one as large was freed (unless its environment sets a threshold). A call
    of milliseconds then works on fresh pages, which may cost it as much again, on whichever side they fall.
    """
    torch.empty(MOST_KEPT, dtype=torch.uint8)


def bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device=device)  # zeros are written: pages that were not are one
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds([partial(target.copy_, source)], device)[0]


def stored(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of tensors: on a CPU bfloat16 is that of a product's operands alone."""
    return torch.float32 if device == "cpu" else dtype


def cast_by_torch(function: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    """It under autocast of a CPU; a result in float32, as the other side's is."""

    def under(*arguments: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return function(*arguments).float()

    return under


def routed(tokens: int, experts: int, active: int) -> Tensor:
    """What each token chooses evenly at random, (T, K)."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(tokens, experts, generator=generator).topk(active, 1).indices
