"""The FP8 products and quantisations in Triton, laid out as the grouped product in 16 bits is (kernels/README.md).

A step of a product takes one block of 128 terms: tensor cores sum it, in E4M3 and about 14 bits, and the sum goes with
its scales into a float32 total (V3 section 3.3.2). Both sides lie with their terms side by side, which is all that
E4M3's instructions read; where a matrix does not, it is copied.

Without such instructions (older GPUs; Triton's interpreter, whose cast and product of E4M3 know neither ties nor NaN)
values are taken apart and put together bit by bit, and multiplied in float32: all else is the same code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor

from gristmill.kernels.dispatch import require
from gristmill.kernels.fp8_gemm.reference import BLOCK, most_tiles, tile_ends
from gristmill.kernels.grouped_gemm.gpu import INTERPRETED, MOST_ROWS, Tiles, _places, _processors, _whole
from gristmill.kernels.tiles import tuned


@dataclass(frozen=True)
class Strip:
    """Rows, or columns, that a program quantises 128 numbers of; warps."""

    lines: int
    warps: int


PRODUCT, SHORT_PRODUCT = Tiles(128, 128, BLOCK, 8, 3), Tiles(64, 128, BLOCK, 4, 4, programs=2)
SHORT = 384  # rows of a group, on the mean, below which small tiles hide the writing of one behind the sums of another
GRADIENT = Tiles(128, 128, BLOCK, 8, 4)
WRITERS = 16  # programs that write a matrix of zeros
QUANTISED_ROWS, QUANTISED_COLUMNS = Strip(32, 4), Strip(64, 4)
E4M3 = torch.float8_e4m3fn


@triton.jit
def _scale(bits):
    """A tile's scale from the largest bits of its absolute values, which order as the values do, and NaN above all."""
    largest = bits.to(tl.float32, bitcast=True)
    scale = tl.maximum(tl.div_rn(largest, 448.0), 1.1754943508222875e-38)
    return tl.where(bits < 0x7F800000, scale, float("nan"))


