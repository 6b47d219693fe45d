"""Losses that jump or are no number: judged, left out, rolled back, and told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gristmill.model.stage_types import silent
from gristmill.model.training.config import OptimizerConfig, ScheduleConfig, SpikeConfig
from gristmill.model.training.loop import Training, train
from gristmill.model.training.models import load_model
from gristmill.model.training.spikes import LEAST, Spikes
from gristmill.model.transformer import Transformer
from tests.model.windows import MODEL, VOCAB, Windows

STEPS = 40
pytestmark = pytest.mark.usefixtures("one_rank")


def run(out: Path, spoilt: dict[int, float], **how: Any) -> tuple[list[dict], list[dict]]:
    (out / "log").mkdir(parents=True, exist_ok=True)
    model = Transformer(MODEL, VOCAB)
    model.initialise(0)
    asked = Training(
        steps=STEPS,
        batch_sequences=4,
        optimizer=OptimizerConfig(muon_learning_rate=0.0, adam_learning_rate=1e-2),
        schedule=ScheduleConfig(warmup_steps=2, decay_fraction=0.0),
        checkpoint_every=8,
        spikes=SpikeConfig(threshold=4.0, **how),
    )
    history = train(model, Windows(spoilt), asked, out, silent)
    return history.curves, history.spikes


def test_the_score_is_robust() -> None:
    rows = [{"main_loss": 2.0 + 0.01 * (i % 5)} for i in range(64)]
    spikes = Spikes(SpikeConfig(), rows)
    spread = 1.4826 * 0.01  # the median deviation of 0, 1, 2, 3, 4 hundredths is one hundredth
    assert spikes.score(2.02 + 5 * spread) == pytest.approx(5, rel=1e-6)
    rows[3] = {"main_loss": 1e6}  # one wild loss in the window moves nothing much
    assert Spikes(SpikeConfig(), rows).score(2.02 + 5 * spread) == pytest.approx(5, rel=0.2)
    assert Spikes(SpikeConfig(), rows[: LEAST - 1]).score(1e9) == 0
    flat = Spikes(SpikeConfig(), [{"main_loss": 2.0}] * 20)
    assert flat.score(2.002) == pytest.approx(1)


def weights(out: Path) -> list[torch.Tensor]:
    return list(load_model(out / "model", torch.device("cpu")).state_dict().values())


def test_a_batch_that_spoils_the_loss_is_left_out(tmp_path: Path) -> None:
    """Whatever spoils it, weights, moments and biases stay to the bit, and so does what comes of them."""
    left: list[list[torch.Tensor]] = []
    for name, wrong in (("nan", math.nan), ("inf", math.inf), ("jump", 1.0)):
        curves, spikes = run(tmp_path / name, {30: wrong})
        (told,) = spikes
        assert (told["step"], told["documents"], told["policy"]) == (30, ["document 30"], "skip")
        assert told["why"] == ("spike" if name == "jump" else "loss")
        assert told["score"] is None or told["score"] > 4
        assert [row["step"] for row in curves] == list(range(STEPS))
        assert [row["step"] for row in curves if "spike" in row] == [30]
        json.dumps([curves, spikes], allow_nan=False)
        left.append(weights(tmp_path / name))
    assert all(torch.equal(a, b) for other in left[1:] for a, b in zip(other, left[0], strict=True))
    run(tmp_path / "undisturbed", {})
    assert not all(torch.equal(a, b) for a, b in zip(weights(tmp_path / "undisturbed"), left[0], strict=True))


def test_rolled_back_it_goes_on_with_the_data_behind(tmp_path: Path) -> None:
    curves, spikes = run(tmp_path, {30: 1.0}, policy="rollback")
    assert spikes[0]["weights_of_step"] == 24
    assert [row["step"] for row in curves] == list(range(STEPS))
    # To the bit what comes of leaving out everything from step 24 to step 30.
    run(tmp_path / "left-out", {step: math.nan for step in range(24, 31)})
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path), weights(tmp_path / "left-out"), strict=True))


def test_it_ends_by_policy_or_when_it_happens_too_often(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"at step 20 \("):
        run(tmp_path / "stop", {20: math.nan}, policy="stop")
    with pytest.raises(FloatingPointError, match=r"at step 26 \(the 3th time, and spikes.at_most allows 2\)"):
        run(tmp_path / "often", {20: math.nan, 23: 1.0, 26: math.nan}, at_most=2)
    with pytest.raises(FloatingPointError, match="there is no checkpoint to roll back to yet"):
        run(tmp_path / "early", {3: math.nan}, policy="rollback")


def test_a_resumed_run_judges_alike(tmp_path: Path) -> None:
    """Its window comes from the curves that the checkpoint holds, those of steps left out among them."""
    straight = run(tmp_path / "straight", {18: math.nan, 30: 1.0})
    out = tmp_path / "out"
    with pytest.raises(FloatingPointError):
        run(out, {18: math.nan, 30: 1.0, 33: math.nan, 34: math.nan}, at_most=3)
    assert run(out, {18: math.nan, 30: 1.0}) == straight
