"""The likeliest token of logits and its log-probability, as greedy decoding wants both at every step.

On a CPU in float32 by `cpu.cpp`, in one call; elsewhere by torch's operations (reference.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gristmill.kernels.compiled import needed
from gristmill.kernels.dispatch import chosen, require
from gristmill.kernels.likeliest import library
from gristmill.kernels.likeliest.reference import likeliest_reference

__all__ = ["likeliest"]
SOURCE = "likeliest/cpu.cpp"


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The place of the highest in the last dimension of (..., V), int64, and log softmax there, float32, (...) each.

    Of equal ones it is the first, and what is not a number is above all numbers. No gradient.

    Raises:
        TypeError: logits are not floating.
        ValueError: there is nothing to choose from.
    """
    require(logits.is_floating_point(), TypeError, "likeliest: logits", logits.dtype, "a floating dtype")
    some = logits.ndim > 0 and logits.shape[-1] > 0
    require(some, ValueError, "likeliest: shape of logits", logits.shape, "(..., V)")
    implementation = chosen("likeliest", logits, SOURCE, triton=None)
    if implementation == "operation":
        return library.likeliest(logits)
    if implementation != "compiled":
        return likeliest_reference(logits.detach())
    logits, columns = logits.contiguous(), logits.shape[-1]
    token = logits.new_empty(logits.shape[:-1], dtype=torch.int64)
    log_p = logits.new_empty(logits.shape[:-1])
    needed(SOURCE)("likeliest", logits, token, log_p, token.numel(), columns)
    return token, log_p
