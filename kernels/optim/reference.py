"""AdamW by torch's operations on lists of tensors, and Newton–Schulz by its batched products: the specification."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.kernels.optim.rounding import Origin, round_reference

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Keller Jordan's coefficients


@dataclass(frozen=True)
class AdamW:
    """The numbers of an update: those of a run, and those of its step (1, 2, …)."""

    rate: float
    step: int
    decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    coefficient: float = 1.0  # what gradients are multiplied by, as clipping says
    seed: int | None = None  # of the stochastic rounding of bfloat16 moments; none: they are rounded to nearest


def adamw_reference(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    how: AdamW,
    origins: list[Origin],
) -> None:
    """See `adamw`."""
    scaled = torch._foreach_mul(gradients, how.coefficient)
    first, second = ([m.to(g.dtype) for m, g in zip(ms, scaled, strict=True)] for ms in (exp_avg, exp_avg_sq))
    torch._foreach_lerp_(first, scaled, 1 - how.beta1)
    torch._foreach_mul_(second, how.beta2)
    torch._foreach_addcmul_(second, scaled, scaled, 1 - how.beta2)
    size = torch._foreach_sqrt(torch._foreach_div(second, 1 - how.beta2**how.step))
    torch._foreach_add_(size, how.eps)
    torch._foreach_mul_(parameters, 1 - how.rate * how.decay)
    torch._foreach_addcdiv_(parameters, first, size, -how.rate / (1 - how.beta1**how.step))
    if how.seed is not None:
        round_reference(first, exp_avg, how.seed, how.step, origins)
        return round_reference(second, exp_avg_sq, how.seed, how.step, origins, upper=True)
    for kept, made in ((exp_avg, first), (exp_avg_sq, second)):
        if any(k is not m for k, m in zip(kept, made, strict=True)):
            torch._foreach_copy_(kept, made)


def orthogonalised_reference(matrices: Tensor, steps: int) -> Tensor:
    """See `orthogonalised`."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
