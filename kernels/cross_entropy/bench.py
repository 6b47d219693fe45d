"""What is timed of the output head with its cross-entropy."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.cross_entropy import linear_cross_entropy_mean, linear_log_probs
from gristmill.kernels.timing import OURS, Case, Goal, Work, both_ways, resident

AIMED_AT = (32_768, 129_280)  # columns
CHUNKS = (128, 512)  # rows at a time; Liger's rule gives 16 and 8 at those shapes, where torch's products are slower
WHOLE, LIGER = "whole logits, F.cross_entropy", "Liger-Kernel"
CHUNKED = tuple(f"chunked torch, {rows} rows" for rows in CHUNKS)
SHARE = 0.05  # of the bytes of all logits


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Against the logits held whole with torch's cross-entropy, and against chunks: torch's on a CPU, Liger's on a
    GPU."""
    sizes = [(2048, 128, 1024), (2048, 256, 8192), *((2048, 256, columns) for columns in AIMED_AT)]
    if device == "cuda":
        sizes = [(8192, 2048, 32_768), (16_384, 7168, 129_280)]
    for rows, width, columns in sizes:
        yield _loss(device, dtype, rows, width, columns)
        if columns != AIMED_AT[1] or device == "cuda":
            yield _log_probs(device, dtype, rows, width, columns)


def _loss(device: str, dtype: torch.dtype, rows: int, width: int, columns: int) -> Case:
    of = {
        name: both_ways(side, *leaves) for name, (side, leaves) in _sides(device, dtype, rows, width, columns).items()
    }
    goals: tuple[Goal, ...] = ()
    if columns in AIMED_AT:
        chunked = tuple(name for name in (*CHUNKED, LIGER) if name in of)
        logits = "all logits", rows * columns * dtype.itemsize
        goals = (Goal("speed", 1.0, chunked),) if chunked else ()
        goals = (*goals, Goal("memory", SHARE, whole=logits))
    return Case(
        "cross_entropy",
        f"{rows} × {width} → {columns}",
        6 * rows * width * columns,
        of.pop(OURS),
        of,
        goals,
        results=(rows + columns) * width * dtype.itemsize,  # the gradients
        resident=partial(resident, _apart, rows, width, columns) if goals and device == "cpu" else None,
    )


def _sides(
    device: str, dtype: torch.dtype, rows: int, width: int, columns: int
) -> dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[Tensor, Tensor]]]:
    """Each side's function, and what it is given."""
    x = torch.randn(rows, width, device=device, dtype=dtype)
    w = torch.empty(columns, width, device=device, dtype=dtype).normal_(0, width**-0.5)
    target = torch.randint(0, columns, (rows,), device=device)
    weight = torch.full((rows,), 1 / rows, device=device)
    sides: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        OURS: lambda a, b: linear_cross_entropy_mean(a, b, target, weight),
        WHOLE: lambda a, b: F.cross_entropy((a @ b.T).float(), target),
    }
    if device == "cpu":
        for name, chunk in zip(CHUNKED, CHUNKS, strict=True):
            sides[name] = lambda a, b, chunk=chunk: ChunkedTorch.apply(a, b, target, chunk)
    elif importlib.util.find_spec("liger_kernel"):
        liger = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
        sides[LIGER] = lambda a, b: liger(a, b, target)
    return {name: (side, (x, w)) for name, side in sides.items()}


def _apart(rows: int, width: int, columns: int, name: str) -> tuple[Work, Work]:
    """A side in float32 on a CPU for a process of its own: at a tiny shape, and at this one."""
    tiny, work = (_sides("cpu", torch.float32, *shape)[name] for shape in ((32, 32, 32), (rows, width, columns)))
    return both_ways(tiny[0], *tiny[1]), both_ways(work[0], *work[1])


class ChunkedTorch(torch.autograd.Function):
    """The mean as Liger-Kernel takes it, by torch's operations: chunk after chunk of rows, and both gradients in the
    forward pass, from a chunk's softmax less one at its targets. The backward pass scales them."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_VD: Tensor, target_T: Tensor, rows: int) -> Tensor:
        grad_x, grad_w, total = torch.empty_like(x_TD), torch.zeros_like(w_VD), x_TD.new_zeros(())
        for x, target, grad in zip(*(t.split(rows) for t in (x_TD, target_T, grad_x)), strict=True):
            log_p = torch.log_softmax(x @ w_VD.t(), -1)
            total -= log_p.gather(1, target[:, None]).sum()
            slope = log_p.exp_()
            slope.scatter_add_(1, target[:, None], slope.new_full((len(x), 1), -1.0))
            slope.mul_(1 / len(x_TD))
            torch.mm(slope, w_VD, out=grad)
            grad_w.addmm_(slope.t(), x)
        ctx.save_for_backward(grad_x, grad_w)
        return total / len(x_TD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        grad_x, grad_w = ctx.saved_tensors
        return grad_x.mul_(grad), grad_w.mul_(grad), None, None


def _log_probs(device: str, dtype: torch.dtype, rows: int, width: int, columns: int) -> Case:
    x = torch.randn(rows, width, device=device, dtype=dtype)
    w = torch.empty(columns, width, device=device, dtype=dtype).normal_(0, width**-0.5)
    target = torch.randint(0, columns, (rows,), device=device)

    def whole(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T).float().log_softmax(-1).gather(1, target[:, None])[:, 0]

    return Case(
        "linear_log_probs",
        f"{rows} × {width} → {columns}",
        6 * rows * width * columns,
        both_ways(lambda a, b: linear_log_probs(a, b, target), x, w),
        {"whole logits, log_softmax": both_ways(whole, x, w)},
    )
