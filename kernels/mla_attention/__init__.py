"""Softmax attention for training and prefill, and multi-head latent attention from its projections (V3 section 2.1.1).

On a CPU in float32 a compiled source runs (cpu.cpp; `compiled` in `report()`), on a Hopper GPU code in Triton (gpu.py;
`gpu`) where heads are made of parts of 16 bytes. Elsewhere it is torch's own `scaled_dot_product_attention` (sdpa.py;
`torch` on a GPU, `cpu` on a CPU).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gristmill.kernels.dispatch import INTERPRETED, chosen, in_own_dtypes, readable, require
from gristmill.kernels.mla_attention import library, operation
from gristmill.kernels.mla_attention.native import SOURCE, Attention, LatentAttention
from gristmill.kernels.mla_attention.reference import attention_reference, latent_attention_reference
from gristmill.kernels.mla_attention.sdpa import sdpa_attention, sdpa_latent_attention

__all__ = ["attention", "latent_attention", "operation"]
LOGS = -2
"""Where a Function's saved tensors have the logarithms of the sums of exponentials."""
TAKES = "16 bits on a Hopper GPU, a scale above zero, and heads whose parts have whole 16 bytes and at most 128 numbers"


@in_own_dtypes
def attention(
    q_BSHN: Tensor,
    k_BSGN: Tensor,
    v_BSGW: Tensor,
    scale: float,
    mask_BSS: Tensor | None = None,
    first_BS: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) v of each head, (B, S, H, W), differentiable once; two runs give equal bits where
    the code is ours.

    Tensors may lie in any order; what the compiled path reads best has the numbers of a head side by side. What is
    not a number in a key or value reaches every query that sees it, and may reach others near them.

    Args:
        q_BSHN: queries, (B, S, H, N).
        k_BSGN: keys, (B, S, G, N), each of whose heads serves H / G heads of queries in their order.
        v_BSGW: values, (B, S, G, W); W need not be N.
        scale: what the products are multiplied by.
        mask_BSS: true where a query (row) may see a key (column). A query that may see none has zeros. Keys before the
            first and behind the last that a few neighbouring queries see cost nothing.
        first_BS: the place in its sequence of the first key that a query sees, int32 or int64, (B, S); it sees the keys
            from there up to its own, and none where the first is behind that. In any order; packed sequences need no
            more, and nothing of (S, S) is made in our own code. With neither a query sees the keys up to its own.

    Raises:
        TypeError: dtypes differ, the mask is not boolean, or the first keys are not int32 or int64.
        ValueError: shapes or devices do not fit, a mask and first keys are given together, or (on a CPU; on a GPU where
            GRISTMILL_KERNELS_CHECK=1) a first key is below zero.
    """
    _check_tensors("attention", {"q_BSHN": (q_BSHN, 4), "k_BSGN": (k_BSGN, 4), "v_BSGW": (v_BSGW, 4)})
    (batch, length, heads, width), groups = q_BSHN.shape, k_BSGN.shape[2]
    _check_shape("attention: shape of k_BSGN", k_BSGN, (batch, length, groups, width))
    _check_shape("attention: shape of v_BSGW", v_BSGW, (batch, length, groups, v_BSGW.shape[3]))
    divides = groups > 0 and heads % groups == 0
    require(divides, ValueError, "attention: heads of k_BSGN", groups, f"a divisor of the {heads} of q_BSHN")
    _check_seen("attention", mask_BSS, first_BS, q_BSHN)
    fits = in_triton(q_BSHN, width, v_BSGW.shape[3], scale)
    implementation = chosen("attention", q_BSHN, SOURCE, triton=fits, takes=TAKES)
    if implementation == "reference":
        return attention_reference(q_BSHN, k_BSGN, v_BSGW, scale, mask_BSS, first_BS)
    if implementation == "compiled":
        return Attention.apply(q_BSHN, k_BSGN, v_BSGW, scale, mask_BSS, first_BS)
    if implementation == "gpu":
        from gristmill.kernels.mla_attention.gpu import TritonAttention

        return TritonAttention.apply(q_BSHN, k_BSGN, v_BSGW, scale, mask_BSS, first_BS)
    if implementation == "operation":
        return library.attention(q_BSHN, k_BSGN, v_BSGW, scale, mask_BSS, first_BS)[0]
    return sdpa_attention(q_BSHN, k_BSGN, v_BSGW, scale, mask_BSS, first_BS)


@in_own_dtypes
def latent_attention(
    q_BSHQ: Tensor,
    kv_BSHX: Tensor,
    key_BSR: Tensor,
    rotary: tuple[Tensor, Tensor],
    scale: float,
    mask_BSS: Tensor | None = None,
    first_BS: Tensor | None = None,
) -> Tensor:
    """`attention` of what MLA's projections give, before rotation (V3 equations 4 and 7 to 10), (B, S, H, W).

    Args:
        q_BSHQ: queries, (B, S, H, N + R), of which the last R are rotated here, in interleaved pairs.
        kv_BSHX: keys and values up-projected from the latent, (B, S, H, N + W), keys first.
        key_BSR: the part of the key that all heads share, (B, S, R), rotated here.
        rotary: cosines and sines of the angles, float32, (B, S, R/2) each; they get no gradient.
        scale: what the products are multiplied by.
        mask_BSS, first_BS: as in `attention`.

    Raises:
        TypeError: dtypes differ, angles are not float32, or as in `attention`.
        ValueError: as in `attention`.
    """
    name, (cos, sin) = "latent_attention", rotary
    _check_tensors(name, {"q_BSHQ": (q_BSHQ, 4), "kv_BSHX": (kv_BSHX, 4), "key_BSR": (key_BSR, 3)})
    (batch, length, heads, wide), turning = q_BSHQ.shape, key_BSR.shape[2]
    require(heads > 0, ValueError, f"{name}: heads of q_BSHQ", heads, "1 or more")
    require(turning % 2 == 0, ValueError, f"{name}: width of key_BSR", turning, "an even number, of pairs")
    require(turning <= wide, ValueError, f"{name}: width of key_BSR", turning, f"at most that of q_BSHQ, {wide}")
    more = kv_BSHX.shape[3] > wide - turning
    require(more, ValueError, f"{name}: width of kv_BSHX", kv_BSHX.shape[3], f"more than the keys' {wide - turning}")
    _check_shape(f"{name}: shape of kv_BSHX", kv_BSHX, (batch, length, heads, kv_BSHX.shape[3]))
    _check_shape(f"{name}: shape of key_BSR", key_BSR, (batch, length, turning))
    for what, angle in (("cosines", cos), ("sines", sin)):
        _check_shape(f"{name}: shape of the {what}", angle, (batch, length, turning // 2))
        _check_device(f"{name}: device of the {what}", angle, q_BSHQ)
        require(angle.dtype == torch.float32, TypeError, f"{name}: dtype of the {what}", angle.dtype, torch.float32)
    _check_seen(name, mask_BSS, first_BS, q_BSHQ)
    fits = latent_in_triton(q_BSHQ, kv_BSHX, key_BSR, scale)
    implementation = chosen(name, q_BSHQ, SOURCE, triton=fits, takes=TAKES)
    if implementation == "reference":
        return latent_attention_reference(q_BSHQ, kv_BSHX, key_BSR, rotary, scale, mask_BSS, first_BS)
    if implementation == "compiled":
        return LatentAttention.apply(q_BSHQ, kv_BSHX, key_BSR, cos, sin, scale, mask_BSS, first_BS)
    if implementation == "gpu":
        from gristmill.kernels.mla_attention.gpu import TritonLatentAttention

        angles = cos.detach(), sin.detach()
        return TritonLatentAttention.apply(q_BSHQ, kv_BSHX, key_BSR, *angles, scale, mask_BSS, first_BS)
    if implementation == "operation":
        angles = cos.detach(), sin.detach()
        return library.latent_attention(q_BSHQ, kv_BSHX, key_BSR, *angles, scale, mask_BSS, first_BS)[0]
    return sdpa_latent_attention(q_BSHQ, kv_BSHX, key_BSR, rotary, scale, mask_BSS, first_BS)


def latent_in_triton(q_BSHQ: Tensor, kv_BSHX: Tensor, key_BSR: Tensor, scale: float) -> bool:
    """Whether the code in Triton takes what MLA's projections give."""
    wide, turning = q_BSHQ.shape[3], key_BSR.shape[2]
    return in_triton(q_BSHQ, wide, kv_BSHX.shape[3] - wide + turning, scale, turning)


