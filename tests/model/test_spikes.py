"""Losses that jump or are no number: judged, left out, rolled back, and told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gristmill.model.stage_types import silent
from gristmill.model.training.batches import TrainingBatch
from gristmill.model.training.config import OptimizerConfig, ScheduleConfig, SpikeConfig
from gristmill.model.training.loop import Training, train
from gristmill.model.training.models import load_model
from gristmill.model.training.spikes import LEAST, Spikes
from gristmill.model.transformer import Transformer
from tests.model.windows import MODEL, VOCAB, Windows

STEPS = 40
pytestmark = pytest.mark.usefixtures("one_rank")


class Overflowing(Windows):
    """Windows whose loss is as ever while a gradient of the head's is no number at some steps."""

    def __init__(self, model: Transformer, wrong: dict[int, float]) -> None:
        super().__init__({})
        self.wrong, self.at = wrong, 0
        model.lm_head.weight.register_hook(self._spoil)

    def step(self, step: int, rank: int, ranks: int) -> TrainingBatch:
        self.at = step
        return super().step(step, rank, ranks)

    def _spoil(self, gradient_VD: torch.Tensor) -> torch.Tensor:
        spoilt_VD = gradient_VD.clone()
        spoilt_VD[0, 0] = self.wrong.get(self.at, float(spoilt_VD[0, 0]))
        return spoilt_VD


def run(
    out: Path, spoilt: dict[int, float], gradient: dict[int, float] | None = None, **how: Any
) -> tuple[list[dict], list[dict]]:
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
    batches = Overflowing(model, gradient) if gradient else Windows(spoilt)
    history = train(model, batches, asked, out, silent)
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


def test_a_gradient_that_is_no_number_is_left_out_although_its_loss_is_one(tmp_path: Path) -> None:
    """To the bit as a batch whose loss is none."""
    run(tmp_path / "loss", {30: math.nan})
    for name, wrong in (("nan", math.nan), ("inf", -math.inf)):
        curves, (told,) = run(tmp_path / name, {}, {30: wrong})
        assert (told["step"], told["why"], told["score"]) == (30, "gradient", None)
        assert (told["documents"], told["policy"], told["grad_norm"]) == (["document 30"], "skip", name)
        assert told["main_loss"] == curves[30]["main_loss"] == pytest.approx(curves[26]["main_loss"], rel=0.1)
        assert [(row["step"], row["spike"]) for row in curves if "spike" in row] == [(30, "gradient")]
        json.dumps([curves, told], allow_nan=False)
        pairs = zip(weights(tmp_path / name), weights(tmp_path / "loss"), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(FloatingPointError, match=r"gradient is not finite .*at step 20 \(.*'grad_norm': inf"):
        run(tmp_path / "stop", {}, {20: math.inf}, policy="stop")


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
