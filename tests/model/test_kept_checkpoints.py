"""Checkpoints that are kept for good: which ones, that they are whole, and that a run goes on from them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gristmill.model.training.checkpoints import Checkpoint, DamagedCheckpoint, checkpoints
from gristmill.model.training.config import OptimizerConfig, ScheduleConfig
from gristmill.model.training.keeping import KeptCheckpoints
from gristmill.model.training.models import own_tensors
from gristmill.model.transformer import Transformer
from tests.model.checkpoint_command import gristmill
from tests.model.several_runs import Stopped, stopping_at
from tests.model.test_checkpoints import spoil
from tests.model.test_training import CONFIG, content, trained

KEEPING = CONFIG.model_copy(update={"keep_every": 4, "keep_best": True, "evaluate_every": 2})


@pytest.fixture(scope="module")
def tokens(lesson_tokens: Path) -> Path:
    return lesson_tokens


@pytest.fixture(scope="module")
def straight(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "out"
    trained(tokens, out, KEEPING)
    return out


@pytest.fixture
def stopped(tokens: Path, tmp_path: Path) -> Path:
    """A run that ended after nine steps, with checkpoints of six and eight in work/."""
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        trained(tokens, out, KEEPING, progress=stopping_at(9))
    assert names(out / "kept") == ["best", "step-00000004", "step-00000008"]
    assert [p.parent.name for p in checkpoints(out / "work")] == ["kept", "work", "work"]
    return out


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def starts(out: Path) -> list[int]:
    return [json.loads(line)["from_step"] for line in (out / "log" / "starts.jsonl").read_text().splitlines()]


def losses(out: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (out / "curves.jsonl").read_text().splitlines()]
    return {row["step"] + 1: row["held_out_bpb"] for row in rows if "held_out_bpb" in row}


def test_every_few_and_the_best_are_kept_whole(straight: Path, tokens: Path, tmp_path: Path) -> None:
    """Parameters, moments and biases; the state of everything else is a function of the step and in state.json."""
    assert names(straight / "kept") == ["best", "step-00000004", "step-00000008"]
    for name, step in {"best": 10, "step-00000004": 4, "step-00000008": 8}.items():
        with Checkpoint(straight / "kept" / name) as kept:  # hashes all files
            assert kept.step == step
            own = own_tensors(Transformer(CONFIG.model, kept.manifest["owner"]["vocab_size"]))
            assert {*kept.names("parameter"), *kept.names("buffer")} == set(own)
            assert all(kept.names(kind) for kind in ("momentum", "exp_avg", "exp_avg_sq"))
            assert {"curves", "optimizer_steps"} <= set(kept.state())
    found = losses(straight)
    assert min(found, key=found.__getitem__) == 10  # it learns throughout, so that the best is the last
    trained(tokens, tmp_path / "plain")
    plain = (tmp_path / "plain" / "model" / "model.safetensors").read_bytes()
    assert (straight / "model" / "model.safetensors").read_bytes() == plain


def test_what_is_kept_becomes_a_model(straight: Path, tmp_path: Path) -> None:
    kept = [str(straight / "kept" / name) for name in ("step-00000004", "step-00000008", "best")]
    assert gristmill("verify", kept[0])[0] == 0
    assert gristmill("convert", kept[2], str(tmp_path / "best"))[0] == 0
    assert gristmill("convert", str(straight / "model"), str(tmp_path / "last"))[0] == 0
    best, last = (load_file(tmp_path / name / "model.safetensors") for name in ("best", "last"))
    assert best.keys() == last.keys()
    assert all(torch.equal(tensor, last[name]) for name, tensor in best.items())
    assert gristmill("average", *kept[:2], str(tmp_path / "average"))[0] == 0


def test_the_best_is_kept_where_it_is_not_the_last(tokens: Path, tmp_path: Path) -> None:
    """A rate so large that the run is best after four steps, by a third of its loss at the next check."""
    wild = OptimizerConfig(muon_learning_rate=0.0, adam_learning_rate=0.3)
    schedule = ScheduleConfig(warmup_steps=6, decay_fraction=0.0)
    config = {"keep_every": 2, "keep_best": True, "evaluate_every": 2, "optimizer": wild, "schedule": schedule}
    trained(tokens, tmp_path / "out", CONFIG.model_copy(update=config))
    found = losses(tmp_path / "out")
    best = min(found, key=found.__getitem__)
    assert 2 < best < 10  # neither the first nor the last
    kept = tmp_path / "out" / "kept"
    assert names(kept) == ["best", *(f"step-{step:08d}" for step in (2, 4, 6, 8, 10))]
    assert content(kept / "best") == content(kept / f"step-{best:08d}")


def test_the_best_is_measured_against_checks_between_checkpoints_too(tmp_path: Path) -> None:
    kept = KeptCheckpoints(tmp_path, 0, True)
    found = ((2, 3.0), (4, 3.0), (6, 2.0), (8, 2.5), (10, 2.0))
    curves: list[dict[str, Any]] = [{"step": step - 1, "held_out_bpb": bpb} for step, bpb in found]
    assert [kept.due(step, curves) for step in (4, 8, 10)] == [["best"], [], ["best"]]


@pytest.mark.parametrize(("gone", "first"), [(["work"], 8), (["work", "kept/step-00000008"], 4)])
def test_a_run_goes_on_from_what_is_kept(
    gone: list[str], first: int, stopped: Path, straight: Path, tokens: Path
) -> None:
    for name in gone:
        shutil.rmtree(stopped / name)
    trained(tokens, stopped, KEEPING)
    assert starts(stopped) == [0, first]
    assert content(stopped) == content(straight)


def test_what_is_kept_is_offered_where_the_others_are_damaged(stopped: Path, straight: Path, tokens: Path) -> None:
    for step in (6, 8):
        spoil(stopped / "work" / f"checkpoint-{step:08d}", "truncated")
    with pytest.raises(DamagedCheckpoint, match="good one is step-00000004: remove checkpoint-00000008 to go on"):
        trained(tokens, stopped, KEEPING)
    shutil.rmtree(stopped / "work")
    with pytest.raises(DamagedCheckpoint, match="good one is step-00000004: remove step-00000008 to go on"):
        trained(tokens, stopped, KEEPING)  # of one file, which has two names
    shutil.rmtree(stopped / "kept" / "step-00000008")
    trained(tokens, stopped, KEEPING)
    assert content(stopped) == content(straight)


def test_what_a_kill_left_out_is_kept_at_the_next_start(stopped: Path, straight: Path, tokens: Path) -> None:
    (stopped / "kept" / "step-00000008").rename(stopped / "kept" / "step-00000008.tmp")
    (stopped / "kept" / "best-before.tmp").mkdir()  # what the best was, not removed yet
    shutil.rmtree(stopped / "kept" / "best")
    trained(tokens, stopped, KEEPING)
    assert starts(stopped) == [0, 8]
    assert content(stopped) == content(straight)


def refusing(number: int) -> Any:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def test_a_file_system_without_second_names_gets_copies(
    straight: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "link", refusing(errno.EPERM))
    trained(tokens, tmp_path / "out", KEEPING)
    assert "is copied, for it cannot have a second name here" in caplog.text
    assert content(tmp_path / "out") == content(straight)


def test_copying_shows_life(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refusing(errno.EXDEV))
    told: list[str] = []
    kept = KeptCheckpoints(tmp_path, 4, False, lambda: told.append("alive"))
    assert kept.keep(straight / "kept" / "step-00000004", "step-00000004") == []
    assert len(told) >= len(names(straight / "kept" / "step-00000004"))
    assert content(tmp_path / "step-00000004") == content(straight / "kept" / "step-00000004")


def test_a_full_disk_ends_the_run_with_a_sentence(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refusing(errno.ENOSPC))
    with pytest.raises(OSError, match=r"kept/best\.tmp cannot be written .*is the disk full\?"):
        trained(tokens, tmp_path / "out", KEEPING)
    assert [p.name for p in checkpoints(tmp_path / "out" / "work")][-1] == "checkpoint-00000002"


def test_other_names_are_no_checkpoints_of_the_run(stopped: Path) -> None:
    """As of copies that somebody made by hand."""
    shutil.copytree(stopped / "work" / "checkpoint-00000006", stopped / "work" / "checkpoint-00000006.bak")
    shutil.copytree(stopped / "work" / "checkpoint-00000006", stopped / "work" / "checkpoint-mine")
    assert [p.name for p in checkpoints(stopped / "work")] == [
        "step-00000004", "checkpoint-00000006", "checkpoint-00000008"
    ]  # fmt: skip


def test_looking_for_another_one_shows_life(stopped: Path) -> None:
    spoil(stopped / "work" / "checkpoint-00000008", "truncated")
    told: list[str] = []
    with pytest.raises(DamagedCheckpoint, match="the last good one is checkpoint-00000006"):
        Checkpoint(stopped / "work" / "checkpoint-00000008", alive=lambda: told.append("alive"))
    assert len(told) >= 3  # of the files of the one before it
