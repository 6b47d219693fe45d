"""Linear and cross-entropy in chunks of rows: the logits of one chunk are all that is ever held."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from gristmill.kernels.linear.reference import nearest

CPU_LOGITS = 1 << 20  # of a chunk: it stays in the cache
GPU_LOGITS = (1 << 25, 1 << 27)
"""At least and at most of a chunk: the head's gradient is read and written once a chunk."""
SHARE = 20  # of all logits: between the two, 5 % of them is held
LEAST_ROWS = 128  # with fewer, a product spends its time on reading the weights
WHOLE_ROWS = 256  # of two tiles of a GPU's products: a few rows more would take the time of another tile


def chunks(rows: int, vocab_size: int, implementation: str) -> Iterator[slice]:
    """Slices of rows whose logits fit a chunk, but at least `LEAST_ROWS` of them."""
    if implementation == "cpu":
        size = CPU_LOGITS // max(1, vocab_size)
    else:
        least, most = GPU_LOGITS
        size = min(most, max(least, rows * vocab_size // SHARE)) // max(1, vocab_size)
        size = size // WHOLE_ROWS * WHOLE_ROWS
    size = max(LEAST_ROWS, size)
    for start in range(0, rows, size):
        yield slice(start, start + size)


def softmax_of(implementation: str) -> ModuleType:
    """The module with `softmax_loss` and `softmax_slope_`."""
    if implementation == "gpu":
        from gristmill.kernels.cross_entropy import gpu

        return gpu
    from gristmill.kernels.cross_entropy import cpu

    return cpu


class LinearCrossEntropyMean(torch.autograd.Function):
    """Σ weight · loss; the gradients are made in the forward pass, since the weights are known there.

    The backward pass scales them where they lie, for a copy of the head's gradient would be as large as the head: so it
    can be run once.
    """

    @staticmethod
    def forward(
        ctx, x_TD: Tensor, w_VD: Tensor, target_T: Tensor, weight_T: Tensor, z_loss: float, implementation: str,
        rounded: bool,
    ) -> Tensor:  # fmt: skip
        if rounded:
            x_TD, w_VD = nearest(x_TD), nearest(w_VD)
        softmax = softmax_of(implementation)
        grad_x, grad_w = torch.empty_like(x_TD), torch.zeros_like(w_VD)
        total = torch.zeros((), dtype=torch.float32, device=x_TD.device)
        for rows in chunks(x_TD.shape[0], w_VD.shape[0], implementation):
            x, target = x_TD[rows], target_T[rows]
            weight = weight_T[rows].float() * (target >= 0)
            logits = x @ w_VD.t()
            loss = softmax.softmax_slope_(logits, target.clamp_min(0), weight, 1.0, z_loss)
            total += (loss * weight).sum()
            logits = nearest(logits) if rounded else logits
            torch.mm(logits, w_VD, out=grad_x[rows])
            grad_w.addmm_(logits.t(), x)
            del logits  # before the next chunk's are made
        ctx.save_for_backward(grad_x, grad_w)
        ctx.scaled = False
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        if ctx.scaled:
            raise RuntimeError(
                "linear_cross_entropy_mean: its gradients were taken before, and are kept only once: ask for those of "
                "x and w together, or call it again"
            )
        ctx.scaled = True
        grad_x, grad_w = ctx.saved_tensors
        return grad_x.mul_(grad), grad_w.mul_(grad), None, None, None, None, None


class LinearLogProbs(torch.autograd.Function):
    """Log-probabilities of the targets, and entropies; the backward pass computes a chunk's logits again."""

    @staticmethod
    def forward(
        ctx, x_TD: Tensor, w_VD: Tensor, target_T: Tensor, temperature: float, implementation: str
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_TD, w_VD, target_T)
        ctx.temperature, ctx.implementation = temperature, implementation
        softmax = softmax_of(implementation)
        log_p, entropy = (torch.empty(len(x_TD), dtype=torch.float32, device=x_TD.device) for _ in range(2))
        for rows in chunks(x_TD.shape[0], w_VD.shape[0], implementation):
            loss, entropy[rows] = softmax.softmax_loss(x_TD[rows] @ w_VD.t(), target_T[rows], temperature)
            log_p[rows] = -loss
        ctx.mark_non_differentiable(entropy)
        return log_p, entropy

    @staticmethod
    def backward(ctx, grad_T: Tensor, _: Tensor | None):
        x_TD, w_VD, target_T = ctx.saved_tensors
        softmax = softmax_of(ctx.implementation)
        grad_x, grad_w = torch.empty_like(x_TD), torch.zeros_like(w_VD)
        for rows in chunks(x_TD.shape[0], w_VD.shape[0], ctx.implementation):
            x = x_TD[rows]
            logits = x @ w_VD.t()
            softmax.softmax_slope_(logits, target_T[rows], -grad_T[rows], ctx.temperature, 0.0)
            torch.mm(logits, w_VD, out=grad_x[rows])
            grad_w.addmm_(logits.t(), x)
            del logits  # before the next chunk's are made
        return grad_x, grad_w, None, None, None
