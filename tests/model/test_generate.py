"""Sampling: seeded by the sample, with the model's distribution, and blind to its batch mates."""

from __future__ import annotations

import pytest
import torch

from gristmill.model.config import ModelConfig
from gristmill.model.generate import Sampling, sample, thought_tokens
from gristmill.model.sampling import choose, uniform
from gristmill.model.transformer import Batch, Transformer


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(ModelConfig(initializer_range=0.1), 40)
    model.initialise(0)
    return model.eval()


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_uniforms_are_uniform_and_repeatable() -> None:
    seeds = torch.arange(20_000)
    u = uniform(seeds, 3)
    assert torch.equal(u, uniform(seeds, 3))
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    counts = torch.histc(u, 20, 0, 1)
    assert chi_square(counts, torch.full((20,), 1000.0)) < 50.8  # 19 degrees of freedom: exceeded once in 10,000
    assert not torch.equal(u, uniform(seeds, 4))


def test_choice_follows_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20_000, 4)
    token, log_p = choose(
        logits, Sampling(1, temperature=0.7), torch.arange(20_000), torch.zeros(20_000, dtype=torch.long)
    )
    p = (logits[0] / 0.7).softmax(-1)
    assert chi_square(torch.bincount(token, minlength=4), p * 20_000) < 21.1  # 3 degrees: once in 10,000
    torch.testing.assert_close(log_p, p.log()[token])


def test_top_p_leaves_out_the_tail() -> None:
    logits = torch.tensor([[3.0, 2.0, 0.0, -1.0]]).expand(5000, 4)
    token, _ = choose(logits, Sampling(1, top_p=0.9), torch.arange(5000), torch.zeros(5000, dtype=torch.long))
    assert set(token.tolist()) == {0, 1}  # 0.70 + 0.26 reach 0.9


def test_samples_do_not_depend_on_batch_mates(model: Transformer) -> None:
    prompts = [[0, 3, 9, 4], [0, 3, 11, 12, 13, 4], [0, 5]]
    together = sample(model, prompts, [1, 2, 3, 4, 5, 6], Sampling(12), eos=1, pad=2, copies=2)
    alone = sample(model, [prompts[1]], [3, 4], Sampling(12), eos=1, pad=2, copies=2)
    assert [s.tokens for s in together[2:4]] == [s.tokens for s in alone]
    assert together[2].tokens != together[3].tokens


def test_log_probabilities_are_those_of_the_full_forward(model: Transformer) -> None:
    prompt = [0, 3, 9, 10, 4]
    for s in sample(model, [prompt], [7, 8, 9], Sampling(10, temperature=0.8), eos=1, pad=2, copies=3):
        tokens = torch.tensor([prompt + s.tokens])
        logits = model(Batch(tokens, torch.arange(tokens.shape[1])[None]))
        log_p = (logits[0, len(prompt) - 1 : -1] / 0.8).log_softmax(-1)
        expected = log_p.gather(1, torch.tensor(s.tokens)[:, None])[:, 0]
        # float32; the absorbed form sums in another order than the full forward does
        torch.testing.assert_close(torch.tensor(s.log_probs), expected, rtol=2e-4, atol=2e-4)
        assert s.ended == (s.tokens[-1] == 1)


def test_a_response_past_the_position_limit_is_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match="position limit 512"):
        sample(model, [[0] * 500], [1], Sampling(20), eos=1, pad=2)


def test_thought_length() -> None:
    assert thought_tokens([8, 9, 6, 7], 6) == 2
    assert thought_tokens([8, 9], 6) == 2
