"""RMSNorm and rotary embedding, forward and gradients, against their references in float64: on the GPU where there is
one, else on each path of a CPU, and the Triton code under its interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill import kernels
from gristmill.kernels.norm_rope import WIDEST, add_rms_norm, rms_norm, rotate, rotate_halves
from gristmill.kernels.norm_rope.reference import (
    add_rms_norm_reference,
    rms_norm_reference,
    rotate_halves_reference,
    rotate_reference,
)

EPS = torch.finfo(torch.float32).eps
INTERPRETED = os.environ.get("GRISTMILL_KERNELS") == "gpu"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
TRITON = INTERPRETED or DEVICE == "cuda"
EXAMPLES = 8 if INTERPRETED else 10 if DEVICE == "cuda" else 40  # compiled anew for most widths on a GPU
ROTATIONS = [(rotate, rotate_reference), (rotate_halves, rotate_halves_reference)]
Operation = Callable[..., Tensor]


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def gradients(operation: Operation, leaves: list[Tensor], seen: Tensor, *rest: object) -> list[Tensor]:
    """The result and the gradients of its product with `seen`."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = operation(*leaves, *rest)
    return [out.detach(), *torch.autograd.grad(out, leaves, seen)]


def close(got: Tensor, wanted: Tensor, allowed: float, term: float = 1.0) -> None:
    """`term`: the size of what the numbers are sums or differences of, where that is more than they are."""
    assert got.shape == wanted.shape
    if got.numel():
        assert float((got.double() - wanted).abs().max()) <= allowed * max(1.0, term, float(wanted.abs().max()))


