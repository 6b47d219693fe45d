"""Times of the kernels against plain torch on equal inputs: `python -P -m gristmill.kernels.bench [--device cpu]`.

Forward and backward together, medians of several runs, both sides in turn in one process.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.cross_entropy import linear_cross_entropy_mean
from gristmill.kernels.grouped_gemm import grouped_gemm

RUNS, WARM = 9, 2


def seconds(ours: Callable[[], Any], theirs: Callable[[], Any], device: str) -> tuple[float, float]:
    """Median seconds of each, the two run in turn so that a drift of the machine meets both."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(WARM + RUNS):
        for side, work in enumerate((ours, theirs)):
            began = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            if run >= WARM:
                times[side].append(time.perf_counter() - began)
    return median(times[0]), median(times[1])


def both_ways(function: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], Any]:
    """Forward, and the gradients of the sum; by a gradient held whole, which torch's grouped product needs."""

    def work() -> Any:
        out = function(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return work


def grouped(device: str, experts: int, rows: int, inner: int, outer: int) -> dict[str, Any]:
    """Groups of uneven sizes, against torch's own grouped product."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inner, generator=generator).to(device).requires_grad_()
    w = torch.randn(experts, outer, inner, generator=generator).to(device).requires_grad_()
    cuts = torch.randint(0, rows, (experts - 1,), generator=generator).sort().values
    ends = torch.cat((cuts, torch.tensor([rows]))).to(device)
    offsets = ends.to(torch.int32)
    ours, theirs = seconds(
        both_ways(lambda a, b: grouped_gemm(a, b, ends), x, w),
        both_ways(lambda a, b: F.grouped_mm(a, b.transpose(-2, -1), offs=offsets), x, w),
        device,
    )
    shape = f"{experts} × {outer}×{inner}, {rows} rows"
    return row("grouped_gemm", shape, device, ours, "torch.nn.functional.grouped_mm", theirs, 6 * rows * inner * outer)


def cross_entropy(device: str, rows: int, width: int, vocab: int) -> dict[str, Any]:
    """Against the logits held whole and torch's cross-entropy."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator).to(device).requires_grad_()
    w = (torch.randn(vocab, width, generator=generator) / width**0.5).to(device).requires_grad_()
    target = torch.randint(0, vocab, (rows,), generator=generator).to(device)
    weight = torch.full((rows,), 1 / rows, device=device)
    ours, theirs = seconds(
        both_ways(lambda a, b: linear_cross_entropy_mean(a, b, target, weight), x, w),
        both_ways(lambda a, b: F.cross_entropy(a @ b.T, target), x, w),
        device,
    )
    shape = f"{rows} × {width} → {vocab}"
    return row("cross_entropy", shape, device, ours, "whole logits, F.cross_entropy", theirs, 6 * rows * width * vocab)


def row(op: str, shape: str, device: str, ours: float, peer: str, theirs: float, flops: int) -> dict[str, Any]:
    """One line of the table."""
    return {
        "op": op,
        "shape": shape,
        "dtype": "float32",
        "device": device,
        "seconds": ours,
        "gflops": flops / ours / 1e9,
        "peer": peer,
        "peer_seconds": theirs,
        "ratio": theirs / ours,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--op", choices=["grouped_gemm", "cross_entropy"])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    asked = parser.parse_args()
    cases = {
        "grouped_gemm": [(8, 4096, 128, 128), (32, 8192, 256, 256), (64, 8192, 512, 512)],
        "cross_entropy": [(2048, 128, 1024), (2048, 256, 32_768)],
    }
    makers: dict[str, Callable[..., dict[str, Any]]] = {"grouped_gemm": grouped, "cross_entropy": cross_entropy}
    print(f"torch {torch.__version__}, {platform.machine()}, {asked.device}, {torch.get_num_threads()} threads")
    rows = [
        makers[op](asked.device, *case) for op, listed in cases.items() if asked.op in (None, op) for case in listed
    ]
    for r in rows:
        print(
            f"{r['op']:<14} {r['shape']:<30} {r['seconds'] * 1e3:8.1f} ms {r['gflops']:7.1f} GFLOP/s   "
            f"{r['peer']}: {r['peer_seconds'] * 1e3:8.1f} ms   ratio {r['ratio']:.2f}"
        )
    if asked.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
