"""What is timed of the routed experts."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.expert_rows import rows_by_expert
from gristmill.kernels.moe_mlp import moe_mlp
from gristmill.kernels.timing import Case, Goal, Work, both_ways, cast_by_torch, routed, stored, without_gradients

AIMED_AT = ((32, 2048, 4, 256, 128), (64, 2048, 4, 512, 256))  # experts, tokens, active, width, hidden
UNFUSED = "unfused torch"
MOST_GATHERED = 8 << 30
"""Bytes of the matrices that batched_mm gathers, an expert's for each row, and of their gradients: beyond, it is left
out."""
Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """With gradients; and a step of decoding's few rows without."""
    for size in [(64, 8192, 6, 2048, 1408)] if device == "cuda" else [*AIMED_AT, (32, 2048, 4, 1024, 512)]:
        yield from _both_ways(device, dtype, *size)
    if stored(device, dtype) == dtype:
        for size in [(64, 64, 4, 2048, 1408)] if device == "cuda" else [(32, 1, 4, 256, 128), (32, 32, 4, 256, 128)]:
            yield _few_rows(device, dtype, *size)


def _both_ways(
    device: str, dtype: torch.dtype, experts: int, tokens: int, active: int, width: int, hidden: int
) -> Iterator[Case]:
    """Against the experts of `transformers`, each of whose implementations is a peer, and on a GPU torch's operations
    one by one."""
    expert = routed(tokens, experts, active).to(device)
    load = expert.flatten().bincount(minlength=experts)
    kept, rounded = stored(device, dtype), stored(device, dtype) != dtype
    x = torch.randn(tokens, width, device=device, dtype=kept)
    gate = torch.rand(tokens, active, device=device)
    gate_up = torch.empty(experts, 2 * hidden, width, device=device, dtype=kept).normal_(0, width**-0.5)
    down = torch.empty(experts, width, hidden, device=device, dtype=kept).normal_(0, hidden**-0.5)
    leaves, seen = (x, gate, gate_up, down), torch.ones_like(x)
    results = sum(leaf.nbytes for leaf in leaves) + seen.nbytes  # gradients, and what the operation gives
    matrices = 3 * width * hidden * kept.itemsize  # bytes of an expert
    given = implementations(width, hidden, experts, 2 * tokens * active * matrices)
    goals: tuple[Goal, ...] = ()
    if device == "cuda":
        given |= {UNFUSED: unfused}
        goals = Goal("speed", 1.5, (UNFUSED,)), Goal("memory", 0.5, (UNFUSED,))
    elif not rounded and given and (experts, tokens, active, width, hidden) in AIMED_AT:
        goals = (Goal("speed", 1.3, tuple(given)),)
    peers: dict[str, Work] = {}
    for name, function in given.items():
        theirs = partial(function, expert)
        peers[name] = both_ways(cast_by_torch(theirs, dtype) if rounded else theirs, *leaves, seen=seen)

    def ours(order: Tensor | None) -> Work:
        return both_ways(
            lambda a, g, u, d: moe_mlp(a, expert, g, u, d, load, order, rounded=rounded), *leaves, seen=seen
        )

    shape = f"{experts} × {width}×{hidden}, {tokens} tokens × {active}"
    flops = 3 * 6 * tokens * active * width * hidden
    yield Case("moe_mlp", shape, flops, ours(None), peers, goals, results=results)
    sorted_here = {"the same, sorting the rows": ours(None)}
    yield Case("moe_mlp, order given", shape, flops, ours(rows_by_expert(expert)), sorted_here, results=results)


def _few_rows(device: str, dtype: torch.dtype, experts: int, tokens: int, active: int, width: int, hidden: int) -> Case:
    def draw(*shape: int) -> Tensor:
        return torch.empty(*shape, device=device, dtype=dtype).normal_(0, shape[-1] ** -0.5)

    x, expert, gate = draw(tokens, width), routed(tokens, experts, active).to(device), draw(tokens, active).abs()
    gate_up, down = draw(experts, 2 * hidden, width), draw(experts, width, hidden)
    load = expert.flatten().bincount(minlength=experts)
    given = implementations(width, hidden, experts, tokens * active * 3 * width * hidden * dtype.itemsize)
    return Case(
        "moe_mlp, few rows",
        f"{tokens} tokens × {active}, {experts} × {width}×{hidden}",
        6 * tokens * active * width * hidden,
        without_gradients(moe_mlp, x, expert, gate, gate_up, down, load),
        {name: without_gradients(function, expert, x, gate, gate_up, down) for name, function in given.items()},
    )


def implementations(width: int, hidden: int, experts: int, gathered: int) -> dict[str, Experts]:
    """DeepSeek-V3's experts of `transformers` in each implementation that torch alone runs, by its name; none without
    it. `gathered` are bytes of batched_mm, as above."""
    if not importlib.util.find_spec("transformers"):
        return {}
    names = ["grouped_mm", "eager", "batched_mm"]
    if gathered > MOST_GATHERED:
        names.remove("batched_mm")
        print(f"transformers batched_mm is left out: its matrices would be {gathered >> 30} GiB", flush=True)
    return {f"transformers {name}": _experts(name, width, hidden, experts) for name in names}


def _experts(implementation: str, width: int, hidden: int, experts: int) -> Experts:
    """One of them, as a function of (expert, x, gate, gate_up, down)."""
    config = importlib.import_module("transformers").DeepseekV3Config(
        hidden_size=width, moe_intermediate_size=hidden, n_routed_experts=experts
    )
    config._experts_implementation = implementation
    theirs = importlib.import_module("transformers.models.deepseek_v3.modeling_deepseek_v3").DeepseekV3Experts
    with torch.device("meta"):
        module = theirs(config)

    def function(expert: Tensor, x: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        matrices = {"gate_up_proj": gate_up, "down_proj": down}
        return torch.func.functional_call(module, matrices, (x, expert, gate.to(x.dtype)))

    return function


def unfused(expert_TK: Tensor, x_TD: Tensor, gate_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """The experts by torch's operations one by one: rows sorted, gathered, multiplied by `grouped_mm`, put back."""
    active = expert_TK.shape[1]
    order_M = rows_by_expert(expert_TK)
    ends_E = expert_TK.flatten().bincount(minlength=len(down_EDF)).cumsum(0).to(torch.int32)
    pre_M2F = F.grouped_mm(x_TD[order_M // active], gate_up_E2FD.transpose(-2, -1), offs=ends_E)
    a_MF, b_MF = pre_M2F.chunk(2, -1)
    y_MD = F.grouped_mm(F.silu(a_MF) * b_MF, down_EDF.transpose(-2, -1), offs=ends_E)
    weighted_MD = y_MD * gate_TK.flatten()[order_M, None].to(y_MD.dtype)
    return torch.zeros_like(x_TD).index_add(0, order_M // active, weighted_MD)
