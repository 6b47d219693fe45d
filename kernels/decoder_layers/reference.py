"""The same in plain torch, layer by layer: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gristmill.kernels.decoder_layers import LayerWeights, Shape
from gristmill.kernels.mla_decode.reference import mla_decode_reference
from gristmill.kernels.moe_mlp.reference import moe_mlp_reference
from gristmill.kernels.router.reference import route_reference
from gristmill.kernels.swiglu.reference import swiglu_reference


def layers_reference(
    x_BSD: Tensor,
    start_B: Tensor,
    cache_LBPC: Tensor,
    layers: Sequence[LayerWeights],
    n: Shape,
    turn_SR: tuple[Tensor, Tensor],
) -> Tensor:
    """What the last layer gives, (B, S, D); the cache is written."""
    position_BS = start_B[:, None] + torch.arange(x_BSD.shape[1])
    rotary = turn_SR[0][position_BS], turn_SR[1][position_BS]
    for layer, cache_BPC in zip(layers, cache_LBPC, strict=True):
        normed_BSD = _norm(x_BSD, layer.attention_norm_D, n.eps)
        query, kv_BSY = (normed_BSD @ layer.first_XD.t()).split(
            [len(layer.first_XD) - n.latent - n.turning, n.latent + n.turning], -1
        )
        if layer.query_norm_Q is not None and layer.query_up_XQ is not None:
            query = _norm(query, layer.query_norm_Q, n.latent_eps) @ layer.query_up_XQ.t()
        out = mla_decode_reference(
            query.unflatten(-1, (n.heads, -1)), kv_BSY, cache_BPC, start_B, int(position_BS.max()) + 1, rotary,
            layer.latent_norm_C, n.latent_eps, layer.up_HXC, n.scale,
        )  # fmt: skip
        x_BSD = x_BSD + out @ layer.out_DX.t()
        x_BSD = x_BSD + _ffn(_norm(x_BSD, layer.ffn_norm_D, n.eps), layer, n)
    return x_BSD


def _ffn(x_BSD: Tensor, layer: LayerWeights, n: Shape) -> Tensor:
    if layer.gate_ED is None or layer.bias_E is None:
        return swiglu_reference(x_BSD @ layer.gate_up.t()) @ layer.down.t()
    x_TD = x_BSD.flatten(0, 1)
    expert_TK, gate_TK, *_ = route_reference(x_TD, layer.gate_ED, layer.bias_E, n.choice)
    out_TD = moe_mlp_reference(x_TD, expert_TK, gate_TK, layer.gate_up, layer.down)
    if layer.shared_gate_up is not None and layer.shared_down is not None:
        out_TD = out_TD + swiglu_reference(x_TD @ layer.shared_gate_up.t()) @ layer.shared_down.t()
    return out_TD.view_as(x_BSD)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def joined_reference(
    hidden_BSD: Tensor, embedding_BSD: Tensor, norm_D: Tensor, hidden_norm_D: Tensor, embedding_norm_D: Tensor,
    join_DX: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """What an MTP module's block reads."""
    hidden_BSD = _norm(_norm(hidden_BSD, norm_D, eps), hidden_norm_D, eps)
    return torch.cat((_norm(embedding_BSD, embedding_norm_D, eps), hidden_BSD), -1) @ join_DX.t()
