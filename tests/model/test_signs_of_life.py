"""Which silence is a hang: not that of a rank that asked for it, nor of one that waits for such a rank."""

from __future__ import annotations

import json
import shutil
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from torch.profiler import profile

from gristmill.kernels import compiled, compiling
from gristmill.model.launch import JobFailed, launch
from gristmill.model.signs_of_life import LONG_SECONDS, SLOWEST, SignOfLife, SignsOfLife, seconds_to_move
from gristmill.model.stage_types import silent
from gristmill.model.training.checkpoints import CheckpointWriter
from gristmill.model.training.config import LayoutConfig, OptimizerConfig, ScheduleConfig
from gristmill.model.training.engine import Engine
from gristmill.model.training.loop import BYTES_TRAINED, Training, train
from gristmill.model.training.optimizers import MuonAdamW
from gristmill.model.transformer import Transformer
from gristmill.model.worker import Teller
from tests.model.windows import MODEL, VOCAB, Windows


def test_a_call_of_progress_is_a_sign_of_life_to_the_end(tmp_path: Path) -> None:
    """Behind the last step there is a model to write: what it is watched by is no other than before."""
    teller, file = Teller(tmp_path, 0), tmp_path / "alive-00000"
    teller(0, 2)
    assert file.read_text() == ""
    teller(2, 2, loss=1.0)
    assert json.loads((tmp_path / "progress.jsonl").read_text().splitlines()[-1])["values"] == {"loss": 1.0}
    SignOfLife(tmp_path, 0).ask_for(50)
    teller.shown -= 1.0  # a while ago
    teller(2, 2)
    assert file.read_text() == ""
    assert len((tmp_path / "progress.jsonl").read_text().splitlines()) == 2


def test_time_that_is_asked_for_goes_by_what_is_moved() -> None:
    assert seconds_to_move(200_000_000) == 2.0
    assert seconds_to_move(10**15) == LONG_SECONDS
    # of a model of 20 million parameters, laid out for training, a hang is still noticed within a minute
    assert LayoutConfig().hang_seconds + seconds_to_move(BYTES_TRAINED * 20_000_000) < 60


def test_a_job_on_several_nodes_is_not_started_beside_itself(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    SignOfLife(tmp_path / "log", 3).show()
    layout = LayoutConfig(nodes=2, hang_seconds=0.2)
    with pytest.raises(JobFailed, match=r"rank 3 of an earlier start was alive \d s ago"):
        launch("busy:run", {}, tmp_path, threads=1, device="cpu", progress=silent, ranks=4, layout=layout)
    SignOfLife(tmp_path / "log", 3).ask_for(50)
    time.sleep(0.3)
    with pytest.raises(JobFailed, match=r"start again once it has been silent for 50.2 s"):
        launch("busy:run", {}, tmp_path, threads=1, device="cpu", progress=silent, ranks=4, layout=layout)


def test_a_late_sign_that_was_announced_is_no_hang(tmp_path: Path) -> None:
    first, second, signs = SignOfLife(tmp_path, 0), SignOfLife(tmp_path, 1), SignsOfLife(tmp_path, 0.2, 2)
    second.show()
    time.sleep(0.01)
    first.ask_for(0.6)
    assert signs.hung() is None
    time.sleep(0.4)
    assert signs.hung() is None  # the second waits for the first
    first.show()
    assert signs.hung() is None
    time.sleep(0.4)
    assert signs.hung() == (1, 0.2)
    second.ask_for(0.3)
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
    SignOfLife(tmp_path, 0).ask_for(LONG_SECONDS)
    SignOfLife(tmp_path, 2).ask_for(LONG_SECONDS)
    assert signs.hung() is None
    assert signs.absent() is None
    time.sleep(0.4)
    assert signs.hung() is None
    assert signs.absent() == 1
    SignOfLife(tmp_path, 1).show()
    assert signs.hung() is None
    assert signs.absent() is None


@pytest.mark.usefixtures("one_rank")
def test_training_asks_for_time_before_what_moves_much_and_before_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And for none before a batch, an update, a check or text samples, of which the first may compile kernels."""
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
    noting("lay out", deepspeed, "initialize")
    windows, others = Windows({}), Windows({})
    noting("read", windows, "step")

    def look(step: int, engine: Engine) -> dict[str, float]:
        return {"held_out": engine.evaluate(others.step(step, 0, 1))}

    def write(step: int) -> list[dict[str, Any]]:
        asked.setdefault("text", []).append(float(life.path.read_text() or 0))
        return []

    training = Training(3, 4, OptimizerConfig(), ScheduleConfig(warmup_steps=1), checkpoint_every=3)
    layout = LayoutConfig(profile=(1,))
    train(model, windows, training, tmp_path, lambda *_, **__: life.show(), look, layout, write)
    size = sum(p.numel() for p in model.parameters())
    assert asked["lay out"] == [pytest.approx(BYTES_TRAINED * size / SLOWEST, rel=1e-4)]
    assert asked["export"] == [LONG_SECONDS]
    assert asked["forward"] == [0] * 6  # of training, and of a check
    assert asked["read"] == asked["update"] == asked["text"] == [0, 0, 0]
    assert torch.isfinite(model.lm_head.weight).all()


@pytest.mark.usefixtures("one_rank")
def test_a_save_that_is_waited_for_has_the_time_of_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    life, asked, released = SignOfLife(tmp_path / "log", 0), list[float](), threading.Event()
    life.path.parent.mkdir()
    write, sleep = CheckpointWriter._write, time.sleep

    def slowly(self: CheckpointWriter, *given: Any) -> None:
        assert released.wait(60)
        write(self, *given)

    def waiting(seconds: float) -> None:
        asked.append(float(life.path.read_text() or 0))
        released.set()
        sleep(seconds)

    monkeypatch.setattr(CheckpointWriter, "_write", slowly)
    monkeypatch.setattr("gristmill.model.training.loop.time", SimpleNamespace(sleep=waiting, perf_counter=time.time))
    model = Transformer(MODEL, VOCAB)
    model.initialise(0)
    training = Training(2, 4, OptimizerConfig(), ScheduleConfig(warmup_steps=1), checkpoint_every=2)
    train(model, Windows({}), training, tmp_path, lambda *_, **__: life.show())
    saved = (tmp_path / "work" / "checkpoint-00000002" / "rank-00000.safetensors").stat().st_size
    assert asked[0] == pytest.approx(saved / SLOWEST, rel=0.2)  # the file has a header


def test_each_kernel_that_is_compiled_shows_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after, also where a rank is in its first batch."""
    source = tmp_path / "doubling" / "cpu.cpp"
    source.parent.mkdir()
    source.write_text('extern "C" void nothing() {}\n')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    told: list[bool] = []
    monkeypatch.setattr(compiling, "_told", [])
    compiling.tell(lambda: told.append(bool(list(tmp_path.rglob("*.so")))))
    for _ in range(2):  # the second time it lies in the cache
        assert compiled._built(source, shutil.which("c++") or "g++").exists()
    assert told == [False, True]


def test_triton_tells_of_its_kernels_and_heeds_the_hook_that_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton").knobs
    told: list[int] = []
    monkeypatch.setattr(compiling, "_told", [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **_: True)
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", None)
    for _ in range(2):
        compiling.tell(partial(told.append, 1))
    assert knobs.runtime.jit_cache_hook(key="") is True
    assert knobs.runtime.jit_post_compile_hook(key="") is None
    assert len(told) == 4
