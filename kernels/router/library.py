"""The gate of a mixture of experts as an operation of torch.library; the numbers of the choice go in one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from gristmill.kernels import router as public
from gristmill.kernels.dispatch import chosen as chosen_implementation
from gristmill.kernels.operations import Context, gradient, gradients_in_torch, operation
from gristmill.kernels.router.reference import Choice, route_reference


def _fake(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, chosen: int, affinity: str = "sigmoid", groups: int = 1,
    groups_allowed: int = 1, normalised: bool = True, scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, experts = x_TD.shape[0], weight_ED.shape[0]
    sizes = (tokens, chosen), (experts,), (tokens * chosen,), (experts,)
    expert_TK, load_E, order_M, ends_E = (x_TD.new_empty(size, dtype=torch.int64) for size in sizes)
    return x_TD.new_empty(tokens, chosen), x_TD.new_empty(tokens, experts), expert_TK, load_E, order_M, ends_E


@operation(_fake)
def route(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, chosen: int, affinity: str = "sigmoid", groups: int = 1,
    groups_allowed: int = 1, normalised: bool = True, scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gates, affinities, experts, loads, the order of rows and the experts' ends: what has a gradient comes first."""
    how = Choice(chosen, affinity, groups, groups_allowed, normalised, scale)  # type: ignore[arg-type]
    expert_TK, gate_TK, score_TE, load_E, order_M, ends_E = public.route(x_TD, weight_ED, bias_E, how)
    return gate_TK, score_TE, expert_TK, load_E, order_M, ends_E


@gradient(route, "x_TD", "weight_ED", results=(0, 1), kept=(1, 2, 4, 5), absent=True)
def route_backward(
    needs: list[bool], grad_gate_TK: Tensor | None, grad_score_TE: Tensor | None, score_TE: Tensor, expert_TK: Tensor,
    order_M: Tensor, ends_E: Tensor, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, chosen: int, affinity: str,
    groups: int, groups_allowed: int, normalised: bool, scale: float,
):  # fmt: skip
    how = Choice(chosen, affinity, groups, groups_allowed, normalised, scale)  # type: ignore[arg-type]
    source = public.SOURCE if weight_ED.is_contiguous() else None
    implementation = chosen_implementation("router_backward", x_TD, source, triton=x_TD.dtype == torch.float32)
    if implementation == "compiled":
        saved = x_TD.contiguous(), weight_ED, score_TE, expert_TK, order_M, ends_E
        context = Context(*saved, needs=needs, numbers=public.numbers_of(x_TD, weight_ED, how))
        return public.NativeRouter.backward(context, None, grad_gate_TK, grad_score_TE)[:2]
    grad_gate_TK = score_TE.new_zeros(expert_TK.shape) if grad_gate_TK is None else grad_gate_TK
    grad_score_TE = torch.zeros_like(score_TE) if grad_score_TE is None else grad_score_TE
    if implementation == "gpu":
        from gristmill.kernels.router.gpu import TritonRouter

        context = Context(x_TD, weight_ED, score_TE, expert_TK, needs=needs, how=how)
        return TritonRouter.backward(context, None, grad_gate_TK, grad_score_TE)[:2]

    def again(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, ...]:
        return route_reference(x_TD, weight_ED, bias_E, how)[1:3]

    return gradients_in_torch(again, (x_TD, weight_ED), (grad_gate_TK, grad_score_TE))
