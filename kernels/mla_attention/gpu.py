"""Softmax attention in Triton, forward and backward in tiles (Dao, arXiv 2307.08691), for MLA's unequal head widths.

Queries and keys come in two parts, whose products are added: for MLA the part that is rotated, whose key all heads
share and which is therefore never spread over them, and the part that is not; else a power of two and the rest, so
that a width of 192 is not padded to 256. Tiles travel by the copy engine of a Hopper GPU.

A mask, or the first key that each query sees, is looked at once, tile by tile: a block of queries then has a list of
the tiles of keys that it sees whole, of which nothing is asked again, and of those that it sees in part; others cost
nothing. A block of keys has such a list of tiles of queries. Whatever is added up is added by one program in one order:
two runs give equal bits, and so do first keys and the mask that says the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from gristmill.kernels.grouped_gemm.gpu import ALIGNED, INTERPRETED, _has_engine, _whole
from gristmill.kernels.mla_attention import operation
from gristmill.kernels.mla_attention.gpu_kernels import (
    forward,
    gradient_of_keys,
    gradient_of_queries,
    kinds,
    kinds_from_first,
    packed,
    products,
)
from gristmill.kernels.norm_rope.gpu import turned, turned_back
from gristmill.kernels.tiles import tuned

LOG2_E = math.log2(math.e)
LEAST = 16  # columns of a tile: less a product of tensor cores does not take
PACKED_ROWS = 64
TILES_AT_ONCE = 64
MOST = 128  # columns of a part: tiles of wider ones do not fit into shared memory


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of a tile; warps and buffers of a program."""

    rows: int
    keys: int
    warps: int
    stages: int


FORWARD, OF_QUERIES, OF_KEYS = Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 2)
FLOAT32 = Tiles(32, 32, 4, 2)


class Sides(NamedTuple):
    """Of one attention, (B, heads, S, width) each: both parts of queries and keys, the second or none, and values."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_second: Tensor | None
    k_second: Tensor | None


class Lists(NamedTuple):
    """Tiles that are seen, those seen whole first, for each block of a sequence: (B, blocks, tiles), and two counts."""

    tile: Tensor
    whole: Tensor
    part: Tensor


def _seen(mask_BSS: Tensor | None, first_BS: Tensor | None) -> Tensor | None:
    """What tiles that are seen in part look at: a mask's bits, (B, S, K), or first keys, int32 and (B, S); or none."""
    if first_BS is not None:
        return first_BS.clamp(0, first_BS.shape[1]).to(torch.int32).contiguous()
    return None if mask_BSS is None else _bits(mask_BSS)


def _said(seen: Tensor | None) -> str:
    """The kernels' SEEN."""
    return "causal" if seen is None else "first" if seen.ndim == 2 else "mask"


def _bits(mask_BSS: Tensor) -> Tensor:
    """A mask as bits, 64 keys a number, an even number of them."""
    batch, length = mask_BSS.shape[:2]
    words = 2 * triton.cdiv(length, 128)
    bits_BSK = torch.empty(batch, length, words, dtype=torch.int64, device=mask_BSS.device)
    grid = (triton.cdiv(batch * length, PACKED_ROWS), words)
    packed[grid](mask_BSS.contiguous().view(torch.uint8), bits_BSK, batch * length, length, ROWS=PACKED_ROWS)
    return bits_BSK


def _lists(seen: Tensor | None, tiles: Tiles, like: Tensor, *, of_keys: bool = False) -> Lists:
    """For blocks of queries the tiles of keys, or the other way round; nothing is in them where it is causal."""
    if seen is None:
        return Lists(*(torch.empty(1, dtype=torch.int32, device=like.device) for _ in range(3)))
    batch, length = seen.shape[:2]
    rows, keys = triton.cdiv(length, tiles.rows), triton.cdiv(length, tiles.keys)
    kind = torch.empty(batch, rows, keys, dtype=torch.int8, device=like.device)
    if _said(seen) == "mask":
        kinds[(rows, keys, batch)](seen, kind, length, ROWS=tiles.rows, KEYS=tiles.keys)
    else:
        grid = (rows, triton.cdiv(keys, TILES_AT_ONCE), batch)
        kinds_from_first[grid](seen, kind, length, keys, ROWS=tiles.rows, KEYS=tiles.keys, TILES=TILES_AT_ONCE)
    kind = kind.mT if of_keys else kind
    order = kind.sort(dim=-1, descending=True, stable=True).indices.to(torch.int32).contiguous()
    whole, part = ((kind == which).sum(-1, dtype=torch.int32) for which in (2, 1))
    return Lists(order, whole, part)


def _padded(width: int) -> int:
    return max(LEAST, triton.next_power_of_2(width))


def _tile(tensor: Tensor, rows: int) -> Any:
    """A descriptor of tiles of so many rows of one head; what is beyond the last row or column is zero."""
    return _whole(tensor, 1, 1, rows, _padded(tensor.shape[-1]))


