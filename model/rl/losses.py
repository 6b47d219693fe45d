"""Group relative policy optimisation, as arithmetic on tensors (DeepSeekMath, arXiv 2402.03300, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def group_advantages(reward_QG: Tensor) -> Tensor:
    """(reward − group mean) / group standard deviation, (Q, G); zero in a group without spread."""
    centred = reward_QG - reward_QG.mean(1, keepdim=True)
    deviation = reward_QG.std(1, correction=0, keepdim=True)
    flat = (reward_QG == reward_QG[:, :1]).all(1, keepdim=True)
    return torch.where(flat, torch.zeros_like(centred), centred / deviation.clamp_min(1e-8))


def kl_estimate(log_p: Tensor, log_ref: Tensor) -> Tensor:
    """π_ref/π − log(π_ref/π) − 1 for each token: unbiased and never negative (DeepSeekMath equation 4)."""
    difference = log_ref - log_p
    return difference.exp() - difference - 1


@dataclass(frozen=True)
class PolicyLoss:
    """The scalar to minimise and what the curves show of it."""

    loss: Tensor
    kl: Tensor
    clip_fraction: Tensor


def policy_loss(
    log_p_N: Tensor,
    old_log_p_N: Tensor,
    advantage_N: Tensor,
    weight_N: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    reference_log_p_N: Tensor | None = None,
    kl_weight: float = 0.0,
) -> PolicyLoss:
    """−Σ weight · (min(r·A, clip(r, 1−ε_low, 1+ε_high)·A) − β·KL) over the response tokens of all outputs, flat.

    `weight_N` is 1/(outputs · length of the token's output), which makes the sum the paper's mean of means.
    """
    ratio_N = (log_p_N - old_log_p_N).exp()
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    gain_N = torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
    loss = -(weight_N * gain_N).sum()
    kl = log_p_N.new_zeros(())
    if reference_log_p_N is not None:
        kl = (weight_N * kl_estimate(log_p_N, reference_log_p_N)).sum()
        loss = loss + kl_weight * kl
    cut = (ratio_N * advantage_N > clipped_N * advantage_N).float()
    return PolicyLoss(loss, kl.detach(), (weight_N * cut).sum().detach())
