"""RMSNorm and rotary embedding, forward and gradients, on each path of a CPU, against their references in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill import kernels
from gristmill.kernels.norm_rope import rms_norm, rotate, rotate_halves
from gristmill.kernels.norm_rope.reference import rms_norm_reference, rotate_halves_reference, rotate_reference

pytestmark = pytest.mark.usefixtures("cpu_path")
EPS = torch.finfo(torch.float32).eps
ROTATIONS = [(rotate, rotate_reference), (rotate_halves, rotate_halves_reference)]
Operation = Callable[..., Tensor]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(operation: Operation, leaves: list[Tensor], seen: Tensor, *rest: object) -> list[Tensor]:
    """The result and the gradients of its product with `seen`."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = operation(*leaves, *rest)
    return [out.detach(), *torch.autograd.grad(out, leaves, seen)]


def close(got: Tensor, wanted: Tensor, allowed: float) -> None:
    assert got.shape == wanted.shape
    if got.numel():
        assert float((got.double() - wanted).abs().max()) <= allowed * max(1.0, float(wanted.abs().max()))


@given(
    rows=st.integers(0, 9) | st.sampled_from([64, 65, 200]), width=st.integers(1, 40) | st.sampled_from([256, 301]),
    strided=st.booleans(), size=st.sampled_from([1e-3, 1.0, 1e3]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
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
    close(got[1], grad_x, allowed * 4)  # the difference of two terms, each up to the largest value
    close(got[2], grad_weight, allowed + 2 * (rows + 1) * EPS)  # a sum over the rows


def test_rows_that_lie_apart_and_a_gradient_that_does() -> None:
    x, weight, seen = draw(3, 5, 4, 24), draw(4, 24), draw(5, 5, 4, 24)
    wanted = gradients(rms_norm, [x, weight], seen, 1e-5)
    apart = x.transpose(0, 1).contiguous().transpose(0, 1)  # no one distance between rows
    columns = torch.stack((x, x), -1)[..., 0]
    for other in (apart, columns):
        laid_apart = torch.stack((seen, seen), -1)[..., 0]
        for mine, theirs in zip(gradients(rms_norm, [other, weight], laid_apart, 1e-5), wanted, strict=True):
            close(mine, theirs.double(), 32 * EPS)  # torch's own norm sums a strided row in another order


def test_a_row_of_zeros_and_what_is_no_number() -> None:
    x, weight = draw(6, 4, 10), torch.ones(10)
    x[0], x[1, 3] = 0.0, float("nan")
    out, grad_x, grad_weight = gradients(rms_norm, [x, weight], torch.ones(4, 10), 1e-6)
    assert out[0].equal(torch.zeros(10))
    assert out[1].isnan().all()
    assert grad_x[1].isnan().all()
    assert grad_weight.isnan().all()
    assert not out[2:].isnan().any()
    assert not grad_x[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize(("operation", "reference"), ROTATIONS)
@given(
    batch=st.integers(1, 3), length=st.integers(0, 9), heads=st.integers(1, 3), half=st.integers(1, 20),
    lead=st.integers(0, 5), axis=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_rotations(
    operation: Operation, reference: Operation, batch: int, length: int, heads: int, half: int, lead: int, axis: bool
) -> None:
    shape = (batch, length, heads) if axis else (batch, length)
    x, seen = draw(0, *shape, lead + 2 * half)[..., lead:], draw(1, *shape, 2 * half)
    angle = draw(2, batch, length, half + lead)[..., :half] * 9
    angle = angle[:, :, None] if axis else angle
    got = gradients(lambda x: operation(x, angle.cos(), angle.sin()), [x], seen)
    with torch.no_grad():
        assert operation(x, angle.cos(), angle.sin()).equal(got[0])
    cos, sin = angle.cos().double(), angle.sin().double()  # of the same cosines: they are given
    wanted = gradients(lambda x: reference(x, cos, sin), [x.double()], seen.double())
    for mine, theirs in zip(got, wanted, strict=True):
        close(mine, theirs, 2 * EPS)  # two products and their sum


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
    assert operation(half, cos, sin).dtype == torch.float32
    assert operation(half, cos, sin).equal(reference(half, cos, sin))


def test_two_runs_give_equal_bits() -> None:
    x, weight, seen, angle = draw(13, 2, 333, 4, 64), draw(14, 64), draw(15, 2, 333, 4, 64), draw(16, 2, 333, 1, 32)
    cos, sin = angle.cos(), angle.sin()
    runs = [
        [
            *gradients(rms_norm, [x, weight], seen, 1e-6),
            *gradients(lambda x: rotate(x, cos, sin), [x], seen),
            *gradients(lambda x: rotate_halves(x, cos, sin), [x], seen),
        ]
        for _ in range(2)
    ]
    assert all(first.equal(second) for first, second in zip(*runs, strict=True))


def test_threads_change_no_bit(cpu_path: str) -> None:
    if cpu_path != "compiled":
        pytest.skip("torch's own sums go by threads")
    x, weight, seen, threads = draw(17, 500, 64), draw(18, 64), draw(19, 500, 64), torch.get_num_threads()
    wanted = gradients(rms_norm, [x, weight], seen, 1e-6)
    try:
        torch.set_num_threads(2 if threads != 2 else 1)
        for mine, theirs in zip(gradients(rms_norm, [x, weight], seen, 1e-6), wanted, strict=True):
            assert mine.equal(theirs)
    finally:
        torch.set_num_threads(threads)


def test_references_on_demand() -> None:
    x, weight = draw(20, 3, 6), draw(21, 6)
    with kernels.use_reference():
        assert rms_norm(x, weight, 1e-6).equal(rms_norm_reference(x, weight, 1e-6))


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
    with pytest.raises(ValueError, match=r"rotate: shape of cos is \(2, 3\); wanted 2 dimensions"):
        rotate(x, angle[:, :3], angle[:, :3])
    with pytest.raises(ValueError, match=r"rotate_halves: shape of cos is \(4,\); wanted 2 dimensions"):
        rotate_halves(x, angle[0], angle[0])
    with pytest.raises(ValueError, match=r"rotate: shape of sin is \(1, 4\); wanted that of cos, \(2, 4\)"):
        rotate(x, angle, angle[:1])
