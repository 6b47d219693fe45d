"""Stochastic rounding of float32 to bfloat16 by numbers that a counter gives: the specification, in plain torch.

A number goes to the bfloat16 above it (in size) with the probability by which it is beyond the one below, so that what
is added up over steps is right in the mean (Gupta et al. 2015, arXiv 1502.02551, section 3). Which way it goes is a
function of (seed, step, stream, place in the whole tensor) alone, by Philox 4×32-10 (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"): key (low, high half of the seed), counter (low, high half of place // 4, step,
stream), of whose four words place % 4 is meant. Its lower half rounds a tensor, or a first moment; its upper half the
second moment beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MULTIPLIERS, RAISES, ROUNDS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 10
WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Origin:
    """Of what whole a tensor's numbers are, and where the first lies there: so parts are rounded as the whole is."""

    stream: int  # 0 to 2³² − 1, another one for each whole tensor
    first: int = 0


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """The four words of each counter; words of 32 bits lie in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = _product(c0, MULTIPLIERS[0]), _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + RAISES[0]) & WORD, (k1 + RAISES[1]) & WORD
    return c0, c1, c2, c3


def _product(word: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits, by halves of the word, since int64 does not hold the whole."""
    upper, lower = (word >> 16) * by, (word & 0xFFFF) * by
    return (upper + (lower >> 16)) >> 16, ((upper << 16) + lower) & WORD


def words(count: int, seed: int, step: int, origin: Origin, device: torch.device) -> Tensor:
    """The words of so many numbers from the origin on, (count,), 0 to 2³² − 1 in int64."""
    quad = torch.arange(origin.first // 4, -(-(origin.first + count) // 4), device=device)
    counter = (quad & WORD, quad >> 32, torch.full_like(quad, step), torch.full_like(quad, origin.stream))
    drawn = torch.stack(philox(counter, (seed & WORD, seed >> 32)), -1).view(-1)
    return drawn[origin.first % 4 :][:count]


def rounded_by(exact: Tensor, half: Tensor) -> Tensor:
    """`exact` in bfloat16, up (in size) where the 16 bits behind bfloat16's and those of `half` reach 2¹⁶ together."""
    bits = exact.view(torch.int32).long() & WORD
    upper = torch.where(exact.isnan(), 0x7FC0, (bits + half) >> 16)
    return upper.to(torch.int16).view(torch.bfloat16)


def round_reference(
    exact: list[Tensor], rounded: list[Tensor], seed: int, step: int, origins: list[Origin], *, upper: bool = False
) -> None:
    """See `round_stochastically`; by the upper halves of the words where asked to."""
    for numbers, kept, origin in zip(exact, rounded, origins, strict=True):
        word = words(numbers.numel(), seed, step, origin, numbers.device).view(numbers.shape)
        kept.copy_(rounded_by(numbers, word >> 16 if upper else word & 0xFFFF))
