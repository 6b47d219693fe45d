"""How a token is drawn from logits: temperature, the tokens that are left out, and a draw that is a hash.

The draw of a sample's t-th token is a hash of (its seed, t), so that it depends on no other sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.kernels.likeliest import likeliest


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: temperature 0 takes the likeliest.

    Attributes:
        top_p: keeps the nucleus, the likeliest tokens that reach this share of the weight together.
        top_k: keeps so many of the likeliest; 0 keeps all.
        min_p: keeps tokens with at least this share of the likeliest one's weight.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} is less than one: ask for 1 or more")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or not 0 <= self.min_p < 1:
            raise ValueError(
                f"temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}, min_p {self.min_p}: wanted "
                "a temperature of 0 or more, a top_p in (0, 1], a top_k of 0 or more and a min_p in [0, 1)"
            )

    @property
    def cuts(self) -> bool:
        """Whether some tokens are left out."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


def uniform(seed_B: Tensor, step: int | Tensor) -> Tensor:
    """Numbers in [0, 1), float64, a hash of (seed, step): SplitMix64 (Steele et al. 2014) in wrapping int64.

    The step is one for all or int64 of a shape that goes with the seeds'.
    """
    golden = 0x9E3779B97F4A7C15
    z = seed_B + (_signed((step + 1) * golden) if isinstance(step, int) else (step + 1) * _signed(golden))
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shift(z, 31)
    return _shift(z, 11).double() * 2.0**-53


def _signed(value: int) -> int:
    """The 64-bit two's complement of a Python integer."""
    return (value + 2**63) % 2**64 - 2**63


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def choose(logits_BV: Tensor, sampling: Sampling, seed_B: Tensor, step_B: Tensor) -> tuple[Tensor, Tensor]:
    """The token at this step of each sample, and its log-probability at the temperature before any is left out."""
    if sampling.temperature == 0:
        return likeliest(logits_BV)
    logits_BV = logits_BV.float() / sampling.temperature
    u_B = uniform(seed_B, step_B)
    p_BV = logits_BV.softmax(-1)
    if sampling.cuts:
        p_BV, order_BV = _cut(p_BV, sampling)
        token_B = order_BV.gather(1, inverse_cdf(p_BV, u_B)[:, None])[:, 0]
    else:
        token_B = inverse_cdf(p_BV, u_B)
    return token_B, log_probability(logits_BV, token_B)


def log_probability(logits: Tensor, token: Tensor) -> Tensor:
    """Of these tokens (...) under the softmax of logits (..., V), without writing the others'."""
    return logits.gather(-1, token[..., None])[..., 0] - logits.logsumexp(-1)


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that `choose` draws from, (B, V) float32."""
    if sampling.temperature == 0:
        return torch.zeros_like(logits_BV, dtype=torch.float32).scatter_(1, logits_BV.argmax(-1, keepdim=True), 1.0)
    p_BV = (logits_BV.float() / sampling.temperature).softmax(-1)
    if not sampling.cuts:
        return p_BV
    kept_BV, order_BV = _cut(p_BV, sampling)
    return torch.zeros_like(p_BV).scatter_(1, order_BV, kept_BV / kept_BV.sum(-1, keepdim=True))


def _cut(p_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities from the largest on, 0 where a token is left out, and the tokens that they are of."""
    p_BV, order_BV = torch.sort(p_BV, stable=True, dim=-1, descending=True)
    left_out = torch.zeros_like(p_BV, dtype=torch.bool)
    if sampling.top_p < 1:
        left_out |= p_BV.cumsum(-1) - p_BV >= sampling.top_p
    if sampling.top_k:
        left_out[:, sampling.top_k :] = True
    if sampling.min_p:
        left_out |= p_BV < sampling.min_p * p_BV[:, :1]
    return p_BV.masked_fill(left_out, 0), order_BV


def inverse_cdf(p_BV: Tensor, u_B: Tensor) -> Tensor:
    """The token at which each row's weights, summed up, pass its number in [0, 1); no token without weight."""
    total_BV = p_BV.cumsum(-1)
    all_B = total_BV[:, -1]
    # the product may round up to the whole, which no token passes
    target_B = torch.minimum(u_B.to(all_B.dtype) * all_B, all_B.nextafter(torch.zeros_like(all_B)))
    return torch.searchsorted(total_BV, target_B[:, None], right=True)[:, 0]
