"""Linear and cross-entropy on a CPU as one compiled pass: products, softmax and slope while their blocks are near."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.kernels.compiled import Compiled, compiled
from gristmill.kernels.cross_entropy.chunked import LinearCrossEntropyMean

SHARE = 20  # of all logits: up to 5 % of them are held,
LOGITS = 1 << 21  # or so many, where they are few:
LEAST_ROWS, MOST_ROWS = 96, 256  # at once; with more of them a product does not get faster
WHOLE_ROWS = 32  # of the widest tile
WHOLE_VOCAB = 6  # a tile's other side


def library(x_TD: Tensor, w_VD: Tensor) -> Compiled | None:
    """The compiled functions, if there are any for such operands."""
    plain = all(t.dtype == torch.float32 and t.is_contiguous() and t.numel() > 0 for t in (x_TD, w_VD))
    return compiled("cross_entropy/cpu.cpp") if plain else None


def rows_at_once(rows: int, vocab_size: int) -> int:
    """Rows of a chunk, a whole number of tiles."""
    asked = min(MOST_ROWS, max(LEAST_ROWS, rows // SHARE, LOGITS // vocab_size))
    return min(asked // WHOLE_ROWS, -(-rows // WHOLE_ROWS)) * WHOLE_ROWS


def losses(run: Compiled, x_TD: Tensor, w_VD: Tensor, target_T: Tensor, temperature: float) -> Tensor:
    """−log softmax(x·wᵀ / temperature) at the targets, (T,)."""
    (rows, width), vocab = x_TD.shape, len(w_VD)
    loss_T, target_T, none = x_TD.new_empty(rows), target_T.long().contiguous(), x_TD.new_empty(0)
    chunk = rows_at_once(rows, vocab)
    run(
        "cross_entropy", x_TD, w_VD, target_T, none, rows, width, vocab, 1.0 / temperature, chunk, 0, none,
        loss_T, none, none,
    )  # fmt: skip
    return loss_T


def losses_and_gradients(
    run: Compiled, x_TD: Tensor, w_VD: Tensor, target_T: Tensor, weight_T: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses, (T,), and the gradients of Σ weight · loss in x and w."""
    (rows, width), vocab = x_TD.shape, len(w_VD)
    loss_T, grad_x, grad_w = x_TD.new_empty(rows), torch.empty_like(x_TD), torch.zeros_like(w_VD)
    target_T, weight_T = target_T.long().contiguous(), weight_T.contiguous()
    chunk = rows_at_once(rows, vocab)
    held = x_TD.new_empty(-(-vocab // WHOLE_VOCAB) * WHOLE_VOCAB, chunk)
    run(
        "cross_entropy", x_TD, w_VD, target_T, weight_T, rows, width, vocab, 1.0 / temperature, chunk, 1, held,
        loss_T, grad_x, grad_w,
    )  # fmt: skip
    return loss_T, grad_x, grad_w


def linear_cross_entropy_mean(run: Compiled, x_TD: Tensor, w_VD: Tensor, target_T: Tensor, weight_T: Tensor) -> Tensor:
    """Σ weight · loss; without gradients where nobody will ask for them."""
    weight_T = weight_T.float() * (target_T >= 0)
    target_T = target_T.clamp_min(0)
    if torch.is_grad_enabled() and (x_TD.requires_grad or w_VD.requires_grad):
        return FusedCrossEntropyMean.apply(x_TD, w_VD, target_T, weight_T, run)
    return (losses(run, x_TD, w_VD, target_T, 1.0) * weight_T).sum()


class FusedCrossEntropyMean(LinearCrossEntropyMean):
    """Its gradients are made in the forward pass, as those of the class above, which also has the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_VD: Tensor, target_T: Tensor, weight_T: Tensor, run: Compiled) -> Tensor:
        loss_T, grad_x, grad_w = losses_and_gradients(run, x_TD, w_VD, target_T, weight_T, 1.0)
        ctx.save_for_backward(grad_x, grad_w)
        ctx.scaled = False
        return (loss_T * weight_T).sum()


class FusedLogProbs(torch.autograd.Function):
    """Log-probabilities of the targets; the backward pass computes a chunk's logits again."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_VD: Tensor, target_T: Tensor, temperature: float, run: Compiled) -> Tensor:
        ctx.save_for_backward(x_TD, w_VD, target_T)
        ctx.temperature, ctx.run = temperature, run
        return losses(run, x_TD, w_VD, target_T, temperature).neg_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor):
        x_TD, w_VD, target_T = ctx.saved_tensors
        _, grad_x, grad_w = losses_and_gradients(ctx.run, x_TD, w_VD, target_T, -grad_T, ctx.temperature)
        return grad_x, grad_w, None, None, None
