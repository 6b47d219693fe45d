"""How a model's products are taken, applied to it from outside: float32, bfloat16, or FP8 as V3 has it (section 3.3).

Parameters, their gradients and the optimizer are float32 throughout, and so is what runs between blocks: the residual
stream, norms, the gate and the embedding. What changes is how products are taken:

              attention's projections, FFNs, experts, MTP's projection      head       attention
    bfloat16  operands and results bfloat16                                 bfloat16   bfloat16
    fp8       operands E4M3, all three products; results bfloat16           bfloat16   bfloat16

On a CPU bfloat16 is of the operands alone: each product of both passes takes theirs rounded, its sums and results are
float32, and attention is float32 throughout. So nothing is converted on the way, and where the processor multiplies
bfloat16 numbers the products take half the time; elsewhere as long as in float32.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.cross_entropy import linear_cross_entropy_mean
from gristmill.kernels.expert_rows import places
from gristmill.kernels.fp8_gemm import fp8_feed_forward, fp8_linear, is_whole
from gristmill.kernels.linear import linear
from gristmill.kernels.moe_mlp import moe_mlp
from gristmill.model.stage_types import Metrics
from gristmill.model.training.config import Precision
from gristmill.model.transformer import Experts, Linear, Transformer

log = logging.getLogger("gristmill.precision")


def apply_precision(model: Transformer, precision: Precision) -> Metrics:
    """Set how the model's products are taken in training; returns what a manifest should say of it.

    Decoding with a cache takes one dtype throughout: a trained model is loaded anew for it.
    """
    if precision == "float32":
        return {}
    linear, experts = (_bfloat16_linear, _bfloat16_experts) if precision == "bfloat16" else (_fp8_linear, _fp8_experts)
    products, filled = 0, []
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module is not model.lm_head:
            module.product, widths = linear, tuple(module.weight.shape)
        elif isinstance(module, Experts):
            module.product, widths = experts, tuple(module.down_proj.shape[1:])
        else:
            continue
        products += 1
        if not is_whole(*widths):
            filled.append(name)
    model.head_loss = _bfloat16_head_loss
    if precision == "bfloat16":
        return {}
    if filled:
        log.warning("fp8: widths of %d of %d products are no multiples of 128, so that operands are filled up with "
                    "zeros each time: %s", len(filled), products, ", ".join(filled))  # fmt: skip
    return {"fp8_products": products, "fp8_products_filled_up": len(filled)}


def _bfloat16_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.is_cpu:
        return linear(x.float(), weight, bias, rounded=True)
    return F.linear(x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16())


def _bfloat16_experts(
    x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, load_E: Tensor,
    order_M: Tensor,
) -> Tensor:  # fmt: skip
    if x_TD.is_cpu:
        return moe_mlp(x_TD.float(), expert_TK, gate_TK, gate_up_EGD, down_EDF, load_E, order_M, rounded=True)
    x_TD, gate_up_EGD, down_EDF = (x.bfloat16() for x in (x_TD, gate_up_EGD, down_EDF))
    return moe_mlp(x_TD, expert_TK, gate_TK, gate_up_EGD, down_EDF, load_E, order_M)


def _bfloat16_head_loss(x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, weight_T: Tensor) -> Tensor:
    if x_TD.is_cpu:
        return linear_cross_entropy_mean(x_TD.float(), weight_VD, target_T, weight_T, rounded=True)
    return linear_cross_entropy_mean(x_TD.bfloat16(), weight_VD.bfloat16(), target_T, weight_T)


def _fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = fp8_linear(x.bfloat16().flatten(0, -2), weight).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias.bfloat16()


def _fp8_experts(
    x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, load_E: Tensor,
    order_M: Tensor,
) -> Tensor:  # fmt: skip
    (tokens, chosen), place_M = expert_TK.shape, places(order_M)
    x_MD = x_TD.bfloat16()[:, None].expand(-1, chosen, -1).flatten(0, 1)
    x_MD = _Permute.apply(x_MD, order_M, place_M)
    y_MD = fp8_feed_forward(x_MD, gate_up_EGD, down_EDF, load_E.cumsum(0))
    y_TKD = _Permute.apply(y_MD, place_M, order_M).view(tokens, chosen, -1)
    return (gate_TK.bfloat16()[..., None] * y_TKD).sum(1)


class _Permute(torch.autograd.Function):
    """Rows of x in another order; its gradient gathers by the inverse, so that nothing is added by a race."""

    @staticmethod
    def forward(ctx, x_MD: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_M)
        return x_MD.index_select(0, order_M)

    @staticmethod
    def backward(ctx, grad_MD: Tensor):
        (inverse_M,) = ctx.saved_tensors
        return grad_MD.index_select(0, inverse_M), None, None
