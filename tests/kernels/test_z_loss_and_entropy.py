"""What the head's operation adds to a loss (z-loss) and tells beside log-probabilities (entropy), on every path."""

from __future__ import annotations

import math
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill import kernels
from gristmill.kernels.cross_entropy import (
    linear_cross_entropy_mean,
    linear_log_probs,
    linear_log_probs_and_entropy,
)
from gristmill.kernels.dispatch import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
TRITON = INTERPRETED or DEVICE == "cuda"
EPS = torch.finfo(torch.float32).eps
EXAMPLES = 4 if INTERPRETED else 10


def inputs(rows: int, width: int, vocab: int, scale: float = 1.0) -> tuple[Tensor, ...]:
    """Hidden states and a head whose logits have this deviation, targets of which some are left out, weights."""
    generator = torch.Generator().manual_seed(rows + width + vocab)
    x = torch.randn(rows, width, generator=generator) * scale
    w = torch.randn(vocab, width, generator=generator) / width**0.5
    target, weight = torch.randint(-1, vocab, (rows,), generator=generator), torch.rand(rows, generator=generator)
    return tuple(t.to(DEVICE) for t in (x, w, target, weight))


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("reference", [False, True])
@given(rows=st.integers(0, 130), vocab=st.integers(1, 500), z_loss=st.sampled_from([1e-4, 0.01, 0.5]))
@settings(max_examples=EXAMPLES, deadline=None)
def test_z_loss_against_float64(rows: int, vocab: int, z_loss: float, reference: bool) -> None:
    x, w, target, weight = inputs(rows, 24, vocab)
    xd, wd = x.double().requires_grad_(), w.double().requires_grad_()
    logits, told = xd @ wd.T, target.clamp_min(0)
    lost = torch.nn.functional.cross_entropy(logits, told, reduction="none") + z_loss * logits.logsumexp(-1) ** 2
    wanted = gradients((lost * weight.double() * (target >= 0)).sum(), xd, wd)
    x, w = x.requires_grad_(), w.requires_grad_()
    with kernels.use_reference() if reference else nullcontext():
        got = gradients(linear_cross_entropy_mean(x, w, target, weight, z_loss=z_loss), x, w)
        with torch.no_grad():
            plain = linear_cross_entropy_mean(x, w, target, weight, z_loss=z_loss)
    # A sum of so many terms errs by eps a term of the largest result's size, in signs that differ: √terms; z's slope,
    # 1 + 2 · z_loss · log Σ exp, multiplies what the logits' own rounding does to the probabilities.
    # Where a probability is nearly one, its slope is the small difference of terms as large as the row's weight.
    allowed = 16 * (rows + 24 + vocab) ** 0.5 * EPS * (1 + 2 * z_loss * 10)
    term = float(max(x.detach().abs().max(), w.detach().abs().max()) * weight.max()) if rows else 0.0
    for mine, exact in zip(got, wanted, strict=True):
        if mine.numel():
            assert float((mine.double() - exact).abs().max()) <= allowed * max(float(exact.abs().max()), term)
    torch.testing.assert_close(plain, got[0], rtol=4 * EPS * max(1, rows), atol=0)  # in another order, maybe


@pytest.mark.skipif(TRITON, reason="C++ is given addresses and numbers by their kind")
def test_a_whole_number_is_a_z_loss_as_well() -> None:
    """In a process of its own, in which the first call settles what kinds of arguments there are."""
    script = (
        "import torch; from gristmill.kernels.cross_entropy import linear_cross_entropy_mean as loss;"
        "x, w, t, s = torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2).long(), torch.ones(2);"
        "assert loss(x, w, t, s, z_loss=1).equal(loss(x, w, t, s, z_loss=1.0));"
        "print(float(loss(x, w, t, s, z_loss=0)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) == pytest.approx(2 * math.log(4), rel=1e-6)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("reference", [False, True])
@given(
    rows=st.integers(0, 130), vocab=st.integers(1, 500), scale=st.sampled_from([0.0, 1.0, 30.0]),
    temperature=st.sampled_from([0.6, 1.0, 2.0]),
)  # fmt: skip
@settings(max_examples=EXAMPLES, deadline=None)
def test_entropy_against_float64(rows: int, vocab: int, scale: float, temperature: float, reference: bool) -> None:
    x, w, target, _ = inputs(rows, 24, vocab, scale)
    target = target.clamp_min(0)
    log_p = ((x.double() @ w.double().T) / temperature).log_softmax(-1)
    wanted = torch.special.entr(log_p.exp()).sum(-1)
    with kernels.use_reference() if reference else nullcontext():
        log_p_T, entropy_T = linear_log_probs_and_entropy(x, w, target, temperature)
        assert log_p_T.equal(linear_log_probs(x, w, target, temperature))
    assert entropy_T.shape == (rows,)
    assert entropy_T.dtype == torch.float32
    # A logit errs by a sum of 24 products, as large as the largest logit; the entropy moves by that times a
    # probability's distance from it in nats, log V or so at most, and by eps a term of its own sum.
    logits = float((x @ w.T).abs().max()) / temperature if rows else 0.0
    allowed = EPS * (24**0.5 * max(1.0, logits) * (2 + torch.tensor(float(vocab)).log()) + 4 * vocab**0.5)
    if rows:
        assert float((entropy_T.double() - wanted).abs().max()) <= float(allowed)


@pytest.mark.usefixtures("cpu_path")
def test_the_entropy_has_no_gradient_and_the_log_probabilities_have() -> None:
    x, w, target, _ = inputs(9, 24, 50)
    log_p_T, entropy_T = linear_log_probs_and_entropy(x.requires_grad_(), w, target.clamp_min(0))
    assert not entropy_T.requires_grad
    (both,) = torch.autograd.grad(log_p_T.sum(), x)
    (alone,) = torch.autograd.grad(linear_log_probs(x, w, target.clamp_min(0)).sum(), x)
    assert both.equal(alone)


@pytest.mark.usefixtures("cpu_path")
def test_of_edges() -> None:
    """Even logits have log V, a certain one none; logits of minus infinity count nothing, what is no number does."""
    x, w = torch.ones(4, 1, device=DEVICE), torch.zeros(200, 1, device=DEVICE)
    target = torch.full((4,), 199, device=DEVICE)
    even = linear_log_probs_and_entropy(x, w, target)[1]
    torch.testing.assert_close(even, torch.full_like(even, 200.0).log(), rtol=8 * EPS, atol=0)
    w[:150] = -torch.inf
    some = linear_log_probs_and_entropy(x, w, target)[1]
    torch.testing.assert_close(some, torch.full_like(some, 50.0).log(), rtol=8 * EPS, atol=0)
    w[:199] = -torch.inf
    assert linear_log_probs_and_entropy(x, w, target)[1].abs().max() == 0
    x[2] = torch.nan
    assert linear_log_probs_and_entropy(x, w, target)[1].isnan().tolist() == [False, False, True, False]


def test_a_negative_z_loss_is_refused() -> None:
    x, w, target, weight = inputs(3, 4, 5)
    with pytest.raises(ValueError, match=r"linear_cross_entropy_mean: z_loss is -0\.1; wanted 0 or more"):
        linear_cross_entropy_mean(x, w, target, weight, z_loss=-0.1)
