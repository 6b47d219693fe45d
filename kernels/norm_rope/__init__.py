"""Row by row between the products: RMSNorm (arXiv 1910.07467) and rotary embedding (arXiv 2104.09864)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.dispatch import chosen, in_own_dtypes, require_device
from gristmill.kernels.norm_rope import library, native
from gristmill.kernels.norm_rope.layout import rows_of
from gristmill.kernels.norm_rope.reference import (
    add_rms_norm_reference,
    rms_norm_reference,
    rotate_halves_reference,
    rotate_reference,
)

__all__ = ["add_rms_norm", "rms_norm", "rotate", "rotate_halves"]
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 16_384
"""Numbers of a row that a Triton program takes; of wider rows and of other dtypes torch's operations run on a GPU."""
TAKES = f"float32, bfloat16 and float16, and rows of at most {WIDEST} numbers"
TAKES_ANGLES = f"{TAKES}, and angles in float32 that want no gradient and lie evenly apart, as the rows do"


@in_own_dtypes
def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight of the last dimension, (..., D), differentiable once in x and weight.

    Of 16 bits, sums are taken in float32. Two runs give equal bits: the weight's gradient is summed over blocks of rows
    that depend on their number and width alone.

    Raises:
        TypeError: x is not floating, or weight has another dtype.
        ValueError: the shapes or devices do not fit, eps is negative, or on a GPU there are 2³⁰ rows or more.
    """
    _check_norm("rms_norm", x, weight_D, eps)
    implementation = chosen("rms_norm", x, native.SOURCE, triton=fits_triton(x), takes=TAKES)
    if implementation == "reference":
        return rms_norm_reference(x, weight_D, eps)
    if implementation == "compiled":
        return native.rms_norm(x, weight_D, eps)
    if implementation == "gpu":
        from gristmill.kernels.norm_rope import gpu

        return gpu.rms_norm(x, weight_D, eps)
    if implementation == "operation":
        return library.rms_norm(x, weight_D, eps)[0]
    return F.rms_norm(x, weight_D.shape, weight_D, eps)


@in_own_dtypes
def add_rms_norm(x: Tensor, y: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and `rms_norm` of it: a residual and the norm that reads it, in one pass each way.

    Both results are (..., D) in x's dtype, on a CPU to the bit those of the two operations one by one, as their
    gradients are. The norm is of the sum as it is kept, rounded to that dtype. Differentiable once in x, y and weight;
    of the sum, the gradients of both its uses are added in the pass that gives the norm's.

    Args:
        x: (..., D).
        y: of x's shape; its dtype may have fewer bits, as where a float32 residual stream takes what a product gave.
        weight_D: in x's dtype.
        eps: of the norm.

    Raises:
        TypeError: x or y is not floating, weight has another dtype than x, or y one that x's does not hold.
        ValueError: the shapes or devices do not fit, eps is negative, or on a GPU there are 2³⁰ rows or more.
    """
    _check_norm("add_rms_norm", x, weight_D, eps)
    if not y.is_floating_point() or torch.promote_types(x.dtype, y.dtype) != x.dtype:
        raise TypeError(f"add_rms_norm: y is {y.dtype}; wanted the dtype of x, {x.dtype}, or a narrower one")
    if x.device != y.device:
        raise ValueError(f"add_rms_norm: device of y is {y.device}; wanted that of x, {x.device}")
    if x.shape != y.shape:
        raise ValueError(f"add_rms_norm: shape of y is {tuple(y.shape)}; wanted that of x, {tuple(x.shape)}")
    implementation = chosen("add_rms_norm", x, native.SOURCE, triton=fits_triton(x), takes=TAKES)
    if implementation == "reference":
        return add_rms_norm_reference(x, y, weight_D, eps)
    if implementation == "compiled":
        return native.add_rms_norm(x, y.to(x.dtype), weight_D, eps)
    if implementation == "operation":
        return library.add_rms_norm(x, y, weight_D, eps)[:2]
    if implementation == "gpu":
        from gristmill.kernels.norm_rope import gpu

        return gpu.add_rms_norm(x, y, weight_D, eps)
    total = x + y
    return total, F.rms_norm(total, weight_D.shape, weight_D, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs (x₀,x₁), (x₂,x₃), … as DeepSeek's weights expect; the result is half-split.

    Queries and keys are permuted alike, so their products are those of the interleaved layout. The result has the wider
    dtype of x and the angles. Angles that want a gradient, or are not float32, are turned by torch's own operations.

    Args:
        x: (..., R), differentiable once.
        cos: the angles' cosines, (..., R/2), of dimensions that x's are or that are broadcast to them.
        sin: their sines, of the same shape.

    Raises:
        TypeError: one of them is not floating.
        ValueError: the shapes or devices do not fit, or on a GPU there are 2³⁰ rows or more.
    """
    return _rotated("rotate", rotate_reference, x, cos, sin)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (xᵢ, xᵢ₊ₕ), h being half the width, as the weights of Llama and Qwen expect; see `rotate`."""
    return _rotated("rotate_halves", rotate_halves_reference, x, cos, sin)


def _rotated(operation: str, reference: Callable[..., Tensor], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    _check(operation, x, cos, sin)
    rows, interleaved = rows_of(x, cos, sin), operation == "rotate"
    if rows is None:
        _check_broadcast(operation, x, cos)
    source = native.SOURCE if rows is not None else None
    fits = rows is not None and fits_triton(x)
    implementation = chosen(operation, x, source, triton=fits, takes=TAKES_ANGLES)
    if implementation == "operation":
        return (library.rotate if interleaved else library.rotate_halves)(x, cos, sin)
    if rows is None or implementation not in ("compiled", "gpu"):
        return reference(x, cos, sin)
    if implementation == "compiled":
        return native.rotate(x, cos, sin, rows, interleaved)
    from gristmill.kernels.norm_rope import gpu

    return gpu.rotate(x, cos, sin, rows, interleaved)


def fits_triton(x: Tensor) -> bool:
    return x.dtype in TRITON_DTYPES and x.shape[-1] <= WIDEST


def _check_norm(operation: str, x: Tensor, weight_D: Tensor, eps: float) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{operation}: x is {x.dtype}; wanted a floating dtype")
    if x.dtype != weight_D.dtype:
        raise TypeError(f"{operation}: weight_D is {weight_D.dtype}; wanted the dtype of x, {x.dtype}")
    if x.device != weight_D.device:
        raise ValueError(f"{operation}: device of weight_D is {weight_D.device}; wanted that of x, {x.device}")
    if weight_D.ndim != 1 or x.shape[-1:] != weight_D.shape:
        got = tuple(weight_D.shape)
        raise ValueError(f"{operation}: shape of weight_D is {got}; wanted the last of {tuple(x.shape)}")
    if eps < 0:
        raise ValueError(f"{operation}: eps is {eps}; wanted 0 or more")


def _check(operation: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if not 0 < x.ndim == cos.ndim or 2 * cos.shape[-1] != x.shape[-1]:
        wanted = f"{x.ndim} dimensions, the last of them half of x's, {tuple(x.shape)}"
        raise ValueError(f"{operation}: shape of cos is {tuple(cos.shape)}; wanted {wanted}")
    if sin.shape != cos.shape:
        raise ValueError(f"{operation}: shape of sin is {tuple(sin.shape)}; wanted that of cos, {tuple(cos.shape)}")
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        if not tensor.is_floating_point():
            raise TypeError(f"{operation}: {name} is {tensor.dtype}; wanted a floating dtype")
    require_device(operation, "x", x, cos=cos, sin=sin)


def _check_broadcast(operation: str, x: Tensor, cos: Tensor) -> None:
    """The angles' leading dimensions are those of x, or one."""
    if any(mine not in (1, theirs) for mine, theirs in zip(cos.shape[:-1], x.shape[:-1], strict=True)):
        wanted = f"dimensions that are broadcast to those of x, {tuple(x.shape)}"
        raise ValueError(f"{operation}: shape of cos is {tuple(cos.shape)}; wanted {wanted}")
