"""Speculative decoding: the same greedy tokens, the same distribution, and no draft but from the MTP module."""

from __future__ import annotations

from copy import deepcopy
from itertools import product

import pytest
import torch

from gristmill.kernels import report
from gristmill.kernels.decoder_layers import runs
from gristmill.model import decoding
from gristmill.model.config import ModelConfig
from gristmill.model.generate import Sampling, sample
from gristmill.model.sampling import probabilities
from gristmill.model.speculative import speculate
from gristmill.model.transformer import Batch, Transformer

VOCAB, EOS, PAD = 12, 1, 2
PROMPTS = [[0, 3, 9, 4], [0, 3, 11, 8, 7, 4], [0, 5]]


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(ModelConfig(initializer_range=0.15, num_nextn_predict_layers=1), VOCAB)
    model.initialise(0)
    return model.eval()


@pytest.fixture(scope="module")
def agreeing() -> Transformer:
    """A model whose drafts are often taken: without blocks, and with a module that passes its token on."""
    model = Transformer(ModelConfig(initializer_range=0.15, num_nextn_predict_layers=1), VOCAB)
    model.initialise(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        module = model.mtp[0]
        width = model.config.hidden_size
        module.eh_proj.weight.zero_()
        module.eh_proj.weight[:, :width] = torch.eye(width)
    return model.eval()


@pytest.fixture(scope="module")
def nearly_agreeing(agreeing: Transformer) -> Transformer:
    model = deepcopy(agreeing)
    weight = model.mtp[0].eh_proj.weight
    with torch.no_grad():
        weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)) / len(weight) ** 0.5
    return model


@pytest.mark.parametrize("which", ["model", "agreeing"])
def test_greedy_tokens_are_those_without_drafts(which: str, request) -> None:
    model = request.getfixturevalue(which)
    greedy = Sampling(24, temperature=0)
    plain = sample(model, PROMPTS, [0, 0, 0], greedy, eos=EOS, pad=PAD)
    drafted, found = speculate(model, PROMPTS, [0, 0, 0], greedy, eos=EOS, pad=PAD)
    assert [s.tokens for s in drafted] == [s.tokens for s in plain]
    assert [s.ended for s in drafted] == [s.ended for s in plain]
    for mine, theirs in zip(drafted, plain, strict=True):
        assert mine.log_probs == pytest.approx(theirs.log_probs, abs=1e-4)  # float32, two tokens in one product
    assert found.drafted > 0
    assert (found.accepted == found.drafted) == (which == "agreeing")


def test_a_token_in_one_call_has_the_same_bits_with_a_draft_behind_it(agreeing: Transformer) -> None:
    """Compiled, all layers at once give a token what they give it alone."""
    if not runs(torch.zeros(1), 1):
        pytest.skip("there is no C++ compiler")
    before = report()["decoder_layers"]["compiled"]
    greedy = Sampling(24, temperature=0)
    plain = sample(agreeing, PROMPTS, [0, 0, 0], greedy, eos=-1, pad=PAD)
    drafted, found = speculate(agreeing, PROMPTS, [0, 0, 0], greedy, eos=-1, pad=PAD)
    assert [s.tokens for s in drafted] == [s.tokens for s in plain]
    behind = slice(1, None)  # the first token's logits are the prompt's, which is read another way
    assert [s.log_probs[behind] for s in drafted] == [s.log_probs[behind] for s in plain]
    calls = 1 + 24 + 2 * (1 + 12)  # prompts and steps without drafts; with them, as many calls of the module
    assert report()["decoder_layers"]["compiled"] - before == calls
    assert found.rate == 1


def test_operation_by_operation_the_tokens_are_the_same(
    nearly_agreeing: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (nearly_agreeing, PROMPTS, [5, 6, 7], Sampling(20, temperature=0.9))
    made, found = speculate(*given, eos=EOS, pad=PAD)
    monkeypatch.setattr("gristmill.kernels.compiled.TORCH_ALONE", True)
    plain, again = speculate(*given, eos=EOS, pad=PAD)
    assert [s.tokens for s in made] == [s.tokens for s in plain]
    assert found == again


@pytest.mark.parametrize("which", ["model", "nearly_agreeing"])
@pytest.mark.parametrize("sampling", [Sampling(3, temperature=0.8), Sampling(3, temperature=1.2, top_p=0.8, top_k=6)])
def test_sampled_tokens_have_the_models_distribution(which: str, sampling: Sampling, request) -> None:
    """Against the exact distribution of the third token, and of the second with the third, over all twelve tokens."""
    model, prompt, draws = request.getfixturevalue(which), PROMPTS[0], 8000
    found, rate = speculate(model, [prompt] * draws, list(range(draws)), sampling, eos=-1, pad=PAD)
    assert 0.05 < rate.rate < 0.95
    pairs = torch.tensor(list(product(range(VOCAB), range(VOCAB))))
    rows = torch.cat((torch.tensor([prompt]).expand(len(pairs), -1), pairs), 1)
    with torch.no_grad():
        logits = model(Batch(rows, torch.arange(rows.shape[1]).expand_as(rows)))
    first, second, third = (probabilities(logits[:, k], sampling) for k in (-3, -2, -1))
    p_pair = first.gather(1, pairs[:, :1])[:, 0] * second.gather(1, pairs[:, 1:])[:, 0]
    joint = (p_pair[:, None] * third).view(VOCAB, VOCAB, VOCAB).sum(0).double() * draws  # of the second and the third
    tokens = torch.tensor([s.tokens for s in found])
    counts = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    counts.index_put_((tokens[:, 1], tokens[:, 2]), torch.ones(draws, dtype=torch.float64), accumulate=True)
    assert counts[joint < 1e-6].sum() == 0  # nothing that is left out
    often = joint >= 5
    statistic = float(((counts - joint) ** 2 / joint)[often].sum())
    freedom = int(often.sum()) - 1
    # Wilson and Hilferty's cube root: normal, and 3.7 of its deviations are passed once in 10,000
    deviations = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert deviations < 3.7
    assert freedom > 20


def test_a_sample_does_not_depend_on_its_batch_mates(model: Transformer) -> None:
    sampling = Sampling(20, temperature=0.9, min_p=0.05)
    together, _ = speculate(model, PROMPTS, [5, 6, 7], sampling, eos=EOS, pad=PAD)
    for prompt, seed, expected in zip(PROMPTS, (5, 6, 7), together, strict=True):
        (alone,), _ = speculate(model, [prompt], [seed], sampling, eos=EOS, pad=PAD)
        assert alone.tokens == expected.tokens
    assert len({len(s.tokens) for s in together}) > 1  # so that the batch was made smaller on the way


def test_prompts_that_are_read_in_portions_give_the_same(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(12, temperature=0.9)
    whole, found = speculate(model, PROMPTS, [5, 6, 7], sampling, eos=EOS, pad=PAD)
    monkeypatch.setattr(decoding, "PROMPT_SCORES", 3 * 18 * 4 * 2)  # two positions of three slots
    parts, again = speculate(model, PROMPTS, [5, 6, 7], sampling, eos=EOS, pad=PAD)
    assert [s.tokens for s in parts] == [s.tokens for s in whole]
    assert again == found


def test_a_model_without_the_module_is_refused() -> None:
    model = Transformer(ModelConfig(num_nextn_predict_layers=0), VOCAB)
    with pytest.raises(ValueError, match="no MTP module"):
        speculate(model, PROMPTS, [0, 0, 0], Sampling(4), eos=EOS, pad=PAD)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"min_p": 1.0}])
def test_samplings_that_make_no_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="wanted a temperature of 0 or more"):
        Sampling(4, **wrong)
