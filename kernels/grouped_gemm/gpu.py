"""The grouped product in Triton: tiles find their group on the device, so nothing waits for the host.

One kernel serves the product and its gradient in x, which differ in which way w lies; another gives the gradient in w,
each expert's tile summing over the rows of its group in one fixed order, so two runs give equal bits. A program takes
tile after tile; there are as many as the multiprocessors hold.

Matrices of 16-bit numbers that lie as the copy engine of a Hopper GPU wants them (rows of whole 16 bytes) are read and
written by it, in tiles found by measurement (BENCHMARKS.md), one tile's result while the next is loaded; others, and
float32, by plain loads in smaller tiles.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from gristmill.kernels.dispatch import require
from gristmill.kernels.tiles import tuned

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the interpreter's dot does not know bfloat16
ALIGNED = 16  # bytes; of addresses and of steps from row to row
REGISTERS = 1 << 16  # of a multiprocessor, handed out to a thread by eights, up to 255
MOST_ROWS = 1 << 30  # the bound of Triton's descriptors of groups


@dataclass(frozen=True)
class Tiles:
    """A tile of a result, and how much of the sum is taken at a time; warps, buffers and programs a multiprocessor."""

    rows: int
    columns: int
    terms: int
    warps: int
    stages: int
    programs: int = 1

    def options(self) -> dict[str, int | None]:
        """What a kernel is launched with: no more registers a thread than let all programs run at once."""
        most = REGISTERS // (32 * self.warps * self.programs) // 8 * 8
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": most if most < 255 else None}


PLAIN = Tiles(64, 64, 32, 4, 3, programs=2)
PRODUCT = SHORT_PRODUCT = Tiles(128, 256, 64, 8, 3)
GRADIENT, SHORT_GRADIENT = Tiles(256, 128, 32, 8, 4), Tiles(128, 128, 32, 4, 4, programs=2)
FEW_ROWS = 256
"""Of a group, on average: a product waits for its matrices, and a gradient is soon summed and has to be written."""


@triton.jit
def _places(ends_ptr, table_ptr, groups, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Of a tile of rows: its group, its first row, the end of its group's rows, and how many such tiles there are."""
    wanted, e = tl.program_id(0), tl.arange(0, GROUPS)
    here = e < groups
    end = tl.load(ends_ptr + e, mask=here, other=0).to(tl.int32)
    begin = tl.load(ends_ptr + e - 1, mask=here & (e > 0), other=0).to(tl.int32)
    tiles = tl.where(here, (end - begin + ROWS - 1) // ROWS, 0)
    group = tl.sum((here & (tl.cumsum(tiles, 0) <= wanted)).to(tl.int32), 0)
    before = tl.sum(tl.where(e < group, tiles, 0), 0)
    entry = table_ptr + 4 * wanted
    tl.store(entry, group)
    tl.store(entry + 1, tl.sum(tl.where(e == group, begin, 0), 0) + (wanted - before) * ROWS)
    tl.store(entry + 2, tl.sum(tl.where(e == group, end, 0), 0))
    tl.store(entry + 3, tl.sum(tiles, 0))


@triton.jit
def _product(
    a, b, y, table_ptr, inner, outer, a_row, a_in, b_group, b_in, b_out, y_row,
    TRANSPOSED: tl.constexpr, ENGINE: tl.constexpr, WIDE: tl.constexpr, MOST: tl.constexpr, THREE: tl.constexpr,
    ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """y[rows of e] = a[rows of e] · B_e, where B_e[i, o] lies at b + e·b_group + i·b_in + o·b_out.

    With ENGINE, a, b and y are descriptors, b's of w as it lies: (groups, outer, inner) if TRANSPOSED; y's is of groups
    of rows, and cuts off what a tile has beyond its group.

    With THREE, a tile has three times as many rows, each third with a total of its own: 192 rows × 256 columns fill the
    registers, and read a fifth less for a product than 128 × 256, the next that Triton has. A tile's first loads do not
    begin within the sums of the one before, then: the totals would be set to zero while products may be under way, for
    which the compiler would let each product end before the next.
    """
    columns, steps = tl.cdiv(outer, OUT), tl.cdiv(inner, IN)
    for tile in tl.range(
        tl.program_id(0), tl.load(table_ptr + 3) * columns, tl.num_programs(0), flatten=ENGINE and not THREE
    ):
        entry, column = table_ptr + 4 * (tile // columns), tile % columns * OUT
        group, first, last = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        rows, outs, ins = first + tl.arange(0, ROWS), column + tl.arange(0, OUT), tl.arange(0, IN)
        total = tl.zeros((ROWS, OUT), dtype=tl.float32)
        second, third = tl.zeros((ROWS, OUT), dtype=tl.float32), tl.zeros((ROWS, OUT), dtype=tl.float32)
        for step in range(steps):
            start = step * IN
            if ENGINE:
                x = a.load([first, start])
                if TRANSPOSED:
                    w = b.load([group, column, start]).reshape(OUT, IN).T
                else:
                    w = b.load([group, start, column]).reshape(IN, OUT)
            else:
                i = (start + ins).to(tl.int64)
                x = tl.load(
                    a + rows.to(tl.int64)[:, None] * a_row + i[None, :] * a_in,
                    mask=(rows[:, None] < last) & (i[None, :] < inner),
                    other=0.0,
                )
                w = tl.load(
                    b + group.to(tl.int64) * b_group + i[:, None] * b_in + outs.to(tl.int64)[None, :] * b_out,
                    mask=(i[:, None] < inner) & (outs[None, :] < outer),
                    other=0.0,
                )
            if WIDE:
                x, w = x.to(tl.float32), w.to(tl.float32)
            total = tl.dot(x, w, total, input_precision="ieee")
            if THREE:
                x, next_x = a.load([first + ROWS, start]), a.load([first + 2 * ROWS, start])
                if WIDE:
                    x, next_x = x.to(tl.float32), next_x.to(tl.float32)
                second = tl.dot(x, w, second, input_precision="ieee")
                third = tl.dot(next_x, w, third, input_precision="ieee")
        if ENGINE:
            place = MOST - last + first
            y.store([MOST, last, place, column], total.to(y.dtype).reshape(1, 1, ROWS, OUT))
            if THREE:
                y.store([MOST, last, place + ROWS, column], second.to(y.dtype).reshape(1, 1, ROWS, OUT))
                y.store([MOST, last, place + 2 * ROWS, column], third.to(y.dtype).reshape(1, 1, ROWS, OUT))
        else:
            where = y + rows.to(tl.int64)[:, None] * y_row + outs[None, :]
            tl.store(where, total.to(y.dtype.element_ty), mask=(rows[:, None] < last) & (outs[None, :] < outer))


@triton.jit
def _weight_gradient(
    grad, x, w, ends_ptr, groups, outer, inner, w_group, w_row,
    ENGINE: tl.constexpr, WIDE: tl.constexpr, MOST: tl.constexpr, THREE: tl.constexpr,
    OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dw[e] = grad[rows of e]ᵀ · x[rows of e]; zero for a group without rows. grad and x are contiguous.

    With ENGINE, grad, x and w are descriptors; those of grad and x are of groups of rows, with zeros beyond a group
    (MOST and the sums with it are how such a descriptor is told the bounds of a group; Triton's own function for that
    does not run under its interpreter). THREE is as in the product: of rows of the gradient.
    """
    HIGH: tl.constexpr = 3 * OUT if THREE else OUT
    columns = tl.cdiv(inner, IN)
    tiles = tl.cdiv(outer, HIGH) * columns
    for turn in tl.range(tl.program_id(0), groups * tiles, tl.num_programs(0), flatten=ENGINE and not THREE):
        group, tile = turn // tiles, turn % tiles
        out, into = tile // columns * HIGH, tile % columns * IN
        outs, ins = out + tl.arange(0, OUT), into + tl.arange(0, IN)
        begin = tl.load(ends_ptr + group - 1, mask=group > 0, other=0).to(tl.int32)
        end = tl.load(ends_ptr + group).to(tl.int32)
        total = tl.zeros((OUT, IN), dtype=tl.float32)
        second, third = tl.zeros((OUT, IN), dtype=tl.float32), tl.zeros((OUT, IN), dtype=tl.float32)
        for step in range(tl.cdiv(end - begin, ROWS)):
            if ENGINE:
                beyond = MOST - (end - begin) + step * ROWS
                g = grad.load([MOST, end, beyond, out]).reshape(ROWS, OUT)
                v = x.load([MOST, end, beyond, into]).reshape(ROWS, IN)
            else:
                rows = begin + step * ROWS + tl.arange(0, ROWS)
                at, inside = rows.to(tl.int64)[:, None], rows[:, None] < end
                g = tl.load(grad + at * outer + outs[None, :], mask=inside & (outs[None, :] < outer), other=0.0)
                v = tl.load(x + at * inner + ins[None, :], mask=inside & (ins[None, :] < inner), other=0.0)
            if WIDE:
                g, v = g.to(tl.float32), v.to(tl.float32)
            total = tl.dot(g.T, v, total, input_precision="ieee")
            if THREE:
                g = grad.load([MOST, end, beyond, out + OUT]).reshape(ROWS, OUT)
                next_g = grad.load([MOST, end, beyond, out + 2 * OUT]).reshape(ROWS, OUT)
                if WIDE:
                    g, next_g = g.to(tl.float32), next_g.to(tl.float32)
                second = tl.dot(g.T, v, second, input_precision="ieee")
                third = tl.dot(next_g.T, v, third, input_precision="ieee")
        if ENGINE:
            w.store([group, out, into], total.to(w.dtype).reshape(1, OUT, IN))
            if THREE:
                w.store([group, out + OUT, into], second.to(w.dtype).reshape(1, OUT, IN))
                w.store([group, out + 2 * OUT, into], third.to(w.dtype).reshape(1, OUT, IN))
        else:
            where = w + group.to(tl.int64) * w_group + outs[:, None].to(tl.int64) * w_row + ins[None, :]
            tl.store(where, total.to(w.dtype.element_ty), mask=(outs[:, None] < outer) & (ins[None, :] < inner))


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; under the interpreter a few, so that a program takes several tiles there too."""
    return 3 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _has_engine(device: torch.device) -> bool:
    """Whether it is a Hopper GPU: its engine, and room for the tiles in its shared memory."""
    return INTERPRETED or (torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9)


def _fits_engine(*tensors: Tensor) -> bool:
    """Whether the copy engine can take these: 16-bit numbers, neighbours side by side, the rest in whole 16 bytes."""
    return _has_engine(tensors[0].device) and all(
        t.element_size() == 2
        and t.stride(-1) == 1
        and t.data_ptr() % ALIGNED == 0
        and all(s * t.element_size() % ALIGNED == 0 and s > 0 for s in t.stride()[:-1])
        for t in tensors
    )


def _whole(tensor: Tensor, *block: int) -> Any:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def _part(tiles: Tiles, engine: bool) -> int:
    """Rows of a tile with a total of their own: all, or a third (192 is no power of two, which Triton wants)."""
    return tiles.rows // 3 if engine and tiles.rows % 3 == 0 else tiles.rows


def product(a_NI: Tensor, w_EMK: Tensor, ends_E: Tensor, transposed: bool, tiles: Tiles | None = None) -> Tensor:
    """a[rows of e] · w[e]ᵀ if `transposed`, else a[rows of e] · w[e]; (N, M) or (N, K)."""
    rows, inner = a_NI.shape
    groups, outer = w_EMK.shape[0], w_EMK.shape[1 if transposed else 2]
    y = torch.empty(rows, outer, dtype=a_NI.dtype, device=a_NI.device)
    if not y.numel():
        return y
    if not inner:
        return y.zero_()
    engine = _fits_engine(a_NI, w_EMK, y)
    few = rows < FEW_ROWS * groups
    kernel, usual = ("short_product", SHORT_PRODUCT) if few else ("product", PRODUCT)
    tiles = tiles or (tuned(f"grouped_gemm.{kernel}", a_NI.device, usual) if engine else PLAIN)
    # Each group may end in a tile that is not full: there are at most this many of rows, known without the ends.
    most = triton.cdiv(rows, tiles.rows) + groups
    table = torch.empty(most, 4, dtype=torch.int32, device=a_NI.device)
    _places[(most,)](ends_E, table, groups, ROWS=tiles.rows, GROUPS=triton.next_power_of_2(groups))
    a, b, out = a_NI, w_EMK, y
    part = _part(tiles, engine)
    if engine:
        a = _whole(a_NI, part, tiles.terms)
        b = _whole(w_EMK, 1, *((tiles.columns, tiles.terms) if transposed else (tiles.terms, tiles.columns)))
        out = create_ragged_descriptor(y, [part, tiles.columns])
    w_in, w_out = w_EMK.stride()[:0:-1] if transposed else w_EMK.stride()[1:]
    grid = (min(most * triton.cdiv(outer, tiles.columns), tiles.programs * _processors(a_NI.device)),)
    _product[grid](
        a, b, out, table, inner, outer,
        a_NI.stride(0), a_NI.stride(1), w_EMK.stride(0), w_in, w_out, y.stride(0),
        TRANSPOSED=transposed, ENGINE=engine, WIDE=INTERPRETED, MOST=MOST_ROWS, THREE=part < tiles.rows,
        ROWS=part, OUT=tiles.columns, IN=tiles.terms, **tiles.options(),
    )  # fmt: skip
    return y


def weight_gradient(
    grad_NM: Tensor, x_NK: Tensor, ends_E: Tensor, tiles: Tiles | None = None, into: Tensor | None = None
) -> Tensor:
    """grad[rows of e]ᵀ · x[rows of e] of every group, (E, M, K), in a tensor that is given or a new one.

    A given one may be a part of the columns of a larger one.
    """
    groups, outer, inner = len(ends_E), grad_NM.shape[1], x_NK.shape[1]
    grad_NM, x_NK = grad_NM.contiguous(), x_NK.contiguous()
    grad_w = torch.empty(groups, outer, inner, dtype=x_NK.dtype, device=x_NK.device) if into is None else into
    if not len(x_NK) or not grad_w.numel():
        return grad_w.zero_()
    engine = _fits_engine(grad_NM, x_NK, grad_w)
    few = len(x_NK) < FEW_ROWS * groups
    kernel, usual = ("short_gradient", SHORT_GRADIENT) if few else ("gradient", GRADIENT)
    tiles = tiles or (tuned(f"grouped_gemm.{kernel}", x_NK.device, usual) if engine else PLAIN)
    grad, x, w = grad_NM, x_NK, grad_w
    part = _part(tiles, engine)
    if engine:
        grad = create_ragged_descriptor(grad_NM, [tiles.terms, part])
        x = create_ragged_descriptor(x_NK, [tiles.terms, tiles.columns])
        w = _whole(grad_w, 1, part, tiles.columns)
    most = groups * triton.cdiv(outer, tiles.rows) * triton.cdiv(inner, tiles.columns)
    _weight_gradient[(min(most, tiles.programs * _processors(x_NK.device)),)](
        grad, x, w, ends_E, groups, outer, inner, grad_w.stride(0), grad_w.stride(1),
        ENGINE=engine, WIDE=INTERPRETED, MOST=MOST_ROWS, THREE=part < tiles.rows,
        OUT=part, IN=tiles.columns, ROWS=tiles.terms, **tiles.options(),
    )  # fmt: skip
    return grad_w


class TritonGroupedGemm(torch.autograd.Function):
    """The grouped product with both gradients, on a GPU.

    Raises:
        ValueError: there are 2³⁰ rows or more.
    """

    @staticmethod
    def forward(ctx, x_NK: Tensor, w_EMK: Tensor, ends_E: Tensor) -> Tensor:
        require(len(x_NK) < MOST_ROWS, ValueError, "grouped_gemm: rows of x_NK", len(x_NK), "fewer than 2³⁰")
        ends_E = ends_E.long().contiguous()  # the kernels read it by place, and narrow integers would overflow
        ctx.save_for_backward(x_NK, w_EMK, ends_E)
        return product(x_NK, w_EMK, ends_E, transposed=True)

    @staticmethod
    def backward(ctx, grad_NM: Tensor):
        x_NK, w_EMK, ends_E = ctx.saved_tensors
        grad_NM = grad_NM.contiguous()
        grad_x = product(grad_NM, w_EMK, ends_E, transposed=False) if ctx.needs_input_grad[0] else None
        grad_w = weight_gradient(grad_NM, x_NK, ends_E) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w, None
