"""The softmax of a chunk of logits, its loss and its slope in plain torch."""

from __future__ import annotations

from torch import Tensor


def softmax_loss(logits_RV: Tensor, target_R: Tensor, temperature: float) -> Tensor:
    """−log softmax(logits / temperature) at the targets, (R,) float32."""
    log_p = logits_RV.float().div(temperature).log_softmax(-1)
    return -log_p.gather(1, target_R[:, None])[:, 0]


def softmax_slope_(logits_RV: Tensor, target_R: Tensor, weight_R: Tensor, temperature: float) -> Tensor:
    """The loss of `softmax_loss`; the logits become weight/temperature · (softmax − onehot), their gradient."""
    log_p = logits_RV.float().div(temperature).log_softmax(-1)
    loss = -log_p.gather(1, target_R[:, None])[:, 0]
    weight = (weight_R.float() / temperature)[:, None]
    slope = log_p.exp_().mul_(weight)
    slope.scatter_add_(1, target_R[:, None], -weight)
    logits_RV.copy_(slope)
    return loss
