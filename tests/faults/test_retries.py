"""A rank that is killed in training: the flow starts the job again from its last checkpoint, as often as was asked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.faults.conftest import COMMAND

PATIENCE = 240  # seconds until a checkpoint must be there, a Prefect server started before, on a busy machine


def kill_the_rank(store: Path, times: int) -> list[int]:
    """Kill the job's process once a checkpoint of each of its first starts is there; the pids."""
    killed: list[int] = []
    until = time.monotonic() + PATIENCE
    while len(killed) < times and time.monotonic() < until:
        for starts in store.glob("pretrain/*/log/starts.jsonl"):
            lines = [json.loads(line) for line in starts.read_text().splitlines(keepends=True) if line.endswith("\n")]
            new = lines and lines[-1]["pid"] not in killed
            saved = [int(p.name[-8:]) for p in (starts.parents[1] / "work").glob("checkpoint-????????")]
            if new and any(step > lines[-1]["from_step"] for step in saved):
                os.kill(lines[-1]["pid"], signal.SIGKILL)
                killed.append(lines[-1]["pid"])
        time.sleep(0.005)
    return killed


def until_pretrain(store: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "run", "smoke", "--until", "pretrain", "--store", str(store), *options],
        capture_output=True,
        text=True,
        cwd=store.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def content_hash(starts: Path) -> str:
    return json.loads((starts.parents[1] / "manifest.json").read_text())["content_hash"]


def refuse_and_go_on_from_the_one_before(store: Path, runner: list[str], folder: Path) -> None:
    """A bit of the newest checkpoint flips while nothing runs."""
    newest = sorted((folder / "work").glob("checkpoint-????????"))[-1]
    file = newest / "rank-00000.safetensors"
    held = bytearray(file.read_bytes())
    held[-1] ^= 1
    file.write_bytes(held)
    said = until_pretrain(store, *runner, "--set", "execution.retries=3")
    assert said.returncode == 1
    told = (said.stdout + said.stderr).replace("\n", " ")
    assert f"{newest}: {file.name} has another hash than what was written" in told
    assert f"remove {newest.name} to " in told
    assert len((folder / "log" / "starts.jsonl").read_text().splitlines()) == 1  # not tried again
    shutil.rmtree(newest)
    assert until_pretrain(store, *runner).returncode == 0


@pytest.mark.parametrize("runner", [["--plain"], pytest.param([], marks=pytest.mark.slow)], ids=["plain", "prefect"])
@pytest.mark.parametrize("retries", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_is_started_again(
    runner: list[str], retries: int, smoke_folder: Path, smoke_hashes: dict[str, str], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(
        smoke_folder / ".gristmill" / "store", store, ignore=lambda _, names: {"pretrain", "lock"} & set(names)
    )
    killed: list[int] = []
    killer = threading.Thread(target=lambda: killed.extend(kill_the_rank(store, 1)))
    killer.start()
    asked = ["--set", f"execution.retries={retries}"]
    said = until_pretrain(store, *runner, *asked)
    killer.join()
    assert len(killed) == 1, said.stdout[-3000:] + said.stderr[-3000:]
    (starts,) = store.glob("pretrain/*/log/starts.jsonl")
    begun = [json.loads(line) for line in starts.read_text().splitlines()]
    assert begun[0] == {"pid": killed[0], "from_step": 0}
    if not retries:
        assert said.returncode == 1
        assert "rank 0 was ended by signal 9" in said.stdout + said.stderr
        assert len(begun) == 1
        refuse_and_go_on_from_the_one_before(store, runner, starts.parents[1])
        assert content_hash(starts) == smoke_hashes["pretrain"]
        return
    assert said.returncode == 0, said.stdout[-3000:] + said.stderr[-3000:]
    assert len(begun) == 2
    assert begun[1]["from_step"] > 0
    assert json.loads((starts.parents[1] / "manifest.json").read_text())["attempts"] == 2
    assert content_hash(starts) == smoke_hashes["pretrain"]
