"""Which silence is a hang: not that of a rank that asked for it, nor of one that waits for such a rank."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile

from gristmill.model.launch import JobFailed, launch
from gristmill.model.signs_of_life import LONG_SECONDS, SignOfLife, SignsOfLife
from gristmill.model.stage_types import silent
from gristmill.model.training.config import LayoutConfig, OptimizerConfig, ScheduleConfig
from gristmill.model.training.engine import Engine
from gristmill.model.training.loop import Training, train
from gristmill.model.training.optimizers import MuonAdamW
from gristmill.model.transformer import Transformer
from gristmill.model.worker import Teller
from tests.model.windows import MODEL, VOCAB, Windows


def test_behind_its_last_step_a_rank_may_be_silent_for_long(tmp_path: Path) -> None:
    teller = Teller(tmp_path, 0)
    teller(0, 2)
    assert (tmp_path / "alive-00000").read_text() == ""
    teller(2, 2, loss=1.0)
    assert float((tmp_path / "alive-00000").read_text()) == LONG_SECONDS
    assert json.loads((tmp_path / "progress.jsonl").read_text().splitlines()[-1])["values"] == {"loss": 1.0}


def test_a_job_on_several_nodes_is_not_started_beside_itself(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    SignOfLife(tmp_path / "log", 3).show()
    layout = LayoutConfig(nodes=2, hang_seconds=0.2)
    with pytest.raises(JobFailed, match=r"rank 3 of an earlier start was alive \d s ago"):
        launch("busy:run", {}, tmp_path, threads=1, device="cpu", progress=silent, ranks=4, layout=layout)
    SignOfLife(tmp_path / "log", 3).ask_for_silence(50)
    time.sleep(0.3)
    with pytest.raises(JobFailed, match=r"start again once it has been silent for 50 s"):
        launch("busy:run", {}, tmp_path, threads=1, device="cpu", progress=silent, ranks=4, layout=layout)


def test_silence_that_was_asked_for_is_no_hang(tmp_path: Path) -> None:
    first, second, signs = SignOfLife(tmp_path, 0), SignOfLife(tmp_path, 1), SignsOfLife(tmp_path, 0.2, 2)
    second.show()
    time.sleep(0.01)
    first.ask_for_silence(0.8)
    assert signs.hung() is None
    time.sleep(0.4)
    assert signs.hung() is None  # the second waits for the first
    first.show()
    assert signs.hung() is None
    time.sleep(0.4)
    assert signs.hung() == (1, 0.2)
    second.ask_for_silence(0.5)
    assert signs.hung() is None
    time.sleep(0.7)
    assert signs.hung() == (0, 0.2)
    first.end()
    assert signs.hung() == (1, 0.5)
    second.end()
    assert signs.hung() is None
    assert signs.absent() is None


def test_a_rank_that_does_not_appear_is_missed(tmp_path: Path) -> None:
    signs = SignsOfLife(tmp_path, 0.3, 3)
    assert signs.hung() is None
    assert signs.absent() is None
    time.sleep(0.4)
    assert signs.absent() is None  # nobody has appeared: a machine may be slow to start them all
    SignOfLife(tmp_path, 0).ask_for_silence()
    SignOfLife(tmp_path, 2).ask_for_silence()
    assert signs.hung() is None
    assert signs.absent() is None
    time.sleep(0.4)
    assert signs.hung() is None
    assert signs.absent() == 1
    SignOfLife(tmp_path, 1).show()
    assert signs.hung() is None
    assert signs.absent() is None


@pytest.mark.usefixtures("one_rank")
def test_training_asks_for_silence_before_what_may_be_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of its kind and shape, whose kernels may be compiled, text samples, and the export of a profile."""
    life = SignOfLife(tmp_path / "log", 0)
    life.path.parent.mkdir()
    asked: dict[str, list[float]] = {}

    def noting(kind: str, owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def noted(*given: Any, **named: Any) -> Any:
            asked.setdefault(kind, []).append(float(life.path.read_text() or 0))
            return inner(*given, **named)

        monkeypatch.setattr(owner, name, noted)

    model = Transformer(MODEL, VOCAB)
    model.initialise(0)
    noting("forward", model, "losses")
    noting("update", MuonAdamW, "step")
    noting("export", profile, "export_chrome_trace")
    windows, others = Windows({}), Windows({})
    noting("read", windows, "step")
    life.ask_for_silence()  # as the job's process does at its start

    def look(step: int, engine: Engine) -> dict[str, float]:
        return {"held_out": engine.evaluate(others.step(step, 0, 1))}

    def write(step: int, before: Any) -> list[dict[str, Any]]:
        before()
        asked.setdefault("text", []).append(float(life.path.read_text() or 0))
        return []

    training = Training(3, 4, OptimizerConfig(), ScheduleConfig(warmup_steps=1), checkpoint_every=3)
    layout = LayoutConfig(profile=(1,))
    train(model, windows, training, tmp_path, lambda *_, **__: life.show(), look, layout, write)
    assert asked["forward"] == [LONG_SECONDS, LONG_SECONDS, 0, 0, 0, 0]  # of training, and of a check
    assert asked["read"] == [0, 0, 0]  # nothing is compiled for long there
    assert asked["update"] == [LONG_SECONDS, 0, 0]
    assert asked["export"] == [LONG_SECONDS]
    assert asked["text"] == [LONG_SECONDS, 0, 0]
    assert torch.isfinite(model.lm_head.weight).all()
