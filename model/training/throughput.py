"""What this device can do at best and how much of its memory a run took: what a step's speed is held against."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gristmill.model.training.config import Precision

COUNTED = (
    "products of the active parameters and half of attention's (causal), forward once and backward twice; not what is "
    "computed again, the optimizer, norms, routing and communication"
)
WIDTH = {"cpu": 1024, "cuda": 4096}  # of the square matrices whose product is timed
REPEATS = 5  # the fastest counts
AT_ONCE = {"cpu": 1, "cuda": 8}  # products between two looks at the clock


E4M3_SINCE = (8, 9)  # the compute capability from which a GPU multiplies E4M3 itself


@dataclass(frozen=True)
class Peak:
    """The measured rate of one large product, and which."""

    flops_per_second: float
    product: str


def measured_peak(device: torch.device, precision: Precision) -> Peak:
    """The rate of a large square product on this device, of operands as the run's products have them.

    On a CPU a run in fp8 takes its products in float32 (`precision.py`), and so does this; for one in bfloat16 it is
    the faster of both, since few processors multiply bfloat16 numbers. Random numbers come from a generator of its own;
    a product of zeros would draw less power and run at a higher clock.
    """
    if device.type == "cuda":
        return _peak(device, precision)
    kinds: tuple[Precision, ...] = ("float32", "bfloat16") if precision == "bfloat16" else ("float32",)
    return max((_peak(device, kind) for kind in kinds), key=lambda peak: peak.flops_per_second)


def _peak(device: torch.device, kind: Precision) -> Peak:
    width, at_once = WIDTH[device.type], AT_ONCE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(width, width, generator=generator, device=device) for _ in range(2))
    if kind == "fp8" and torch.cuda.get_device_capability(device) < E4M3_SINCE:
        kind = "float32"  # as the kernels multiply there
    if kind == "fp8":
        a, b, scale = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t(), torch.ones((), device=device)

        def product() -> Tensor:
            return torch._scaled_mm(a, b, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16)
    else:
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        a, b = a.to(dtype), b.to(dtype)

        def product() -> Tensor:
            return a @ b

    product()
    best = min(_seconds(product, at_once, device) for _ in range(REPEATS))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # what this took is not the run's
    return Peak(2.0 * width**3 * at_once / best, f"{kind} {width} × {width} × {width}")


def _seconds(product: Callable[[], Tensor], times: int, device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    for _ in range(times):
        product()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a CUDA device, or this process in a CPU's memory, since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage may tell the peak of the process that started this one
        return 1024 * next(int(line.split()[1]) for line in status.open() if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
