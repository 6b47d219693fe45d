"""Latent attention of new tokens over the cache in Triton: the cache is read once, as it lies, and in several parts.

`_append` puts the new tokens into the cache and rotates the queries. A program of `_attend` then takes a block of one
row's queries (its tokens' heads, one token after the other) and a span of places: each tile of the cache that it loads
is the key of all queries of the block and, but for its rotated part, their value. Where a row's places are several
spans, each leaves a softmax of its own and the logarithm of its sum, by which `_combine` joins them in order.

What a token gives, to the bit, depends on the sizes of the batch (rows, new tokens, heads: they choose the span) and on
those of tiles that were found for the device, and neither on how far the other rows reach nor on what they hold. Scores
and sums are float32; weights are rounded to the cache's dtype, as its tensor cores want them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from gristmill.kernels.grouped_gemm.gpu import INTERPRETED, _processors
from gristmill.kernels.tiles import tuned

SMALLEST = 16  # side of a product of the tensor cores
HEADS = 16  # whose queries one program rotates
PARTS, COLUMNS = 32, 128  # of the tiles in which parts are joined
LEAST_SPAN = 128  # places
MOST_SPAN = 128  # places a query of the block: writing and reading a part is then little beside reading the cache


@dataclass(frozen=True)
class Tiles:
    """Queries of a block and places of a tile; warps, and buffers of the loop over tiles; and of rows that are divided
    the places a row from which on their spans occupy every multiprocessor once: fewer make more spans."""

    queries: int
    places: int
    warps: int
    stages: int
    filled: int = 4096


FEW, MANY = Tiles(16, 64, 4, 3), Tiles(64, 64, 8, 2)  # up to 16 queries a row, and more
PLAIN = Tiles(16, 16, 4, 2)  # of float32, whose products are no tensor cores'


@triton.jit(do_not_specialize=["length", "reach", "pages"])
def _append(
    q_ptr, kv_ptr, cache_ptr, table_ptr, start_ptr, cos_ptr, sin_ptr, norm_ptr, turned_ptr,
    length, heads, plain, latent, turning, reach, pages, q_row, q_token, q_head, kv_row, kv_token, cache_row,
    table_row, eps,
    HEADS: tl.constexpr, LATENT: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Of one token: its latent, normed, and its key, rotated, into the cache; or the rotated part of HEADS queries."""
    token = tl.program_id(0).to(tl.int64)
    row, s = token // length, token % length
    half = turning // 2
    r = tl.arange(0, HALF)
    inside = r < half
    cos = tl.load(cos_ptr + token * half + r, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * half + r, mask=inside, other=0.0).to(tl.float32)
    if tl.program_id(1) == 0:
        new = kv_ptr + row * kv_row + s * kv_token
        place = tl.load(start_ptr + row) + s
        allowed = (place >= 0) & (place < reach)
        if PAGE > 0:
            page = tl.load(table_ptr + row * table_row + place // PAGE, mask=allowed, other=0).to(tl.int64)
            allowed = allowed & (page >= 0) & (page < pages)
            kept = cache_ptr + page * cache_row + place % PAGE * (latent + turning)
        else:
            kept = cache_ptr + row * cache_row + place * (latent + turning)
        c = tl.arange(0, LATENT)
        x = tl.load(new + c, mask=c < latent, other=0.0).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, 0) / latent + eps)
        x = x * tl.load(norm_ptr + c, mask=c < latent, other=0.0).to(tl.float32)
        even = tl.load(new + latent + 2 * r, mask=inside, other=0.0).to(tl.float32)
        odd = tl.load(new + latent + 2 * r + 1, mask=inside, other=0.0).to(tl.float32)
        if allowed:  # nobody looks at places and pages on a GPU: nothing is written beside the cache
            tl.store(kept + c, x.to(cache_ptr.dtype.element_ty), mask=c < latent)
            out = kept + latent + r
            tl.store(out, (even * cos - odd * sin).to(cache_ptr.dtype.element_ty), mask=inside)
            tl.store(out + half, (odd * cos + even * sin).to(cache_ptr.dtype.element_ty), mask=inside)
    else:
        h = (tl.program_id(1) - 1) * HEADS + tl.arange(0, HEADS)[:, None]
        query = q_ptr + row * q_row + s * q_token + h.to(tl.int64) * q_head + plain + 2 * r[None, :]
        both = (h < heads) & inside[None, :]
        evens = tl.load(query, mask=both, other=0.0).to(tl.float32)
        odds = tl.load(query + 1, mask=both, other=0.0).to(tl.float32)
        turned = turned_ptr + (token * heads + h) * turning + r[None, :]
        first, second = evens * cos[None, :] - odds * sin[None, :], odds * cos[None, :] + evens * sin[None, :]
        tl.store(turned, first.to(turned_ptr.dtype.element_ty), mask=both)
        tl.store(turned + half, second.to(turned_ptr.dtype.element_ty), mask=both)


