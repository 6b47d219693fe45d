"""The executor: what is done is not done again, what fails is told, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from gristmill.data.executor import Task, close_cluster, cluster_client, run_tasks
from gristmill.data.stage_types import silent


@pytest.mark.parametrize("workers", [0, 1])
def test_only_missing_results_are_made(workers: int, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("new")
    (tmp_path / "0").write_text("made before")
    seen = []
    tasks = [Task(shutil.copyfile, (source, tmp_path / str(i)), tmp_path / str(i)) for i in range(4)]
    run_tasks(tasks, workers, lambda done, total, **_: seen.append((done, total)))
    close_cluster()
    assert [(tmp_path / str(i)).read_text() for i in range(4)] == ["made before", "new", "new", "new"]
    assert seen[0] == (1, 4)
    assert seen[-1] == (4, 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_reach_the_caller(workers: int, tmp_path: Path) -> None:
    """The functions are the standard library's: a worker cannot import a test module."""
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run_tasks([Task(os.unlink, (tmp_path / "nowhere",), tmp_path / "x")], workers, silent)
    with pytest.raises(RuntimeError, match="ended without writing it"):
        run_tasks([Task(os.getcwd, (), tmp_path / "x")], workers, silent)
    close_cluster()


def test_the_environment_is_left_as_it_was() -> None:
    before = dict(os.environ)
    cluster_client(1)
    close_cluster()
    assert dict(os.environ) == before


def test_workers_end_with_a_killed_run(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import os, time
        from gristmill.data.executor import cluster_client
        if __name__ == "__main__":
            print(*cluster_client(2).run(os.getpid).values(), flush=True)
            time.sleep(60)
        """
    )
    file = tmp_path / "holder.py"
    file.write_text(program)
    holder = subprocess.Popen([sys.executable, "-P", str(file)], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert holder.stdout is not None
    workers = [int(p) for p in holder.stdout.readline().split()]
    assert len(workers) == 2
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    until = time.monotonic() + 15
    while left := [p for p in workers if psutil.pid_exists(p) and psutil.Process(p).status() != "zombie"]:
        assert time.monotonic() < until, f"workers {left} outlive their run"
        time.sleep(0.1)
