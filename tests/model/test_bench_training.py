"""The benches that train do so: a step or two of each, in this process, so that a change of the engine's is noticed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from gristmill.data.mix import MixConfig, mix
from gristmill.data.stage_types import silent
from gristmill.flows.recipe import load_recipe
from gristmill.model.training.config import OptimizerConfig
from tests.model.benches import bench

pytestmark = pytest.mark.usefixtures("one_rank")


def test_growth_measures_steps() -> None:
    growth = bench("growth")
    seconds = growth.measure(growth.Side(experts=4, length=16, sequences=2), steps=2)
    assert {part: len(taken) for part, taken in seconds.items()} == {"accumulate": 2, "update": 2}
    assert all(second > 0 for taken in seconds.values() for second in taken)


def test_balance_counts_every_row(lesson_tokens: Path, tmp_path: Path) -> None:
    recipe = load_recipe("smoke")
    config = recipe.pretrain
    asked = MixConfig(sequence_length=config.sequence_length, sequences=config.sequences)
    mix(asked, lesson_tokens, tmp_path, 0, workers=0, progress=silent)
    balance = bench("balance")
    found = balance.loads(recipe, lesson_tokens, tmp_path, steps=2)
    assert found.shape == (2, len(balance.layer_names(config.model)), config.model.n_routed_experts)
    rows = config.batch_sequences * config.sequence_length * config.model.num_experts_per_tok
    assert (found.sum(-1) == rows).all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "fp8"])
def test_precision_has_a_loss_and_a_time_of_each_step(precision: str) -> None:
    losses, seconds = bench("precision").run(precision, 2, 0, "cpu")
    assert len(losses) == len(seconds) == 2
    assert losses[0] == pytest.approx(math.log(256), rel=0.05)  # of nearly even chances: the initial weights are small


def test_optimizers_evaluate_the_last_step() -> None:
    (row,) = bench("optimizers").trained(OptimizerConfig(), seed=0, steps=2)
    assert row["step"] == 2
    assert row["seconds"] > 0
    assert row["loss"] == pytest.approx(math.log(256), rel=0.1)
