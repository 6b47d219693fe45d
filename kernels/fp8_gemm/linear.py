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

from gristmill.kernels.fp8_gemm import (
    BLOCK,
    fp8_grouped_gemm,
    fp8_weight_gradient,
    quantise_blocks,
    quantise_columns,
    quantise_rows,
    swiglu_quantise,
)


def is_whole(*widths: int) -> bool:
    """Whether nothing need be filled up."""
    return all(width % BLOCK == 0 for width in widths)


def fp8_linear(x_NK: Tensor, w_MK: Tensor) -> Tensor:
    """x · wᵀ in x's dtype, (N, M); the gradient of w is float32 where w is."""
    (outer, inner), rows = w_MK.shape, len(x_NK)
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
    """
    width, hidden = down_EDF.shape[1:]
    if not is_whole(width, hidden):
        wider, deeper = -width % BLOCK, -hidden % BLOCK
        x_MD, down_EDF = F.pad(x_MD, (0, wider)), F.pad(down_EDF, (0, deeper, 0, wider))
        gate_up_EGD = F.pad(gate_up_EGD.unflatten(1, (2, hidden)), (0, wider, 0, deeper)).flatten(1, 2)
    gate_up_MG = _Product.apply(x_MD, gate_up_EGD, ends_E)
    y_MD = _SwiGLUProduct.apply(gate_up_MG, down_EDF, ends_E)
    return y_MD if y_MD.shape[1] == width else y_MD[:, :width]


class _Product(torch.autograd.Function):
    """y[rows of e] = x[rows of e] · w[e]ᵀ."""

    @staticmethod
    def forward(ctx, x_NK: Tensor, w_EMK: Tensor, ends_E: Tensor) -> Tensor:
        w, w_scale = quantise_blocks(w_EMK)
        kept = quantise_columns(x_NK, ends_E) if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(ends_E, w, w_scale, *kept)
        ctx.dtype = w_EMK.dtype
        return fp8_grouped_gemm(*quantise_rows(x_NK), w, w_scale, ends_E, x_NK.dtype)

    @staticmethod
    def backward(ctx, grad_NM: Tensor):
        ends_E, w, w_scale, *kept = ctx.saved_tensors
        grad_x = _input_gradient(grad_NM, w, w_scale, ends_E) if ctx.needs_input_grad[0] else None
        grad_w = None
        if ctx.needs_input_grad[1]:
            x, x_scale = kept
            grad_w = fp8_weight_gradient(*quantise_columns(grad_NM, ends_E), x, x_scale, ends_E).to(ctx.dtype)
        return grad_x, grad_w, None


class _SwiGLUProduct(torch.autograd.Function):
    """y[rows of e] = (silu(gate) · up)[rows of e] · w[e]ᵀ, x holding gate and then up."""

    @staticmethod
    def forward(ctx, x_NG: Tensor, w_EMF: Tensor, ends_E: Tensor) -> Tensor:
        w, w_scale = quantise_blocks(w_EMF)
        ctx.save_for_backward(ends_E, w, w_scale, x_NG)
        ctx.dtype = w_EMF.dtype
        return fp8_grouped_gemm(*swiglu_quantise(x_NG), w, w_scale, ends_E, x_NG.dtype)

    @staticmethod
    def backward(ctx, grad_NM: Tensor):
        ends_E, w, w_scale, x_NG = ctx.saved_tensors
        gate, up = x_NG.float().chunk(2, 1)
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_h = _input_gradient(grad_NM, w, w_scale, ends_E).float()
            grad_gate = torch.ops.aten.silu_backward(grad_h * up, gate)
            grad_x = torch.cat((grad_gate, grad_h * F.silu(gate)), 1).to(x_NG.dtype)
        if ctx.needs_input_grad[1]:
            h = quantise_columns(F.silu(gate) * up, ends_E)
            grad_w = fp8_weight_gradient(*quantise_columns(grad_NM, ends_E), *h, ends_E).to(ctx.dtype)
        return grad_x, grad_w, None


def _input_gradient(grad_NM: Tensor, w_EMK: Tensor, w_scale_EBC: Tensor, ends_E: Tensor) -> Tensor:
    return fp8_grouped_gemm(*quantise_rows(grad_NM), w_EMK.mT, w_scale_EBC.mT, ends_E, grad_NM.dtype)
