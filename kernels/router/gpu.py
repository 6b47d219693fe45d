"""The gate in Triton: what lies between the logits and the experts in one kernel, and the way back in another.

Rows are sorted by counting: each program counts its rows of every expert, sums over programs before it say where its
rows of an expert begin, and within a program a row comes behind those before it: no race decides.

The choice goes by whole numbers that ascend as the affinities do and hold the expert's place below them, so each is
there once: ties fall to the lower expert, what is not a number comes first, as the reference sorts, and whatever the
affinities are, an expert that there is comes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.kernels.dispatch import INTERPRETED
from gristmill.kernels.router.reference import Choice
from gristmill.kernels.tiles import tuned


@dataclass(frozen=True)
class Held:
    """Affinities that a program holds, of a token at least; warps: one needs no barrier in sums and choices."""

    numbers: int
    warps: int


@dataclass(frozen=True)
class Sorting:
    """Rows that a program counts and puts into their places; experts that are counted, and rows that are compared with
    all of them, at a time, at most; warps."""

    rows: int
    experts: int
    compared: int
    warps: int


CHOICE = SLOPE = Held(8192 if INTERPRETED else 512, 1)
SORTED = Sorting(256, 256, 32, 4)
FEWEST = 16  # smaller groups are padded to it, so that fewer sizes are compiled
LOWEST = tl.constexpr(-(2**63))  # below every affinity: of what is not there, or was chosen already


@triton.jit
def _key(value, low):
    """Of float32 a number that ascends with (value, low), NaN highest; low, from 0, lies in the lower half.

    There is no −0 among sums of an affinity, which is never −0, and a bias."""
    bits = value.to(tl.int32, bitcast=True)
    order = tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | low.to(tl.int64)


@triton.jit
def _value(key):
    """The value of a key."""
    order = (key >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _in_best_groups(
    key, groups, groups_allowed, PAIRS: tl.constexpr, TOKENS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """Keys of (TOKENS, GROUPS · SIZE), those outside the best groups lowered to −∞."""
    grouped = tl.reshape(key, (TOKENS, GROUPS, SIZE))
    first = tl.max(grouped, 2)
    score = _value(first)
    if PAIRS:
        score += _value(tl.max(tl.where(grouped == first[:, :, None], LOWEST, grouped), 2))
    group = tl.arange(0, GROUPS)[None, :]
    rank = tl.where(group < groups, _key(score, GROUPS - 1 - group), LOWEST)
    for _ in range(groups_allowed):
        rank = tl.where(rank == tl.max(rank, 1)[:, None], LOWEST, rank)
    lowered = _key(tl.full((TOKENS, GROUPS, SIZE), -float("inf"), tl.float32), grouped & 0x7FFFFFFF)
    grouped = tl.where((rank == LOWEST)[:, :, None] | (grouped == LOWEST), grouped, lowered)
    return tl.reshape(grouped, (TOKENS, GROUPS * SIZE))


@triton.jit(do_not_specialize=["tokens"])
def _choose(
    logit_ptr, bias_ptr, score_ptr, expert_ptr, gate_ptr, tokens, groups, size, chosen, groups_allowed, scale,
    SIGMOID: tl.constexpr, NORMALISED: tl.constexpr,
    TOKENS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """Of some tokens: affinities, experts and gates."""
    LAST: tl.constexpr = GROUPS * SIZE - 1
    experts = groups * size
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    place = tl.arange(0, GROUPS * SIZE)  # of groups that are padded to SIZE
    expert = place // SIZE * size + place % SIZE
    real = (place % SIZE < size) & (expert < experts)
    there = (token < tokens)[:, None]
    here = there & real[None, :]
    at = token[:, None] * experts + expert[None, :]
    logit = tl.load(logit_ptr + at, mask=here, other=0.0)
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logit))
    else:
        most = tl.max(tl.where(here, logit, -float("inf")), 1)
        score = tl.exp(logit - tl.where(there, most[:, None], 0.0))
        score = score / tl.where(there, tl.sum(tl.where(here, score, 0.0), 1)[:, None], 1.0)
    score = tl.where(here, score, 0.0)
    tl.store(score_ptr + at, score, mask=here)
    bias = tl.load(bias_ptr + expert, mask=real, other=0.0)
    key = tl.where(here, _key(score + bias[None, :], LAST - place[None, :]), LOWEST)
    if GROUPS > 1:
        key = _in_best_groups(key, groups, groups_allowed, SIGMOID, TOKENS, GROUPS, SIZE)
    choice = tl.arange(0, CHOSEN)[None, :]
    gate, found = tl.zeros((TOKENS, CHOSEN), tl.float32), tl.zeros((TOKENS, CHOSEN), tl.int32)
    for k in range(chosen):
        best = tl.max(key, 1)[:, None]
        picked = key == best
        gate = tl.where(choice == k, tl.sum(tl.where(picked, score, 0.0), 1)[:, None], gate)
        found = tl.where(choice == k, LAST - best.to(tl.int32), found)
        key = tl.where(picked, LOWEST, key)
    if NORMALISED:
        gate = gate / (tl.sum(gate, 1) + 1e-20)[:, None]
    to, wanted = token[:, None] * chosen + choice, there & (choice < chosen)
    tl.store(gate_ptr + to, gate * scale, mask=wanted)
    tl.store(expert_ptr + to, (found // SIZE * size + found % SIZE).to(tl.int64), mask=wanted)


@triton.jit(do_not_specialize=["rows"])
def _count(expert_ptr, count_ptr, rows, experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """How many of a program's rows each expert has, a block of EXPERTS at a time."""
    block = tl.program_id(0).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    own = tl.load(expert_ptr + row, mask=row < rows, other=-1).to(tl.int32)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    count = tl.sum((own[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(count_ptr + block * experts + expert, count.to(tl.int64), mask=expert < experts)


@triton.jit(do_not_specialize=["rows"])
def _place(expert_ptr, start_ptr, order_ptr, rows, experts, ROWS: tl.constexpr, OTHERS: tl.constexpr):
    """A program's rows to their places; `start` says where its first row of each expert goes."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    place = tl.arange(0, ROWS)
    there = first + place < rows
    own = tl.load(expert_ptr + first + place, mask=there, other=-1).to(tl.int32)
    before = tl.zeros((ROWS,), tl.int32)  # rows of its own expert
    for others in range(0, ROWS, OTHERS):  # not all at once, which would spill registers
        other = others + tl.arange(0, OTHERS)
        its = tl.load(expert_ptr + first + other, mask=first + other < rows, other=-1).to(tl.int32)
        before += tl.sum(((own[:, None] == its[None, :]) & (other[None, :] < place[:, None])).to(tl.int32), 1)
    start = tl.load(start_ptr + tl.program_id(0).to(tl.int64) * experts + own, mask=there, other=0)
    tl.store(order_ptr + start + before, first + place, mask=there)


def choose(
    logit_TE: Tensor, bias_E: Tensor, how: Choice, sizes: Held | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Experts and gates of each token, and the affinities of all: (T, K), (T, K), (T, E)."""
    (tokens, experts), score_TE = logit_TE.shape, torch.empty_like(logit_TE)
    expert_TK = torch.empty(tokens, how.chosen, dtype=torch.int64, device=logit_TE.device)
    gate_TK = score_TE.new_empty(tokens, how.chosen)
    sizes = sizes or tuned("router.choice", logit_TE.device, CHOICE)
    size, groups = experts // how.groups, triton.next_power_of_2(how.groups)
    padded = max(FEWEST, triton.next_power_of_2(size))
    count = max(1, sizes.numbers // (groups * padded))
    if tokens:
        _choose[(triton.cdiv(tokens, count),)](
            logit_TE, bias_E.float().contiguous(), score_TE, expert_TK, gate_TK,
            tokens, how.groups, size, how.chosen, how.groups_allowed, float(how.scale),
            SIGMOID=how.affinity == "sigmoid", NORMALISED=how.normalised, TOKENS=count, GROUPS=groups, SIZE=padded,
            CHOSEN=max(FEWEST, triton.next_power_of_2(how.chosen)), num_warps=sizes.warps,
        )  # fmt: skip
    return expert_TK, gate_TK, score_TE


def sort_rows(expert_TK: Tensor, experts: int, sizes: Sorting | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Loads, the rows in the order of their experts, and where each expert's end: (E,), (M,), (E,)."""
    sizes, rows = sizes or tuned("router.sorting", expert_TK.device, SORTED), expert_TK.numel()
    blocks = triton.cdiv(rows, sizes.rows)
    count_PE = torch.empty(blocks, experts, dtype=torch.int64, device=expert_TK.device)
    order_M = torch.empty(rows, dtype=torch.int64, device=expert_TK.device)
    if rows:
        at_once = min(sizes.experts, triton.next_power_of_2(experts))
        _count[(blocks, triton.cdiv(experts, at_once))](
            expert_TK, count_PE, rows, experts, ROWS=sizes.rows, EXPERTS=at_once, num_warps=sizes.warps
        )
    upto_PE = count_PE.cumsum(0)
    load_E = count_PE.sum(0)
    ends_E = load_E.cumsum(0)
    if rows:
        start_PE = upto_PE - count_PE + (ends_E - load_E)
        _place[(blocks,)](
            expert_TK, start_PE, order_M, rows, experts,
            ROWS=sizes.rows, OTHERS=min(sizes.compared, sizes.rows), num_warps=sizes.warps,
        )  # fmt: skip
    return load_E, order_M, ends_E


@triton.jit(do_not_specialize=["tokens"])
def _slope(
    score_ptr, expert_ptr, grad_gate_ptr, grad_score_ptr, slope_ptr, tokens, experts, chosen, scale,
    SIGMOID: tl.constexpr, NORMALISED: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits of some tokens, from those of their gates and affinities."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    there, e = token < tokens, tl.arange(0, EXPERTS)[None, :]
    at, here = token[:, None] * experts + e, there[:, None] & (e < experts)
    score = tl.load(score_ptr + at, mask=here, other=0.0)
    slope = tl.load(grad_score_ptr + at, mask=here, other=0.0)
    total, along = tl.zeros((TOKENS,), tl.float32) + 1e-20, tl.zeros((TOKENS,), tl.float32)
    if NORMALISED:
        for k in range(chosen):
            expert = tl.load(expert_ptr + token * chosen + k, mask=there, other=0)
            own = tl.load(score_ptr + token * experts + expert, mask=there, other=0.0)
            total += own
            along += own * tl.load(grad_gate_ptr + token * chosen + k, mask=there, other=0.0)
    for k in range(chosen):
        expert = tl.load(expert_ptr + token * chosen + k, mask=there, other=0)
        grad = tl.load(grad_gate_ptr + token * chosen + k, mask=there, other=0.0)
        if NORMALISED:
            grad = (grad - along / total) / total
        slope += tl.where(e == expert[:, None], (scale * grad)[:, None], 0.0)
    if SIGMOID:
        slope = slope * score * (1.0 - score)
    else:
        slope = score * (slope - tl.sum(slope * score, 1)[:, None])
    tl.store(slope_ptr + at, slope, mask=here)


def gradient_of_logits(
    score_TE: Tensor, expert_TK: Tensor, grad_gate_TK: Tensor, grad_score_TE: Tensor, how: Choice,
    sizes: Held | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of the logits, (T, E)."""
    slope_TE, (tokens, experts) = torch.empty_like(score_TE), score_TE.shape
    sizes = sizes or tuned("router.slope", score_TE.device, SLOPE)
    padded = max(FEWEST, triton.next_power_of_2(experts))
    count = max(1, sizes.numbers // padded)
    if tokens:
        _slope[(triton.cdiv(tokens, count),)](
            score_TE, expert_TK, grad_gate_TK.contiguous(), grad_score_TE.contiguous(), slope_TE,
            tokens, experts, how.chosen, float(how.scale), SIGMOID=how.affinity == "sigmoid",
            NORMALISED=how.normalised, TOKENS=count, EXPERTS=padded, num_warps=sizes.warps,
        )  # fmt: skip
    return slope_TE


class TritonRouter(torch.autograd.Function):
    """The gate in float32 on a GPU, with both gradients; nothing waits for the host."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, how: Choice):
        logit_TE = x_TD @ weight_ED.t()  # which recomputation may keep, and give again: it is not written to
        expert_TK, gate_TK, score_TE = choose(logit_TE, bias_E, how)
        sorted_ = sort_rows(expert_TK, len(weight_ED))
        ctx.save_for_backward(x_TD, weight_ED, score_TE, expert_TK)
        ctx.mark_non_differentiable(expert_TK, *sorted_)
        ctx.how = how
        return expert_TK, gate_TK, score_TE, *sorted_

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _expert: Any, grad_gate_TK: Tensor, grad_score_TE: Tensor, *_: Any):
        (x_TD, weight_ED, score_TE, expert_TK), how = ctx.saved_tensors, ctx.how
        slope_TE = gradient_of_logits(score_TE, expert_TK, grad_gate_TK, grad_score_TE, how)
        grad_x = slope_TE @ weight_ED if ctx.needs_input_grad[0] else None
        grad_weight = slope_TE.t() @ x_TD if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None
