"""FP8 quantisation bit for bit, and products against float64 of the values they multiply: on the GPU where there is one,
else on the CPU, and the Triton code under its interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill import kernels
from gristmill.kernels.fp8_gemm import (
    fp8_gemm,
    fp8_grouped_gemm,
    fp8_weight_gradient,
    most_tiles,
    quantise_blocks,
    quantise_columns,
    quantise_rows,
    swiglu_quantise,
    tile_ends,
)
from gristmill.kernels.fp8_gemm.linear import fp8_feed_forward, fp8_linear

INTERPRETED = os.environ.get("GRISTMILL_KERNELS") == "gpu"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
EXAMPLES = 2 if INTERPRETED else 8
EPS = 2.0**-24  # half a step of float32
# A block's sum: rounded once by the specification, in 128 additions where float32 sums it. A Hopper GPU's tensor cores
# take 32 terms an instruction in 14 bits, of which one is the sign: each term and the sum so far are cut off to a step of
# 2⁻¹³ of the largest among them.
BLOCK_SUM = 128 * EPS if INTERPRETED or DEVICE == "cuda" else EPS
CUT, TERMS = 2.0**-13, 32
# The result's own rounding: half a step, which is 2⁻⁷ of a value; the interpreter cuts off, a whole one.
RESULT = {torch.float32: 0.0, torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8}


def draw(seed: int, *shape: int, spread: float = 0.0) -> torch.Tensor:
    """Normal values; with a spread, rows of very unequal size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return (x * (spread * torch.randn((*shape[:-1], 1), generator=generator)).exp()).to(DEVICE)


