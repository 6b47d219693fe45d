"""Products whose operands are rounded to bfloat16, against the same in float64, on both paths of a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill import kernels
from gristmill.kernels.cross_entropy import linear_cross_entropy_mean
from gristmill.kernels.grouped_gemm import grouped_gemm
from gristmill.kernels.linear import LEAST_ROWS, linear
from gristmill.kernels.linear.reference import nearest
from gristmill.kernels.moe_mlp import moe_mlp

EPS = 2**-24
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU one gives tensors in bfloat16")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, a: Tensor, b: Tensor) -> None:
    """a·b of the nearest numbers, whose products are exact in float64, within a float32 sum of so many terms."""
    a, b = nearest(a).double(), nearest(b).double()
    allowed = (a.shape[1] + 2) * EPS * (a.abs() @ b.abs()) + 1e-30
    assert bool(((got.double() - a @ b).abs() <= allowed).all())


@pytest.mark.usefixtures("cpu_path")
@given(rows=st.integers(1, 300), inner=st.integers(1, 600), outer=st.integers(1, 70), strided=st.booleans())
@settings(max_examples=40, deadline=None)
def test_each_product_is_of_the_nearest_numbers(rows: int, inner: int, outer: int, strided: bool) -> None:
    x, w, seen = draw(0, rows, inner), draw(1, outer, inner), draw(2, rows, outer)
    if strided:
        x, seen = x.t().contiguous().t(), seen.t().contiguous().t()
    x, w = x.requires_grad_(), w.requires_grad_()
    y = linear(x[None], w, rounded=True)[0]
    grad_x, grad_w = torch.autograd.grad(y, (x, w), seen)
    x, w = x.detach(), w.detach()
    close(y.detach(), x, w.t())
    close(grad_x, seen, w)
    close(grad_w, seen.t(), x)


@pytest.mark.usefixtures("cpu_path")
@given(
    groups=st.lists(st.integers(0, 300), min_size=1, max_size=4), inner=st.integers(1, 300), outer=st.integers(1, 70)
)
@settings(max_examples=20, deadline=None)
def test_each_product_of_groups_is_of_the_nearest_numbers(groups: list[int], inner: int, outer: int) -> None:
    rows, ends = sum(groups), torch.tensor(groups).cumsum(0)
    x, w, seen = draw(0, rows, inner).requires_grad_(), draw(1, len(groups), outer, inner), draw(2, rows, outer)
    y = grouped_gemm(x, w.requires_grad_(), ends, rounded=True)
    grad_x, grad_w = torch.autograd.grad(y, (x, w), seen)
    with torch.no_grad(), kernels.use_reference():
        assert grouped_gemm(x, w, ends, rounded=True).allclose(y, rtol=1e-4, atol=1e-4)  # in range: bounds are below
    x, w = x.detach(), w.detach()
    for e, end in enumerate(ends.tolist()):
        mine = slice(end - groups[e], end)
        close(y[mine].detach(), x[mine], w[e].t())
        close(grad_x[mine], seen[mine], w[e])
        close(grad_w[e], seen[mine].t(), x[mine])


@pytest.mark.usefixtures("cpu_path")
def test_ties_go_to_even_and_what_is_no_number_stays_so() -> None:
    """1 + 2⁻⁸ lies between 1 and 1 + 2⁻⁷, 1 + 3·2⁻⁸ between that and 1 + 2⁻⁶; the largest float is beyond bfloat16's."""
    x = torch.zeros(LEAST_ROWS, 2)
    x[:6, 0] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 3.4028235e38, float("nan"), float("-inf")])
    y = linear(x, torch.tensor([[1.0, 0.0]]), rounded=True)[:6, 0]
    assert y[:4].tolist() == [1.0, 1 + 2**-6, -1.0, float("inf")]
    assert bool(y[4].isnan())
    assert y[5] == float("-inf")


def both_ways(run: Callable[..., Tensor], leaves: list[Tensor], *, rounded: bool, exact: bool) -> list[Tensor]:
    """Result and gradients; `exact` by the reference in float64."""
    leaves = [(leaf.double() if exact else leaf).clone().requires_grad_() for leaf in leaves]
    with kernels.use_reference() if exact else contextlib.nullcontext():
        out = run(*leaves, rounded=rounded)
        return [out.detach(), *torch.autograd.grad(out.square().sum() if out.ndim else out, leaves)]


def rounds(run: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    """It is the reference but for numbers so near the middle of two that float32's last bits decide: few, so that
    the distance (of all numbers, root of the squares) is a fifth at most of what rounding itself moves."""
    got, wanted, unrounded = (
        both_ways(run, leaves, rounded=rounded, exact=exact) for rounded, exact in ((1, 0), (1, 1), (0, 1))
    )
    for mine, theirs, other in zip(got, wanted, unrounded, strict=True):
        assert float((mine - theirs).norm()) < 0.2 * float((other - theirs).norm())
        assert float((mine - theirs).norm()) < 1e-3 * float(theirs.norm())


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize(("tokens", "width", "hidden"), [(61, 50, 33), (400, 96, 64)])
def test_experts(tokens: int, width: int, hidden: int) -> None:
    experts, chosen = 5, 2
    expert = draw(5, tokens, experts).topk(chosen).indices
    load = expert.flatten().bincount(minlength=experts)
    matrices = draw(2, experts, 2 * hidden, width) * width**-0.5, draw(3, experts, width, hidden) * hidden**-0.5

    def run(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *, rounded: bool) -> Tensor:
        return moe_mlp(x, expert, gate, up, down, load, rounded=rounded)

    rounds(run, [draw(0, tokens, width), draw(1, tokens, chosen), *matrices])


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize(("rows", "width", "vocab"), [(33, 45, 101), (500, 257, 700), (300, 64, 97)])
def test_head(rows: int, width: int, vocab: int) -> None:
    target = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(1))
    weight = torch.full((rows,), 1 / rows)

    def run(x: Tensor, w: Tensor, *, rounded: bool) -> Tensor:
        return linear_cross_entropy_mean(x, w, target, weight, rounded=rounded)

    leaves = [draw(0, rows, width), draw(1, vocab, width)]
    got, wanted, unrounded = (
        both_ways(run, leaves, rounded=rounded, exact=exact) for rounded, exact in ((1, 0), (1, 1), (0, 1))
    )
    assert abs(float(got[0] - wanted[0])) < 1e-5 * float(wanted[0])  # of logits whose float32 sums are a few eps off
    for mine, theirs, other in zip(got[1:], wanted[1:], unrounded[1:], strict=True):
        assert float((mine - theirs).norm()) < 0.2 * float((other - theirs).norm())
