"""A batch that grows: its sizes over the steps, and that every position is read once and in order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gristmill.flows.errors import UsageError
from gristmill.flows.recipe import load_recipe
from gristmill.model.batch_sizes import BatchSizes
from gristmill.model.training.config import BatchRampConfig, PretrainConfig

RAMP = {"start_sequences": 2, "increment": 2, "tokens": 32 * 30}


@given(
    start=st.integers(1, 40),
    increment=st.integers(1, 20),
    parts=st.integers(1, 8),
    tokens=st.integers(1, 50_000),
    length=st.sampled_from([8, 32, 128]),
)
def test_sizes_are_those_of_counting_step_by_step(
    start: int, increment: int, parts: int, tokens: int, length: int
) -> None:
    """The rule said another way: a step's batch has grown once for each part of the tokens that was read before it."""
    full = start + parts * increment
    sizes = BatchSizes(full, length, BatchRampConfig(start_sequences=start, increment=increment, tokens=tokens))
    read = step = 0
    while read * length < 2 * tokens and step < 400:
        grown = min(parts, read * length * parts // tokens)
        assert sizes.first_position(step) == read
        assert sizes.sequences(step) == start + grown * increment
        assert sizes.step_of(read) == sizes.step_of(read + sizes.sequences(step) - 1) == step
        read += sizes.sequences(step)
        step += 1


def test_without_a_ramp_positions_are_multiples_of_the_batch() -> None:
    sizes = BatchSizes(16, 128, None)
    assert [sizes.first_position(step) for step in (0, 1, 30)] == [0, 16, 480]
    assert sizes.sequences(30) == 16
    assert sizes.step_of(479) == 29
    assert PretrainConfig().sequences == 400 * 32


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"start_sequences": 8}, "start_sequences 8 is not below batch_sequences 8"),
        ({"increment": 4}, "increment 4 does not divide the 6 sequences between start_sequences 2"),
        ({"tokens": 10**6}, r"batch_ramp.tokens 1000000 take \d+ steps of growing batches, and the run has 40"),
    ],
)
def test_a_ramp_that_does_not_fit_is_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        PretrainConfig.model_validate(
            {"steps": 40, "sequence_length": 32, "batch_sequences": 8, "batch_ramp": {**RAMP, **changed}}
        )


def test_a_recipe_mixes_what_the_ramp_reads_and_asks_that_ranks_share_every_batch() -> None:
    given_ramp = ["start_sequences=2", "increment=2", "tokens=7680"]
    settings = [f"pretrain.batch_ramp.{s}" for s in given_ramp] + ["pretrain.batch_sequences=8", "pretrain.steps=40"]
    recipe = load_recipe("tiny", settings)
    # 60 sequences in three parts: 10 steps of 2 read 20, 5 of 4 read 40, 4 of 6 read 64, and 21 of 8 the rest.
    assert recipe.mixing.sequences == 20 + 20 + 24 + 21 * 8
    load_recipe("tiny", [*settings, "execution.ranks=2"])
    with pytest.raises(UsageError, match=r"a batch of 2 sequences \(from step 0 on\) does not divide among 4 ranks"):
        load_recipe("tiny", [*settings, "execution.ranks=4"])
