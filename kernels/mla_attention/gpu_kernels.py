"""The kernels of `gpu.py`: attention tile by tile, forward and backward.

Operands are descriptors of (B, heads, S, width); x and `x_second` are a block's queries. Scores are taken times
`scale` · log₂ e, so that weights are powers of two. What queries see is said by SEEN: "causal", the keys up to their
own; "first", of these the ones from a place on that `seen_ptr` has for each query, int32; "mask", what its bits say,
which `packed` made. A list of tiles, where it is not causal, is one of `Lists`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def packed(mask_ptr, bits_ptr, rows, length, ROWS: tl.constexpr):
    """64 neighbouring keys of a row of the mask as the bits of one number; those beyond the last are unseen."""
    row, key = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, 64)
    column = tl.program_id(1) * 64 + key
    here = (row < rows)[:, None] & (column < length)[None, :]
    seen = tl.load(mask_ptr + row[:, None] * length + column[None, :], mask=here, other=0) != 0
    bits = tl.sum(seen.to(tl.int64) << key.to(tl.int64)[None, :], 1)  # of disjoint bits the sum is the union
    tl.store(bits_ptr + row * tl.num_programs(1) + tl.program_id(1), bits, mask=row < rows)


@triton.jit
def _words(bits_ptr, batch, rows, word, length):
    """A number for each row: of 64 keys, those from 64 · word on. A row has an even number of them."""
    words = 2 * tl.cdiv(length, 128)
    first = bits_ptr + batch.to(tl.int64) * length * words + word
    return tl.load(first + rows * words, mask=rows < length, other=0)


@triton.jit
def _first_seen(first_ptr, batch, rows, length):
    """The first key that each row sees, or one behind all keys where there is no such row."""
    return tl.load(first_ptr + batch.to(tl.int64) * length + rows, mask=rows < length, other=2147483647)


@triton.jit
def _seen(seen_ptr, batch, rows, first, length, SEEN: tl.constexpr, KEYS: tl.constexpr, UPRIGHT: tl.constexpr):
    """Whether rows see keys from `first` on, (ROWS, KEYS), or (KEYS, ROWS) if UPRIGHT."""
    key = tl.arange(0, KEYS)
    keys = first + key
    keys, rows_there = (keys[:, None], rows[None, :]) if UPRIGHT else (keys[None, :], rows[:, None])
    if SEEN == "mask":
        word = _words(seen_ptr, batch, rows, first // 64, length)
        bits, place = word[None, :] if UPRIGHT else word[:, None], keys - first // 64 * 64
        if KEYS > 64:
            more = _words(seen_ptr, batch, rows, first // 64 + 1, length)
            bits = tl.where(place < 64, bits, more[None, :] if UPRIGHT else more[:, None])
        return ((bits >> (place % 64).to(tl.int64)) & 1) != 0
    if SEEN == "first":
        begin = _first_seen(seen_ptr, batch, rows, length)
        return (keys >= (begin[None, :] if UPRIGHT else begin[:, None])) & (keys <= rows_there)
    return (keys <= rows_there) & (keys < length)


@triton.jit
def kinds(bits_ptr, kind_ptr, length, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Of a tile of the mask: 0 nothing is seen, 2 everything, 1 a part, as where keys beyond the last would be."""
    batch, row, key = tl.program_id(2), tl.program_id(0), tl.program_id(1)
    rows = row * ROWS + tl.arange(0, ROWS)
    seen = _seen(bits_ptr, batch, rows, key * KEYS, length, "mask", KEYS, False).to(tl.int32)
    least = tl.min(tl.min(tl.where((rows < length)[:, None], seen, 1), 1), 0)
    place = (batch.to(tl.int64) * tl.num_programs(0) + row) * tl.num_programs(1) + key
    tl.store(kind_ptr + place, tl.max(tl.max(seen, 1), 0) + least)


