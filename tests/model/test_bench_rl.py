"""The bench of a step of GRPO: what it prepares trains, and TRL's gradient on our responses is ours."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gristmill.model.rl import training
from gristmill.model.rl.rewards import Judged
from tests.model.benches import bench
from tests.model.in_process import jobs_here

QUESTIONS, SAMPLES = 4, 3


@pytest.fixture(scope="module")
def rl() -> ModuleType:
    return bench("rl")


@pytest.fixture(scope="module")
def folder(rl: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rl")
    for name, few in {"SHAPES": {"tiny": 2}, "LESSONS": 300, "QUESTIONS": QUESTIONS, "SAMPLES": SAMPLES}.items():
        setattr(rl, name, few)
    with jobs_here():
        rl.prepare(folder, "tiny", 1)
    return folder


@pytest.fixture(scope="module")
def ours(rl: ModuleType, folder: Path) -> dict[str, Any]:
    """A model without training earns nothing by the rules: here the length of a response decides."""

    def judged(text: str, *_: object) -> Judged:
        return Judged(float(len(text) % 3 == 0), 1.0, 1.0, float(len(text) % 3), "")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "judge", judged)
        return rl.run_ours(folder, 2)


def test_steps_have_seconds_and_tokens(ours: dict[str, Any], folder: Path) -> None:
    assert len(ours["seconds"]) == len(ours["sampling"]) == len(ours["tokens"]) == 2
    assert all(whole > sampling > 0 for whole, sampling in zip(ours["seconds"], ours["sampling"], strict=True))
    assert len(json.loads((folder / "asked.json").read_text())) == 2 * QUESTIONS
    rollout = json.loads((folder / "rollout.json").read_text())
    assert sum(map(len, rollout["completion_ids"])) == ours["tokens"][0]
    assert {len(rows) for rows in rollout.values()} == {QUESTIONS * SAMPLES}


def test_theirs_takes_the_same_gradient_of_our_responses(ours: dict[str, Any], rl: ModuleType, folder: Path) -> None:
    pytest.importorskip("trl")
    theirs = rl.run_theirs(folder, 1, "grouped_mm", QUESTIONS * SAMPLES, given=True)
    assert ours["grad_norm"] > 0
    assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=rl.APART)
