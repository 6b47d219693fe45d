"""What is timed of the gate."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from gristmill.kernels.router import Choice, route
from gristmill.kernels.timing import Case, Goal, Work, both_ways

PEER = "transformers"


def cases(device: str, _: torch.dtype) -> Iterator[Case]:
    """In float32 everywhere, as V3's is."""
    sizes = [(2048, 256, 32, 4, 1, 1), (2048, 512, 64, 4, 8, 4)]
    for size in [(8192, 7168, 256, 8, 8, 4)] if device == "cuda" else sizes:
        yield _at(device, *size)
        yield _at(device, *size, balanced=True)


def _at(
    device: str,
    tokens: int,
    width: int,
    experts: int,
    active: int,
    groups: int,
    allowed: int,
    *,
    balanced: bool = False,
) -> Case:
    """Against the router of `transformers`, alone and with what its experts make of the choices, as ours does; by the
    gradient of the gates, or of all affinities too, as where a loss balances them."""
    x, bias = torch.randn(tokens, width, device=device), torch.zeros(experts, device=device)
    weight = torch.empty(experts, width, device=device).normal_(0, width**-0.5)
    how = Choice(active, groups=groups, groups_allowed=allowed)
    peers: dict[str, Work] = {}
    if importlib.util.find_spec("transformers"):
        config = importlib.import_module("transformers").DeepseekV3Config(
            hidden_size=width, n_routed_experts=experts, num_experts_per_tok=active, n_group=groups, topk_group=allowed,
            norm_topk_prob=True, routed_scaling_factor=1.0,
        )  # fmt: skip
        name = "transformers.models.deepseek_v3.modeling_deepseek_v3"
        with torch.device(device):
            module = importlib.import_module(name).DeepseekV3TopkRouter(config)

        def theirs(a: Tensor, b: Tensor, *, counted: bool = False) -> tuple[Tensor, ...]:
            logits, gates, expert = torch.func.functional_call(module, {"weight": b}, (a,))
            if counted:  # as integrations/moe.py does for its grouped product
                sorted_, _ = torch.sort(expert.flatten())
                load = torch.histc(sorted_.float() if device == "cpu" else sorted_.int(), experts, 0, experts - 1)
                load.cumsum(0, dtype=torch.int32)
            return (gates, logits.sigmoid()) if balanced else (gates,)

        peers[PEER] = both_ways(theirs, x, weight)
        peers[f"{PEER}, sorted"] = both_ways(partial(theirs, counted=True), x, weight)
    goals = (Goal("speed", 2.0, (PEER,)),) if device == "cpu" and peers and not balanced else ()
    ours = both_ways(lambda a, b: route(a, b, bias, how)[1 : 3 if balanced else 2], x, weight)
    shape = f"{tokens} × {width}, {active} of {experts}, {groups} groups"
    return Case(
        "router, with affinities" if balanced else "router", shape, 6 * tokens * width * experts, ours, peers, goals
    )
