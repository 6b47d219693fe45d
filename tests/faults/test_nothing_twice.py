"""On the real pipeline: what is there is not made again, and what runs again says why."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gristmill.flows.r1 import r1
from gristmill.flows.recipe import load_recipe
from gristmill.flows.runners import Plan
from gristmill.flows.store import Store

COMMAND = [str(Path(sys.executable).with_name("gristmill"))]


def would_run(folder: Path, *settings: str) -> dict[str, str]:
    plan = Plan(Store(folder / ".gristmill" / "store")).run(r1, load_recipe("smoke", list(settings)))
    return {s.call.stage.name: s.reason for s in plan.stages if s.runs}


def test_a_second_run_is_all_cached_and_quick(smoke_folder: Path, smoke_hashes: dict[str, str]) -> None:
    began = time.monotonic()
    said = subprocess.run([*COMMAND, "run", "smoke"], capture_output=True, text=True, cwd=smoke_folder, check=False)
    assert said.returncode == 0, said.stderr
    assert time.monotonic() - began < 20
    states = [line.split()[1] for line in said.stdout.splitlines() if line.split()[0] in smoke_hashes]
    assert set(states[: len(smoke_hashes)]) == {"cached"}
    assert "\x1b" not in said.stdout  # no control characters where there is no terminal


def test_lineage_reaches_the_sources(smoke_folder: Path, smoke_hashes: dict[str, str]) -> None:
    said = subprocess.run(
        [*COMMAND, "lineage", "rl", "--json"], capture_output=True, text=True, cwd=smoke_folder, check=True
    )
    both = json.loads(said.stdout)
    assert {n["stage"] for n in both["made_of"]} == set(smoke_hashes) - {"rl_zero", "evaluate", "export", "report"}
    assert {n["stage"] for n in both["used_for"]} == {"evaluate", "export", "report"}
    assert set(next(n for n in both["made_of"] if n["stage"] == "ingest")["sources"]) == {
        "stdlib",
        "docstrings",
        "lessons",
    }
    said = subprocess.run([*COMMAND, "lineage", "ingest"], capture_output=True, text=True, cwd=smoke_folder, check=True)
    assert "source lessons" in said.stdout
    assert "  report " in said.stdout


@pytest.mark.parametrize(
    ("setting", "first", "why", "others"),
    [
        ("rl.optimizer.adam_learning_rate=0.0001", "rl", "optimizer.adam_learning_rate 0.0002 → 0.0001", {"evaluate", "export", "report"}),
        ("evaluate.samples=3", "evaluate", "samples 2 → 3", {"report"}),
        ("report.title=Mine", "report", "title", set()),
        ("problems.styles.guess=2.0", "problems", "styles.guess 1.0 → 2.0", {"cold_start", "rl_zero", "rl", "evaluate", "export", "report"}),
        ("execution.workers=3", None, "", set()),
        ("execution.retries=2", None, "", set()),
        ("description=another", None, "", set()),
    ],
)  # fmt: skip
def test_what_a_change_makes_run_again(
    setting: str, first: str | None, why: str, others: set[str], smoke_folder: Path, smoke_hashes: dict[str, str]
) -> None:
    again = would_run(smoke_folder, setting)
    assert set(again) == ({first} | others if first else set())
    if first:
        assert why in again[first]


def test_interrupted_leaves_a_resumable_store_and_nobody_behind(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "run", "smoke", "--plain", "--until", "pretrain", "--set", "pretrain.steps=400"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    store = tmp_path / ".gristmill" / "store"
    until = time.monotonic() + 120
    while not any(store.glob("pretrain/*/work/checkpoint-????????")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=40)
    assert process.returncode == 130, said
    assert "the same command resumes" in said
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(store).encode() in _read(p)]
    assert left == []
    plan = Plan(Store(store)).run(r1, load_recipe("smoke", ["pretrain.steps=400"]), until="pretrain")
    assert plan.named("pretrain").state == "partial"
    assert Store(store).runs()[-1]["state"] == "failed"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # it ended between the listing and the look


def test_the_rooms_hide_no_package_of_that_name() -> None:
    """`transformers` looks for a package called kernels; our folder of that name must not be taken for it."""
    root = Path(__file__).parents[2]
    code = "import transformers, sys; assert 'kernels' not in sys.modules or 'hub' in str(sys.modules['kernels'])"
    said = subprocess.run([sys.executable, "-P", "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
