"""Multi-head latent attention of new tokens over a cache of latents, in its absorbed form (V3 section 2.1.1).

On a CPU in float32 `cpu.cpp` runs (`compiled` in `report()`): a token's heads read the cache as it lies, nothing as
large as the scores of all tokens is held, and what a token gives does not depend on those beside it. On a GPU Triton's
kernels do the same in 16 bits (gpu.py, `gpu`), many programs sharing a long row. Elsewhere it is torch's operations
(reference.py), as on a GPU in float32, or where places of the cache do not lie one behind the other.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gristmill.kernels.compiled import needed
from gristmill.kernels.dispatch import (
    INTERPRETED,
    chosen,
    in_own_dtypes,
    readable,
    require,
    require_device,
    require_ranks,
    require_shapes,
)
from gristmill.kernels.mla_decode import library
from gristmill.kernels.mla_decode.reference import mla_decode_reference, mla_decode_with_log_reference

__all__ = ["mla_decode"]
SOURCE = "mla_decode/cpu.cpp"
MOST_LATENT = 512  # numbers; tiles of wider latents do not fit into shared memory
LEAST_PAGE = 16  # places; a tile of a GPU's tensor cores lies in one page
TAKES = (
    f"operands whose numbers lie side by side, and on a GPU 16 bits, a Hopper GPU, latents of at most {MOST_LATENT} "
    f"numbers and pages of at least {LEAST_PAGE} places"
)


@overload
def mla_decode(
    q_BSHQ: Tensor, kv_BSY: Tensor, cache_BPC: Tensor, start_B: Tensor, reach: int, rotary: tuple[Tensor, Tensor],
    norm_C: Tensor, eps: float, up_HXC: Tensor, scale: float, table_BJ: Tensor | None = None, *,
    with_log: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def mla_decode(
    q_BSHQ: Tensor, kv_BSY: Tensor, cache_BPC: Tensor, start_B: Tensor, reach: int, rotary: tuple[Tensor, Tensor],
    norm_C: Tensor, eps: float, up_HXC: Tensor, scale: float, table_BJ: Tensor | None = None, *,
    with_log: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@in_own_dtypes
@torch.no_grad()
def mla_decode(
    q_BSHQ: Tensor,
    kv_BSY: Tensor,
    cache_BPC: Tensor,
    start_B: Tensor,
    reach: int,
    rotary: tuple[Tensor, Tensor],
    norm_C: Tensor,
    eps: float,
    up_HXC: Tensor,
    scale: float,
    table_BJ: Tensor | None = None,
    *,
    with_log: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Write new tokens into their slots, and let each attend to its slot up to itself, (B, S, H·W). No gradient.

    Args:
        q_BSHQ: queries as projected, (B, S, H, N + R), of which the last R are rotated here, in interleaved pairs.
        kv_BSY: latents before their norm and the key that all heads share before its rotation, (B, S, C + R).
        cache_BPC: a layer's slots, (B, P, C + R): normed latents and rotated keys; written at start + s. With a table,
            pages of P places, a power of two, as many as there are for all rows.
        start_B: the place of each row's first token, int64.
        reach: one more than the furthest place of a token, at most P, or J · P with a table.
        rotary: cosines and sines of the tokens' angles, float32, (B, S, R/2) each.
        norm_C: the weight of the latent's RMS norm.
        eps: of that norm.
        up_HXC: what makes keys and values of a latent, (H, N + W, C), keys first.
        scale: what the products of queries and keys are multiplied by.
        table_BJ: the page of each P places of a row, in order, int32 or int64, (B, J); what stands behind a row's last
            token is not looked at. Pages that several rows read (of a common beginning) none of them may write. The
            result does not depend on where pages lie: on the compiled path to the bit.
        with_log: whether the natural logarithms of each head's Σ exp(scaled score) over the places that it sees come
            along, (B, S, H) in float32: by them results over several caches are joined.

    Raises:
        TypeError: q is not floating, dtypes differ, angles are not float32, places not int64, or pages neither int32
            nor int64.
        ValueError: shapes or devices do not fit, a page's size is no power of two, or (on a CPU; on a GPU where
            GRISTMILL_KERNELS_CHECK=1) a place is negative or not below the reach, or a row's page is none of the cache.
    """
    if is_dynamo_compiling():
        node = library.mla_decode_with_log if with_log else library.mla_decode
        return node(q_BSHQ, kv_BSY, cache_BPC, start_B, reach, *rotary, norm_C, eps, up_HXC, scale, table_BJ)
    _check(q_BSHQ, kv_BSY, cache_BPC, start_B, reach, rotary, norm_C, up_HXC, table_BJ)
    (batch, length, heads, wide), (latent,) = q_BSHQ.shape, norm_C.shape
    turning = kv_BSY.shape[-1] - latent
    value = up_HXC.shape[1] + turning - wide
    if not q_BSHQ.numel():
        out, log_BSH = q_BSHQ.new_empty(batch, length, heads * value), q_BSHQ.new_empty(0, dtype=torch.float32)
        return (out, log_BSH.view(batch, length, heads)) if with_log else out
    read = (cache_BPC, rotary[0], rotary[1], norm_C, up_HXC, start_B)
    lies = all(t.is_contiguous() for t in read[1:]) and cache_BPC.stride()[1:] == (latent + turning, 1)
    lies = lies and _rows(q_BSHQ) is not None and _rows(kv_BSY) is not None
    if readable(start_B):
        low, high = int(start_B.min()), int(start_B.max()) + length
        within = low >= 0 and high <= reach
        require(within, ValueError, "mla_decode: places", (low, high - 1), f"from 0 to below reach, {reach}")
    page = None if table_BJ is None else cache_BPC.shape[1]
    in_order = cache_BPC.stride()[1:] == (latent + turning, 1)
    fits = in_order and _in_triton(q_BSHQ, latent, page)
    path = chosen("mla_decode", q_BSHQ, SOURCE if lies else None, triton=fits, takes=TAKES)
    if table_BJ is not None and path != "compiled" and readable(table_BJ):
        _check_pages(table_BJ, cache_BPC, start_B + length)
    given = q_BSHQ, kv_BSY, cache_BPC, start_B, reach, rotary, norm_C, eps, up_HXC, scale, table_BJ
    if path == "gpu":
        from gristmill.kernels.mla_decode.gpu import triton_mla_decode

        both = triton_mla_decode(*given)
        return both if with_log else both[0]
    if path != "compiled":
        return mla_decode_with_log_reference(*given) if with_log else mla_decode_reference(*given)
    log_BSH = q_BSHQ.new_empty(batch, length, heads) if with_log else None
    out = q_BSHQ.new_empty(batch, length, heads * value)
    table: tuple[Tensor | None, int, int, int] = (None, 0, 0, 0)
    if table_BJ is not None:
        table = (table_BJ.long().contiguous(), table_BJ.shape[1], cache_BPC.shape[1], len(cache_BPC))
    inputs = (q_BSHQ, _rows(q_BSHQ), kv_BSY, _rows(kv_BSY), cache_BPC, cache_BPC.stride(0), *table, start_B)
    sizes = (batch, length, heads, wide - turning, turning, value, latent)
    failed = needed(SOURCE)("decode", *inputs, *rotary, norm_C, up_HXC, out, log_BSH, *sizes, float(eps), float(scale))
    if failed and table_BJ is not None:  # which it looked at before it wrote
        _check_pages(table_BJ, cache_BPC, start_B + length)
    return out if log_BSH is None else (out, log_BSH)


