"""Row by row between the products: RMSNorm (arXiv 1910.07467) and rotary embedding (arXiv 2104.09864)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.dispatch import chosen, require
from gristmill.kernels.norm_rope import cpu
from gristmill.kernels.norm_rope.reference import rms_norm_reference, rotate_halves_reference, rotate_reference

__all__ = ["rms_norm", "rotate", "rotate_halves"]


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight of the last dimension, (..., D), differentiable once in x and weight.

    Two runs give equal bits: the weight's gradient is summed over blocks of rows that depend on their number alone.

    Raises:
        TypeError: x and weight differ in dtype.
        ValueError: the shapes or devices do not fit, or eps is negative.
    """
    require(x.dtype == weight_D.dtype, TypeError, "rms_norm: weight_D", weight_D.dtype, x.dtype)
    require(x.device == weight_D.device, ValueError, "rms_norm: device of weight_D", weight_D.device, x.device)
    fits = x.ndim > 0 and weight_D.shape == x.shape[-1:]
    require(fits, ValueError, "rms_norm: shape of weight_D", tuple(weight_D.shape), "that of x's last dimension")
    require(eps >= 0, ValueError, "rms_norm: eps", eps, "0 or more")
    implementation = chosen("rms_norm", x)
    if implementation == "reference":
        return rms_norm_reference(x, weight_D, eps)
    if implementation == "cpu" and (run := cpu.library(x, weight_D)) is not None:
        return cpu.rms_norm(run, x, weight_D, eps)
    return F.rms_norm(x, weight_D.shape, weight_D, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs (x₀,x₁), (x₂,x₃), … as DeepSeek's weights expect; the result is half-split.

    Queries and keys are permuted alike, so their products are those of the interleaved layout.

    Args:
        x: (..., R), differentiable once.
        cos: the angles' cosines, (..., R/2), of dimensions that x's are or that are broadcast to them.
        sin: their sines, of the same shape.

    Raises:
        ValueError: the shapes do not fit.
    """
    return _rotated("rotate", rotate_reference, x, cos, sin)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (xᵢ, xᵢ₊ₕ), h being half the width, as the weights of Llama and Qwen expect; see `rotate`."""
    return _rotated("rotate_halves", rotate_halves_reference, x, cos, sin)


def _rotated(operation: str, torch_path: Callable[..., Tensor], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    fits = x.ndim > 0 and x.shape[-1] % 2 == 0 and cos.ndim == x.ndim and 2 * cos.shape[-1] == x.shape[-1]
    require(fits, ValueError, f"{operation}: shape of cos", tuple(cos.shape), f"half the width of x, {tuple(x.shape)}")
    require(sin.shape == cos.shape, ValueError, f"{operation}: shape of sin", tuple(sin.shape), tuple(cos.shape))
    if chosen(operation, x) == "cpu" and (rows := cpu.rotated_rows(x, cos, sin)) is not None:
        return cpu.rotate(rows, x, cos, sin, interleaved=operation == "rotate")
    return torch_path(x, cos, sin)
