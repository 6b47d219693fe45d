"""Products with a matrix and their gradients, against float64, on both paths of a CPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill import kernels
from gristmill.kernels.linear import LEAST_PRODUCTS, LEAST_ROWS, few, linear, multiply

EPS = 2**-24


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(got: torch.Tensor, wanted: torch.Tensor, size: torch.Tensor, terms: int) -> None:
    """Within a float32 sum of so many terms, which is off by terms · eps of the sum of their sizes at most."""
    assert got.shape == wanted.shape
    assert bool(((got.double() - wanted).abs() <= (terms + 2) * EPS * size + 1e-30).all())


@pytest.mark.usefixtures("cpu_path")
@given(
    rows=st.integers(LEAST_ROWS, 600),
    inner=st.integers(1, 600),
    outer=st.integers(1, 70),
    bias=st.booleans(),
    strided=st.sampled_from(["", "rows", "weight", "columns"]),
    scale=st.sampled_from([1.0, 1e4, 1e-4]),
)
@settings(max_examples=40, deadline=None)
def test_result_and_gradients(rows: int, inner: int, outer: int, bias: bool, strided: str, scale: float) -> None:
    x, w, b, seen = draw(0, rows, inner) * scale, draw(1, outer, inner), draw(2, outer), draw(3, rows, outer) * scale
    if strided == "rows":
        x, seen = x.t().contiguous().t(), seen.t().contiguous().t()
    elif strided == "weight":
        w = w.t().contiguous().t()
    elif strided == "columns":
        x, w, seen = (torch.stack((t, t), -1)[..., 0] for t in (x, w, seen))
    x, w = x.requires_grad_(), w.requires_grad_()
    y = linear(x[None], w, b if bias else None)[0]
    grad_x, grad_w = torch.autograd.grad(y, (x, w), seen)
    x, w, b, seen = (t.detach().double() for t in (x, w, b, seen))
    close(y.detach(), x @ w.t() + b * bias, x.abs() @ w.abs().t() + b.abs(), inner)
    close(grad_x, seen @ w, seen.abs() @ w.abs(), outer)
    close(grad_w, seen.t() @ x, seen.abs().t() @ x.abs(), rows)


def test_what_runs(cpu_path: str) -> None:
    before = kernels.report().get("linear", {})
    linear(draw(0, LEAST_ROWS, 8), draw(1, 3, 8))
    linear(draw(0, LEAST_ROWS - 1, 8), draw(1, 3, 8))
    linear(draw(0, 2, 8), draw(1, LEAST_PRODUCTS // 16, 8))
    linear(draw(0, 2, 8), draw(1, LEAST_PRODUCTS // 16, 8).requires_grad_())
    linear(draw(0, LEAST_ROWS, 8).double(), draw(1, 3, 8).double())
    after = kernels.report()["linear"]
    ran = {path: after.get(path, 0) - before.get(path, 0) for path in ("compiled", "cpu")}
    assert ran == ({"compiled": 2, "cpu": 3} if cpu_path == "compiled" else {"compiled": 0, "cpu": 5})


@pytest.mark.usefixtures("cpu_path")
@given(rows=st.integers(1, LEAST_ROWS - 1), inner=st.integers(1, 300), outer=st.integers(1, 90), bias=st.booleans())
@settings(max_examples=40, deadline=None)
def test_few_rows_without_gradients(rows: int, inner: int, outer: int, bias: bool) -> None:
    x, w, b = draw(0, rows, inner), draw(1, outer, inner), draw(2, outer)
    whole = linear(x[None], w, b if bias else None)[0]
    x, w, b = (t.double() for t in (x, w, b))
    close(whole, x @ w.t() + b * bias, x.abs() @ w.abs().t() + b.abs(), inner)


def test_a_row_of_few_does_not_depend_on_the_others(cpu_path: str) -> None:
    if cpu_path != "compiled":
        pytest.skip("torch's products are another library's")
    x, w = draw(0, 95, 203), draw(1, 77, 203)
    whole = few(x, w)
    for rows in (1, 2, 3, 4, 7, 32):
        assert torch.equal(few(x[5 : 5 + rows], w), whole[5 : 5 + rows])
    assert torch.equal(few(x, w[11:20]), whole[:, 11:20])


@pytest.mark.usefixtures("cpu_path")
def test_nan_and_infinity_reach_their_rows_alone() -> None:
    x, w = draw(0, 200, 300), draw(1, 40, 300)
    x[7, 5], x[150, 299] = math.nan, math.inf
    y = linear(x, w)
    assert y[7].isnan().all()
    assert y[150].isinf().all()
    assert y[[i for i in range(200) if i not in (7, 150)]].isfinite().all()


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("rows", [3, 700])
def test_two_runs_give_equal_bits(rows: int) -> None:
    x, w, seen = draw(0, rows, 300), draw(1, 900, 300), draw(2, rows, 900)
    assert torch.equal(linear(x, w), linear(x, w))
    leaves = [t.requires_grad_() for t in (x, w)]
    runs = [torch.autograd.grad(linear(x, w), leaves, seen) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@pytest.mark.usefixtures("cpu_path")
@given(rows=st.integers(1, 200), inner=st.integers(1, 300), outer=st.integers(1, 70), scale=st.sampled_from([1.0, 1e4]))
@settings(max_examples=20, deadline=None)
def test_in_bfloat16(rows: int, inner: int, outer: int, scale: float) -> None:
    x, w, seen = (t.bfloat16() for t in (draw(0, rows, inner) * scale, draw(1, outer, inner), draw(2, rows, outer)))
    leaves = [t.requires_grad_() for t in (x, w)]
    y = linear(x, w)
    got = y.detach(), *torch.autograd.grad(y, leaves, seen)
    x, w, seen = (t.detach().double() for t in (x, w, seen))
    for mine, a, b in zip(got, (x, seen, seen.t()), (w.t(), w, x), strict=True):
        assert mine.dtype == torch.bfloat16
        # The sum in float32, and the rounding of the result
        allowed = (a.shape[1] + 2) * EPS * (a.abs() @ b.abs())
        assert bool(((mine.double() - a @ b).abs() <= allowed + 2**-8 * ((a @ b).abs() + allowed)).all())


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_bit(cpu_path: str, threads: int) -> None:
    if cpu_path != "compiled":
        pytest.skip("torch's products are another library's")
    x, w = draw(0, 700, 300), draw(1, 600, 300)
    wanted, got, now = torch.empty(700, 600), torch.empty(700, 600), torch.get_num_threads()
    multiply(x, w.t(), wanted)
    try:
        torch.set_num_threads(threads)
        multiply(x, w.t(), got)
    finally:
        torch.set_num_threads(now)
    assert torch.equal(got, wanted)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="inner size of w_MK is 5; wanted 4"):
        linear(draw(0, 3, 4), draw(1, 2, 5))
    with pytest.raises(ValueError, match="rank of w_MK is 1; wanted 2"):
        linear(draw(0, 3, 4), draw(1, 4))
