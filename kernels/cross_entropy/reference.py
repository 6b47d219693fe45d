"""Linear and cross-entropy in obvious torch: the specification. It holds all logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.linear.reference import linear_reference


def linear_cross_entropy_mean_reference(
    x_TD: Tensor, w_VD: Tensor, target_T: Tensor, weight_T: Tensor, *, rounded: bool = False
) -> Tensor:
    """Σ weight · cross-entropy of x·wᵀ; rows with a negative target count nothing."""
    logits_TV = linear_reference(x_TD, w_VD, rounded=rounded).float()
    loss_T = F.cross_entropy(logits_TV, target_T.clamp_min(0), reduction="none")
    return (loss_T * weight_T * (target_T >= 0)).sum()


def linear_log_probs_reference(x_TD: Tensor, w_VD: Tensor, target_T: Tensor, temperature: float) -> Tensor:
    """log softmax(x·wᵀ / temperature) at the targets."""
    logits_TV = (x_TD @ w_VD.T).float() / temperature
    return logits_TV.log_softmax(-1).gather(1, target_T[:, None])[:, 0]
