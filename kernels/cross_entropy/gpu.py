"""The softmax of a chunk of logits, its loss and its slope in Triton: two passes over a row, written in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gristmill.kernels.tiles import tuned


@dataclass(frozen=True)
class Row:
    """Columns of a row that its program takes at a time; warps."""

    columns: int
    warps: int


LOSS = SLOPE = Row(1024, 4)


@triton.jit
def _slope(
    logits_ptr, target_ptr, weight_ptr, loss_ptr, entropy_ptr, vocab, row_stride, inverse_temperature, z_loss,
    WRITE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row: an online maximum m, Σ exp(z − m) and Σ exp(z − m) · (z − m), from which its loss and entropy follow.

    Then weight/T · (softmax · (1 + 2 · z_loss · log Σ exp) − onehot) in the logits' place.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(target_ptr + row)
    # Before the sums, for which all warps wait: behind them another one might have written over it
    aimed = tl.load(logits_ptr + target).to(tl.float32) * inverse_temperature
    highest, total, weighted = -float("inf"), 0.0, 0.0
    for start in range(0, vocab, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + v, mask=v < vocab, other=-float("inf")).to(tl.float32) * inverse_temperature
        above = tl.maximum(highest, tl.max(z, 0))
        base = tl.where(above == -float("inf"), 0.0, above)  # nothing but infinite ones so far
        kept, share = tl.exp(highest - base), tl.exp(z - base)
        if not WRITE:  # a probability of zero times its logarithm is zero
            weighted = (weighted + total * tl.maximum(highest - base, -1e30)) * kept
            weighted += tl.sum(share * tl.maximum(z - base, -1e30), 0)
        total = total * kept + tl.sum(share, 0)
        highest = above
    log_total = highest + tl.log(total)
    tl.store(loss_ptr + row, log_total - aimed + z_loss * log_total * log_total)
    if not WRITE:
        tl.store(entropy_ptr + row, tl.log(total) - weighted / total)
    if WRITE:
        pull = 1.0 + 2.0 * z_loss * log_total
        weight = tl.load(weight_ptr + row).to(tl.float32) * inverse_temperature
        for start in range(0, vocab, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            z = tl.load(logits_ptr + v, mask=v < vocab, other=0.0).to(tl.float32) * inverse_temperature
            p = tl.exp(z - log_total) * pull - tl.where(v == target, 1.0, 0.0)
            tl.store(logits_ptr + v, (p * weight).to(logits_ptr.dtype.element_ty), mask=v < vocab)


def softmax_loss(
    logits_RV: Tensor, target_R: Tensor, temperature: float, sizes: Row | None = None
) -> tuple[Tensor, Tensor]:
    """−log p at the targets, where p = softmax(logits / temperature), and −Σ p · log p; (R,) float32 each."""
    entropy = torch.empty(logits_RV.shape[0], dtype=torch.float32, device=logits_RV.device)
    sizes = sizes or tuned("cross_entropy.loss", logits_RV.device, LOSS)
    return _launch(logits_RV, target_R, target_R, temperature, 0.0, entropy, sizes), entropy


def softmax_slope_(
    logits_RV: Tensor, target_R: Tensor, weight_R: Tensor, temperature: float, z_loss: float, sizes: Row | None = None
) -> Tensor:
    """The loss of `softmax_loss` plus z_loss · (log Σ exp)²; the logits become weight times its gradient in them."""
    sizes = sizes or tuned("cross_entropy.slope", logits_RV.device, SLOPE)
    return _launch(logits_RV, target_R, weight_R, temperature, z_loss, None, sizes)


def _launch(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    temperature: float,
    z_loss: float,
    entropy: Tensor | None,
    sizes: Row,
) -> Tensor:
    """The loss; and the entropy where it has a place, else the slope."""
    target, weight = target.contiguous(), weight.contiguous()  # the kernel reads them by place
    loss = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        _slope[(logits.shape[0],)](
            logits, target, weight, loss, loss if entropy is None else entropy, logits.shape[1], logits.stride(0),
            1.0 / temperature, z_loss, WRITE=entropy is None, BLOCK_V=sizes.columns, num_warps=sizes.warps,
        )  # fmt: skip
    return loss
