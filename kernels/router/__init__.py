"""The gate of a mixture of experts (V3 equations 12 to 16; with softmax V2's, section 2.2.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.kernels.blocks import empty
from gristmill.kernels.compiled import needed
from gristmill.kernels.dispatch import chosen, in_own_dtypes, require, require_device
from gristmill.kernels.linear import LEAST_ROWS, linear
from gristmill.kernels.router import library
from gristmill.kernels.router.reference import Choice, Routes, route_reference

__all__ = ["Choice", "Routes", "route"]
SOURCE = "router/cpu.cpp"
TAKES = "float32, and on a CPU a contiguous weight_ED"


@in_own_dtypes
def route(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, how: Choice) -> Routes:
    """Chosen experts (T, K), highest biased affinity first; their gates (T, K), all affinities (T, E) and loads (E,).

    The bias decides the choice alone (equation 16). Of equal affinities the expert with the lower number is chosen.
    Gates and affinities are differentiable once in x and the weight; loads, int64, are the counts of the choices. For
    what multiplies rows expert by expert there are the rows in the order of their experts, those of one in the order of
    tokens, (T·K,), and where each expert's end, (E,), both int64. On a GPU nothing waits for the host.

    Args:
        x_TD: tokens, (T, D), in the weight's dtype.
        weight_ED: a centroid an expert, (E, D).
        bias_E: what is added to the affinities for the choice, (E,), of any floating dtype.
        how: the numbers of the choice.

    Raises:
        TypeError: x and the weight differ in dtype, or one of the three is not floating.
        ValueError: shapes or devices do not fit, groups do not divide the experts or hold fewer than are chosen.
    """
    _check(x_TD, weight_ED, bias_E)
    _check_choice(len(weight_ED), how)
    source, fits = SOURCE if weight_ED.is_contiguous() else None, x_TD.dtype == torch.float32
    implementation = chosen("router", x_TD, source, triton=fits, traceable=False, takes=TAKES)
    if implementation == "compiled":
        return Routes(*NativeRouter.apply(x_TD, weight_ED, bias_E, how))
    if implementation == "gpu":
        from gristmill.kernels.router.gpu import TritonRouter

        return Routes(*TritonRouter.apply(x_TD, weight_ED, bias_E, how))
    if implementation == "operation":
        numbers = (how.chosen, how.affinity, how.groups, how.groups_allowed, how.normalised, how.scale)
        gate_TK, score_TE, expert_TK, *counted = library.route(x_TD, weight_ED, bias_E, *numbers)
        return Routes(expert_TK, gate_TK, score_TE, *counted)
    return route_reference(x_TD, weight_ED, bias_E, how)


def _check(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor) -> None:
    dtype = weight_ED.dtype
    if x_TD.dtype != dtype:
        raise TypeError(f"route: dtype of x_TD is {x_TD.dtype}; wanted {dtype}, that of weight_ED")
    require(dtype.is_floating_point, TypeError, "route: dtype of weight_ED", dtype, "a floating one")
    require(bias_E.is_floating_point(), TypeError, "route: dtype of bias_E", bias_E.dtype, "a floating one")
    require(x_TD.ndim == 2, ValueError, "route: rank of x_TD", x_TD.ndim, 2)
    require(weight_ED.ndim == 2, ValueError, "route: rank of weight_ED", weight_ED.ndim, 2)
    experts, width = weight_ED.shape
    require(x_TD.shape[1] == width, ValueError, "route: width of x_TD", x_TD.shape[1], width)
    require(bias_E.shape == (experts,), ValueError, "route: shape of bias_E", bias_E.shape, (experts,))
    require_device("route", "x_TD", x_TD, weight_ED=weight_ED, bias_E=bias_E)


def _check_choice(experts: int, how: Choice) -> None:
    groups, allowed = how.groups, how.groups_allowed
    require(experts % groups == 0, ValueError, "route: groups", groups, f"a divisor of {experts} experts")
    least = 2 if how.affinity == "sigmoid" and groups > 1 else 1
    require(experts // groups >= least, ValueError, "route: experts a group", experts // groups, f">= {least}")
    require(allowed <= groups, ValueError, "route: groups allowed", allowed, "1 to groups")
    held = experts // groups * allowed
    require(how.chosen <= held, ValueError, "route: experts chosen", how.chosen, f"1 to {held}")


def numbers_of(x_TD: Tensor, weight_ED: Tensor, how: Choice) -> tuple[int | float, ...]:
    """What `cpu.cpp` is told of sizes and of gates, either way."""
    sizes = (*x_TD.shape, len(weight_ED), how.chosen)
    return *sizes, int(how.affinity == "sigmoid"), int(how.normalised), float(how.scale)


class NativeRouter(torch.autograd.Function):
    """The gate by `cpu.cpp`, with both gradients."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, how: Choice):
        x_TD, experts, tokens = x_TD.contiguous(), len(weight_ED), len(x_TD)
        many = tokens >= LEAST_ROWS and x_TD.numel() > 0  # an empty tensor is a null pointer, which stands for none
        # Torch's product recomputation may keep and give again: it is not to be written to
        score_TE = x_TD.new_empty(tokens, experts) if many else linear(x_TD, weight_ED).clone()
        gate_TK = x_TD.new_empty(tokens, how.chosen)
        sizes = (tokens, how.chosen), (tokens * how.chosen,), (experts,), (experts,)
        expert_TK, order_M, load_E, ends_E = (x_TD.new_empty(size, dtype=torch.int64) for size in sizes)
        ctx.numbers = numbers_of(x_TD, weight_ED, how)
        given = x_TD if many else None, weight_ED, score_TE, bias_E.float().contiguous()
        made = expert_TK, gate_TK, load_E, order_M, ends_E
        needed(SOURCE)("route", *given, *made, how.groups, how.groups_allowed, *ctx.numbers)
        ctx.save_for_backward(x_TD, weight_ED, score_TE, expert_TK, order_M, ends_E)
        ctx.mark_non_differentiable(expert_TK, load_E, order_M, ends_E)
        ctx.set_materialize_grads(False)  # a loss seldom asks for all affinities
        return expert_TK, gate_TK, score_TE, load_E, order_M, ends_E

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _expert: Any, grad_gate_TK: Tensor | None, grad_score_TE: Tensor | None, *_: Any):
        x_TD, weight_ED, score_TE, expert_TK, order_M, ends_E = ctx.saved_tensors
        grad_gate = x_TD.new_zeros(expert_TK.shape) if grad_gate_TK is None else grad_gate_TK.contiguous()
        grad_score = None if grad_score_TE is None else grad_score_TE.contiguous()
        grad_x, grad_weight = (
            empty(*to.shape) if wanted else None
            for to, wanted in zip((x_TD, weight_ED), ctx.needs_input_grad, strict=False)
        )
        slope_TE = torch.empty_like(score_TE)
        given = x_TD, weight_ED, score_TE, expert_TK, order_M, ends_E, grad_gate, grad_score
        needed(SOURCE)("route_backward", *given, slope_TE, grad_x, grad_weight, *ctx.numbers)
        return grad_x, grad_weight, None, None