def _check(
    q_BSHQ: Tensor, kv_BSY: Tensor, cache_BPC: Tensor, start_B: Tensor, reach: int, rotary: tuple[Tensor, Tensor],
    norm_C: Tensor, up_HXC: Tensor, table_BJ: Tensor | None,
) -> None:  # fmt: skip
    """What can be told without looking at numbers."""
    name, (cos, sin) = "mla_decode", rotary
    require_ranks(
        name, q_BSHQ=(q_BSHQ, 4), kv_BSY=(kv_BSY, 3), cache_BPC=(cache_BPC, 3), norm_C=(norm_C, 1), up_HXC=(up_HXC, 3)
    )
    (batch, length, heads, wide), (latent,), wanted = q_BSHQ.shape, norm_C.shape, kv_BSY.shape[2]
    turning, value = wanted - latent, up_HXC.shape[1] + wanted - latent - wide
    rows, places = (batch, cache_BPC.shape[1]) if table_BJ is None else _paged(table_BJ, cache_BPC, batch)
    angles = batch, length, turning // 2
    require_shapes(
        name, kv_BSY=(kv_BSY, (batch, length, wanted)), cache_BPC=(cache_BPC, (rows, cache_BPC.shape[1], wanted)),
        start_B=(start_B, (batch,)), up_HXC=(up_HXC, (heads, wide - turning + value, latent)), cosines=(cos, angles),
        sines=(sin, angles),
    )  # fmt: skip
    fits = 0 < turning <= wide and turning % 2 == 0 and value > 0
    require(fits, ValueError, "mla_decode: numbers of a rotated part, of a value", (turning, value), "even, positive")
    require(reach <= places, ValueError, "mla_decode: reach", reach, f"at most {places}")
    require(start_B.dtype == torch.int64, TypeError, "mla_decode: start_B", start_B.dtype, torch.int64)
    require(q_BSHQ.is_floating_point(), TypeError, "mla_decode: q_BSHQ", q_BSHQ.dtype, "a floating dtype")
    for what, angle in (("cosines", cos), ("sines", sin)):
        if angle.dtype != torch.float32:
            raise TypeError(f"mla_decode: {what} are {angle.dtype}; wanted {torch.float32}")
    for what, tensor in (("kv_BSY", kv_BSY), ("cache_BPC", cache_BPC), ("norm_C", norm_C), ("up_HXC", up_HXC)):
        if tensor.dtype != q_BSHQ.dtype:
            raise TypeError(f"mla_decode: {what} is {tensor.dtype}; wanted {q_BSHQ.dtype}, that of q_BSHQ")
    require_device(
        name, "q_BSHQ", q_BSHQ, kv_BSY=kv_BSY, cache_BPC=cache_BPC, start_B=start_B, cosines=cos, sines=sin,
        norm_C=norm_C, up_HXC=up_HXC, table_BJ=table_BJ,
    )  # fmt: skip