@triton.jit
def _magnitude(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _rounded(x, scale, NATIVE: tl.constexpr):
    """x / scale in E4M3, to nearest with ties to even; at most 448."""
    value = tl.div_rn(x, scale)
    if NATIVE:
        return value.to(tl.float8e4nv)
    bits = _magnitude(value)
    sign = (value.to(tl.int32, bitcast=True) >> 24) & 0x80
    nan, bits = bits > 0x7F800000, tl.minimum(bits, 0x43E00000)
    # 2¹⁴ and a value below 2⁻⁶ add up to 2¹⁴ and as many 2⁻⁹ as is nearest: the bits of a subnormal number.
    small = (bits.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    # Other values lose 20 bits of their fraction, rounded, and 120 of the exponent's offset.
    large = (bits + 0x7FFFF + ((bits >> 20) & 1) - (120 << 23)) >> 20
    found = tl.where(nan, 0x7F, tl.where(bits < 0x3C800000, small, large))
    return (found | sign).to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _value(q):
    """float32 of E4M3, bit by bit."""
    bits = q.to(tl.uint8, bitcast=True).to(tl.int32)
    size = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2¹²⁰
    size = tl.where((bits & 0x7F) == 0x7F, float("nan"), size)
    return tl.where(bits >= 0x80, -size, size)


@triton.jit
def _block_sum(x, w, NATIVE: tl.constexpr):
    """x (rows, 128) times wᵀ, w being (columns, 128)."""
    if NATIVE:
        return tl.dot(x, w.T)
    return tl.dot(_value(x), _value(w).T, input_precision="ieee")


@triton.jit
def _quantise_rows(
    x, q, scales, rows, columns, x_row, x_in, s_row, s_block,
    SWIGLU: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tiles of 1 × 128 of x, or of silu(gate) · up where x holds gate and then up."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = row[:, None] < rows
    at = x + row[:, None] * x_row + column[None, :] * x_in
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if SWIGLU:
        up = tl.load(at + columns.to(tl.int64) * x_in, mask=inside, other=0.0).to(tl.float32)
        value = tl.sigmoid(value) * value * up
    scale = _scale(tl.max(_magnitude(value), 1))
    tl.store(scales + row * s_row + tl.program_id(1) * s_block, scale, mask=row < rows)
    tl.store(q + row[:, None] * columns + column[None, :], _rounded(value, scale[:, None], NATIVE), mask=inside)


@triton.jit
def _quantise_columns(
    x, q, scales, table, tiles, columns, x_row, x_in,
    NATIVE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tiles of 128 rows of x, each of one group and filled up with zeros, transposed."""
    tile = tl.program_id(0)
    first, last = tl.load(table + 4 * tile + 1), tl.load(table + 4 * tile + 2)
    place, column = tl.arange(0, BLOCK), (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    row = (first + place).to(tl.int64)
    value = tl.load(x + row[:, None] * x_row + column[None, :] * x_in, mask=row[:, None] < last, other=0.0)
    value = value.to(tl.float32)
    scale = _scale(tl.max(_magnitude(value), 0))
    tl.store(scales + tile.to(tl.int64) * columns + column, scale)
    where = q + column[:, None] * (tiles * BLOCK) + tile * BLOCK + place[None, :]
    tl.store(where, _rounded(value, scale[None, :], NATIVE).T)


@triton.jit
def _quantise_blocks(w, q, scales, outer, inner, w_group, w_out, w_in, NATIVE: tl.constexpr, BLOCK: tl.constexpr):
    group, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    across = inner // BLOCK
    out = (block // across * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    into = (block % across * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    value = tl.load(w + group * w_group + out[:, None] * w_out + into[None, :] * w_in).to(tl.float32)
    scale = _scale(tl.max(tl.max(_magnitude(value), 1), 0))
    tl.store(scales + group * (outer // BLOCK) * across + block, scale)
    where = q + group * outer * inner + out[:, None] * inner + into[None, :]
    tl.store(where, _rounded(value, scale, NATIVE))


@triton.jit
def _made(x):
    """x, made before what comes next: a half's sums would else lie beside the next half's, and registers run out."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def _product(
    x, x_scale, w, w_scale, y, table, inner, outer, s_row, s_block,
    NATIVE: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, TWO: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y[rows of e] = x[rows of e] · w[e]ᵀ; x, w and y are descriptors, and OUT columns lie in one block of w.

    With TWO, a tile has twice as many columns, whose halves are multiplied one after the other: rows of x are read half
    as often, and no more than one half's products wait outside of the tensor cores to be scaled. A tile's first loads
    do not begin within the sums of the one before, then: registers would run out.

    Scales are read a step before their use: they are multiplied, and so waited for, before the tensor cores begin.
    """
    WIDE: tl.constexpr = 2 * OUT if TWO else OUT
    SECOND: tl.constexpr = 1 if TWO else 0
    columns, steps = outer // WIDE, inner // BLOCK
    for tile in tl.range(
        tl.program_id(0), tl.load(table + 3) * columns, tl.num_programs(0), flatten=NATIVE and not TWO
    ):
        entry, column = table + 4 * (tile // columns), tile % columns * WIDE
        group, first, last = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        rows = tl.minimum(first + tl.arange(0, ROWS), last - 1)  # what is past the last is not written
        block = (group * (outer // BLOCK) + column // BLOCK) * steps
        total = tl.zeros((ROWS, OUT), dtype=tl.float32)
        second = tl.zeros((ROWS, OUT), dtype=tl.float32)
        row = tl.load(x_scale + rows.to(tl.int64) * s_row)
        own, other = tl.load(w_scale + block), tl.load(w_scale + block + SECOND * steps)
        for step in range(steps):
            a, b = x.load([first, step * BLOCK]), w.load([group, column, step * BLOCK]).reshape(OUT, BLOCK)
            scale, scale_2, after = row * own, row * other, tl.minimum(step + 1, steps - 1)
            row = tl.load(x_scale + tl.cast(after, tl.int64) * s_block + rows.to(tl.int64) * s_row)
            own, other = tl.load(w_scale + block + after), tl.load(w_scale + block + SECOND * steps + after)
            total += _block_sum(a, b, NATIVE) * scale[:, None]
            if TWO:
                if NATIVE:
                    total = _made(total)
                b = w.load([group, column + OUT, step * BLOCK]).reshape(OUT, BLOCK)
                second += _block_sum(a, b, NATIVE) * scale_2[:, None]
        place = [MOST, last, MOST - last + first, column]
        y.store(place, total.to(y.dtype).reshape(1, 1, ROWS, OUT))
        if TWO:
            place = [MOST, last, MOST - last + first, column + OUT]
            y.store(place, second.to(y.dtype).reshape(1, 1, ROWS, OUT))


@triton.jit
def _weight_gradient(
    grad, grad_scale, x, x_scale, y, table, tile_ends, groups, most, turns, tiles, rows,
    g_row, g_block, x_row, x_block,
    NATIVE: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[e] = grad · xᵀ over the blocks of e; grad (outer, P), x (inner, P) and y are descriptors.

    A program goes through the blocks of `most` groups for one of a matrix's `tiles`, of which a column has `rows`: one
    sum after the other, without a pause between them. Groups without rows have no block, and are left out.
    """
    for turn in tl.range(tl.program_id(0), turns, tl.num_programs(0)):
        part, tile = turn // tiles, turn % tiles
        out, into = tile % rows * OUT, tile // rows * IN
        before, until = tl.minimum(part * most, groups), tl.minimum(part * most + most, groups)
        begin = tl.load(tile_ends + before - 1, mask=before > 0, other=0).to(tl.int32)
        end = tl.load(tile_ends + until - 1).to(tl.int32)
        at = tl.maximum(tl.minimum(begin, end - 1), 0).to(tl.int64)  # some block, for a part that has none
        outs, ins = out + tl.arange(0, OUT), into + tl.arange(0, IN)
        own = tl.load(grad_scale + at * g_block + outs.to(tl.int64) * g_row)
        other, entry = tl.load(x_scale + at * x_block + ins.to(tl.int64) * x_row), table + 4 * at
        group, first, last = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        total = tl.zeros((OUT, IN), dtype=tl.float32)
        for block in range(begin, end):
            a, b = grad.load([out, block * BLOCK]), x.load([into, block * BLOCK])
            scale, scale_2, after = own, other, tl.minimum(block + 1, end - 1).to(tl.int64)
            here, ends, entry = group, first + BLOCK >= last, table + 4 * after
            group, first, last = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
            own = tl.load(grad_scale + after * g_block + outs.to(tl.int64) * g_row)
            other = tl.load(x_scale + after * x_block + ins.to(tl.int64) * x_row)
            total += _block_sum(a, b, NATIVE) * (scale[:, None] * scale_2[None, :])
            if ends:
                y.store([here, out, into], total.reshape(1, OUT, IN))
                total = tl.zeros((OUT, IN), dtype=tl.float32)


@triton.jit
def _no_rows(ends, y, size, PIECE: tl.constexpr):
    """Zeros for the matrices of groups without rows."""
    group = tl.program_id(0).to(tl.int64)
    begin = tl.load(ends + group - 1, mask=group > 0, other=0)
    if tl.load(ends + group) == begin:
        for start in range(tl.program_id(1) * PIECE, size, tl.num_programs(1) * PIECE):
            at = start + tl.arange(0, PIECE)
            tl.store(y + group * size + at, tl.zeros((PIECE,), dtype=tl.float32), mask=at < size)


@cache
def _native(device: torch.device) -> bool:
    """Whether the device casts to and multiplies E4M3 itself."""
    return not INTERPRETED and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def _scales_by_column(rows: int, blocks: int, device: torch.device) -> Tensor:
    return torch.empty(blocks, rows, dtype=torch.float32, device=device).t()


def quantise_rows(x_NK: Tensor, swiglu: bool = False, strip: Strip | None = None) -> tuple[Tensor, Tensor]:
    strip = strip or tuned("fp8_gemm.quantise_rows", x_NK.device, QUANTISED_ROWS)
    rows, columns = x_NK.shape[0], x_NK.shape[1] // (2 if swiglu else 1)
    q = torch.empty(rows, columns, dtype=E4M3, device=x_NK.device)
    scale = _scales_by_column(rows, columns // BLOCK, x_NK.device)
    if q.numel():
        _quantise_rows[(triton.cdiv(rows, strip.lines), columns // BLOCK)](
            x_NK, q, scale, rows, columns, *x_NK.stride(), *scale.stride(),
            SWIGLU=swiglu, NATIVE=_native(x_NK.device), ROWS=strip.lines, BLOCK=BLOCK, num_warps=strip.warps,
        )  # fmt: skip
    return q, scale


def swiglu_quantise(x_NG: Tensor) -> tuple[Tensor, Tensor]:
    return quantise_rows(x_NG, swiglu=True)


def _table(ends_E: Tensor, most: int, rows: int) -> Tensor:
    """Of each tile of rows, its group and bounds: see the grouped product in 16 bits."""
    table = torch.empty(most, 4, dtype=torch.int32, device=ends_E.device)
    _places[(most,)](
        ends_E.long().contiguous(), table, len(ends_E), ROWS=rows, GROUPS=triton.next_power_of_2(len(ends_E))
    )
    return table


def quantise_columns(x_NK: Tensor, ends_E: Tensor, strip: Strip | None = None) -> tuple[Tensor, Tensor]:
    strip = strip or tuned("fp8_gemm.quantise_columns", x_NK.device, QUANTISED_COLUMNS)
    rows, columns = x_NK.shape
    tiles = most_tiles(rows, len(ends_E))
    q = torch.empty(columns, tiles * BLOCK, dtype=E4M3, device=x_NK.device)
    scale = _scales_by_column(columns, tiles, x_NK.device)
    if q.numel():
        _quantise_columns[(tiles, columns // strip.lines)](
            x_NK, q, scale, _table(ends_E, tiles, BLOCK), tiles, columns, *x_NK.stride(),
            NATIVE=_native(x_NK.device), COLUMNS=strip.lines, BLOCK=BLOCK, num_warps=strip.warps,
        )  # fmt: skip
    return q, scale


def quantise_blocks(w_EMK: Tensor) -> tuple[Tensor, Tensor]:
    groups, outer, inner = w_EMK.shape
    q = torch.empty(w_EMK.shape, dtype=E4M3, device=w_EMK.device)
    scale = torch.empty(groups, outer // BLOCK, inner // BLOCK, dtype=torch.float32, device=w_EMK.device)
    if q.numel():
        _quantise_blocks[(groups, scale[0].numel())](
            w_EMK, q, scale, outer, inner, *w_EMK.stride(), NATIVE=_native(w_EMK.device), BLOCK=BLOCK
        )
    return q, scale


def fp8_grouped_gemm(
    x_NK: Tensor, x_scale_NC: Tensor, w_EMK: Tensor, w_scale_EBC: Tensor, ends_E: Tensor, dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    (rows, inner), (groups, outer, _) = x_NK.shape, w_EMK.shape
    require(rows < MOST_ROWS, ValueError, "fp8_grouped_gemm: rows of x_NK", rows, "fewer than 2³⁰")
    y = torch.empty(rows, outer, dtype=dtype, device=x_NK.device)
    if not y.numel():
        return y
    if not inner:
        return y.zero_()
    kernel, usual = ("short_product", SHORT_PRODUCT) if rows < SHORT * groups else ("product", PRODUCT)
    tiles = tiles or tuned(f"fp8_gemm.{kernel}", x_NK.device, usual)
    columns = min(tiles.columns, BLOCK)
    two = tiles.columns > BLOCK and outer % tiles.columns == 0
    most = triton.cdiv(rows, tiles.rows) + groups
    table = _table(ends_E, most, tiles.rows)
    x, w = _whole(x_NK.contiguous(), tiles.rows, BLOCK), _whole(w_EMK.contiguous(), 1, columns, BLOCK)
    out = create_ragged_descriptor(y, [tiles.rows, columns])
    grid = (min(most * (outer // (2 * columns if two else columns)), tiles.programs * _processors(x_NK.device)),)
    _product[grid](
        x, x_scale_NC, w, w_scale_EBC.contiguous(), out, table, inner, outer, *x_scale_NC.stride(),
        NATIVE=_native(x_NK.device), MOST=MOST_ROWS, ROWS=tiles.rows, OUT=columns, TWO=two, BLOCK=BLOCK,
        **tiles.options(),
    )  # fmt: skip
    return y


def fp8_weight_gradient(
    grad_MP: Tensor, grad_scale_MQ: Tensor, x_KP: Tensor, x_scale_KQ: Tensor, ends_E: Tensor,
    tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    groups, outer, inner = len(ends_E), len(grad_MP), len(x_KP)
    dw = torch.empty(groups, outer, inner, dtype=torch.float32, device=x_KP.device)
    if not dw.numel() or not x_KP.shape[1]:
        return dw.zero_()
    tiles = tiles or tuned("fp8_gemm.gradient", x_KP.device, GRADIENT)
    grad, x = _whole(grad_MP.contiguous(), tiles.rows, BLOCK), _whole(x_KP.contiguous(), tiles.columns, BLOCK)
    ends_E = ends_E.long().contiguous()
    _no_rows[(groups, WRITERS)](ends_E, dw, outer * inner, PIECE=4096)
    programs, of_one = tiles.programs * _processors(x_KP.device), (outer // tiles.rows) * (inner // tiles.columns)
    parts = min(groups, triton.cdiv(programs, of_one))  # small matrices have fewer tiles than there are programs
    _weight_gradient[(min(parts * of_one, programs),)](
        grad, grad_scale_MQ, x, x_scale_KQ, _whole(dw, 1, tiles.rows, tiles.columns),
        _table(ends_E, x_KP.shape[1] // BLOCK, BLOCK), tile_ends(ends_E),
        groups, triton.cdiv(groups, parts), parts * of_one, of_one, outer // tiles.rows,
        *grad_scale_MQ.stride(), *x_scale_KQ.stride(),
        NATIVE=_native(x_KP.device), OUT=tiles.rows, IN=tiles.columns, BLOCK=BLOCK,
        **tiles.options(),
    )  # fmt: skip
    return dw