def largest_term(x: Tensor, weight: Tensor, seen: Tensor | None) -> float:
    """Of a norm's gradient: weight · gradient over the row's root mean square, from which nearly as much may be taken."""
    if seen is None or not x.numel():
        return 1.0
    scale = (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return float((scale * weight * seen).abs().max())


@pytest.mark.usefixtures("cpu_path")
@given(
    rows=st.integers(0, 9) | st.sampled_from([64, 65, 200]), width=st.integers(1, 40) | st.sampled_from([256, 301]),
    strided=st.booleans(), size=st.sampled_from([1e-3, 1.0, 1e3]),
)  # fmt: skip
@settings(max_examples=EXAMPLES, deadline=None)
def test_rms_norm(rows: int, width: int, strided: bool, size: float) -> None:
    x = (draw(0, 2, rows, width + 7)[..., 3 : 3 + width] if strided else draw(0, 2, rows, width)) * size
    weight, seen = 1 + draw(1, width) / 4, draw(2, 2, rows, width)
    got = gradients(rms_norm, [x, weight], seen, 1e-6)
    with torch.no_grad():
        assert rms_norm(x, weight, 1e-6).equal(got[0])
    out, grad_x, grad_weight = gradients(rms_norm_reference, [x.double(), weight.double()], seen.double(), 1e-6)
    # a mean of `width` squares has a relative error of less than eps a term; what follows are a few products
    allowed = (width + 8) * EPS
    close(got[0], out, allowed)
    close(got[1], grad_x, allowed * 4, largest_term(x, weight, seen))  # the difference of two terms
    close(got[2], grad_weight, allowed + 2 * (rows + 1) * EPS)  # a sum over the rows


def off_by(x: Tensor, weight: Tensor, seen: Tensor, more: Tensor | None = None) -> list[Tensor]:
    """Of a norm's result and gradients in bfloat16, in float64: what they are rounded by. What goes in is exact; the
    factor, products and differences are rounded as they are made, by half a step of their terms, four times at most."""
    x, weight, seen = x.double(), weight.double(), seen.double()
    scale = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    along = (seen * weight * x).abs().mean(-1, keepdim=True) * scale**2
    of_x = scale * ((seen * weight).abs() + x.abs() * along) + (0.0 if more is None else more.double().abs())
    terms = (x * scale * weight).abs(), of_x, (seen * x * scale).abs().flatten(0, -2).sum(0)
    return [4 * 2**-8 * t for t in terms]


@pytest.mark.usefixtures("cpu_path")
@given(
    rows=st.integers(1, 9) | st.sampled_from([65, 200]), width=st.integers(1, 40) | st.sampled_from([256, 301]),
    strided=st.booleans(), size=st.sampled_from([1e-3, 1.0, 1e3]),
)  # fmt: skip
@settings(max_examples=EXAMPLES, deadline=None)
def test_norms_in_bfloat16(rows: int, width: int, strided: bool, size: float) -> None:
    x, y = ((draw(seed, 2, rows, width + 7) * size).bfloat16()[..., :width] for seed in (0, 1))
    x, y = (x, y) if strided else (x.contiguous(), y.contiguous())
    weight, seen, more = (
        (1 + draw(2, width) / 4).bfloat16(),
        draw(3, 2, rows, width).bfloat16(),
        draw(4, 2, rows, width),
    )
    wide = weight.double(), seen.double()

    def check(got: list[Tensor], wanted: list[Tensor], off: list[Tensor]) -> None:
        for mine, theirs, allowed in zip(got, wanted, off, strict=True):
            assert mine.dtype == torch.bfloat16
            assert bool(((mine.double() - theirs).abs() <= allowed * (1 + (width + rows) * EPS) + 1e-30).all())

    wanted = gradients(rms_norm_reference, [x.double(), wide[0]], wide[1], 1e-6)
    check(gradients(rms_norm, [x, weight], seen, 1e-6), wanted, off_by(x, weight, seen))
    total, *ours, of_y, of_weight = summed(add_rms_norm, [x, y, weight], (more.bfloat16(), seen))
    if not INTERPRETED:  # which cuts off
        assert total.equal(x + y)
    assert of_y.equal(ours[1])
    both = more.bfloat16().double(), wide[1]
    _, *wanted, _, wanted_weight = summed(
        add_rms_norm_reference, [total.double(), torch.zeros_like(total).double(), wide[0]], both
    )
    check([*ours, of_weight], [*wanted, wanted_weight], off_by(total, weight, seen, both[0]))


def summed(operation: Operation, leaves: list[Tensor], seen: tuple[Tensor | None, Tensor | None]) -> list[Tensor]:
    """Both results, and the gradients of their products with what is seen of them; one may be unseen."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    both = operation(*leaves, 1e-6)
    pairs = [(out, by) for out, by in zip(both, seen, strict=True) if by is not None]
    grads = torch.autograd.grad([out for out, _ in pairs], leaves, [by for _, by in pairs], materialize_grads=True)
    return [*(out.detach() for out in both), *grads]


def one_by_one(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + y
    return total, rms_norm(total, weight, eps)


@pytest.mark.usefixtures("cpu_path")
@given(
    rows=st.integers(0, 9) | st.sampled_from([64, 65, 200]), width=st.integers(1, 40) | st.sampled_from([256, 301]),
    strided=st.booleans(), size=st.sampled_from([1e-3, 1.0, 1e3]), uses=st.sampled_from(["both", "sum", "norm"]),
)  # fmt: skip
@settings(max_examples=EXAMPLES, deadline=None)
def test_add_rms_norm(rows: int, width: int, strided: bool, size: float, uses: str) -> None:
    x, y = (draw(seed, 2, rows, width + 7) * size for seed in (0, 1))
    x, y = (x[..., 3 : 3 + width], y[..., :width]) if strided else (x[..., :width].contiguous(), y[..., :width])
    weight = 1 + draw(2, width) / 4
    leaves = [x, y, weight]
    seen = tuple(None if uses == other else draw(3, 2, rows, width) for other in ("norm", "sum"))
    got = summed(add_rms_norm, leaves, seen)
    assert got[0].equal(x + y)
    if DEVICE == "cpu":
        assert got[1].equal(rms_norm(x + y, weight, 1e-6))
    with torch.no_grad():
        assert all(mine.equal(theirs) for mine, theirs in zip(add_rms_norm(*leaves, 1e-6), got, strict=False))
    if not TRITON:  # whose norm's gradient is rounded once, with the other use added
        assert all(mine.equal(theirs) for mine, theirs in zip(got, summed(one_by_one, leaves, seen), strict=True))
    close(got[0], add_rms_norm_reference(x.double(), y.double(), weight.double(), 1e-6)[0], EPS / 2 * (1 + 2 * EPS))
    # What follows is of the sum as it was rounded: where x and y cancel, the norm of the exact one is another.
    rounded = [got[0].double(), torch.zeros_like(got[0]).double(), weight.double()]
    wide = tuple(None if by is None else by.double() for by in seen)
    _, out, grad, _, grad_weight = summed(add_rms_norm_reference, rounded, wide)
    allowed = (width + 8) * EPS  # as of the norm alone
    close(got[1], out, allowed)
    close(got[2], grad, allowed * 4, largest_term(got[0], weight, seen[1]))
    assert got[3].equal(got[2])
    close(got[4], grad_weight, allowed + 2 * (rows + 1) * EPS)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("uses", ["both", "sum", "norm"])
def test_what_is_added_may_have_fewer_bits(uses: str) -> None:
    """As where a product in 16 bits is added to a float32 residual stream: only its gradient is rounded."""
    x, y, weight = draw(0, 70, 48), draw(1, 70, 48).bfloat16(), 1 + draw(2, 48) / 4
    seen = tuple(None if uses == other else draw(seed, 70, 48) for other, seed in (("norm", 3), ("sum", 4)))
    got, wanted = summed(add_rms_norm, [x, y, weight], seen), summed(add_rms_norm, [x, y.float(), weight], seen)
    assert [t.dtype for t in got] == [torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float32]
    wanted[3] = wanted[3].bfloat16()
    assert all(mine.equal(theirs) for mine, theirs in zip(got, wanted, strict=True))


@pytest.mark.usefixtures("cpu_path")
def test_rows_that_lie_apart_and_a_gradient_that_does() -> None:
    x, weight, seen = draw(3, 5, 4, 24), draw(4, 24), draw(5, 5, 4, 24)
    wanted = gradients(rms_norm, [x, weight], seen, 1e-5)
    apart = x.transpose(0, 1).contiguous().transpose(0, 1)  # no one distance between rows
    columns = torch.stack((x, x), -1)[..., 0]
    for other in (apart, columns):
        laid_apart = torch.stack((seen, seen), -1)[..., 0]
        for mine, theirs in zip(gradients(rms_norm, [other, weight], laid_apart, 1e-5), wanted, strict=True):
            close(mine, theirs.double(), 32 * EPS)  # torch's own norm sums a strided row in another order


@pytest.mark.usefixtures("cpu_path")
def test_a_row_of_zeros_and_what_is_no_number() -> None:
    x, weight = draw(6, 4, 10), torch.ones(10, device=DEVICE)
    x[0], x[1, 3] = 0.0, float("nan")
    out, grad_x, grad_weight = gradients(rms_norm, [x, weight], torch.ones_like(x), 1e-6)
    assert out[0].equal(torch.zeros_like(weight))
    assert out[1].isnan().all()
    assert grad_x[1].isnan().all()
    assert grad_weight.isnan().all()
    assert not out[2:].isnan().any()
    assert not grad_x[[0, 2, 3]].isnan().any()


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize(("operation", "reference"), ROTATIONS)
@given(
    batch=st.integers(1, 3), length=st.integers(0, 9), heads=st.integers(1, 3), half=st.integers(1, 20),
    lead=st.integers(0, 5), axis=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.sampled_from([1.0, 1e4]),
)  # fmt: skip
@settings(max_examples=EXAMPLES, deadline=None)
def test_rotations(
    operation: Operation, reference: Operation, batch: int, length: int, heads: int, half: int, lead: int, axis: bool,
    dtype: torch.dtype, size: float,
) -> None:  # fmt: skip
    shape = (batch, length, heads) if axis else (batch, length)
    x, seen = (draw(seed, *shape, lead + 2 * half)[..., lead:] for seed in (0, 1))
    x = (x * size).to(dtype)
    angle = draw(2, batch, length, half + lead)[..., :half] * 9
    angle = angle[:, :, None] if axis else angle
    got = gradients(lambda x: operation(x, angle.cos(), angle.sin()), [x], seen)
    with torch.no_grad():
        assert operation(x, angle.cos(), angle.sin()).equal(got[0])
    cos, sin = angle.cos().double(), angle.sin().double()  # of the same cosines: they are given
    out, grad = gradients(lambda x: reference(x, cos, sin), [x.double()], seen.double())
    assert [t.dtype for t in got] == [torch.float32, dtype]
    close(got[0], out, 2 * EPS)  # two products and their sum
    # and torch's own rounds in bfloat16 both products and the sum
    close(got[1], grad, 2 * EPS if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize(("operation", "interleaved"), [(rotate, True), (rotate_halves, False)])
def test_what_is_no_number_stays_in_its_pair(operation: Operation, interleaved: bool) -> None:
    x, seen, angle = draw(0, 3, 2, 12), draw(1, 3, 2, 12), draw(2, 3, 1, 6)
    x[1, 0, 3], seen[2, 1, 8] = float("nan"), float("inf")  # of pairs 1, or 3; and of 2
    out, grad = gradients(lambda x: operation(x, angle.cos(), angle.sin()), [x], seen)
    pair = 1 if interleaved else 3
    assert out.isnan().nonzero().tolist() == [[1, 0, pair], [1, 0, pair + 6]]
    place = [4, 5] if interleaved else [2, 8]
    assert (~grad.isfinite()).nonzero().tolist() == [[2, 1, i] for i in place]


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize(("operation", "reference"), ROTATIONS)
def test_angles_that_lie_in_any_way(operation: Operation, reference: Operation) -> None:
    x, seen = draw(7, 2, 5, 3, 8), draw(8, 2, 5, 3, 8)
    whole = draw(9, 2, 5, 1, 4)
    for angle in (
        whole[:1],  # one sequence's, for all
        whole[0, 0].expand(2, 5, 1, 4),
        draw(10, 2, 5, 3, 4),  # of each head
        draw(11, 2, 4, 1, 5).transpose(1, 3),
        draw(12, 2, 5, 1, 8)[..., :4],
    ):
        cos, sin = angle.cos(), angle.sin()
        got = gradients(lambda x, c=cos, s=sin: operation(x, c, s), [x], seen)
        wanted = gradients(lambda x, c=cos, s=sin: reference(x, c.double(), s.double()), [x.double()], seen.double())
        for mine, theirs in zip(got, wanted, strict=True):
            close(mine, theirs, 2 * EPS)
    half = x.bfloat16()
    out, grad = gradients(lambda x: operation(x, cos, sin), [half], seen)
    wanted = gradients(lambda x: reference(x, cos.double(), sin.double()), [half.double()], seen.double())
    assert (out.dtype, grad.dtype) == (torch.float32, torch.bfloat16)
    close(out, wanted[0], 2 * EPS)
    close(grad, wanted[1], 4 * torch.finfo(half.dtype).eps)  # torch rounds both products and their sum


@pytest.mark.usefixtures("cpu_path")
def test_two_runs_give_equal_bits() -> None:
    length = 33 if INTERPRETED else 333
    x, weight, seen = draw(13, 2, length, 4, 64), draw(14, 64), draw(15, 2, length, 4, 64)
    angle = draw(16, 2, length, 1, 32)
    cos, sin = angle.cos(), angle.sin()
    runs = [
        [
            *gradients(rms_norm, [x, weight], seen, 1e-6),
            *summed(add_rms_norm, [x, seen, weight], (x, seen)),
            *gradients(lambda x: rotate(x, cos, sin), [x], seen),
            *gradients(lambda x: rotate_halves(x, cos, sin), [x], seen),
        ]
        for _ in range(2)
    ]
    assert all(first.equal(second) for first, second in zip(*runs, strict=True))


@pytest.mark.skipif(not TRITON, reason="of the GPU's code")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(70, 130), (9, 2048), (5, 7168), (2, WIDEST)])
def test_rows_of_any_width_are_rounded_once(rows: int, width: int, dtype: torch.dtype) -> None:
    """Slices, and on a GPU so many rows that each program takes several tiles."""
    rows *= 1 if INTERPRETED else 300
    x, seen = (draw(seed, rows, width + 16, dtype=dtype)[:, 8:-8] for seed in (0, 1))
    weight = (1 + draw(2, width) / 4).to(dtype)
    got = gradients(rms_norm, [x, weight], seen, 1e-6)
    wanted = gradients(rms_norm_reference, [x.double(), weight.double()], seen.double(), 1e-6)
    # The interpreter cuts bfloat16 off, a whole eps. Sums: of squares, halved by the root, and over the rows.
    once, sums = torch.finfo(dtype).eps, (width + rows + 8) * EPS
    total, both = draw(3, rows, width, dtype=dtype), draw(4, rows, width, dtype=dtype)
    ours = summed(add_rms_norm, [total, torch.zeros_like(total), weight], (both, seen))
    assert ours[0].equal(total)
    theirs = [t.double() for t in (total, torch.zeros_like(total), weight)]
    got += ours[1:]
    wanted += summed(add_rms_norm_reference, theirs, (both.double(), seen.double()))[1:]
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == dtype
        allowed = once * theirs.abs() + 4 * sums * max(1.0, float(theirs.abs().max()))
        assert bool(((mine.double() - theirs).abs() <= allowed).all())


@pytest.mark.skipif(not TRITON, reason="of the GPU's code")
def test_what_triton_does_not_take_is_torchs() -> None:
    before = {op: kernels.report().get(op, {}).get("torch", 0) for op in ("rms_norm", "rotate", "add_rms_norm")}
    x, weight = draw(0, 2, WIDEST + 2), draw(1, WIDEST + 2)
    close(rms_norm(x, weight, 1e-6), rms_norm_reference(x.double(), weight.double(), 1e-6), WIDEST * EPS)
    assert add_rms_norm(x, x, weight, 1e-6)[1].equal(rms_norm(x + x, weight, 1e-6))
    x, weight, angle = draw(0, 3, 8).double(), draw(1, 8).double(), draw(2, 3, 4)
    close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6), 32 * torch.finfo(torch.float64).eps)
    assert rotate(x, angle, angle).equal(rotate_reference(x, angle, angle))
    assert rotate(x.float(), angle.double(), angle.double()).dtype == torch.float64
    assert {op: kernels.report()[op]["torch"] - before[op] for op in before} == {
        "rms_norm": 3, "rotate": 2, "add_rms_norm": 1,
    }  # fmt: skip


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_nothing_waits_for_the_host_on_a_gpu() -> None:
    x, weight, angle = draw(0, 64, 4, 128, dtype=torch.bfloat16), draw(1, 128, dtype=torch.bfloat16), draw(2, 64, 1, 64)
    cos, sin = angle.cos(), angle.sin()

    def both_ways() -> list[Tensor]:
        turned = gradients(lambda x: rotate(x, cos, sin), [x], x.float())
        total = summed(add_rms_norm, [x, x, weight], (x, x))
        return [*gradients(rms_norm, [x, weight], x, 1e-6), *total, *turned]

    first = both_ways()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = both_ways()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_threads_change_no_bit(cpu_path: str) -> None:
    if cpu_path != "compiled" or TRITON:
        pytest.skip("torch's own sums go by threads, and a GPU has others")
    x, weight, seen, threads = draw(17, 500, 64), draw(18, 64), draw(19, 500, 64), torch.get_num_threads()

    def both() -> list[Tensor]:
        total = summed(add_rms_norm, [x, seen, weight], (x, seen))
        return [*gradients(rms_norm, [x, weight], seen, 1e-6), *total]

    wanted = both()
    try:
        torch.set_num_threads(2 if threads != 2 else 1)
        assert all(mine.equal(theirs) for mine, theirs in zip(both(), wanted, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_references_on_demand() -> None:
    x, weight = draw(20, 3, 6), draw(21, 6)
    with kernels.use_reference():
        assert rms_norm(x, weight, 1e-6).equal(rms_norm_reference(x, weight, 1e-6))
        wanted = add_rms_norm_reference(x, x, weight, 1e-6)
        assert all(map(torch.equal, add_rms_norm(x, x, weight, 1e-6), wanted))


def test_bad_arguments_are_named() -> None:
    x, weight, angle = draw(0, 2, 8), draw(0, 8), draw(0, 2, 4)
    with pytest.raises(TypeError, match=r"rms_norm: weight_D is torch.float64; wanted the dtype of x, torch.float32"):
        rms_norm(x, weight.double(), 1e-6)
    with pytest.raises(ValueError, match=r"rms_norm: shape of weight_D is \(7,\); wanted the last of \(2, 8\)"):
        rms_norm(x, weight[:7], 1e-6)
    with pytest.raises(ValueError, match=r"rms_norm: shape of weight_D is \(1, 8\)"):
        rms_norm(x, weight[None], 1e-6)
    with pytest.raises(ValueError, match=r"rms_norm: eps is -1; wanted 0 or more"):
        rms_norm(x, weight, -1)
    with pytest.raises(ValueError, match=r"add_rms_norm: eps is -1; wanted 0 or more"):
        add_rms_norm(x, x, weight, -1)
    with pytest.raises(TypeError, match=r"add_rms_norm: y is torch.float64; wanted the dtype of x, torch.float32, or"):
        add_rms_norm(x, x.double(), weight, 1e-6)
    with pytest.raises(ValueError, match=r"add_rms_norm: shape of y is \(1, 8\); wanted that of x, \(2, 8\)"):
        add_rms_norm(x, x[:1], weight, 1e-6)
    with pytest.raises(ValueError, match=r"rotate: shape of cos is \(2, 3\); wanted 2 dimensions"):
        rotate(x, angle[:, :3], angle[:, :3])
    with pytest.raises(ValueError, match=r"rotate_halves: shape of cos is \(4,\); wanted 2 dimensions"):
        rotate_halves(x, angle[0], angle[0])
    with pytest.raises(ValueError, match=r"rotate: shape of sin is \(1, 4\); wanted that of cos, \(2, 4\)"):
        rotate(x, angle, angle[:1])
