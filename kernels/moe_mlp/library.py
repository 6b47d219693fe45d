"""The routed experts as an operation of torch.library."""

from __future__ import annotations

import torch
from torch import Tensor

from gristmill.kernels import moe_mlp as public
from gristmill.kernels.dispatch import chosen
from gristmill.kernels.moe_mlp import cpu, native
from gristmill.kernels.moe_mlp.reference import moe_mlp_reference
from gristmill.kernels.operations import Context, gradient, gradients_in_torch, not_made, operation, with_saved

GRADED = "x_TD", "gate_TK", "gate_up_E2FD", "down_EDF"


def _fake(
    x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, load_E: Tensor,
    order_M: Tensor | None = None, rounded: bool = False, graded: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = expert_TK.numel() if graded else 0
    kept_M = x_TD.new_empty(rows, dtype=torch.int64)
    return x_TD.new_empty(x_TD.shape), kept_M, x_TD.new_empty(rows, gate_up_E2FD.shape[1])


@operation(_fake)
def moe_mlp(
    x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, load_E: Tensor,
    order_M: Tensor | None = None, rounded: bool = False, graded: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The result, and for the backward pass the order of the rows, (M,), and gate_up·x, (M, 2F).

    Those have no rows where no gradient is asked for, and are minus infinity where it is taken from torch.
    """
    inputs = x_TD, expert_TK, gate_TK, gate_up_E2FD, down_EDF, load_E, order_M
    out_TD, saved = with_saved(
        lambda *tensors: public.moe_mlp(*tensors, rounded=rounded), inputs, of=(0, 2, 3, 4) if graded else ()
    )
    kept_M, pre_M2F = saved[-2:] or map(not_made, _fake(*inputs, rounded, graded)[1:])
    return out_TD, kept_M if order_M is None else kept_M.clone(), pre_M2F


@gradient(moe_mlp, *GRADED, kept=(1, 2))
def moe_mlp_backward(
    needs: list[bool], grad: Tensor, kept_M: Tensor, pre_M2F: Tensor, x_TD: Tensor, expert_TK: Tensor,
    gate_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, load_E: Tensor, order_M: Tensor | None, rounded: bool,
    graded: bool,
):  # fmt: skip
    implementation, inputs = chosen("moe_mlp_backward", x_TD, native.SOURCE), (x_TD, gate_TK, gate_up_E2FD, down_EDF)
    if implementation == "reference":

        def again(x: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
            return moe_mlp_reference(x, expert_TK, gate, gate_up, down, rounded=rounded)

        return gradients_in_torch(again, inputs, grad)
    if implementation == "gpu":
        from gristmill.kernels.moe_mlp.gpu import gradients

        slope_M2F = torch.empty_like(pre_M2F)  # what a graph has kept is not to be written over
        saved = x_TD, gate_TK.contiguous(), gate_up_E2FD, down_EDF, load_E.cumsum(0), kept_M, pre_M2F
        return list(gradients(*saved, slope_M2F, grad))
    ends_E = load_E.long().cumsum(0)
    if implementation == "cpu":
        operand, bounds = cpu.nearest if rounded else cpu._as_it_is, [0, *ends_E.tolist()]
        return _graded(cpu.MoeMlp.backward(Context(*inputs, kept_M, pre_M2F, operand=operand, bounds=bounds), grad))
    x, gate, gate_up, down = x_TD.contiguous(), gate_TK.float().contiguous(), *(w.contiguous() for w in inputs[2:])
    sizes = (*expert_TK.shape, len(down), x.shape[1], down.shape[2])
    bounds_E = torch.cat((ends_E.new_zeros(1), ends_E))
    context = Context(
        x, gate, gate_up, down, bounds_E, kept_M, pre_M2F, sizes=sizes, rounded=int(rounded), gate_dtype=gate_TK.dtype
    )
    return _graded(native.NativeMoeMlp.backward(context, grad))


def _graded(gradients: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Those of x, the gates and both stacks, of one for each input."""
    return [gradients[place] for place in (0, 2, 3, 4)]
