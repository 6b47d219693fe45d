"""Linear and cross-entropy in float32 on a CPU by `cpu.cpp`: every step of a block of logits in one thread's cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.kernels.compiled import needed
from gristmill.kernels.cross_entropy.chunked import LinearCrossEntropyMean

SOURCE = "cross_entropy/cpu.cpp"
SHARE = 20  # of all logits: up to 5 % of them are held,
LOGITS = 1 << 21  # or so many, where they are few:
LEAST_ROWS, MOST_ROWS = 96, 256  # at once; with more of them a product does not get faster
WHOLE_ROWS, WHOLE_VOCAB = 32, 6  # what both are filled up to: a tile of the widest vectors


def rows_at_once(rows: int, vocab_size: int) -> int:
    """Rows of a chunk, a whole number of tiles."""
    asked = min(MOST_ROWS, max(LEAST_ROWS, rows // SHARE, LOGITS // max(1, vocab_size)))
    return min(asked // WHOLE_ROWS, -(-rows // WHOLE_ROWS)) * WHOLE_ROWS


def losses_and_entropy(
    x_TD: Tensor, w_VD: Tensor, target_T: Tensor, temperature: float, z_loss: float = 0.0, rounded: bool = False
) -> tuple[Tensor, Tensor]:
    """−log p at the targets, (T,), where p = softmax(x·wᵀ / temperature); and −Σ p · log p, (T,)."""
    entropy_T = x_TD.new_empty(len(x_TD))
    return _run(x_TD, w_VD, target_T, None, temperature, z_loss, rounded, None, entropy_T, None, None), entropy_T


def losses_and_gradients(
    x_TD: Tensor, w_VD: Tensor, target_T: Tensor, weight_T: Tensor, temperature: float, z_loss: float = 0.0,
    rounded: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The losses, (T,), and the gradients of Σ weight · loss in x and w."""
    grad_x, grad_w = x_TD.new_empty(x_TD.shape), w_VD.new_zeros(w_VD.shape)
    vocab = -(-len(w_VD) // WHOLE_VOCAB) * WHOLE_VOCAB
    held = x_TD.new_empty(vocab, rows_at_once(len(x_TD), len(w_VD)))
    loss_T = _run(x_TD, w_VD, target_T, weight_T.contiguous(), temperature, z_loss, rounded, held, None, grad_x, grad_w)
    return loss_T, grad_x, grad_w


def _run(
    x_TD: Tensor, w_VD: Tensor, target_T: Tensor, weight_T: Tensor | None, temperature: float, z_loss: float,
    rounded: bool, held: Tensor | None, entropy_T: Tensor | None, grad_x: Tensor | None, grad_w: Tensor | None,
) -> Tensor:  # fmt: skip
    """The losses; and the gradients, where there is memory to hold a chunk's logits."""
    x_TD, w_VD, target_T = (t.contiguous() for t in (x_TD, w_VD, target_T.long()))
    (rows, width), vocab, loss_T = x_TD.shape, len(w_VD), x_TD.new_empty(len(x_TD))
    needed(SOURCE)(
        "cross_entropy", x_TD, w_VD, target_T, weight_T, rows, width, vocab, 1.0 / temperature, float(z_loss),
        rows_at_once(rows, vocab), int(rounded), held, loss_T, entropy_T, grad_x, grad_w,
    )  # fmt: skip
    return loss_T


def linear_cross_entropy_mean(
    x_TD: Tensor, w_VD: Tensor, target_T: Tensor, weight_T: Tensor, z_loss: float, rounded: bool
) -> Tensor:
    """Σ weight · loss; without gradients where nobody will ask for them."""
    weight_T = weight_T.float() * (target_T >= 0)
    target_T = target_T.clamp_min(0)
    if torch.is_grad_enabled() and (x_TD.requires_grad or w_VD.requires_grad):
        return NativeCrossEntropyMean.apply(x_TD, w_VD, target_T, weight_T, z_loss, rounded)
    return (losses_and_entropy(x_TD, w_VD, target_T, 1.0, z_loss, rounded)[0] * weight_T).sum()


class NativeCrossEntropyMean(LinearCrossEntropyMean):
    """As the class above it, the gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, w_VD: Tensor, target_T: Tensor, weight_T: Tensor, z_loss: float, rounded: bool
    ) -> Tensor:
        loss_T, grad_x, grad_w = losses_and_gradients(x_TD, w_VD, target_T, weight_T, 1.0, z_loss, rounded)
        ctx.save_for_backward(grad_x, grad_w)
        ctx.scaled = False
        return (loss_T * weight_T).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return LinearCrossEntropyMean.backward(ctx, grad)[:6]


class NativeLogProbs(torch.autograd.Function):
    """Log-probabilities of the targets, and entropies; the backward pass computes a chunk's logits again."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_VD: Tensor, target_T: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_TD, w_VD, target_T)
        ctx.temperature = temperature
        loss_T, entropy_T = losses_and_entropy(x_TD, w_VD, target_T, temperature)
        ctx.mark_non_differentiable(entropy_T)
        return loss_T.neg_(), entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor, _: Tensor | None):
        x_TD, w_VD, target_T = ctx.saved_tensors
        _, grad_x, grad_w = losses_and_gradients(x_TD, w_VD, target_T, -grad_T, ctx.temperature)
        return grad_x, grad_w, None, None
