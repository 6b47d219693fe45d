"""Products with three FP8 passes each, forward and both gradients, from matrices held in float32 (V3 section 3.3.1).

What a matrix is multiplied with is quantised twice, along the sum of each of its two products: x along its columns for
y = x · wᵀ and along rows for dw = dyᵀ · x, and dy likewise. Only the E4M3 form that the backward pass reads is kept. A
SwiGLU keeps its input and is computed again, so that its product's input is never held in 16 bits (section 3.2.3).

Widths that are no multiple of 128 are filled up with zeros, which changes no value: it costs the copy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.kernels import fp8_gemm as public
from gristmill.kernels.dispatch import require, require_device, require_ranks, require_shapes
from gristmill.kernels.expert_rows import check_ends
from gristmill.kernels.fp8_gemm.reference import BLOCK


def is_whole(*widths: int) -> bool:
    """Whether nothing need be filled up."""
    return all(width % BLOCK == 0 for width in widths)


def fp8_linear(x_NK: Tensor, w_MK: Tensor) -> Tensor:
    """x · wᵀ in x's dtype, (N, M); the gradient of w is float32 where w is.

    Raises:
        TypeError: x or w is not floating.
        ValueError: one of them is no matrix, or their inner sizes or devices differ.
    """
    require_ranks("fp8_linear", x_NK=(x_NK, 2), w_MK=(w_MK, 2))
    _check_floating("fp8_linear", x_NK=x_NK, w_MK=w_MK)
    inner = x_NK.shape[1]
    require(w_MK.shape[1] == inner, ValueError, "fp8_linear: inner size of w_MK", w_MK.shape[1], inner)
    require_device("fp8_linear", "x_NK", x_NK, w_MK=w_MK)
    outer, rows = len(w_MK), len(x_NK)
    if not is_whole(outer, inner):
        x_NK, w_MK = F.pad(x_NK, (0, -inner % BLOCK)), F.pad(w_MK, (0, -inner % BLOCK, 0, -outer % BLOCK))
    ends_E = torch.full((1,), rows, device=x_NK.device)
    y_NM = _Product.apply(x_NK, w_MK[None], ends_E)
    return y_NM if y_NM.shape[1] == outer else y_NM[:, :outer]


def fp8_feed_forward(x_MD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """down · (silu(gate · x) · up · x) in x's dtype, (M, D), of each group's rows with its own matrices.

    Args:
        x_MD: rows laid out group by group.
        gate_up_EGD: (E, 2F, D), gate first.
        down_EDF: (E, D, F).
        ends_E: where each group's rows end, as `grouped_gemm` has it.

    Raises:
        TypeError: x or a stack is not floating, or the ends are no integers.
        ValueError: shapes or devices do not fit, or (on a CPU; on a GPU where GRISTMILL_KERNELS_CHECK=1) the ends do
            not ascend to M.
    """
    name = "fp8_feed_forward"
    require_ranks(name, x_MD=(x_MD, 2), gate_up_EGD=(gate_up_EGD, 3), down_EDF=(down_EDF, 3))
    _check_floating(name, x_MD=x_MD, gate_up_EGD=gate_up_EGD, down_EDF=down_EDF)
    (experts, width, hidden), rows = down_EDF.shape, len(x_MD)
    require_shapes(name, x_MD=(x_MD, (rows, width)), gate_up_EGD=(gate_up_EGD, (experts, 2 * hidden, width)))
    require_device(name, "x_MD", x_MD, gate_up_EGD=gate_up_EGD, down_EDF=down_EDF)
    check_ends(name, ends_E, experts, "x_MD", x_MD)
    if not is_whole(width, hidden):
        wider, deeper = -width % BLOCK, -hidden % BLOCK
        x_MD, down_EDF = F.pad(x_MD, (0, wider)), F.pad(down_EDF, (0, deeper, 0, wider))
        gate_up_EGD = F.pad(gate_up_EGD.unflatten(1, (2, hidden)), (0, wider, 0, deeper)).flatten(1, 2)
    gate_up_MG = _Product.apply(x_MD, gate_up_EGD, ends_E)
    y_MD = _SwiGLUProduct.apply(gate_up_MG, down_EDF, ends_E)
    return y_MD if y_MD.shape[1] == width else y_MD[:, :width]


def _check_floating(operation: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        require(tensor.is_floating_point(), TypeError, f"{operation}: {name}", tensor.dtype, "a floating dtype")


class _Product(torch.autograd.Function):
    """y[rows of e] = x[rows of e] · w[e]ᵀ."""

    @staticmethod
    def forward(ctx, x_NK: Tensor, w_EMK: Tensor, ends_E: Tensor) -> Tensor:
        w, w_scale = public.quantise_blocks(w_EMK)
        kept = public.quantise_columns(x_NK, ends_E) if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(ends_E, w, w_scale, *kept)
        ctx.dtype = w_EMK.dtype
        return public.fp8_grouped_gemm(*public.quantise_rows(x_NK), w, w_scale, ends_E, x_NK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NM: Tensor):
        ends_E, w, w_scale, *kept = ctx.saved_tensors
        grad_x = _input_gradient(grad_NM, w, w_scale, ends_E) if ctx.needs_input_grad[0] else None
        grad_w = None
        if ctx.needs_input_grad[1]:
            x, x_scale = kept
            grad = public.quantise_columns(grad_NM, ends_E)
            grad_w = public.fp8_weight_gradient(*grad, x, x_scale, ends_E).to(ctx.dtype)
        return grad_x, grad_w, None


class _SwiGLUProduct(torch.autograd.Function):
    """y[rows of e] = (silu(gate) · up)[rows of e] · w[e]ᵀ, x holding gate and then up."""

    @staticmethod
    def forward(ctx, x_NG: Tensor, w_EMF: Tensor, ends_E: Tensor) -> Tensor:
        w, w_scale = public.quantise_blocks(w_EMF)
        ctx.save_for_backward(ends_E, w, w_scale, x_NG)
        ctx.dtype = w_EMF.dtype
        return public.fp8_grouped_gemm(*public.swiglu_quantise(x_NG), w, w_scale, ends_E, x_NG.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NM: Tensor):
        ends_E, w, w_scale, x_NG = ctx.saved_tensors
        gate, up = x_NG.float().chunk(2, 1)
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_h = _input_gradient(grad_NM, w, w_scale, ends_E).float()
            grad_gate = torch.ops.aten.silu_backward(grad_h * up, gate)
            grad_x = torch.cat((grad_gate, grad_h * F.silu(gate)), 1).to(x_NG.dtype)
        if ctx.needs_input_grad[1]:
            h = public.quantise_columns(F.silu(gate) * up, ends_E)
            grad_w = public.fp8_weight_gradient(*public.quantise_columns(grad_NM, ends_E), *h, ends_E).to(ctx.dtype)
        return grad_x, grad_w, None


def _input_gradient(grad_NM: Tensor, w_EMK: Tensor, w_scale_EBC: Tensor, ends_E: Tensor) -> Tensor:
    return public.fp8_grouped_gemm(*public.quantise_rows(grad_NM), w_EMK.mT, w_scale_EBC.mT, ends_E, grad_NM.dtype)
