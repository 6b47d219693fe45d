"""The rungs of a ladder: shapes that hold at every width, and runs that follow from the recipe's own."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gristmill.model.config import ModelConfig
from gristmill.model.costs import flops_per_token, parameter_counts
from gristmill.model.ladder import SweepConfig, ladder, rung, scaled_model
from gristmill.model.training.config import PretrainConfig

VOCABULARY = 512
V3 = ModelConfig(
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    first_k_dense_replace=3,
    intermediate_size=18432,
    n_routed_experts=256,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    moe_intermediate_size=2048,
)
QWEN = ModelConfig(
    attention="gqa", hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
    first_k_dense_replace=24, intermediate_size=4864, qkv_bias=True, tie_word_embeddings=True,
)  # fmt: skip


def costs(model: ModelConfig, length: int) -> tuple[int, int]:
    return parameter_counts(model, VOCABULARY)[1], flops_per_token(model, VOCABULARY, length, mtp=True)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([ModelConfig(), V3, QWEN]),
    st.integers(1, 200).map(lambda n: 8 * n),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_every_width_is_a_model_of_the_same_kind(model: ModelConfig, width: int, depth: float) -> None:
    small = scaled_model(model, width, depth)  # ModelConfig's own checks run
    assert small.hidden_size == width
    assert small.head_width == model.head_width
    assert (small.n_routed_experts, small.num_experts_per_tok) == (model.n_routed_experts, model.num_experts_per_tok)
    assert (small.first_k_dense_replace > 0) == (model.first_k_dense_replace > 0)
    sparse = [m.num_hidden_layers - m.first_k_dense_replace > 0 for m in (small, model)]
    assert sparse[0] == sparse[1]
    if model.num_key_value_heads:
        assert small.num_key_value_heads
        assert small.num_attention_heads // small.num_key_value_heads == 7


@pytest.mark.parametrize("model", [ModelConfig(), V3, QWEN])
def test_the_recipes_own_width_is_the_recipes_own_model(model: ModelConfig) -> None:
    same = scaled_model(model, model.hidden_size)
    assert parameter_counts(same, VOCABULARY) == parameter_counts(model, VOCABULARY)


def test_tokens_follow_parameters_and_rates_follow_compute() -> None:
    recipe = PretrainConfig()
    sweep = SweepConfig(sizes=(32, 64), hold_out=128, tokens_per_parameter=(10.0,), rate_exponent=0.125)
    runs = [*ladder(recipe, sweep, costs).rungs, ladder(recipe, sweep, costs).held_out]
    spent = []
    for run in runs:
        active, flops = costs(run.model, run.sequence_length)
        tokens = run.steps * run.batch_sequences * run.sequence_length
        # Whole hundreds of sequences: at 32 a step the number of steps is a multiple of 25.
        assert abs(tokens - 10 * active) <= 25 * run.batch_sequences * run.sequence_length / 2
        assert run.steps * run.batch_sequences % 100 == 0
        spent.append(flops * 10 * active)
        assert 0 <= run.schedule.warmup_steps / run.steps - 20 / 400 < 1 / run.steps
    rates = [run.optimizer.adam_learning_rate for run in runs]
    for first, second in ((0, 1), (1, 2)):
        expected = (spent[second] / spent[first]) ** -0.125
        assert rates[second] / rates[first] == pytest.approx(expected, rel=1e-3)  # rates have four digits


def test_the_batch_follows_compute_where_it_is_asked_to() -> None:
    sweep = SweepConfig(sizes=(32, 64), hold_out=256, batch_exponent=0.3271)
    batches = [rung(PretrainConfig(), sweep, width, 20.0, costs).batch_sequences for width in (32, 64, 256)]
    assert batches == sorted(set(batches))


def test_steps_in_place_of_tokens_are_taken_as_they_are() -> None:
    found = ladder(PretrainConfig(), SweepConfig(sizes=(16, 32), hold_out=64, steps=(7, 11)), costs)
    assert [r.steps for r in found.rungs] == [7, 7]
    assert [r.steps for r in found.further] == [11, 11]
    assert found.held_out.steps == 7


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"sizes": [32]}, "at least 2"),
        ({"sizes": [32, 36]}, "multiples of 8"),
        ({"sizes": [64, 32]}, "do not rise"),
        ({"sizes": [32, 64], "hold_out": 64}, "hold_out 64 is not larger than the largest rung 64"),
        ({"tokens_per_parameter": [2.0, 2.0]}, "each once"),
        ({"tokens_per_parameter": [float("inf")]}, "positive numbers"),
        ({"steps": [0]}, "positive numbers"),
    ],
)
def test_a_ladder_that_cannot_be_is_refused(asked: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        SweepConfig.model_validate(asked)
