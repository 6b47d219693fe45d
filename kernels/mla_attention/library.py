"""Attention and MLA's as operations of torch.library, each around the one of operations.py that runs on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from gristmill.kernels import mla_attention as public
from gristmill.kernels.dispatch import chosen
from gristmill.kernels.mla_attention import native
from gristmill.kernels.operations import Context, gradient, gradients_in_torch, not_made, operation, with_saved


def _fake(
    q_BSHN: Tensor, k_BSGN: Tensor, v_BSGW: Tensor, scale: float,
    mask_BSS: Tensor | None = None, first_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _results(q_BSHN, v_BSGW.shape[3])


@operation(_fake)
def attention(
    q_BSHN: Tensor, k_BSGN: Tensor, v_BSGW: Tensor, scale: float,
    mask_BSS: Tensor | None = None, first_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result, and for the backward pass the logarithms of the sums of exponentials, float32, (B, H, S).

    The base is that of the path; where the gradient is taken from torch they are minus infinity.
    """
    out, saved = with_saved(public.attention, (q_BSHN, k_BSGN, v_BSGW, scale, mask_BSS, first_BS), of=(0, 1, 2))
    return out, saved[public.LOGS] if saved else not_made(_results(q_BSHN, 0)[1])


@gradient(attention, "q_BSHN", "k_BSGN", "v_BSGW", kept=(0, 1))
def attention_backward(
    needs: list[bool], grad: Tensor, out: Tensor, logs: Tensor, q_BSHN: Tensor, k_BSGN: Tensor, v_BSGW: Tensor,
    scale: float, mask_BSS: Tensor | None, first_BS: Tensor | None,
):  # fmt: skip
    given, seen = (q_BSHN, k_BSGN, v_BSGW), (mask_BSS, first_BS)
    triton = public.in_triton(q_BSHN, q_BSHN.shape[3], v_BSGW.shape[3], scale)
    implementation = chosen("attention_backward", q_BSHN, native.SOURCE, triton=triton, takes=public.TAKES)
    if implementation == "compiled":
        inputs, first = native.of_whole(*given, *seen)
        reach = native.reach(inputs.mask_BSS, first, *q_BSHN.shape[:2])
        context = Context(*inputs, out, logs, reach, scale=scale)
        return native.Attention.backward(context, grad)[:3]
    if implementation == "gpu":
        from gristmill.kernels.mla_attention import gpu

        context = Context(*gpu._heads_first(*given), out.transpose(1, 2), logs, gpu._seen(*seen), scale=scale)
        return gpu.TritonAttention.backward(context, grad)[:3]
    return gradients_in_torch(lambda q, k, v: public.attention(q, k, v, scale, *seen), given, grad)


def _latent_fake(
    q_BSHQ: Tensor, kv_BSHX: Tensor, key_BSR: Tensor, cos: Tensor, sin: Tensor, scale: float,
    mask_BSS: Tensor | None = None, first_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _results(q_BSHQ, kv_BSHX.shape[3] - q_BSHQ.shape[3] + key_BSR.shape[2])


@operation(_latent_fake)
def latent_attention(
    q_BSHQ: Tensor, kv_BSHX: Tensor, key_BSR: Tensor, cos: Tensor, sin: Tensor, scale: float,
    mask_BSS: Tensor | None = None, first_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `attention`."""

    def attend(q: Tensor, kv: Tensor, key: Tensor) -> Tensor:
        return public.latent_attention(q, kv, key, (cos.detach(), sin.detach()), scale, mask_BSS, first_BS)

    out, saved = with_saved(attend, (q_BSHQ, kv_BSHX, key_BSR), of=(0, 1, 2))
    return out, saved[public.LOGS] if saved else not_made(_results(q_BSHQ, 0)[1])


@gradient(latent_attention, "q_BSHQ", "kv_BSHX", "key_BSR", kept=(0, 1))
def latent_attention_backward(
    needs: list[bool], grad: Tensor, out: Tensor, logs: Tensor, q_BSHQ: Tensor, kv_BSHX: Tensor, key_BSR: Tensor,
    cos: Tensor, sin: Tensor, scale: float, mask_BSS: Tensor | None, first_BS: Tensor | None,
):  # fmt: skip
    given, angles, seen = (q_BSHQ, kv_BSHX, key_BSR), (cos.detach(), sin.detach()), (mask_BSS, first_BS)
    triton = public.latent_in_triton(*given, scale)
    implementation = chosen("latent_attention_backward", q_BSHQ, native.SOURCE, triton=triton, takes=public.TAKES)
    if implementation == "compiled":
        kv, inputs, first = native.of_latents(*given, *angles, *seen)
        reach = native.reach(inputs.mask_BSS, first, *q_BSHQ.shape[:2])
        context = Context(inputs.q_BSHQ, kv, *inputs[3:], out, logs, reach, scale=scale)
        return native.LatentAttention.backward(context, grad)[:3]
    if implementation == "gpu":
        from gristmill.kernels.mla_attention import gpu

        parts = gpu._latent_parts(*given, *angles)
        context = Context(*parts, *angles, out.transpose(1, 2), logs, gpu._seen(*seen), scale=scale)
        return gpu.TritonLatentAttention.backward(context, grad)[:3]

    def again(q: Tensor, kv: Tensor, key: Tensor) -> Tensor:
        return public.latent_attention(q, kv, key, angles, scale, *seen)

    return gradients_in_torch(again, given, grad)


def _results(q: Tensor, width: int) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return q.new_empty(batch, length, heads, width), q.new_empty(batch, heads, length, dtype=torch.float32)