def _paged(table: Tensor, cache: Tensor, batch: int) -> tuple[int, int]:
    """How many pages there are, and how many places a row has in them."""
    require(table.ndim == 2, ValueError, "mla_decode: rank of table_BJ", table.ndim, 2)
    require(len(table) == batch, ValueError, "mla_decode: rows of table_BJ", len(table), batch)
    whole = table.dtype in (torch.int32, torch.int64)
    require(whole, TypeError, "mla_decode: table_BJ", table.dtype, (torch.int32, torch.int64))
    page = cache.shape[1]
    require(page.bit_count() == 1, ValueError, "mla_decode: places of a page", page, "a power of two")
    return len(cache), table.shape[1] * page


def _check_pages(table_BJ: Tensor, cache_BPC: Tensor, end_B: Tensor) -> None:
    """The pages of places before the rows' ends are there."""
    used_BJ = torch.arange(table_BJ.shape[1], device=end_B.device) * cache_BPC.shape[1] < end_B[:, None]
    low, high = (int(page) for page in table_BJ[used_BJ].aminmax())
    within, wanted = low >= 0 and high < len(cache_BPC), f"from 0 to below {len(cache_BPC)}"
    require(within, ValueError, "mla_decode: pages of table_BJ", (low, high), wanted)


def _in_triton(q: Tensor, latent: int, page: int | None) -> bool:
    """Whether the code in Triton takes such queries: in 16 bits on a Hopper GPU, of latents and pages that fit."""
    if page is not None and page < LEAST_PAGE:
        return False
    if INTERPRETED:
        return q.dtype != torch.float64
    if not q.is_cuda or q.element_size() != 2 or latent > MOST_LATENT:
        return False
    from gristmill.kernels.grouped_gemm.gpu import _has_engine

    return _has_engine(q.device)


def _rows(x: Tensor) -> int | None:
    """Numbers from one token to the next, where a token's lie side by side and tokens evenly apart."""
    batch, length = x.shape[:2]
    apart = x.stride(1) if length > 1 else x.stride(0)
    inside = x[0, 0].is_contiguous()
    even = batch == 1 or length == 1 or x.stride(0) == length * apart
    return apart if inside and even else None