def in_triton(q: Tensor, width: int, values: int, scale: float, turning: int | None = None) -> bool:
    """Whether the code in Triton takes queries of this width, the last of which are turned, and such values."""
    if not (q.is_cuda or INTERPRETED):
        return False
    from gristmill.kernels.mla_attention.gpu import supported

    return supported(q, width, values, turning, scale)


def _check_tensors(operation: str, ranks: dict[str, tuple[Tensor, int]]) -> None:
    first, (of, _) = next(iter(ranks.items()))
    for name, (tensor, rank) in ranks.items():
        require(tensor.ndim == rank, ValueError, f"{operation}: rank of {name}", tensor.ndim, rank)
        same = tensor.dtype == of.dtype and of.dtype.is_floating_point
        wanted = "a floating dtype" if tensor is of else f"the floating dtype of {first}, {of.dtype}"
        require(same, TypeError, f"{operation}: {name}", tensor.dtype, wanted)
        _check_device(f"{operation}: device of {name}", tensor, of)


def _check_seen(operation: str, mask: Tensor | None, first: Tensor | None, q: Tensor) -> None:
    one = mask is None or first is None
    require(one, ValueError, f"{operation}: what queries see", "given as mask_BSS and as first_BS", "one of the two")
    if mask is not None:
        require(mask.dtype == torch.bool, TypeError, f"{operation}: mask_BSS", mask.dtype, "torch.bool")
        _check_shape(f"{operation}: shape of mask_BSS", mask, (q.shape[0], q.shape[1], q.shape[1]))
        _check_device(f"{operation}: device of mask_BSS", mask, q)
    if first is not None:
        whole = first.dtype in (torch.int32, torch.int64)
        require(whole, TypeError, f"{operation}: first_BS", first.dtype, "torch.int32 or torch.int64")
        _check_shape(f"{operation}: shape of first_BS", first, (q.shape[0], q.shape[1]))
        _check_device(f"{operation}: device of first_BS", first, q)
        if readable(first) and first.numel():
            least = int(first.min())
            require(least >= 0, ValueError, f"{operation}: the least of first_BS", least, "a place from 0 on")


def _check_shape(what: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    require(tuple(tensor.shape) == wanted, ValueError, what, tuple(tensor.shape), wanted)


def _check_device(what: str, tensor: Tensor, of: Tensor) -> None:
    require(tensor.device == of.device, ValueError, what, tensor.device, f"that of the queries, {of.device}")
