"""AdamW over many tensors at once (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2), clipping included."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gristmill.kernels.compiled import needed
from gristmill.kernels.dispatch import chosen, require
from gristmill.kernels.optim import library
from gristmill.kernels.optim.newton_schulz import orthogonalised
from gristmill.kernels.optim.reference import AdamW, adamw_reference
from gristmill.kernels.optim.rounding import Origin
from gristmill.kernels.optim.stochastic import SOURCE, check_dtypes, check_rounding, round_stochastically, table

TAKES = (
    "tensors that are contiguous on one device; on a CPU parameters and gradients in float32 and moments all in it or "
    "all in bfloat16, on a GPU these two dtypes"
)
__all__ = ["AdamW", "Origin", "adamw", "orthogonalised", "round_stochastically"]


@torch.no_grad()
def adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    how: AdamW,
    origins: list[Origin] | None = None,
) -> None:
    """Update the parameters and both moments where they lie; gradients are only read.

    With g' = coefficient · g: m ← β₁m + (1 − β₁)g', v ← β₂v + (1 − β₂)g'², and
    p ← (1 − rate · decay) p − rate · m̂ / (√v̂ + ε), where m̂ = m / (1 − β₁ᵗ) and v̂ = v / (1 − β₂ᵗ). Moments may be
    bfloat16: they are computed in the gradient's dtype, on a GPU in float32, and rounded as they are put down: to
    nearest, or with `how.seed` stochastically (rounding.py) by the seed, the step and each tensor's origin. On a GPU
    contiguous tensors in float32 and bfloat16 are Triton's, those of equal dtypes in one launch (gpu.py); others are
    torch's.

    Raises:
        TypeError: a tensor is not floating; with a seed, gradients are not float32 or moments not bfloat16.
        ValueError: the lists differ in length, or a gradient or moment in shape or device from its parameter; the step
            is below 1; a seed without origins, or one of the numbers of the rounding is out of its range.
    """
    if is_dynamo_compiling():
        numbers = (how.rate, how.step, how.decay, how.beta1, how.beta2, how.eps, how.coefficient, how.seed)
        places = [o.stream for o in origins or ()], [o.first for o in origins or ()]
        return library.adamw(parameters, gradients, exp_avg, exp_avg_sq, *numbers, *places)
    lists = {"gradients": gradients, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, tensors in lists.items():
        require(len(tensors) == len(parameters), ValueError, f"adamw: length of {name}", len(tensors), len(parameters))
        for i, (tensor, parameter) in enumerate(zip(tensors, parameters, strict=True)):
            if tensor.shape != parameter.shape or tensor.device != parameter.device:
                got, wanted = (tuple(tensor.shape), tensor.device), (tuple(parameter.shape), parameter.device)
                raise ValueError(
                    f"adamw: shape and device of {name}[{i}] is {got}; wanted those of parameters[{i}], {wanted}"
                )
    require(how.step >= 1, ValueError, "adamw: step", how.step, "1 or more")
    for name, tensors in (("parameters", parameters), *lists.items()):
        for i, tensor in enumerate(tensors):
            if not tensor.is_floating_point():
                raise TypeError(f"adamw: dtype of {name}[{i}] is {tensor.dtype}; wanted a floating one")
    if how.seed is not None:
        check_rounding("adamw", how.seed, how.step, origins, len(parameters))
        check_dtypes("adamw", "gradients", gradients, torch.float32)
        check_dtypes("adamw", "moments", [*exp_avg, *exp_avg_sq], torch.bfloat16)
    origins = [] if how.seed is None else origins or []
    if not parameters:
        return
    every = [t for tensors in (parameters, *lists.values()) for t in tensors]
    plain = len({t.device for t in every}) == 1 and all(t.is_contiguous() for t in every)
    float32 = all(t.dtype == torch.float32 for tensors in (parameters, gradients) for t in tensors)
    moments = {t.dtype for tensors in (exp_avg, exp_avg_sq) for t in tensors}
    compiles = plain and float32 and moments in ({torch.float32}, {torch.bfloat16})
    runs = plain and {t.dtype for t in every} <= {torch.float32, torch.bfloat16}
    path = chosen("adamw", parameters[0], SOURCE if compiles else None, triton=runs, takes=TAKES)
    if path == "gpu":
        from gristmill.kernels.optim.gpu import triton_adamw

        return triton_adamw(parameters, gradients, exp_avg, exp_avg_sq, how, origins)
    if path != "compiled":
        return adamw_reference(parameters, gradients, exp_avg, exp_avg_sq, how, origins)
    addresses = [[t.data_ptr() for t in tensors] for tensors in (parameters, *lists.values())]
    counts = torch.tensor([p.numel() for p in parameters], device="cpu")
    needed(SOURCE)(
        "adamw", torch.tensor(addresses, device="cpu"), counts, len(parameters), int(moments == {torch.bfloat16}),
        float(how.coefficient), 1.0 - how.rate * how.decay, float(how.beta1), float(how.beta2), float(how.eps),
        how.rate / (1 - how.beta1**how.step), 1 / (1 - how.beta2**how.step),
        table(origins) if origins else None, how.seed or 0, how.step,
    )  # fmt: skip
