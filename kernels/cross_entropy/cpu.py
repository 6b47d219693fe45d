"""The softmax of a chunk of logits, its loss and its slope in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_loss(logits_RV: Tensor, target_R: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """−log p at the targets, where p = softmax(logits / temperature), and −Σ p · log p; (R,) float32 each."""
    log_p = logits_RV.float().div(temperature).log_softmax(-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    return -log_p.gather(1, target_R[:, None])[:, 0], entropy


def softmax_slope_(logits_RV: Tensor, target_R: Tensor, weight_R: Tensor, temperature: float, z_loss: float) -> Tensor:
    """The loss of `softmax_loss` plus z_loss · (log Σ exp)²; the logits become weight times its gradient in them."""
    z = logits_RV.float().div(temperature)
    log_total = z.logsumexp(-1) if z_loss else None
    log_p = z.log_softmax(-1)
    loss = -log_p.gather(1, target_R[:, None])[:, 0]
    weight = (weight_R.float() / temperature)[:, None]
    pulled = weight if log_total is None else weight * (1 + 2 * z_loss * log_total)[:, None]
    slope = log_p.exp_().mul_(pulled)
    slope.scatter_add_(1, target_R[:, None], -weight)
    logits_RV.copy_(slope)
    return loss if log_total is None else loss + z_loss * log_total**2