def of_rows(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What tiles of 1 × 128 stand for, in float64."""
    return q.double() * scale.double().repeat_interleave(128, -1)


def of_blocks(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return q.double() * scale.double().repeat_interleave(128, -1).repeat_interleave(128, -2)


def same_bits(got: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        mine, theirs = mine.float(), theirs.float()
        assert mine.isnan().equal(theirs.isnan())
        assert mine.nan_to_num().equal(theirs.nan_to_num())


def cut_off(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """What tensor cores may lose in x · wᵀ; a block's terms have one scale, so that it does not matter here."""
    lost = torch.zeros(len(x), len(w), dtype=torch.float64, device=x.device)
    for block in range(0, x.shape[1], 128):
        so_far = torch.zeros_like(lost)
        for first in range(block, block + 128, TERMS):
            term = x[:, None, first : first + TERMS] * w[None, :, first : first + TERMS]
            largest = torch.maximum(term.abs().amax(-1), so_far.abs())
            so_far = so_far + term.sum(-1)
            lost += (TERMS + 1) * CUT * torch.maximum(largest, so_far.abs())
    return lost


def close(got: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    """got is x · wᵀ but for roundings, each a share of the sum of the terms' sizes."""
    blocks = x.shape[1] // 128
    size = x.abs() @ w.abs().t()
    allowed = (BLOCK_SUM + (blocks + 4) * EPS) * size + RESULT[got.dtype] * (x @ w.t()).abs()
    if DEVICE == "cuda":
        allowed += cut_off(x, w)
    worst = (got.double() - x @ w.t()).abs() - allowed
    assert got.numel() == 0 or float(worst.max()) <= 0


def test_the_nearest_number_ties_to_even() -> None:
    """Against a search through all the numbers of the format."""
    code = torch.arange(127, dtype=torch.uint8)  # 0 to 448
    number = code.view(torch.float8_e4m3fn).double()
    between = (number[1:] + number[:-1]) / 2
    near = [between * (1 + side) for side in (-(2.0**-20), 0.0, 2.0**-20)]  # ties are exact in float32
    value = torch.cat((number, *near, number[-1:] * draw(0, 1000).cpu().double().sigmoid()))
    value = torch.nn.functional.pad(value, (0, -len(value) % 127)).view(-1, 127)
    value = torch.cat((torch.full((len(value), 1), 448.0), value), 1).float()  # so that each scale is one
    value = torch.cat((value, -value))
    distance = (value.abs().double()[..., None] - number).abs()
    lowest = distance == distance.amin(-1, keepdim=True)
    even_first = torch.where(code % 2 == 0, 2, 1) * lowest
    expected = number[even_first.argmax(-1)].copysign(value.double())
    q, scale = quantise_rows(value.to(DEVICE))
    assert bool((scale == 1).all())
    assert q.cpu().double().equal(expected)


@given(
    rows=st.integers(1, 70),
    blocks=st.integers(1, 3),
    spread=st.sampled_from([0.0, 10.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    strided=st.booleans(),
)
@settings(max_examples=EXAMPLES, deadline=None)
def test_rows_come_back_within_half_a_step(
    rows: int, blocks: int, spread: float, dtype: torch.dtype, strided: bool
) -> None:
    x = draw(1, rows, 128 * blocks, spread=spread).to(dtype)
    x = x.t().contiguous().t() if strided else x
    q, scale = quantise_rows(x)
    with kernels.use_reference():
        same_bits((q, scale), quantise_rows(x))
    # Half a step is 2⁻⁴ of a value, and 2⁻¹⁰ below 2⁻⁶; the scale's and the quotient's own roundings come on top.
    allowed = torch.maximum(x.double().abs() * 2.0**-4, scale.double().repeat_interleave(128, 1) * 2.0**-10)
    assert bool(((of_rows(q, scale) - x.double()).abs() <= allowed * (1 + 2.0**-20)).all())
    largest = q.float().unflatten(1, (-1, 128)).abs().amax(2)
    assert bool((largest == 448).all())


def test_zeros_extremes_and_what_is_not_a_number() -> None:
    x = draw(2, 6, 256)
    x[0] = 0
    x[1] *= 1e-42
    x[2] *= 5e37
    x[3, 130], x[4, 5], x[5, 7] = float("nan"), float("inf"), -float("inf")
    q, scale = quantise_rows(x)
    with kernels.use_reference():
        same_bits((q, scale), quantise_rows(x))
    assert not q[0].float().any()
    assert bool((of_rows(q, scale)[1] - x[1].double()).abs().max() <= 2.0**-126 * 2.0**-9)
    assert bool(of_rows(q, scale)[2].isfinite().all())
    assert q[3, 128:].float().isnan().all()
    assert q[3, :128].float().isfinite().all()
    assert q[4:, :128].float().isnan().all()
    assert q[4:, 128:].float().isfinite().all()
    w, w_scale = quantise_blocks(draw(3, 1, 128, 256))
    y = fp8_gemm(q, scale, w[0], w_scale[0])
    assert y[3:].isnan().all()  # passed on to their rows
    assert y[:2].isfinite().all()  # and to no other


@given(
    groups=st.lists(st.integers(0, 140), min_size=1, max_size=4), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
@settings(max_examples=EXAMPLES, deadline=None)
def test_columns_are_the_rows_of_the_transpose_group_by_group(groups: list[int], dtype: torch.dtype) -> None:
    x, ends = draw(4, sum(groups), 128, spread=4.0).to(dtype), torch.tensor(groups).cumsum(0).to(DEVICE)
    q, scale = quantise_columns(x, ends)
    assert q.shape == (128, 128 * most_tiles(sum(groups), len(groups)))
    taken, tiles = 0, tile_ends(ends).tolist()
    for rows, begin, tile in zip(groups, [0, *tiles], tiles, strict=False):
        own = torch.nn.functional.pad(x[taken : taken + rows], (0, 0, 0, -rows % 128))
        if rows:
            same_bits((q[:, begin * 128 : tile * 128], scale[:, begin:tile]), quantise_rows(own.t()))
        taken += rows
    assert not q[:, tiles[-1] * 128 :].float().any()


def test_blocks_share_their_largest() -> None:
    w = draw(5, 2, 128, 256, spread=2.0)
    q, scale = quantise_blocks(w)
    assert scale.shape == (2, 1, 2)
    blocks = w.unflatten(2, (2, 128)).unflatten(1, (1, 128)).abs().amax((2, 4))
    torch.testing.assert_close(scale, blocks / 448, rtol=2 * EPS, atol=0)
    with kernels.use_reference():
        same_bits((q, scale), quantise_blocks(w))
    same_bits(quantise_blocks(w.mT), (q.mT, scale.mT))


def test_a_swiglu_is_quantised_as_if_it_had_been_written() -> None:
    x = draw(6, 45, 512).bfloat16()
    q, scale = swiglu_quantise(x)
    gate, up = x.double().chunk(2, 1)
    h = gate * gate.sigmoid() * up
    wanted, wanted_scale = quantise_rows(h.float())
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-6, atol=0)  # a few roundings of float32
    # Those may move a value over a tie, to the next number; and few do.
    step = torch.maximum(
        of_rows(wanted, wanted_scale).abs() * 2.0**-3, wanted_scale.double().repeat_interleave(128, 1) * 2.0**-9
    )
    apart = (of_rows(q, scale) - of_rows(wanted, wanted_scale)).abs()
    assert bool((apart <= step * 1.001).all())
    assert float((q.float() != wanted.float()).float().mean()) < 0.001


@given(
    groups=st.lists(st.integers(0, 140), min_size=1, max_size=3),
    outer=st.integers(1, 2),
    inner=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    opposite=st.booleans(),
)
@settings(max_examples=EXAMPLES, deadline=None)
def test_products(groups: list[int], outer: int, inner: int, dtype: torch.dtype, opposite: bool) -> None:
    """Forward in both layouts of w, and the gradient in w, with groups of every size."""
    rows, ends = sum(groups), torch.tensor(groups).cumsum(0).to(DEVICE)
    x, grad = draw(7, rows, 128 * inner, spread=3.0), draw(8, rows, 128 * outer, spread=3.0)
    w = draw(9, len(groups), 128 * outer, 128 * inner)
    w_q, w_scale = quantise_blocks(w)
    if opposite:
        w_q, w_scale = w_q.mT.contiguous().mT, w_scale.mT.contiguous().mT
    q, scale = quantise_rows(x)
    y = fp8_grouped_gemm(q, scale, w_q, w_scale, ends, dtype)
    sides = (*quantise_columns(grad, ends), *quantise_columns(x, ends))
    dw = fp8_weight_gradient(*sides, ends)
    assert y.dtype == dtype
    assert (dw.dtype, dw.shape) == (torch.float32, w.shape)
    grad64, x64 = of_rows(*sides[:2]), of_rows(*sides[2:])
    begin = tile = 0
    for e, (end, tiles) in enumerate(zip(ends.tolist(), tile_ends(ends).tolist(), strict=True)):
        close(y[begin:end], of_rows(q, scale)[begin:end], of_blocks(w_q, w_scale)[e])
        own = slice(tile * 128, tiles * 128)
        close(dw[e], grad64[:, own], x64[:, own])
        if dtype == torch.float32 and end > begin:
            close(
                fp8_gemm(q[begin:end], scale[begin:end], w_q[e], w_scale[e], dtype),
                of_rows(q, scale)[begin:end],
                of_blocks(w_q, w_scale)[e],
            )
        begin, tile = end, tiles


@pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="of the code in Triton")
@pytest.mark.parametrize("blocks", [2, 3])
def test_a_tile_of_two_blocks_of_a_matrix_gives_the_same_bits(blocks: int) -> None:
    """Or is taken as two, where the matrix has an odd number of them."""
    from gristmill.kernels.fp8_gemm import gpu

    ends = torch.tensor([20, 20, 65], device=DEVICE)
    sides = *quantise_rows(draw(18, 65, 256, spread=3.0)), *quantise_blocks(draw(19, 3, 128 * blocks, 256))
    one, two = (
        gpu.fp8_grouped_gemm(*sides, ends, torch.float32, gpu.Tiles(64, columns, 128, 4, 2)) for columns in (128, 256)
    )
    assert torch.equal(one, two)


def test_numbers_that_the_format_has_are_multiplied_exactly() -> None:
    x = torch.randint(-8, 9, (20, 256), generator=torch.Generator().manual_seed(10)).float().to(DEVICE) * 28
    w = torch.randint(-8, 9, (128, 256), generator=torch.Generator().manual_seed(11)).float().to(DEVICE) * 28
    for side in (x, w):
        side[:, ::128] = 448  # so that scales are one (8 · 28 is 224, and 14 · 32 is 448)
        side.copy_(side.to(torch.float8_e4m3fn).float())
    (q, x_scale), (w_q, w_scale) = quantise_rows(x), quantise_blocks(w[None])
    assert q.float().equal(x)
    assert w_q[0].float().equal(w)
    y = fp8_gemm(q, x_scale, w_q[0], w_scale[0], torch.float32)
    if DEVICE == "cpu":
        assert y.double().equal(x.double() @ w.double().t())  # sums of 256 products of 18 bits, all multiples of 16
    else:
        close(y, x.double(), w.double())


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="of the specification")
def test_an_order_of_sums_within_a_block_changes_no_bit() -> None:
    order = torch.cat(
        [b * 128 + torch.randperm(128, generator=torch.Generator().manual_seed(12 + b)) for b in range(3)]
    )
    (q, scale), (w, w_scale) = quantise_rows(draw(13, 33, 384, spread=6.0)), quantise_blocks(draw(14, 1, 128, 384))
    y = fp8_gemm(q, scale, w[0], w_scale[0], torch.float32)
    assert y.equal(fp8_gemm(q[:, order], scale, w[0][:, order], w_scale[0], torch.float32))


def test_two_runs_give_equal_bits() -> None:
    x, ends = draw(15, 140, 128), torch.tensor([10, 140], device=DEVICE)
    gate_up, down = draw(16, 2, 256, 128), draw(17, 2, 128, 128)
    leaves = [t.requires_grad_() for t in (x, gate_up, down)]
    runs = []
    for _ in range(2):
        y = fp8_feed_forward(leaves[0], leaves[1], leaves[2], ends)
        runs.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(("outer", "inner"), [(256, 128), (72, 200)])
def test_a_linear_and_its_gradients_are_products_of_quantised_values(outer: int, inner: int) -> None:
    """Of float64, with each operand rounded along the sum of its product; widths that do not fit are filled up."""
    x, w, grad = draw(18, 150, inner), draw(19, outer, inner), draw(20, 150, outer)
    leaves = [x.requires_grad_(), w.requires_grad_()]
    y = fp8_linear(*leaves)
    dx, dw = torch.autograd.grad(y, leaves, grad)
    assert (y.shape, dx.shape, dw.shape) == (grad.shape, x.shape, w.shape)

    def filled(t: torch.Tensor, rows: bool = True) -> torch.Tensor:
        return torch.nn.functional.pad(t.detach(), (0, -t.shape[1] % 128, 0, -len(t) % 128 if rows else 0))

    def by_rows(t: torch.Tensor) -> torch.Tensor:
        return of_rows(*quantise_rows(t))

    w64 = of_blocks(*(part[0] for part in quantise_blocks(filled(w)[None])))
    close(torch.nn.functional.pad(y.detach(), (0, -outer % 128)), by_rows(filled(x, False)), w64)
    close(torch.nn.functional.pad(dx, (0, -inner % 128)), by_rows(filled(grad, False)), w64.t())
    close(filled(dw), by_rows(filled(grad).t().contiguous()), by_rows(filled(x).t().contiguous()))


@pytest.mark.parametrize("hidden", [128, 72])
def test_a_feed_forward_is_near_that_of_float64(hidden: int) -> None:
    """With its gradients: roundings of 2⁻⁴ at most, of random sign, leave of a norm a few hundredths."""
    ends = torch.tensor([0, 70, 150], device=DEVICE)
    leaves = [draw(21, 150, 128), draw(22, 3, 2 * hidden, 128) / 11, draw(23, 3, 128, hidden) / 11]
    ours, wanted = [t.requires_grad_() for t in leaves], [t.detach().double().requires_grad_() for t in leaves]
    y = fp8_feed_forward(ours[0], ours[1], ours[2], ends)
    parts = []
    for e, (a, b) in enumerate([(0, 0), (0, 70), (70, 150)]):
        gate, up = (wanted[0][a:b] @ wanted[1][e].t()).chunk(2, 1)
        parts.append((torch.nn.functional.silu(gate) * up) @ wanted[2][e].t())
    expected, seen = torch.cat(parts), draw(24, 150, 128)
    got = (y, *torch.autograd.grad(y, ours, seen))
    exact = (expected, *torch.autograd.grad(expected, wanted, seen.double()))
    for mine, theirs in zip(got, exact, strict=True):
        assert mine.shape == theirs.shape
        assert float((mine.double() - theirs).detach().norm()) <= 0.08 * float(theirs.detach().norm())
    assert not got[2][0].any()  # the group without rows
    assert not got[3][0].any()


def test_only_the_gradients_that_are_asked_for() -> None:
    x, w = draw(25, 10, 128), draw(26, 128, 128)
    fp8_linear(x.requires_grad_(), w).sum().backward()
    assert x.grad is not None
    assert w.grad is None
    x = x.detach()
    fp8_linear(x, w.requires_grad_()).sum().backward()
    assert x.grad is None
    assert w.grad is not None


E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantise_rows(torch.zeros(4, 100)), ValueError, "columns of x_NK is 100; wanted a multiple of 128"),
        (lambda: quantise_rows(torch.zeros(4, 128, dtype=torch.int32)), TypeError, "x_NK is torch.int32; wanted a floating"),
        (lambda: quantise_rows(torch.zeros(128)), ValueError, "rank of x_NK is 1; wanted 2"),
        (lambda: quantise_columns(torch.zeros(4, 128), torch.tensor([3])), ValueError, "last of ends_E is 3; wanted the 4 rows"),
        (lambda: quantise_columns(torch.zeros(4, 64), torch.tensor([4])), ValueError, "columns of x_NK is 64; wanted"),
        (lambda: quantise_blocks(torch.zeros(1, 100, 128)), ValueError, "rows of w_EMK is 100; wanted a multiple of 128"),
        (lambda: swiglu_quantise(torch.zeros(4, 128)), ValueError, "columns of x_NG is 128; wanted a multiple of 256"),
        (lambda: product(x=torch.zeros(4, 100)), ValueError, "fp8_gemm: columns of x_NK is 100; wanted a multiple of 128"),
        (lambda: product(x_scale=torch.ones(4, 1)), ValueError, r"shape of the scales of x_NK is \(4, 1\); wanted \(4, 2\)"),
        (lambda: product(w=torch.zeros(128, 128), w_scale=torch.ones(1, 1)), ValueError, "columns of w_MK is 128; wanted 256"),
        (lambda: product(w_scale=torch.ones(1, 2).double()), TypeError, "scales of w_MK is torch.float64; wanted torch.float32"),
        (lambda: fp8_gemm(torch.zeros(4, 256), torch.ones(4, 2), *WEIGHT), TypeError, "x_NK is torch.float32; wanted torch.float8"),
        (lambda: grouped(torch.tensor([3, 2])), ValueError, r"ends_E is \[3, 2\]; wanted ascending"),
        (lambda: grouped(torch.tensor([4])), ValueError, r"shape of ends_E is \(1,\); wanted \(2,\)"),
        (lambda: gradient(torch.tensor([1, 2])), ValueError, "tiles of grad_MP is 1; wanted at least 2"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


WEIGHT = (torch.zeros(128, 256).to(E4M3), torch.ones(1, 2))


def product(**change: torch.Tensor) -> torch.Tensor:
    taken = {
        "x": torch.zeros(4, 256),
        "x_scale": torch.ones(4, 2),
        "w": torch.zeros(128, 256),
        "w_scale": torch.ones(1, 2),
    } | change
    return fp8_gemm(taken["x"].to(E4M3), taken["x_scale"], taken["w"].to(E4M3), taken["w_scale"])


def grouped(ends: torch.Tensor) -> torch.Tensor:
    w, w_scale = torch.zeros(2, 128, 256).to(E4M3), torch.ones(2, 1, 2)
    return fp8_grouped_gemm(torch.zeros(2, 256).to(E4M3), torch.ones(2, 2), w, w_scale, ends)


def gradient(ends: torch.Tensor) -> torch.Tensor:
    side = (torch.zeros(128, 128).to(E4M3), torch.ones(128, 1))
    return fp8_weight_gradient(*side, *side, ends)


def test_the_report_says_what_ran() -> None:
    quantise_rows(draw(27, 2, 128))
    assert kernels.report()["quantise_rows"]["gpu" if INTERPRETED or DEVICE == "cuda" else "cpu"] >= 1
