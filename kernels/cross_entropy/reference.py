"""Linear and cross-entropy in obvious torch: the specification. It holds all logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.linear.reference import linear_reference


def linear_cross_entropy_mean_reference(
    x_TD: Tensor, w_VD: Tensor, target_T: Tensor, weight_T: Tensor, *, z_loss: float = 0.0, rounded: bool = False
) -> Tensor:
    """Σ weight · (cross-entropy of x·wᵀ + z_loss · (log Σ exp)²); rows with a negative target count nothing."""
    logits_TV = linear_reference(x_TD, w_VD, rounded=rounded).float()
    loss_T = F.cross_entropy(logits_TV, target_T.clamp_min(0), reduction="none")
    if z_loss:
        loss_T = loss_T + z_loss * logits_TV.logsumexp(-1) ** 2
    return (loss_T * weight_T * (target_T >= 0)).sum()


def linear_log_probs_and_entropy_reference(
    x_TD: Tensor, w_VD: Tensor, target_T: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """log p at the targets, where p = softmax(x·wᵀ / temperature), and −Σ p · log p, without a gradient."""
    log_p_TV = ((x_TD @ w_VD.T).float() / temperature).log_softmax(-1)
    return log_p_TV.gather(1, target_T[:, None])[:, 0], torch.special.entr(log_p_TV.detach().exp()).sum(-1)
