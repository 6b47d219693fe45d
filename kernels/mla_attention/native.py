"""Attention by the compiled source, cpu.cpp, with its gradients: float32 on a CPU.

Nothing is joined, spread over heads or transposed on the way: the source takes each tensor by its strides, rotates what
turns where it copies it into its tiles, and writes gradients where the projections' backward passes read them. Kept for
the backward pass are the inputs, the result and log Σ exp of each row of scores; the weights are computed again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.kernels.compiled import needed
from gristmill.kernels.operations import within_passes

SOURCE = "mla_attention/cpu.cpp"


class Inputs(NamedTuple):
    """Tensors of one call, numbers of a row side by side; without a shared key, `key_BSR` and the angles are empty."""

    q_BSHQ: Tensor
    k_BSGN: Tensor
    v_BSGW: Tensor
    key_BSR: Tensor
    cos: Tensor
    sin: Tensor
    mask_BSS: Tensor  # empty: none

    def sizes(self, *gradients: Tensor) -> Tensor:
        """`Shape` of the source; gradients are those of the result, of k and of v."""
        (sequences, length, heads, _), (_, _, groups, width) = self.q_BSHQ.shape, self.k_BSGN.shape
        strides = [x.stride()[:3] for x in (self.q_BSHQ, self.k_BSGN, self.v_BSGW)]
        strides += [(*self.key_BSR.stride()[:2], 0), *(x.stride()[:3] for x in gradients)]
        counts = (sequences, length, heads, groups, width, self.key_BSR.shape[-1], self.v_BSGW.shape[-1])
        return torch.tensor([*counts, *(step for three in strides for step in three)], device="cpu")


def _rowwise(x: Tensor) -> Tensor:
    """x with the numbers of its last dimension side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _seen(mask_BSS: Tensor | None, first_BS: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mask and the first keys, int64, as the source reads them; what is not given is empty."""
    none = torch.empty(0, device="cpu")
    mask = none if mask_BSS is None else mask_BSS.contiguous()
    return mask, none if first_BS is None else first_BS.long().contiguous()


def of_whole(
    q_BSHN: Tensor, k_BSGN: Tensor, v_BSGW: Tensor, mask_BSS: Tensor | None, first_BS: Tensor | None
) -> tuple[Inputs, Tensor]:
    """Of queries, keys and values that are whole, and the first keys."""
    none, (mask, first) = q_BSHN.new_empty(1, 1, 0), _seen(mask_BSS, first_BS)
    return Inputs(_rowwise(q_BSHN), _rowwise(k_BSGN), _rowwise(v_BSGW), none, none, none, mask), first


def of_latents(
    q_BSHQ: Tensor, kv_BSHX: Tensor, key_BSR: Tensor, cos: Tensor, sin: Tensor,
    mask_BSS: Tensor | None, first_BS: Tensor | None,
) -> tuple[Tensor, Inputs, Tensor]:  # fmt: skip
    """Of MLA's projections: keys and values row by row as they are whole, the inputs, and the first keys."""
    q_BSHQ, kv_BSHX, key_BSR = (_rowwise(x) for x in (q_BSHQ, kv_BSHX, key_BSR))
    width, (mask, first) = q_BSHQ.shape[-1] - key_BSR.shape[-1], _seen(mask_BSS, first_BS)
    k_BSHN, v_BSHW = kv_BSHX.tensor_split([width], -1)
    return kv_BSHX, Inputs(q_BSHQ, k_BSHN, v_BSHW, key_BSR, cos.contiguous(), sin.contiguous(), mask), first


def reach(mask_BSS: Tensor, first_BS: Tensor, batch: int, length: int) -> Tensor:
    """The keys that each query sees, (B, S, 3)."""
    reach = torch.empty(batch, length, 3, dtype=torch.int64, device="cpu")
    needed(SOURCE)("attention_reach", mask_BSS, first_BS, reach, batch, length)
    return reach


def _attend(
    q_BSHQ: Tensor,
    k_BSGN: Tensor,
    v_BSGW: Tensor,
    key_BSR: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask_BSS: Tensor,
    first_BS: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result (B, S, H, W), log Σ exp of the scores (B, H, S), and the keys that each query sees (B, S, 3).

    `first_BS` is int64, or empty as without it.
    """
    inputs = Inputs(q_BSHQ, k_BSGN, v_BSGW, key_BSR, cos, sin, mask_BSS)
    batch, length, heads, _ = q_BSHQ.shape
    seen = reach(mask_BSS, first_BS, batch, length)
    out = q_BSHQ.new_empty(batch, length, heads, v_BSGW.shape[-1])
    log_sums = q_BSHQ.new_empty(batch, heads, length)
    needed(SOURCE)("attention_forward", inputs.sizes(), *inputs, seen, out, log_sums, scale)
    return out, log_sums, seen


def _fake(
    q_BSHQ: Tensor, k_BSGN: Tensor, v_BSGW: Tensor, key_BSR: Tensor, cos: Tensor, sin: Tensor, mask_BSS: Tensor,
    first_BS: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, length, heads, _ = q_BSHQ.shape
    out, log_sums = q_BSHQ.new_empty(batch, length, heads, v_BSGW.shape[-1]), q_BSHQ.new_empty(batch, heads, length)
    return out, log_sums, q_BSHQ.new_empty(batch, length, 3, dtype=torch.int64)


attend = within_passes("attention_compiled", _attend, _fake)


def _backward(
    ctx: Any, inputs: Inputs, kept: tuple[Tensor, Tensor, Tensor], grad_out: Tensor, grad_k: Tensor, grad_v: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the queries and of the shared key; those of k and v are written where they are given."""
    grad_out, (out, log_sums, reach) = _rowwise(grad_out), kept
    grad_q = inputs.q_BSHQ.new_empty(inputs.q_BSHQ.shape)
    batch, length, groups, _ = inputs.k_BSGN.shape
    grad_key_BGSR = grad_q.new_empty(batch, groups, length, inputs.key_BSR.shape[-1])
    sizes = inputs.sizes(grad_out, grad_k, grad_v)
    gradients = (grad_out, grad_q, grad_k, grad_v, grad_key_BGSR)
    needed(SOURCE)("attention_backward", sizes, *inputs, reach, out, log_sums, *gradients, ctx.scale)
    return grad_q, grad_key_BGSR.sum(1)


class Attention(torch.autograd.Function):
    """Of queries, keys and values that are whole."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BSHN: Tensor,
        k_BSGN: Tensor,
        v_BSGW: Tensor,
        scale: float,
        mask_BSS: Tensor | None,
        first_BS: Tensor | None,
    ):
        inputs, first = of_whole(q_BSHN, k_BSGN, v_BSGW, mask_BSS, first_BS)
        out, log_sums, reach = attend(*inputs, first, scale)
        ctx.save_for_backward(*inputs, out, log_sums, reach)
        ctx.scale = float(scale)  # a number of the source's kind, whatever it came as
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHW: Tensor):
        *given, out, log_sums, reach = ctx.saved_tensors
        inputs = Inputs._make(given)
        grad_k, grad_v = (x.new_empty(x.shape) for x in (inputs.k_BSGN, inputs.v_BSGW))
        grad_q, _ = _backward(ctx, inputs, (out, log_sums, reach), grad_BSHW, grad_k, grad_v)
        return grad_q, grad_k, grad_v, None, None, None


class LatentAttention(torch.autograd.Function):
    """Of MLA's projections: keys and values side by side, and the part of the key that turns and all heads share."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BSHQ: Tensor,
        kv_BSHX: Tensor,
        key_BSR: Tensor,
        cos: Tensor,
        sin: Tensor,
        scale: float,
        mask_BSS: Tensor | None,
        first_BS: Tensor | None,
    ):
        kv_BSHX, inputs, first = of_latents(q_BSHQ, kv_BSHX, key_BSR, cos, sin, mask_BSS, first_BS)
        out, log_sums, reach = attend(*inputs, first, scale)
        ctx.save_for_backward(inputs.q_BSHQ, kv_BSHX, *inputs[3:], out, log_sums, reach)
        ctx.scale = float(scale)  # a number of the source's kind, whatever it came as
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHW: Tensor):
        q_BSHQ, kv_BSHX, key_BSR, *others, out, log_sums, reach = ctx.saved_tensors
        width = q_BSHQ.shape[-1] - key_BSR.shape[-1]
        inputs = Inputs._make((q_BSHQ, *kv_BSHX.tensor_split([width], -1), key_BSR, *others))
        grad_kv = kv_BSHX.new_empty(kv_BSHX.shape)
        grad_k, grad_v = grad_kv.tensor_split([width], -1)
        grad_q, grad_key = _backward(ctx, inputs, (out, log_sums, reach), grad_BSHW, grad_k, grad_v)
        return grad_q, grad_kv, grad_key, None, None, None, None, None
