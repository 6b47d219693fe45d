"""Muon's orthogonal factor of stacks of matrices (Keller Jordan et al., 2024, kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

import torch
from torch import Tensor

from gristmill.kernels.blocks import empty
from gristmill.kernels.compiled import needed
from gristmill.kernels.dispatch import chosen, in_own_dtypes, require
from gristmill.kernels.optim.reference import NEWTON_SCHULZ, orthogonalised_reference

SOURCE = "optim/newton_schulz.cpp"


@in_own_dtypes
@torch.no_grad()
def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """Towards U·Vᵀ of each matrix U·S·Vᵀ, by a quintic Newton–Schulz iteration: (…, rows, columns), in the same dtype.

    Each matrix is divided by its norm; then X ← (a + b·XXᵀ + c·(XXᵀ)²)·X, which takes singular values above about 0.03
    to between 0.68 and 1.13 in five steps. A matrix of zeros stays one, and what is not a number fills its matrix
    alone. On a CPU in float32 by newton_schulz.cpp, which computes half of each symmetric product, and gives a matrix
    the same bits in every stack and by any number of threads; elsewhere by torch's batched products.

    Args:
        matrices: one matrix, or a stack in any leading dimensions.
        steps: iterations.

    Raises:
        TypeError: the dtype is none of a floating point.
        ValueError: there are fewer than two dimensions, or steps are below 0.
    """
    require(matrices.is_floating_point(), TypeError, "orthogonalised: dtype", matrices.dtype, "a floating point")
    require(matrices.ndim >= 2, ValueError, "orthogonalised: rank", matrices.ndim, "2 or more")
    require(steps >= 0, ValueError, "orthogonalised: steps", steps, "0 or more")
    path = chosen("orthogonalised", matrices, SOURCE if matrices.numel() else None, triton=None)
    if path == "operation":
        return torch.ops.gristmill.orthogonalised(matrices, steps)
    if path != "compiled":
        return orthogonalised_reference(matrices, steps)
    rows, columns = matrices.shape[-2:]
    given, made, stacked = matrices.contiguous(), empty(*matrices.shape), matrices.shape[:-2].numel()
    needed(SOURCE)("orthogonalise", given, made, stacked, rows, columns, steps, *NEWTON_SCHULZ)
    return made
