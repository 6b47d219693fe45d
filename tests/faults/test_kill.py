"""Signal 9 in the middle of every stage: the run goes on and every output has the hash of an undisturbed run.

One undisturbed run of `smoke` gives the hashes. A second store is then run with a kill of the whole process group in
each stage, twice in a row in the training stages, and must come to the same hashes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [str(Path(sys.executable).with_name("gristmill"))]
STAGES = [  # in the order in which they run
    "ingest", "dedup", "filter", "exam", "decontaminate", "tokenize", "mix", "problems", "pretrain",
    "rl_zero", "cold_start", "rl", "evaluate", "export", "report",
]  # fmt: skip
CHECKPOINTED = {"pretrain", "rl_zero", "rl"}
PATIENCE = 120  # seconds until a stage must have begun: far more than smoke takes, on a busy machine too


def start(store: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = (store.parent / f"{store.name}.log").open("ab")
    return subprocess.Popen(
        [*COMMAND, "run", "smoke", "--store", str(store), "--plain"],
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=store.parent,
        env=environment,
        start_new_session=True,
    )


def finish(store: Path) -> dict[str, str]:
    """Run to the end; the content hash of each stage."""
    process = start(store)
    assert process.wait(timeout=600) == 0, (store.parent / f"{store.name}.log").read_text()[-3000:]
    said = subprocess.run(
        [*COMMAND, "verify", "--store", str(store), "--json"],
        capture_output=True,
        text=True,
        cwd=store.parent,
        check=False,
    )
    assert said.returncode == 0, said.stdout + said.stderr
    found = json.loads(said.stdout)
    assert found["bad"] == []
    return found["stages"]


def begun(store: Path, stage: str) -> bool:
    """The stage has begun and not finished; a checkpointed one has a checkpoint to come back to."""
    for folder in (store / stage).glob("*"):
        if (folder / "manifest.json").exists():
            continue
        if stage not in CHECKPOINTED or any(folder.glob("work/checkpoint-????????")):
            return True
    return False


def finished(store: Path, stage: str) -> bool:
    return any((store / stage).glob("*/manifest.json"))


def kill_within(store: Path, stage: str, rng: random.Random) -> bool:
    """Start a run and kill its process group inside the stage; whether the stage was caught unfinished."""
    process = start(store)
    until = time.monotonic() + PATIENCE
    try:
        while not begun(store, stage):
            assert process.poll() is None or finished(store, stage), f"the run ended before {stage} began"
            assert time.monotonic() < until, f"{stage} did not begin within {PATIENCE} s"
            if finished(store, stage):
                return False
            time.sleep(0.01)
        # Checkpointed ones are caught right after a checkpoint, before smoke's few steps are over; mix is over in tenths.
        if stage not in CHECKPOINTED | {"mix"}:
            time.sleep(rng.uniform(0, 0.3))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return not finished(store, stage)


def test_killed_in_every_stage_ends_in_the_same_bytes(smoke_hashes: dict[str, str], tmp_path: Path) -> None:
    store, rng, caught = tmp_path / "store", random.Random(0), []
    for stage in STAGES:
        for _ in range(2 if stage in CHECKPOINTED else 1):
            if not finished(store, stage) and kill_within(store, stage, rng):
                caught.append(stage)
    assert set(caught) >= set(STAGES) - {"problems", "exam"}, caught  # which take some hundredths of a second
    assert finish(store) == smoke_hashes
    ended: list[str] = []
    for stage in CHECKPOINTED & set(caught):
        (starts,) = (store / stage).glob("*/log/starts.jsonl")
        first_steps = [json.loads(line)["from_step"] for line in starts.read_text().splitlines()]
        assert first_steps[0] == 0
        if len(first_steps) == 1:  # the kill met a job that had just ended: it need not run again
            ended.append(stage)
        else:
            assert first_steps[-1] > 0, f"{stage} began again from zero: {first_steps}"
    assert len(ended) < len(CHECKPOINTED), "no stage was killed between a checkpoint and its end"


def test_no_process_outlives_its_killed_run(smoke_hashes: dict[str, str], tmp_path: Path) -> None:
    """Workers in sessions of their own notice within seconds that their launcher is gone."""
    import psutil

    store = tmp_path / "store"
    kill_within(store, "pretrain", random.Random(1))
    until = time.monotonic() + 20
    while left := [p.pid for p in psutil.process_iter(["cmdline"]) if str(store) in " ".join(p.info["cmdline"] or [])]:
        assert time.monotonic() < until, f"still running after the kill: {left}"
        time.sleep(0.2)


@pytest.mark.slow
def test_two_runs_give_the_same_bytes_and_another_seed_others(smoke_hashes: dict[str, str], tmp_path: Path) -> None:
    assert finish(tmp_path / "again") == smoke_hashes
    said = subprocess.run(
        [
            *COMMAND,
            "run",
            "smoke",
            "--store",
            str(tmp_path / "other"),
            "--plain",
            "--until",
            "tokenize",
            "--set",
            "seed=1",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert said.returncode == 0, said.stdout + said.stderr
    manifest = next((tmp_path / "other" / "tokenize").glob("*/manifest.json"))
    assert json.loads(manifest.read_text())["content_hash"] != smoke_hashes["tokenize"]
