"""The gate of a mixture of experts (V3 equations 12 to 16; with softmax V2's, section 2.2.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.kernels.compiled import needed
from gristmill.kernels.dispatch import chosen, require
from gristmill.kernels.linear import LEAST_ROWS, linear, multiply
from gristmill.kernels.router import library
from gristmill.kernels.router.reference import Choice, route_reference

__all__ = ["Choice", "route"]
SOURCE = "router/cpu.cpp"


def route(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, how: Choice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chosen experts (T, K), highest biased affinity first; their gates (T, K), all affinities (T, E) and loads (E,).

    The bias decides the choice alone (equation 16). Of equal affinities the expert with the lower number is chosen.
    Gates and affinities are differentiable once in x and the weight; loads, int64, are the counts of the choices.

    Args:
        x_TD: tokens, (T, D), in the weight's dtype.
        weight_ED: a centroid an expert, (E, D).
        bias_E: what is added to the affinities for the choice, (E,).
        how: the numbers of the choice.

    Raises:
        TypeError: x and the weight differ in dtype.
        ValueError: shapes do not fit, groups do not divide the experts or hold fewer than are chosen.
    """
    experts = len(weight_ED)
    require(x_TD.dtype == weight_ED.dtype, TypeError, "route: dtype of x_TD", x_TD.dtype, f"{weight_ED.dtype}")
    require(x_TD.ndim == 2, ValueError, "route: rank of x_TD", x_TD.ndim, 2)
    require(
        x_TD.shape[1:] == weight_ED.shape[1:], ValueError, "route: width of x_TD", x_TD.shape[1], weight_ED.shape[1]
    )
    require(bias_E.shape == (experts,), ValueError, "route: shape of bias_E", tuple(bias_E.shape), (experts,))
    require(experts % how.groups == 0, ValueError, "route: groups", how.groups, f"a divisor of {experts} experts")
    least = 2 if how.affinity == "sigmoid" and how.groups > 1 else 1
    require(experts // how.groups >= least, ValueError, "route: experts a group", experts // how.groups, f">= {least}")
    require(
        1 <= how.groups_allowed <= how.groups, ValueError, "route: groups allowed", how.groups_allowed, "1 to groups"
    )
    held = experts // how.groups * how.groups_allowed
    require(1 <= how.chosen <= held, ValueError, "route: experts chosen", how.chosen, f"1 to {held}")
    source = SOURCE if weight_ED.is_contiguous() else None
    implementation = chosen("router", x_TD, source, triton=x_TD.dtype == torch.float32, traceable=False)
    if implementation == "compiled":
        return NativeRouter.apply(x_TD, weight_ED, bias_E, how)
    if implementation == "gpu":
        from gristmill.kernels.router.gpu import TritonRouter

        return TritonRouter.apply(x_TD, weight_ED, bias_E, how)
    if implementation == "operation":
        numbers = (how.chosen, how.affinity, how.groups, how.groups_allowed, how.normalised, how.scale)
        gate_TK, score_TE, expert_TK, load_E = library.route(x_TD, weight_ED, bias_E, *numbers)
        return expert_TK, gate_TK, score_TE, load_E
    return route_reference(x_TD, weight_ED, bias_E, how)


class NativeRouter(torch.autograd.Function):
    """The gate by `cpu.cpp`, with both gradients."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, how: Choice):
        x_TD, tokens, experts = x_TD.contiguous(), len(x_TD), len(weight_ED)
        score_TE = linear(x_TD, weight_ED)
        if tokens < LEAST_ROWS:  # it may be torch's, which recomputation keeps and gives again: not to be written to
            score_TE = score_TE.clone()
        expert_TK = torch.empty(tokens, how.chosen, dtype=torch.int64)
        gate_TK, load_E = x_TD.new_empty(tokens, how.chosen), torch.empty(experts, dtype=torch.int64)
        affinity = (int(how.affinity == "sigmoid"), int(how.normalised), float(how.scale))
        limits = (how.groups, how.groups_allowed)
        bias_E = bias_E.float().contiguous()
        sizes = (tokens, experts, how.chosen)
        needed(SOURCE)("choose", score_TE, bias_E, expert_TK, gate_TK, load_E, *sizes, *limits, *affinity)
        ctx.save_for_backward(x_TD, weight_ED, score_TE, expert_TK)
        ctx.mark_non_differentiable(expert_TK, load_E)
        ctx.set_materialize_grads(False)  # a loss seldom asks for all affinities
        ctx.numbers = (*sizes, *affinity)
        return expert_TK, gate_TK, score_TE, load_E

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        _expert: Tensor | None,
        grad_gate_TK: Tensor | None,
        grad_score_TE: Tensor | None,
        _load: Tensor | None,
    ):
        x_TD, weight_ED, score_TE, expert_TK = ctx.saved_tensors
        if grad_score_TE is None:
            slope_TE = torch.zeros_like(score_TE)
        else:
            slope_TE = grad_score_TE.clone(memory_format=torch.contiguous_format)
        grad_gate = torch.zeros(expert_TK.shape) if grad_gate_TK is None else grad_gate_TK.contiguous()
        needed(SOURCE)("choose_backward", score_TE, expert_TK, grad_gate, slope_TE, *ctx.numbers)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x_TD)
            multiply(slope_TE, weight_ED, grad_x)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight_ED)
            multiply(slope_TE.t(), x_TD, grad_weight)
        return grad_x, grad_weight, None, None
