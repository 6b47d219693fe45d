"""The routed experts as one operation: rows to their experts, SwiGLU there, and back weighted (V3 equation 12)."""

from __future__ import annotations

import torch
from torch import Tensor

from gristmill.kernels.dispatch import (
    INTEGERS,
    chosen,
    in_own_dtypes,
    readable,
    require,
    require_device,
    require_dtype,
    require_ranks,
    require_shapes,
    runs_compiled,
)
from gristmill.kernels.expert_rows import check_order
from gristmill.kernels.moe_mlp import library
from gristmill.kernels.moe_mlp.cpu import MoeMlp
from gristmill.kernels.moe_mlp.native import SOURCE, NativeMoeMlp, few_rows, is_other
from gristmill.kernels.moe_mlp.reference import moe_mlp_reference
from gristmill.kernels.operations import graded

__all__ = ["experts_are_compiled", "moe_mlp"]

FEW_ROWS = 24
"""So many rows an expert on average, on a CPU: with fewer, packing its matrices for them costs more than it saves."""


def experts_are_compiled(down_EDF: Tensor) -> bool:
    """Whether compiled code takes experts with such matrices: then few rows read those of their own experts alone."""
    return runs_compiled(down_EDF, SOURCE)


@in_own_dtypes
def moe_mlp(
    x_TD: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    load_E: Tensor,
    order_M: Tensor | None = None,
    *,
    rounded: bool = False,
) -> Tensor:
    """Σₖ gateₖ · down(silu(a) · b) with (a, b) = gate_up·x of each chosen expert, (T, D), in x's dtype.

    Differentiable once, in x, gate and both stacks of matrices. For the backward pass it keeps x, gate, the matrices,
    the order of the rows (T·K integers) and gate_up·x, (T·K, 2F): neither permuted inputs, which are gathered again,
    nor activations and experts' outputs. Two runs give equal bits, and on a GPU nothing waits for the host.

    Args:
        x_TD: tokens, (T, D).
        expert_TK: the experts each token chose, (T, K), integers in [0, E).
        gate_TK: the weight of each choice, (T, K), of any floating dtype.
        gate_up_E2FD: each expert's gate matrix above its up matrix, (E, 2F, D).
        down_EDF: each expert's down matrix, (E, D, F).
        load_E: how many rows each expert has, (E,): the counts of expert_TK.
        order_M: the rows t·K + k in the order of their experts, those of one in the order of tokens, int64, (T·K,), as
            `route` gives it; without it they are sorted here.
        rounded: whether products take their operands rounded to bfloat16, as in `linear`; on a CPU alone.

    Raises:
        TypeError: x is not floating, a stack has another dtype, expert, load or order is not of integers, or gate is.
        ValueError: shapes or devices do not fit, rounding is asked for on a GPU, or (on a CPU; on a GPU where
            GRISTMILL_KERNELS_CHECK=1) an expert is out of range, the load or the order is not that of expert_TK; on a
            GPU, there are 2³⁰ rows or more.
    """
    _check(x_TD, expert_TK, gate_TK, gate_up_E2FD, down_EDF, load_E, order_M)
    implementation = chosen("moe_mlp", x_TD, SOURCE, traceable=False)
    if order_M is not None and readable(order_M) and (implementation != "compiled" or is_other(order_M, expert_TK)):
        check_order(order_M, expert_TK)
    if implementation == "reference":
        return moe_mlp_reference(x_TD, expert_TK, gate_TK, gate_up_E2FD, down_EDF, rounded=rounded)
    if implementation == "gpu":
        require(not rounded, ValueError, "moe_mlp: rounded", rounded, "tensors in bfloat16 on a GPU")
        from gristmill.kernels.moe_mlp.gpu import TritonMoeMlp

        return TritonMoeMlp.apply(x_TD, expert_TK, gate_TK, gate_up_E2FD, down_EDF, load_E, order_M)
    if implementation == "compiled":
        wanted = graded(x_TD, gate_TK, gate_up_E2FD, down_EDF)
        if not wanted and not rounded and expert_TK.numel() < FEW_ROWS * len(down_EDF):
            return few_rows(x_TD, expert_TK, gate_TK, gate_up_E2FD, down_EDF)
        return NativeMoeMlp.apply(x_TD, expert_TK, gate_TK, gate_up_E2FD, down_EDF, order_M, load_E, rounded)
    if implementation == "operation":
        wanted = graded(x_TD, gate_TK, gate_up_E2FD, down_EDF)
        return library.moe_mlp(x_TD, expert_TK, gate_TK, gate_up_E2FD, down_EDF, load_E, order_M, rounded, wanted)[0]
    return MoeMlp.apply(x_TD, expert_TK, gate_TK, gate_up_E2FD, down_EDF, load_E, order_M, rounded)


def _check(
    x: Tensor, expert: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor, load: Tensor, order: Tensor | None
) -> None:
    name = "moe_mlp"
    require_ranks(name, x_TD=(x, 2), expert_TK=(expert, 2), gate_up_E2FD=(gate_up, 3), down_EDF=(down, 3))
    require(x.is_floating_point(), TypeError, "moe_mlp: x_TD", x.dtype, "a floating dtype")
    require_dtype(name, x.dtype, "x_TD", gate_up_E2FD=gate_up, down_EDF=down)
    require(expert.dtype in INTEGERS, TypeError, "moe_mlp: expert_TK", expert.dtype, "integers")
    require(load.dtype in INTEGERS, TypeError, "moe_mlp: load_E", load.dtype, "integers")
    require(gate.is_floating_point(), TypeError, "moe_mlp: gate_TK", gate.dtype, "a floating dtype")
    (tokens, width), (experts, _, hidden), chosen_each = x.shape, down.shape, expert.shape[1]
    require_shapes(
        name, expert_TK=(expert, (tokens, chosen_each)), gate_TK=(gate, (tokens, chosen_each)),
        gate_up_E2FD=(gate_up, (experts, 2 * hidden, width)), down_EDF=(down, (experts, width, hidden)),
        load_E=(load, (experts,)),
    )  # fmt: skip
    if order is not None:
        require(order.dtype == torch.int64, TypeError, "moe_mlp: order_M", order.dtype, torch.int64)
        require_shapes(name, order_M=(order, (tokens * chosen_each,)))
    require_device(
        name, "x_TD", x, expert_TK=expert, gate_TK=gate, gate_up_E2FD=gate_up, down_EDF=down, load_E=load, order_M=order
    )
    if readable(expert):
        _check_indices(expert, load)


def _check_indices(expert: Tensor, load: Tensor) -> None:
    """The checks that read the tensors."""
    if expert.numel():
        low, high = (int(bound) for bound in expert.aminmax())
        within = low >= 0 and high < len(load)
        require(within, ValueError, "moe_mlp: range of expert_TK", (low, high), f"experts from 0 to {len(load) - 1}")
    counts = torch.bincount(expert.reshape(-1), minlength=len(load))
    if not torch.equal(counts, load):
        raise ValueError(f"moe_mlp: load_E is {load.tolist()}; wanted the counts of expert_TK, {counts.tolist()}")
