"""What `bench --tune` tries of the gate: the choice, its way back, and the sorting of rows by expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gristmill.kernels.router.gpu import (
    CHOICE,
    SLOPE,
    SORTED,
    Held,
    Sorting,
    choose,
    gradient_of_logits,
    sort_rows,
)
from gristmill.kernels.router.reference import Choice
from gristmill.kernels.tune import Search, Sizes


@dataclass(frozen=True)
class Shape:
    tokens: int
    experts: int
    how: Choice


DEEPSEEK = Shape(8192, 256, Choice(8, groups=8, groups_allowed=4))  # V3's
SMALL = Shape(40, 72, Choice(7, groups=8, groups_allowed=4))

_HELD = [Held(*sizes) for sizes in ((256, 1), (512, 2), (1024, 1), (1024, 2), (1024, 4), (2048, 4), (2048, 8))]
SIZES: dict[str, Sizes] = {
    "router.choice": (CHOICE, _HELD),
    "router.slope": (SLOPE, _HELD),
    # Rows, experts, rows compared at a time, warps: what is compared at a time should fit into a program's registers.
    "router.sorting": (
        SORTED,
        [
            Sorting(*sizes)
            for sizes in (
                (256, 256, 256, 8), (256, 64, 32, 8), (256, 64, 64, 8), (256, 32, 32, 4), (256, 32, 32, 8),
                (128, 128, 128, 4), (128, 128, 32, 4), (128, 64, 64, 4), (64, 128, 64, 4), (64, 64, 64, 2),
            )
        ],
    ),
}  # fmt: skip


def searches(device: str, shape: Shape = DEEPSEEK) -> Iterator[Search]:
    """Logits evenly at random; a loss of all affinities beside the gates'."""
    how, experts = shape.how, shape.experts
    logits = torch.randn(shape.tokens, experts, device=device)
    bias = torch.zeros(experts, device=device)
    name = "router.choice"
    yield Search(name, *SIZES[name], lambda held: [*choose(logits, bias, how, held)])
    expert, gate, score = choose(logits, bias, how)
    grads = torch.randn_like(gate), torch.randn_like(score)
    name = "router.slope"
    yield Search(name, *SIZES[name], lambda held: [gradient_of_logits(score, expert, *grads, how, held)])
    name = "router.sorting"
    yield Search(name, *SIZES[name], lambda sorting: [*sort_rows(expert, experts, sorting)])