@triton.jit
def kinds_from_first(
    first_ptr, kind_ptr, length, tiles, ROWS: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """As `kinds`, of TILES tiles of keys, from the first key that each row sees."""
    batch, row = tl.program_id(2), tl.program_id(0)
    rows, tile = row * ROWS + tl.arange(0, ROWS), tl.program_id(1) * TILES + tl.arange(0, TILES)
    first, begin, last = _first_seen(first_ptr, batch, rows, length), tile * KEYS, tile * KEYS + KEYS - 1
    from_key, to_key = tl.maximum(first[:, None], begin[None, :]), tl.minimum(rows[:, None], last[None, :])
    some = tl.max((from_key <= to_key).to(tl.int32), 0)
    whole = (tl.max(tl.where(rows < length, first, 0), 0) <= begin) & (last <= row * ROWS)
    place = (batch.to(tl.int64) * tl.num_programs(0) + row) * tiles + tile
    tl.store(kind_ptr + place, some + whole.to(tl.int32), mask=tile < tiles)


@triton.jit
def _scores(q, q_second, k, k_second, SPLIT: tl.constexpr, WIDE: tl.constexpr):
    """q kᵀ, both parts."""
    if WIDE:
        q, k = q.to(tl.float32), k.to(tl.float32)
    scores = tl.dot(q, k.T, input_precision="ieee")
    if SPLIT:
        if WIDE:
            q_second, k_second = q_second.to(tl.float32), k_second.to(tl.float32)
        scores = tl.dot(q_second, k_second.T, scores, input_precision="ieee")
    return scores


@triton.jit
def _add_product(a, b, total, WIDE: tl.constexpr):
    """total + a · b, a rounded to b's dtype first."""
    if WIDE:
        return tl.dot(a, b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a.to(b.dtype), b, total, input_precision="ieee")


@triton.jit
def _bounds(whole_ptr, part_ptr, at):
    """Of a list of tiles: how many are seen whole, and how many at all."""
    count = tl.load(whole_ptr + at)
    return count, count + tl.load(part_ptr + at)


@triton.jit
def _tile_of_softmax(
    x, x_second, k, k_second, v, top, total, sums, seen_ptr, list_ptr, i, batch, group, second, rows, scale, length,
    PART: tl.constexpr, SPLIT: tl.constexpr, SEEN: tl.constexpr, WIDE: tl.constexpr,
    KEYS: tl.constexpr, N: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """One more tile of keys: the highest score, the sum of weights and of weighted values so far."""
    first = KEYS * (tl.load(list_ptr + i) if SEEN != "causal" else i)
    key = k.load([batch, group, first, 0]).reshape(KEYS, N)
    key_second = k_second.load([batch, second, first, 0]).reshape(KEYS, R) if SPLIT else key
    scores = _scores(x, x_second, key, key_second, SPLIT, WIDE)
    if PART:
        seen = _seen(seen_ptr, batch, rows, first, length, SEEN, KEYS, False)
        scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(top, tl.max(scores, 1) * scale)  # scale is above zero
    base = tl.where(new == float("-inf"), 0.0, new) if PART else new
    weight, fade = tl.exp2(scores * scale - base[:, None]), tl.exp2(top - base)
    value = v.load([batch, group, first, 0]).reshape(KEYS, W)
    return new, total * fade + tl.sum(weight, 1), _add_product(weight, value, sums * fade[:, None], WIDE)


@triton.jit
def forward(
    q, q_second, k, k_second, v, out, log_ptr, seen_ptr, list_ptr, whole_ptr, part_ptr,
    scale, length, heads, shared, own_second,
    SPLIT: tl.constexpr, SEEN: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, N: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head: its results, and log₂ Σ 2^(score · scale), infinite where nothing is seen."""
    blocks, both = tl.cdiv(length, ROWS), tl.program_id(0) // tl.cdiv(length, ROWS)
    block = blocks - 1 - tl.program_id(0) % blocks  # causal blocks with most keys begin
    batch, head = both // heads, both % heads
    group, first = head // shared, block * ROWS
    second, rows = group * own_second, first + tl.arange(0, ROWS)
    x = q.load([batch, head, first, 0]).reshape(ROWS, N)
    x_second = q_second.load([batch, head, first, 0]).reshape(ROWS, R) if SPLIT else x
    top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total, sums = tl.zeros((ROWS,), dtype=tl.float32), tl.zeros((ROWS, W), dtype=tl.float32)
    if SEEN != "causal":
        at = (batch * blocks + block).to(tl.int64)
        list_ptr += at * tl.cdiv(length, KEYS)
        complete, end = _bounds(whole_ptr, part_ptr, at)
    else:
        complete, end = (first + 1) // KEYS, tl.cdiv(tl.minimum(first + ROWS, length), KEYS)
    for i in range(0, complete):
        top, total, sums = _tile_of_softmax(
            x, x_second, k, k_second, v, top, total, sums, seen_ptr, list_ptr, i, batch, group, second, rows, scale,
            length, False, SPLIT, SEEN, WIDE, KEYS, N, R, W,
        )  # fmt: skip
    for i in range(complete, end):
        top, total, sums = _tile_of_softmax(
            x, x_second, k, k_second, v, top, total, sums, seen_ptr, list_ptr, i, batch, group, second, rows, scale,
            length, True, SPLIT, SEEN, WIDE, KEYS, N, R, W,
        )  # fmt: skip
    empty = total == 0.0
    result = sums / tl.where(empty, 1.0, total)[:, None]
    out.store([batch, head, first, 0], result.to(out.dtype).reshape(1, 1, ROWS, W))
    log = tl.where(empty, float("inf"), top + tl.log2(total))
    tl.store(log_ptr + both.to(tl.int64) * length + rows, log, mask=rows < length)


@triton.jit
def products(
    out_ptr, grad_ptr, product_ptr, length, heads, width, out_batch, out_head, out_row, grad_batch, grad_head, grad_row,
    ROWS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Σ result · gradient of each query of one head."""
    blocks = tl.cdiv(length, ROWS)
    both, rows = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    batch, head, w = (both // heads).to(tl.int64), (both % heads).to(tl.int64), tl.arange(0, W)
    here = (rows < length)[:, None] & (w < width)[None, :]
    row = rows.to(tl.int64)[:, None]
    out = tl.load(out_ptr + batch * out_batch + head * out_head + row * out_row + w[None, :], mask=here, other=0.0)
    grad = tl.load(grad_ptr + batch * grad_batch + head * grad_head + row * grad_row + w[None, :], mask=here, other=0.0)
    product = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(product_ptr + both.to(tl.int64) * length + rows, product, mask=rows < length)


@triton.jit
def _tile_of_queries(
    x, x_second, slope, log, product, k, k_second, v, dq, dq_second, seen_ptr, list_ptr, i, batch, group, second, rows,
    scale, length,
    PART: tl.constexpr, SPLIT: tl.constexpr, SEEN: tl.constexpr, WIDE: tl.constexpr,
    KEYS: tl.constexpr, N: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """What one tile of keys adds to the gradients of a block of queries."""
    first = KEYS * (tl.load(list_ptr + i) if SEEN != "causal" else i)
    key = k.load([batch, group, first, 0]).reshape(KEYS, N)
    key_second = k_second.load([batch, second, first, 0]).reshape(KEYS, R) if SPLIT else key
    value = v.load([batch, group, first, 0]).reshape(KEYS, W)
    scores = _scores(x, x_second, key, key_second, SPLIT, WIDE) * scale
    if PART:
        seen = _seen(seen_ptr, batch, rows, first, length, SEEN, KEYS, False)
        scores = tl.where(seen, scores, float("-inf"))
    weight = tl.exp2(scores - log[:, None])
    change = weight * (_scores(slope, slope, value, value, False, WIDE) - product[:, None])
    dq = _add_product(change, key, dq, WIDE)
    if SPLIT:
        dq_second = _add_product(change, key_second, dq_second, WIDE)
    return dq, dq_second


@triton.jit
def gradient_of_queries(
    q, q_second, k, k_second, v, grad, grad_q, grad_second, log_ptr, product_ptr,
    seen_ptr, list_ptr, whole_ptr, part_ptr, scale, length, heads, shared, own_second, factor,
    SPLIT: tl.constexpr, SEEN: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, N: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head."""
    blocks, both = tl.cdiv(length, ROWS), tl.program_id(0) // tl.cdiv(length, ROWS)
    block = blocks - 1 - tl.program_id(0) % blocks
    batch, head = both // heads, both % heads
    group, first = head // shared, block * ROWS
    second, rows = group * own_second, first + tl.arange(0, ROWS)
    x = q.load([batch, head, first, 0]).reshape(ROWS, N)
    x_second = q_second.load([batch, head, first, 0]).reshape(ROWS, R) if SPLIT else x
    slope = grad.load([batch, head, first, 0]).reshape(ROWS, W)
    at = both.to(tl.int64) * length + rows
    log = tl.load(log_ptr + at, mask=rows < length, other=float("inf"))
    product = tl.load(product_ptr + at, mask=rows < length, other=0.0)
    dq, dq_second = tl.zeros((ROWS, N), dtype=tl.float32), tl.zeros((ROWS, R), dtype=tl.float32)
    if SEEN != "causal":
        lists = (batch * blocks + block).to(tl.int64)
        list_ptr += lists * tl.cdiv(length, KEYS)
        complete, end = _bounds(whole_ptr, part_ptr, lists)
    else:
        complete, end = (first + 1) // KEYS, tl.cdiv(tl.minimum(first + ROWS, length), KEYS)
    for i in range(0, complete):
        dq, dq_second = _tile_of_queries(
            x, x_second, slope, log, product, k, k_second, v, dq, dq_second, seen_ptr, list_ptr, i, batch, group,
            second, rows, scale, length, False, SPLIT, SEEN, WIDE, KEYS, N, R, W,
        )  # fmt: skip
    for i in range(complete, end):
        dq, dq_second = _tile_of_queries(
            x, x_second, slope, log, product, k, k_second, v, dq, dq_second, seen_ptr, list_ptr, i, batch, group,
            second, rows, scale, length, True, SPLIT, SEEN, WIDE, KEYS, N, R, W,
        )  # fmt: skip
    grad_q.store([batch, head, first, 0], (dq * factor).to(grad_q.dtype).reshape(1, 1, ROWS, N))
    if SPLIT:
        dq_second = (dq_second * factor).to(grad_second.dtype).reshape(1, 1, ROWS, R)
        grad_second.store([batch, head, first, 0], dq_second)


@triton.jit
def _tile_of_keys(
    q, q_second, key, key_second, value, grad, dk, dk_second, dv, log_ptr, product_ptr, seen_ptr, list_ptr, i, batch,
    head, heads, first_key, scale, length,
    PART: tl.constexpr, SPLIT: tl.constexpr, SEEN: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, N: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """What one tile of queries adds to the gradients of a block of keys and values."""
    first = ROWS * (tl.load(list_ptr + i) if SEEN != "causal" else i)
    rows = first + tl.arange(0, ROWS)
    x = q.load([batch, head, first, 0]).reshape(ROWS, N)
    x_second = q_second.load([batch, head, first, 0]).reshape(ROWS, R) if SPLIT else x
    slope = grad.load([batch, head, first, 0]).reshape(ROWS, W)
    at = (batch * heads + head).to(tl.int64) * length + rows
    log = tl.load(log_ptr + at, mask=rows < length, other=float("inf"))
    product = tl.load(product_ptr + at, mask=rows < length, other=0.0)
    scores = _scores(key, key_second, x, x_second, SPLIT, WIDE) * scale
    if PART:
        seen = _seen(seen_ptr, batch, rows, first_key, length, SEEN, KEYS, True)
        scores = tl.where(seen, scores, float("-inf"))
    weight = tl.exp2(scores - log[None, :])
    dv = _add_product(weight, slope, dv, WIDE)
    change = weight * (_scores(value, value, slope, slope, False, WIDE) - product[None, :])
    dk = _add_product(change, x, dk, WIDE)
    if SPLIT:
        dk_second = _add_product(change, x_second, dk_second, WIDE)
    return dk, dk_second, dv


@triton.jit
def gradient_of_keys(
    q, q_second, k, k_second, v, grad, grad_k, grad_second, grad_v, log_ptr, product_ptr,
    seen_ptr, list_ptr, whole_ptr, part_ptr, scale, length, heads, shared, own_second, factor,
    SPLIT: tl.constexpr, SEEN: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, N: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """A block of keys and values of one group, over the queries of its heads in order."""
    blocks, groups = tl.cdiv(length, KEYS), heads // shared
    block, both = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    batch, group, first = both // groups, both % groups, block * KEYS
    key = k.load([batch, group, first, 0]).reshape(KEYS, N)
    key_second = k_second.load([batch, group * own_second, first, 0]).reshape(KEYS, R) if SPLIT else key
    value = v.load([batch, group, first, 0]).reshape(KEYS, W)
    dk, dk_second = tl.zeros((KEYS, N), dtype=tl.float32), tl.zeros((KEYS, R), dtype=tl.float32)
    dv, tiles = tl.zeros((KEYS, W), dtype=tl.float32), tl.cdiv(length, ROWS)
    if SEEN != "causal":
        lists = (batch * blocks + block).to(tl.int64)
        list_ptr += lists * tiles
        end, part_end = _bounds(whole_ptr, part_ptr, lists)
        begin, part = 0, end
    else:
        part = first // ROWS
        begin, end = tl.minimum(tl.cdiv(first + KEYS - 1, ROWS), tiles), tiles
        part_end = begin
    for head in range(group * shared, (group + 1) * shared):
        for i in range(part, part_end):
            dk, dk_second, dv = _tile_of_keys(
                q, q_second, key, key_second, value, grad, dk, dk_second, dv, log_ptr, product_ptr, seen_ptr, list_ptr,
                i, batch, head, heads, first, scale, length, True, SPLIT, SEEN, WIDE, ROWS, KEYS, N, R, W,
            )  # fmt: skip
        for i in range(begin, end):
            dk, dk_second, dv = _tile_of_keys(
                q, q_second, key, key_second, value, grad, dk, dk_second, dv, log_ptr, product_ptr, seen_ptr, list_ptr,
                i, batch, head, heads, first, scale, length, False, SPLIT, SEEN, WIDE, ROWS, KEYS, N, R, W,
            )  # fmt: skip
    grad_k.store([batch, group, first, 0], (dk * factor).to(grad_k.dtype).reshape(1, 1, KEYS, N))
    grad_v.store([batch, group, first, 0], dv.to(grad_v.dtype).reshape(1, 1, KEYS, W))
    if SPLIT:
        dk_second = (dk_second * factor).to(grad_second.dtype).reshape(1, 1, KEYS, R)
        grad_second.store([batch, group, first, 0], dk_second)
