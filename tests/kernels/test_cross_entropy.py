"""The compiled head and cross-entropy: against float64, against the path in torch, and what it does at the edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill.kernels.compiled import compiled
from gristmill.kernels.cross_entropy import linear_cross_entropy_mean, linear_log_probs
from gristmill.kernels.cross_entropy.native import SOURCE

pytestmark = pytest.mark.skipif(compiled(SOURCE) is None, reason="no compiler, or told not to compile")
EPS = torch.finfo(torch.float32).eps


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(rows: int, width: int, vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and a head whose logits have a deviation of one, targets of which some are left out, weights."""
    generator = torch.Generator().manual_seed(2)
    target = torch.randint(-1, vocab, (rows,), generator=generator)
    return draw(0, rows, width), draw(1, vocab, width) / width**0.5, target, torch.rand(rows, generator=generator)


def with_gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def both_ways(x: Tensor, w: Tensor, target: Tensor, weight: Tensor) -> list[Tensor]:
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    return with_gradients(linear_cross_entropy_mean(x, w, target, weight), x, w)


def log_probs_both_ways(x: Tensor, w: Tensor, target: Tensor, temperature: float, seen: Tensor) -> list[Tensor]:
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    out = linear_log_probs(x, w, target, temperature)
    return [out.detach(), *torch.autograd.grad(out, (x, w), seen)]


def close(got: list[Tensor], wanted: list[Tensor], terms: int) -> None:
    """A sum of `terms` products errs by at most eps a term, of its terms' size, which the largest result exceeds here;
    the logits' own rounding, moved on to the probabilities, is of the same size. Errors' signs differ: √terms."""
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.shape == theirs.shape
        if mine.numel():
            size = float(theirs.abs().max()) + EPS
            assert float((mine.double() - theirs).abs().max()) <= 16 * terms**0.5 * EPS * size


@given(
    rows=st.integers(0, 300), width=st.integers(1, 40) | st.sampled_from([256, 257, 400]), vocab=st.integers(1, 700),
    temperature=st.sampled_from([0.6, 1.0, 2.0]),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_against_float64(rows: int, width: int, vocab: int, temperature: float) -> None:
    x, w, target, weight = inputs(rows, width, vocab)
    xd, wd = x.double().requires_grad_(), w.double().requires_grad_()
    told = target.clamp_min(0)
    logp = (xd @ wd.T).log_softmax(-1).gather(1, told[:, None])[:, 0]
    wanted = with_gradients(-(logp * weight.double() * (target >= 0)).sum(), xd, wd)
    terms = rows + width + vocab
    close(both_ways(x, w, target, weight), wanted, terms)
    logp = ((xd @ wd.T) / temperature).log_softmax(-1).gather(1, told[:, None])[:, 0]
    wanted = [logp.detach(), *torch.autograd.grad(logp, (xd, wd), weight.double())]
    close(log_probs_both_ways(x, w, told, temperature, weight), wanted, terms)


def test_it_is_the_path_in_torch_to_the_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    given_ = inputs(600, 70, 1234)
    x, w, target, weight = given_
    ours = both_ways(*given_), log_probs_both_ways(x, w, target.clamp_min(0), 0.7, weight)
    monkeypatch.setattr("gristmill.kernels.compiled.TORCH_ALONE", True)
    theirs = both_ways(*given_), log_probs_both_ways(x, w, target.clamp_min(0), 0.7, weight)
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, [t.double() for t in other], 1900)


def test_two_runs_give_equal_bits() -> None:
    given_ = inputs(500, 65, 999)
    for first, second in zip(both_ways(*given_), both_ways(*given_), strict=True):
        assert first.equal(second)


def test_without_gradients_the_loss_is_the_same() -> None:
    x, w, target, weight = inputs(130, 33, 400)
    assert linear_cross_entropy_mean(x, w, target, weight).equal(both_ways(x, w, target, weight)[0])


def test_operands_and_gradients_may_lie_apart() -> None:
    x, w, target, weight = inputs(40, 12, 50)
    apart = [torch.stack((t, t), -1)[..., 0] for t in (x, w, target, weight)]
    for mine, wanted in zip(both_ways(*apart), both_ways(x, w, target, weight), strict=True):
        assert mine.equal(wanted)
    told = target.clamp_min(0)
    got = log_probs_both_ways(apart[0], apart[1], apart[2].clamp_min(0), 1.0, apart[3])
    for mine, wanted in zip(got, log_probs_both_ways(x, w, told, 1.0, weight), strict=True):
        assert mine.equal(wanted)


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(spoilt: float) -> None:
    x, w, target, weight = inputs(40, 12, 200)
    x[7, 3] = spoilt
    target = target.clamp_min(0)
    loss, grad_x, grad_w = both_ways(x, w, target, weight)
    assert loss.isnan()
    assert grad_w.isnan().all()
    assert grad_x[7].isnan().all()
    assert not grad_x[[row for row in range(40) if row != 7]].isnan().any()
    with torch.no_grad():
        assert linear_log_probs(x, w, target).isnan().nonzero().flatten().tolist() == [7]


def test_a_logit_of_minus_infinity_is_a_probability_of_none() -> None:
    x, w = torch.ones(3, 1), torch.zeros(200, 1)
    w[:150] = -torch.inf  # a whole block of the head's rows
    wanted = (x @ w.T).double().log_softmax(-1)[:, 199]
    # a logarithm of a sum of fifty ones
    torch.testing.assert_close(linear_log_probs(x, w, torch.full((3,), 199)).double(), wanted, rtol=4 * EPS, atol=0)
    assert linear_log_probs(x, w, torch.full((3,), 5)).equal(torch.full((3,), -torch.inf))


@pytest.mark.parametrize("scale", [1e-3, 80.0, 1e4])
def test_logits_of_any_size(scale: float) -> None:
    x, w = draw(3, 9, 8) * scale, draw(4, 300, 8)
    target = (x @ w.T).argmax(-1)
    got, wanted = linear_log_probs(x, w, target), (x.double() @ w.double().T).log_softmax(-1)
    # a log-probability errs as its logits do, sums of eight products as large as the largest logit
    allowed = 16 * EPS * max(1.0, float((x @ w.T).abs().max()))
    assert float((got.double() - wanted.gather(1, target[:, None])[:, 0]).abs().max()) <= allowed


def test_a_target_outside_the_vocabulary_is_refused() -> None:
    x, w, target, weight = inputs(5, 4, 10)
    target[2] = 10
    with pytest.raises(
        ValueError, match="linear_cross_entropy_mean: largest of target_T is 10; wanted less than the 10"
    ):
        linear_cross_entropy_mean(x, w, target, weight)
    with pytest.raises(ValueError, match="linear_log_probs: largest of target_T is 10"):
        linear_log_probs(x, w, target.clamp_min(0))
    target[2] = -1
    with pytest.raises(ValueError, match="linear_log_probs: least of target_T is -1; wanted a token id"):
        linear_log_probs(x, w, target)