@triton.jit(do_not_specialize=["length", "reach", "pages", "span", "tokens"])
def _attend(
    q_ptr, turned_ptr, cache_ptr, table_ptr, start_ptr, out_ptr, lse_ptr,
    length, heads, latent, turning, reach, pages, span, tokens, cache_row, table_row, scale,
    WHOLE: tl.constexpr, WIDE: tl.constexpr, QUERIES: tl.constexpr, PLACES: tl.constexpr,
    LATENT: tl.constexpr, TURNING: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """A block of a row's queries over one span of its places; `scale` is of base-2 exponentials.

    If WHOLE, the span is the only one, and what is stored is (H, T, C) as the queries are; else (T, H, spans, C). Of
    pages, each holds whole tiles of places.
    """
    blocks = tl.cdiv(length * heads, QUERIES)
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    query = block * QUERIES + tl.arange(0, QUERIES)  # token · heads + head
    here, head, token = query < length * heads, query % heads, row * length + query // heads
    first = tl.load(start_ptr + row).to(tl.int32)
    seen = first + query // heads + 1
    last = tl.minimum((block + 1) * QUERIES, length * heads) - 1
    begin = tl.program_id(1) * span
    end = tl.minimum(tl.minimum(first + last // heads + 1, reach), begin + span)
    if begin >= end:
        return
    c, r, p = tl.arange(0, LATENT), tl.arange(0, TURNING), tl.arange(0, PLACES)
    at = (head.to(tl.int64) * tokens + token) * latent
    q = tl.load(q_ptr + at[:, None] + c[None, :], mask=here[:, None] & (c < latent)[None, :], other=0.0)
    at_turned = (token * heads + head) * turning
    turned = tl.load(
        turned_ptr + at_turned[:, None] + r[None, :], mask=here[:, None] & (r < turning)[None, :], other=0.0
    )
    if WIDE:
        q, turned = q.to(tl.float32), turned.to(tl.float32)
    keys = cache_ptr + row * cache_row + begin.to(tl.int64) * (latent + turning)
    in_tile = p[:, None] * (latent + turning)
    highest = tl.full((QUERIES,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    mixed = tl.zeros((QUERIES, LATENT), dtype=tl.float32)
    for place in range(begin, end, PLACES):
        inside = place + p < end
        if PAGE > 0:
            page = tl.load(table_ptr + row * table_row + place // PAGE).to(tl.int64)
            page = tl.minimum(tl.maximum(page, 0), pages - 1)  # nobody looked: nothing is read beside the cache
            keys = cache_ptr + page * cache_row + place % PAGE * (latent + turning)
        kv = tl.load(keys + in_tile + c[None, :], mask=inside[:, None] & (c < latent)[None, :], other=0.0)
        kr = tl.load(keys + latent + in_tile + r[None, :], mask=inside[:, None] & (r < turning)[None, :], other=0.0)
        if WIDE:
            kv, kr = kv.to(tl.float32), kr.to(tl.float32)
        score = tl.dot(q, tl.trans(kv), input_precision="ieee")
        score = tl.dot(turned, tl.trans(kr), score, input_precision="ieee") * scale
        score = tl.where(inside[None, :] & (place + p[None, :] < seen[:, None]), score, -float("inf"))
        above = tl.maximum(highest, tl.max(score, 1))
        level = tl.where(above == -float("inf"), 0.0, above)  # of a query whose token lies before all these places
        weight, faded = tl.exp2(score - level[:, None]), tl.exp2(highest - level)
        total = total * faded + tl.sum(weight, 1)
        mixed = tl.dot(weight.to(kv.dtype), kv, mixed * faded[:, None], input_precision="ieee")
        highest = above
        if PAGE == 0:
            keys += PLACES * (latent + turning)
    mixed = mixed / total[:, None]
    at_lse = token * heads + head
    if not WHOLE:
        at_lse = at_lse * tl.num_programs(1) + tl.program_id(1)
        at = at_lse * latent
    kept = here & (begin < seen)
    tl.store(lse_ptr + at_lse, (highest + tl.log2(total)) * 0.6931471805599453, mask=kept)
    out = out_ptr + at[:, None] + c[None, :]
    tl.store(out, mixed.to(out_ptr.dtype.element_ty), mask=kept[:, None] & (c < latent)[None, :])


@triton.jit(do_not_specialize=["length", "reach", "span", "spans"])
def _combine(
    part_ptr, part_lse_ptr, start_ptr, out_ptr, lse_ptr, length, latent, reach, span, spans,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of one query, the parts of its own token's spans, (T, H, spans, C), joined in order: (H, T, C)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    seen = tl.minimum(tl.load(start_ptr + token // length) + token % length + 1, reach)
    parts = tl.cdiv(seen, span).to(tl.int32)
    part, c = (token * tl.num_programs(1) + head) * spans, tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    highest, total, mixed = -float("inf"), 0.0, tl.zeros((COLUMNS,), dtype=tl.float32)
    for some in range(0, parts, PARTS):
        i = some + tl.arange(0, PARTS)
        lse = tl.load(part_lse_ptr + part + i, mask=i < parts, other=-float("inf"))
        above = tl.maximum(highest, tl.max(lse, 0))
        faded, weight = tl.exp(highest - above), tl.exp(lse - above)
        both = (i < parts)[:, None] & (c < latent)[None, :]
        tile = tl.load(part_ptr + (part + i)[:, None] * latent + c[None, :], mask=both, other=0.0)
        total = total * faded + tl.sum(weight, 0)
        mixed = mixed * faded + tl.sum(weight[:, None] * tile, 0)
        highest = above
    if tl.program_id(2) == 0:
        tl.store(lse_ptr + token * tl.num_programs(1) + head, highest + tl.log(total))
    out = out_ptr + (head * tl.num_programs(0) + token) * latent + c
    tl.store(out, (mixed / total).to(out_ptr.dtype.element_ty), mask=c < latent)


def _span(blocks: int, tiles: Tiles, processors: int, reach: int) -> int:
    """Places of a program, where there are so many blocks of queries.

    From four blocks a multiprocessor on each goes over its places alone. Fewer share them, in spans of a power of two.
    """
    if blocks >= 4 * processors:
        return reach
    span = triton.next_power_of_2(tiles.filled * blocks // processors)
    return min(max(span, LEAST_SPAN), MOST_SPAN * tiles.queries)


def _chosen(q: Tensor, queries: int) -> Tiles:
    """For so many queries a row."""
    if q.dtype == torch.float32:
        return PLAIN
    kernel, usual = ("few", FEW) if queries <= FEW.queries else ("many", MANY)
    return tuned(f"mla_decode.{kernel}", q.device, usual)


def attend(
    q_HTC: Tensor,
    turned_THR: Tensor,
    cache_BPC: Tensor,
    start_B: Tensor,
    reach: int,
    scale: float,
    tiles: Tiles | None = None,
    table_BJ: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The mixed latents of each query, (H, T, C), and the logarithms of their sums of exponentials, (T, H) in float32.

    T tokens are the rows' new ones, row after row, whose latents are in the cache already.
    """
    (heads, tokens, latent), turning, batch = q_HTC.shape, turned_THR.shape[2], len(start_B)
    length, processors = tokens // batch, _processors(q_HTC.device)
    tiles = tiles or _chosen(q_HTC, length * heads)
    table, page = _table(table_BJ, cache_BPC, start_B)
    tiles = replace(tiles, places=min(tiles.places, page)) if page else tiles
    blocks = batch * triton.cdiv(length * heads, tiles.queries)
    span = _span(blocks, tiles, processors, reach)
    spans = triton.cdiv(reach, span)
    mixed_HTC, lse_TH = torch.empty_like(q_HTC), q_HTC.new_empty(tokens, heads, dtype=torch.float32)
    parts, part_lse = mixed_HTC, lse_TH
    if spans > 1:
        parts = q_HTC.new_empty(tokens, heads, spans, latent, dtype=torch.float32)
        part_lse = q_HTC.new_empty(tokens, heads, spans, dtype=torch.float32)
    _attend[(blocks, spans)](
        q_HTC, turned_THR, cache_BPC, table, start_B, parts, part_lse,
        length, heads, latent, turning, reach, len(cache_BPC), span, tokens, cache_BPC.stride(0), table.stride(0),
        scale * math.log2(math.e),
        WHOLE=spans == 1, WIDE=INTERPRETED, QUERIES=tiles.queries, PLACES=tiles.places,
        LATENT=_padded(latent), TURNING=_padded(turning), PAGE=page, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if spans > 1:
        _combine[(tokens, heads, triton.cdiv(latent, COLUMNS))](
            parts, part_lse, start_B, mixed_HTC, lse_TH, length, latent, reach, span, spans,
            PARTS=PARTS, COLUMNS=COLUMNS,
        )  # fmt: skip
    return mixed_HTC, lse_TH


def _table(table_BJ: Tensor | None, cache_BPC: Tensor, start_B: Tensor) -> tuple[Tensor, int]:
    """The table, its rows in order, and a page's places; of a cache that is not paged anything, and 0."""
    if table_BJ is None:
        return start_B, 0
    return (table_BJ if table_BJ.stride(1) == 1 else table_BJ.contiguous()), cache_BPC.shape[1]


def _padded(size: int) -> int:
    return max(triton.next_power_of_2(size), SMALLEST)


def triton_mla_decode(
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
) -> tuple[Tensor, Tensor]:
    """See `mla_decode`, with its logarithms; places of the cache lie one behind the other, in 16 bits or float32."""
    (batch, length, heads, wide), latent, turning = q_BSHQ.shape, len(norm_C), cache_BPC.shape[2] - len(norm_C)
    plain, tokens, start_B = wide - turning, batch * length, start_B.contiguous()
    q_BSHQ, kv_BSY = (t if t.stride(-1) == 1 else t.contiguous() for t in (q_BSHQ, kv_BSY))
    cos, sin = (t.contiguous() for t in rotary)
    turned_THR = q_BSHQ.new_empty(tokens, heads, turning)
    table, page = _table(table_BJ, cache_BPC, start_B)
    _append[(tokens, 1 + triton.cdiv(heads, HEADS))](
        q_BSHQ, kv_BSY, cache_BPC, table, start_B, cos, sin, norm_C.contiguous(), turned_THR,
        length, heads, plain, latent, turning, reach, len(cache_BPC),
        *q_BSHQ.stride()[:3], *kv_BSY.stride()[:2], cache_BPC.stride(0), table.stride(0), float(eps),
        HEADS=HEADS, LATENT=triton.next_power_of_2(latent), HALF=triton.next_power_of_2(turning // 2), PAGE=page,
    )  # fmt: skip
    plain_HTN = q_BSHQ[..., :plain].reshape(tokens, heads, plain).transpose(0, 1)
    q_HTC = torch.bmm(plain_HTN, up_HXC[:, :plain])
    mixed_HTC, log_TH = attend(q_HTC, turned_THR, cache_BPC, start_B, reach, scale, table_BJ=table_BJ)
    out_HTW = torch.bmm(mixed_HTC, up_HXC[:, plain:].transpose(1, 2))
    return out_HTW.transpose(0, 1).reshape(batch, length, -1), log_TH.view(batch, length, heads)
