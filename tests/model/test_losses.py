"""GRPO against an independent computation in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.model.rl.config import RewardConfig
from gristmill.model.rl.losses import group_advantages, kl_estimate, policy_loss
from gristmill.model.rl.rewards import (
    judge,
    language_consistency,
    reference_answer,
    same_answer,
    split_response,
)


def grpo_by_hand(logits, old, reference, chosen, outputs, advantages, low, high, beta):
    """Equation 3 of DeepSeekMath, one token after the other, with its gradient by the chain rule on the softmax."""
    loss, gradient = 0.0, np.zeros_like(logits)
    for o, places in enumerate(outputs):
        for t in places:
            p = np.exp(logits[t] - logits[t].max())
            p /= p.sum()
            log_p = math.log(p[chosen[t]])
            ratio = math.exp(log_p - old[t])
            advantage = advantages[o]
            clipped = min(max(ratio, 1 - low), 1 + high)
            share = 1 / (len(outputs) * len(places))
            taken = min(ratio * advantage, clipped * advantage)
            slope = ratio * advantage if taken == ratio * advantage else 0.0
            away = reference[t] - log_p
            loss -= share * (taken - beta * (math.exp(away) - away - 1))
            slope -= beta * (1 - math.exp(away))
            onehot = np.zeros(logits.shape[1])
            onehot[chosen[t]] = 1
            gradient[t] -= share * slope * (onehot - p)
    return loss, gradient


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_loss_and_gradient_match_the_equations(beta: float) -> None:
    rng = np.random.default_rng(0)
    lengths = [3, 5, 1, 4]
    count = sum(lengths)
    ends = np.cumsum(lengths)
    outputs = [list(range(e - n, e)) for e, n in zip(ends, lengths, strict=True)]
    logits, chosen = rng.normal(size=(count, 7)), rng.integers(0, 7, count)
    exact = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    log_p = exact.log_softmax(-1).gather(1, torch.tensor(chosen)[:, None])[:, 0]
    old = log_p.detach().numpy() + rng.normal(0, 0.4, count)  # ratios on both sides of the clip
    reference = log_p.detach().numpy() + rng.normal(0, 0.4, count)
    advantages = np.array([1.3, -0.7, 0.2, -1.1])
    row = np.repeat(np.arange(4), lengths)
    part = policy_loss(
        log_p,
        torch.tensor(old),
        torch.tensor(advantages[row]),
        torch.tensor(1 / (4 * np.array(lengths)[row])),
        clip_low=0.2,
        clip_high=0.28,
        reference_log_p_N=torch.tensor(reference),
        kl_weight=beta,
    )
    part.loss.backward()
    loss, gradient = grpo_by_hand(logits, old, reference, chosen, outputs, advantages, 0.2, 0.28, beta)
    assert math.isclose(float(part.loss.detach()), loss, rel_tol=1e-12)
    assert exact.grad is not None
    np.testing.assert_allclose(exact.grad.numpy(), gradient, rtol=1e-10, atol=1e-13)
    assert 0 < float(part.clip_fraction) < 1


@given(st.lists(st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.1]), min_size=4, max_size=4), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_advantages(rewards: list[list[float]]) -> None:
    advantage = group_advantages(torch.tensor(rewards, dtype=torch.float64))
    for row, given_row in zip(advantage, rewards, strict=True):
        if len(set(given_row)) == 1:
            assert row.tolist() == [0.0] * 4  # exactly: a group without spread teaches nothing
        else:
            assert abs(float(row.mean())) < 1e-9
            assert abs(float(row.std(correction=0)) - 1) < 1e-6


def test_kl_estimate_is_never_negative_and_unbiased() -> None:
    p = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    q = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    each = kl_estimate(p.log(), q.log())
    assert (each >= 0).all()
    assert math.isclose(float((p * each).sum()), float((p * (p / q).log()).sum()), rel_tol=1e-12)


@pytest.mark.parametrize(
    ("text", "ended", "accuracy", "form"),
    [
        ("7+5=12\n</think>\n12", True, 1.0, 1.0),
        ("\n</think>\n12", True, 1.0, 1.0),
        ("7+5=12\n</think>\n12", False, 0.0, 0.0),
        ("7+5=12\n</think>\n13", True, 0.0, 1.0),
        ("7+5=12\n</think>\n12 </think> 12", True, 0.0, 0.0),
        ("7+5=12\n12", True, 0.0, 0.0),
        ("7+5=12\n</think>\n", True, 0.0, 0.0),
        ("7+5=12\n</think>\n1,2", True, 1.0, 1.0),
        ("x\n</think>\nthe answer may be 12 or 13", True, 0.0, 1.0),
    ],
)
def test_rewards(text: str, ended: bool, accuracy: float, form: float) -> None:
    judged = judge(text, ended, "7+5=?", "12", RewardConfig(accuracy=1.0, format=0.1, language=0.0))
    assert (judged.accuracy, judged.format) == (accuracy, form)
    assert math.isclose(judged.reward, accuracy + 0.1 * form)


def test_answers_are_compared_as_numbers_and_never_run() -> None:
    assert reference_answer("1+1=2\n#### 2") == "2"
    assert same_answer("1,000.0", "1000")
    assert not same_answer("__import__('os').getcwd()", "12")
    assert not same_answer("10+2", "12")
    assert split_response("a</think>b</think>c") is None


def test_language_consistency_counts_words_of_another_script() -> None:
    assert language_consistency("first add then take", "How many pens?") == 1.0
    assert language_consistency("7+5=12", "How many pens?") == 1.0
    assert language_consistency("first сложим then вычтем", "How many pens?") == 0.5
