"""The gate of a mixture of experts in plain torch: the specification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.dispatch import require
from gristmill.kernels.expert_rows import rows_by_expert


@dataclass(frozen=True)
class Choice:
    """How experts are chosen: so many of those in the best groups, and what their affinities become.

    Raises:
        ValueError: the affinity is unknown, or a count is below one.
    """

    chosen: int
    affinity: Literal["sigmoid", "softmax"] = "sigmoid"
    groups: int = 1
    groups_allowed: int = 1
    normalised: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        known = self.affinity in ("sigmoid", "softmax")
        require(known, ValueError, "Choice: affinity", repr(self.affinity), "'sigmoid' or 'softmax'")
        for name in ("chosen", "groups", "groups_allowed"):
            count = getattr(self, name)
            require(count >= 1, ValueError, f"Choice: {name}", count, "1 or more")


class Routes(NamedTuple):
    """What a gate gives; M = T·K rows, of which row t·K + k is the k-th choice of token t."""

    expert_TK: Tensor
    gate_TK: Tensor
    score_TE: Tensor
    load_E: Tensor
    order_M: Tensor
    ends_E: Tensor


def route_reference(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, how: Choice) -> Routes:
    """See `route`."""
    logit_TE = F.linear(x_TD, weight_ED)
    score_TE = logit_TE.sigmoid() if how.affinity == "sigmoid" else logit_TE.softmax(-1)
    with torch.no_grad():
        choice_TE = score_TE + bias_E
        if how.groups > 1:
            choice_TE = choice_TE.masked_fill(~allowed(choice_TE, how), -torch.inf)
        expert_TK = highest(choice_TE, how.chosen)
        load_E = torch.bincount(expert_TK.reshape(-1), minlength=len(weight_ED))
        order_M = rows_by_expert(expert_TK)
    gate_TK = score_TE.gather(1, expert_TK)
    if how.normalised:
        gate_TK = gate_TK / (gate_TK.sum(-1, keepdim=True) + 1e-20)
    return Routes(expert_TK, gate_TK * how.scale, score_TE, load_E, order_M, load_E.cumsum(0))


def allowed(choice_TE: Tensor, how: Choice) -> Tensor:
    """Experts of the best groups; a group's score is the sum of its two highest biased affinities (V2: the highest)."""
    groups = choice_TE.view(len(choice_TE), how.groups, -1)
    scored = groups.topk(2 if how.affinity == "sigmoid" else 1, -1).values.sum(-1)
    best = highest(scored, how.groups_allowed)
    of_groups = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)
    return of_groups[..., None].expand_as(groups).reshape_as(choice_TE)


def highest(value: Tensor, count: int) -> Tensor:
    """Where the highest are, highest first; of equal ones the first."""
    return value.sort(stable=True, dim=-1, descending=True).indices[..., :count].contiguous()
