"""The output head's operation, number by number against float64: in float32 and bfloat16, of logits of any size, on both
paths of a CPU or on the GPU, and the Triton code under its interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill.kernels.cross_entropy import linear_cross_entropy_mean, linear_log_probs, linear_log_probs_and_entropy

INTERPRETED = os.environ.get("GRISTMILL_KERNELS") == "gpu"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
EXAMPLES = 6 if INTERPRETED else 10 if DEVICE == "cuda" else 40
ULP = 2**-24  # half a step of float32
HALF = 2**-8  # of bfloat16
SLOPE = 2 * HALF if INTERPRETED else HALF  # the interpreter cuts off
DTYPES = [torch.float32, torch.bfloat16]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def inputs(rows: int, width: int, vocab: int, dtype: torch.dtype, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and a head, whose logits have this deviation, and targets of which some are left out."""
    x, w = (draw(0, rows, width) * scale / width**0.5).to(dtype), draw(1, vocab, width).to(dtype)
    target = torch.randint(-1, vocab, (rows,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    return x.requires_grad_(), w.requires_grad_(), target


class Head:
    """The softmax of logits in float64, and how far float32's may be from it.

    A float32 logit is a sum of `width` products, each of which errs by a half step of the sum of their sizes at most.
    In bfloat16 it is torch's product rounded, and is taken from there. A sum of `vocab` exponentials errs by as many
    half steps of itself; 16 more are left for exponentials, logarithms and single operations.
    """

    def __init__(self, x: Tensor, w: Tensor, temperature: float) -> None:
        self.x, self.w, self.vocab = x.detach(), w.detach(), len(w)
        whole = self.x.dtype == torch.float32
        z = self.x.double() @ self.w.double().T if whole else (self.x @ self.w.T).double()
        size = self.x.double().abs() @ self.w.double().abs().T if whole else z.abs()
        off = ((x.shape[1] if whole else 0) + 4) * ULP * size.amax(1, keepdim=True) / temperature
        self.z, self.off, self.temperature = z / temperature, off, temperature
        self.log_total, self.log_p = self.z.logsumexp(1, keepdim=True), self.z.log_softmax(1)
        self.log_off = off + (self.vocab + 16) * ULP + ULP * self.log_total.abs()
        self.share_off = off + self.log_off  # of a probability, relative

    def at(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """−log p at the targets, and how far it may be off."""
        loss = -self.log_p.gather(1, target[:, None])
        return loss[:, 0], (self.share_off + ULP * loss)[:, 0]

    def check_gradients(self, got: tuple[Tensor, ...], target: Tensor, weight: Tensor, z_loss: float = 0.0) -> None:
        """Those of Σ weight · (−log p + z_loss · log_total²) in x and w."""
        p, weight = self.log_p.exp(), weight.double()[:, None] / self.temperature
        pull = 1 + 2 * z_loss * self.log_total
        slope = weight * (p * pull).scatter_add(1, target[:, None], torch.full_like(weight, -1.0))
        off = weight.abs() * p * (pull.abs() * self.share_off + 2 * z_loss * self.log_off) + 2 * ULP * slope.abs()
        halved = self.x.dtype == torch.bfloat16
        off += (SLOPE if halved else 0.0) * slope.abs()
        x, w = self.x.double(), self.w.double()
        for mine, by, its_off, other in ((got[0], slope, off, w), (got[1], slope.T, off.T, x)):
            wanted, terms = by @ other, by.shape[1]
            allowed = (its_off + (terms + 4) * ULP * by.abs()) @ other.abs() + 1e-30
            allowed += (HALF if halved else 0.0) * (wanted.abs() + allowed)
            assert mine.dtype == self.x.dtype
            assert bool(((mine.double() - wanted).abs() <= allowed).all())


@pytest.mark.usefixtures("cpu_path")
@given(
    rows=st.integers(1, 40), width=st.integers(1, 24), vocab=st.integers(2, 1300), dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 30.0]), z_loss=st.sampled_from([0.0, 0.0, 1e-2]),
)  # fmt: skip
@settings(max_examples=EXAMPLES, deadline=None)
def test_mean(rows: int, width: int, vocab: int, dtype: torch.dtype, scale: float, z_loss: float) -> None:
    x, w, target = inputs(rows, width, vocab, dtype, scale)
    weight = torch.rand(rows, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    loss = linear_cross_entropy_mean(x, w, target, weight, z_loss=z_loss)
    head, told, counted = Head(x, w, 1.0), target.clamp_min(0), weight.double() * (target >= 0)
    wanted, off = head.at(told)
    log_total, log_off = head.log_total[:, 0], head.log_off[:, 0]
    wanted = wanted + z_loss * log_total**2
    off = off + 2 * z_loss * log_total.abs() * log_off + (rows + 4) * ULP * wanted.abs()
    assert loss.dtype == torch.float32
    assert abs(float(loss.detach()) - float(wanted @ counted)) <= float(off @ counted) + 1e-30
    head.check_gradients(torch.autograd.grad(loss, (x, w)), told, counted, z_loss)


@pytest.mark.usefixtures("cpu_path")
@given(
    rows=st.integers(1, 40), width=st.integers(1, 24), vocab=st.integers(2, 1300), dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 30.0]), temperature=st.sampled_from([0.6, 1.0, 2.0]),
)  # fmt: skip
@settings(max_examples=EXAMPLES, deadline=None)
def test_log_probs_and_entropy(
    rows: int, width: int, vocab: int, dtype: torch.dtype, scale: float, temperature: float
) -> None:
    x, w, target = inputs(rows, width, vocab, dtype, scale)
    target, seen = target.clamp_min(0), draw(3, rows)
    log_p, entropy = linear_log_probs_and_entropy(x, w, target, temperature)
    head = Head(x, w, temperature)
    wanted, off = head.at(target)
    assert log_p.dtype == entropy.dtype == torch.float32
    assert bool(((log_p.detach().double() + wanted).abs() <= off).all())
    # Σ p · log p: of each share the relative error times its nats, which come to log V at most and may cancel those of
    # the largest logit; and eps a term
    nats = 2 + 2 * torch.tensor(float(vocab)).log().to(DEVICE)
    allowed = (head.share_off[:, 0] + (vocab + 16) * ULP) * nats
    exact = torch.special.entr(head.log_p.exp()).sum(1)
    assert bool(((entropy.double() - exact).abs() <= allowed).all())
    head.check_gradients(torch.autograd.grad(log_p, (x, w), seen), target, -seen)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_give_equal_bits(dtype: torch.dtype) -> None:
    rows = 5 if INTERPRETED else 1000  # of several chunks
    x, w, target = inputs(rows, 24, 1300, dtype, 1.0)
    weight = torch.full((rows,), 1 / rows, device=DEVICE)

    def run() -> list[Tensor]:
        loss = linear_cross_entropy_mean(x, w, target, weight, z_loss=0.01)
        both = linear_log_probs_and_entropy(x, w, target.clamp_min(0), 0.7)
        gradients = torch.autograd.grad(loss, (x, w)), torch.autograd.grad(both[0], (x, w), weight)
        return [loss, *both, *gradients[0], *gradients[1]]

    assert all(map(torch.equal, run(), run()))


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("low", [1500, 2048, 2499])
def test_rows_that_begin_with_logits_of_minus_infinity(low: int) -> None:
    """Products beyond float32's range: more than a program of the GPU's code, and a thread's block, look at at once."""
    rows, vocab = 5, 2500
    x, w = draw(0, rows, 3), draw(1, vocab, 3)
    x[:, 0], w[:, 0] = 1e20, 0.0
    w[:low, 0] = -1e20
    x, w, target = (
        x.requires_grad_(),
        w.requires_grad_(),
        torch.arange(vocab - rows, vocab, device=DEVICE).clamp_min(low),
    )
    weight = torch.full((rows,), 1 / rows, device=DEVICE)
    loss = linear_cross_entropy_mean(x, w, target, weight, z_loss=0.01)
    seen = w.detach()[low:].double(), x.detach().double()
    z = seen[1] @ seen[0].T
    log_total = z.logsumexp(1)
    exact = log_total - z.gather(1, target[:, None] - low)[:, 0]
    # Sums of at most 1,000 exponentials, and a few operations on numbers below ten
    near = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(loss.detach().double(), (exact + 0.01 * log_total**2).mean(), **near)
    log_p, entropy = linear_log_probs_and_entropy(x, w, target)
    torch.testing.assert_close(log_p.detach().double(), -exact, **near)
    torch.testing.assert_close(entropy.double(), torch.special.entr(z.softmax(1)).sum(1), **near)
    slope = z.softmax(1).scatter_add(1, target[:, None] - low, torch.full_like(exact[:, None], -1.0))
    for got, pull in (
        (torch.autograd.grad(loss, (x, w)), z.softmax(1) * 0.02 * log_total[:, None]),
        (torch.autograd.grad(log_p, (x, w), -weight), 0.0),
    ):
        by = (slope + pull) / rows
        torch.testing.assert_close(got[0][:, 1:].double(), by @ seen[0][:, 1:], **near)
        torch.testing.assert_close(got[1][low:, 1:].double(), by.T @ seen[1][:, 1:], **near)
        assert not got[0][:, 0].any()
        assert not got[1][:low].any()
        assert got[1].isfinite().all()


@pytest.mark.usefixtures("cpu_path")
def test_operands_may_lie_apart_in_bfloat16() -> None:
    """As the float32 ones do in test_cross_entropy."""
    x, w, target = inputs(40, 12, 50, torch.bfloat16, 1.0)
    apart = [torch.stack((t.detach(), t.detach()), -1)[..., 0].requires_grad_() for t in (x, w)]
    target = target.clamp_min(0)
    got, wanted = linear_log_probs(*apart, target), linear_log_probs(x, w, target)
    # A product in another order moves few logits to the next number, by a step of those near four
    torch.testing.assert_close(got, wanted, rtol=0, atol=4 * 2 * HALF)