def _fitting(tensor: Tensor) -> Tensor:
    """The tensor as the copy engine takes it, copied where it does not lie so."""
    size = tensor.element_size()
    steps = all(stride * size % ALIGNED == 0 and stride > 0 for stride in tensor.stride()[:-1])
    fits = steps and tensor.stride(-1) == 1 and tensor.data_ptr() % ALIGNED == 0
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


def parts_of(width: int) -> tuple[int, int]:
    """A width as a power of two and the rest."""
    first = 1 << max(0, width.bit_length() - 1)
    return first, width - first


def supported(q: Tensor, width: int, values: int, turning: int | None, scale: float) -> bool:
    """Whether it runs here: in 16 bits on a Hopper GPU, heads of parts of whole 16 bytes and at most `MOST` numbers.

    The highest score is looked for before scores are scaled, which takes a scale above zero.
    """
    first, second = parts_of(width) if turning is None else (width - turning, turning)
    parts = [first, values, *([second] if second else [])]
    within = all(0 < part <= MOST and part * q.element_size() % ALIGNED == 0 for part in parts)
    return within and scale > 0 and q.numel() > 0 and (q.element_size() == 2 or INTERPRETED) and _has_engine(q.device)


def _common(sides: Sides, seen: Tensor | None, tiles: Tiles) -> dict[str, Any]:
    return {
        "SPLIT": sides.q_second is not None, "SEEN": _said(seen), "WIDE": INTERPRETED,
        "ROWS": tiles.rows, "KEYS": tiles.keys, "N": _padded(sides.q.shape[-1]),
        "R": LEAST if sides.q_second is None else _padded(sides.q_second.shape[-1]), "W": _padded(sides.v.shape[-1]),
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip


def _of(sides: Sides) -> tuple[int, int, int, int, int]:
    """B, H, S, heads that share keys, and whether the second part of a key is each head's own."""
    batch, heads, length, _ = sides.q.shape
    own = int(sides.k_second is not None and sides.k_second.shape[1] > 1)
    return batch, heads, length, heads // sides.k.shape[1], own


def _sides(sides: Sides, tiles: Tiles) -> tuple[Any, ...]:
    """Descriptors of q, its second part, k, its second part and v, in the kernels' order."""
    q_second, k_second = sides.q_second, sides.k_second
    return (
        _tile(sides.q, tiles.rows), _tile(sides.q if q_second is None else q_second, tiles.rows),
        _tile(sides.k, tiles.keys), _tile(sides.k if k_second is None else k_second, tiles.keys),
        _tile(sides.v, tiles.keys),
    )  # fmt: skip


def _chosen(kernel: str, sides: Sides, usual: Tiles, asked: Tiles | None) -> Tiles:
    if sides.q.dtype == torch.float32:
        return FLOAT32
    parts = "one_part" if sides.q_second is None else "two_parts"
    return asked or tuned(f"attention.{kernel}.{parts}", sides.q.device, usual)


def attend(sides: Sides, scale: float, seen: Tensor | None, tiles: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """Results (B, H, S, W), laid out (B, S, H, W), and log₂ Σ exp(scale · q k) of each query, (B, H, S)."""
    tiles = _chosen("forward", sides, FORWARD, tiles)
    batch, heads, length, shared, own = _of(sides)
    out = sides.v.new_empty(batch, length, heads, sides.v.shape[-1]).transpose(1, 2)
    log = torch.empty(batch, heads, length, dtype=torch.float32, device=sides.q.device)
    lists = _lists(seen, tiles, log)
    forward[(triton.cdiv(length, tiles.rows) * batch * heads,)](
        *_sides(sides, tiles), _tile(out, tiles.rows), log, lists.part if seen is None else seen, *lists,
        scale * LOG2_E, length, heads, shared, own, **_common(sides, seen, tiles),
    )  # fmt: skip
    return out, log


def gradients_(
    into: Sides, sides: Sides, out: Tensor, log: Tensor, grad: Tensor, scale: float, seen: Tensor | None,
    of_queries: Tiles | None = None, of_keys: Tiles | None = None,
) -> None:  # fmt: skip
    """Write the gradients of `sides` into `into`, that of a shared second part of keys once for each head."""
    of_queries = _chosen("of_queries", sides, OF_QUERIES, of_queries)
    of_keys = _chosen("of_keys", sides, OF_KEYS, of_keys)
    batch, heads, length, shared, own = _of(sides)
    grad, product = _fitting(grad), torch.empty_like(log)
    blocks = triton.cdiv(length, of_queries.rows)
    products[(blocks * batch * heads,)](
        out, grad, product, length, heads, out.shape[-1], *out.stride()[:3], *grad.stride()[:3],
        ROWS=of_queries.rows, W=_padded(out.shape[-1]),
    )  # fmt: skip
    numbers = (scale * LOG2_E, length, heads, shared, own, scale)
    lists = _lists(seen, of_queries, log)
    second = into.q if into.q_second is None else into.q_second
    gradient_of_queries[(blocks * batch * heads,)](
        *_sides(sides, of_queries), _tile(grad, of_queries.rows), _tile(into.q, of_queries.rows),
        _tile(second, of_queries.rows), log, product, lists.part if seen is None else seen, *lists, *numbers,
        **_common(sides, seen, of_queries),
    )  # fmt: skip
    lists = _lists(seen, of_keys, log, of_keys=True)
    second = into.k if into.k_second is None else into.k_second
    gradient_of_keys[(triton.cdiv(length, of_keys.keys) * batch * heads // shared,)](
        *_sides(sides, of_keys), _tile(grad, of_keys.rows), _tile(into.k, of_keys.keys),
        _tile(second, of_keys.keys), _tile(into.v, of_keys.keys), log, product,
        lists.part if seen is None else seen, *lists, *numbers, **_common(sides, seen, of_keys),
    )  # fmt: skip


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [_fitting(tensor.transpose(1, 2)) for tensor in tensors]


def _split(x: Tensor) -> tuple[Tensor, Tensor | None]:
    first, rest = parts_of(x.shape[-1])
    return x[..., :first], x[..., first:] if rest else None


class TritonAttention(torch.autograd.Function):
    """`attention` with its three gradients."""

    @staticmethod
    def forward(
        ctx: Any, q_BSHN: Tensor, k_BSGN: Tensor, v_BSGW: Tensor, scale: float,
        mask_BSS: Tensor | None, first_BS: Tensor | None,
    ):  # fmt: skip
        q, k, v = _heads_first(q_BSHN, k_BSGN, v_BSGW)
        ctx.scale, seen = scale, _seen(mask_BSS, first_BS)
        out, log = operation.attend(*_joined_sides(q, k, v), seen, scale)
        ctx.save_for_backward(q, k, v, out, log, seen)
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHW: Tensor):
        q, k, v, out, log, seen = ctx.saved_tensors
        made = [torch.empty_like(t.transpose(1, 2), memory_format=torch.contiguous_format) for t in (q, k, v)]
        into = _joined_sides(*(t.transpose(1, 2) for t in made))
        gradients_(into, _joined_sides(q, k, v), out, log, grad_BSHW.transpose(1, 2), ctx.scale, seen)
        return *made, None, None, None


def _joined_sides(q: Tensor, k: Tensor, v: Tensor) -> Sides:
    (q, q_second), (k, k_second) = _split(q), _split(k)
    return Sides(q, k, v, q_second, k_second)


class TritonLatentAttention(torch.autograd.Function):
    """`latent_attention` with its three gradients."""

    @staticmethod
    def forward(
        ctx: Any, q_BSHQ: Tensor, kv_BSHX: Tensor, key_BSR: Tensor, cos: Tensor, sin: Tensor, scale: float,
        mask_BSS: Tensor | None, first_BS: Tensor | None,
    ):  # fmt: skip
        seen, (q, kv, q_second, key) = _seen(mask_BSS, first_BS), _latent_parts(q_BSHQ, kv_BSHX, key_BSR, cos, sin)
        out, log = operation.attend(*_latent_sides(q, kv, q_second, key), seen, scale)
        ctx.save_for_backward(q, kv, q_second, key, cos, sin, out, log, seen)
        ctx.scale = scale
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSHW: Tensor):
        q, kv, q_second, key, cos, sin, out, log, seen = ctx.saved_tensors
        (batch, heads, length, _), turning = q.shape, key.shape[-1]
        grad_q, grad_kv = (t.new_empty(batch, length, heads, t.shape[-1]) for t in (q, kv))
        seconds = [q.new_empty(batch, length, heads, turning, dtype=torch.float32) for _ in range(2)]
        into = _latent_sides(*(t.transpose(1, 2) for t in (grad_q, grad_kv, *seconds)))
        sides = _latent_sides(q, kv, q_second, key)
        gradients_(into, sides, out, log, grad_BSHW.transpose(1, 2), ctx.scale, seen)
        grad_q[..., -turning:] = turned_back(seconds[0], cos[:, :, None], sin[:, :, None], q.dtype)
        grad_key = turned_back(seconds[1].sum(2), cos, sin, key.dtype)
        return grad_q, grad_kv, grad_key, None, None, None, None, None


def _latent_parts(q_BSHQ: Tensor, kv_BSHX: Tensor, key_BSR: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values, heads first, and turned the second parts of queries and of the key of all heads."""
    turning, (q, kv) = key_BSR.shape[-1], _heads_first(q_BSHQ, kv_BSHX)
    q_second = turned(q_BSHQ[..., -turning:], cos[:, :, None], sin[:, :, None], q.dtype).transpose(1, 2)
    return q, kv, q_second, turned(key_BSR, cos, sin, q.dtype)[:, None]


def _latent_sides(q: Tensor, kv: Tensor, q_turned: Tensor, k_turned: Tensor) -> Sides:
    """Of queries and of keys and values as the projections leave them, with the turned parts beside them."""
    width = q.shape[-1] - k_turned.shape[-1]
    return Sides(q[..., :width], kv[..., :width], kv[..., width:], q_turned, k_turned)
