"""The executor: what is done is not done again, what fails is told, and nothing is left behind."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from gristmill.data.documents import write_json_lines
from gristmill.data.executor import THREAD_COUNTS, Task, close_cluster, cluster_client, remove_work, run_tasks
from gristmill.data.stage_types import silent

# Tasks are sent to workers by name, and workers cannot import this module: functions here are the library's.


@pytest.fixture(autouse=True, scope="module")
def _no_cluster_is_left() -> Iterator[None]:
    yield
    close_cluster()


@pytest.mark.parametrize("workers", [0, 1])
def test_only_missing_results_are_made(workers: int, tmp_path: Path) -> None:
    (tmp_path / "0").write_text("made before")
    seen = []
    tasks = [Task(write_json_lines, (tmp_path / str(i), [{"new": i}]), tmp_path / str(i)) for i in range(4)]
    run_tasks(tasks, workers, lambda done, total, **_: seen.append((done, total)))
    expected = ["made before", *(f'{{"new": {i}}}\n' for i in (1, 2, 3))]
    assert [(tmp_path / str(i)).read_text() for i in range(4)] == expected
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_results_are_removed_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    for attempt in range(2):
        (work / "a").mkdir(parents=True)
        (work / "a" / "marker").touch()
        (work / "data").touch()
        with monkeypatch.context() as patch:
            if attempt == 0:  # as a kill before anything is gone
                patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            remove_work(work)
        assert not work.exists()
    assert not list(tmp_path.iterdir())
    remove_work(work)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_reach_the_caller(workers: int, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not-there"):
        run_tasks([Task(os.rmdir, (tmp_path / "not-there",), tmp_path / "x")], workers, silent)
    with pytest.raises(RuntimeError, match="ended without writing it"):
        run_tasks([Task(time.sleep, (0,), tmp_path / "x")], workers, silent)


def test_a_failed_task_ends_the_others(tmp_path: Path) -> None:
    """Nobody is left at work who could write into the files of the next try."""
    pids = list(cluster_client(2).run(os.getpid).values())
    began = time.monotonic()
    with pytest.raises(FileNotFoundError):
        run_tasks(
            [
                Task(time.sleep, (60,), tmp_path / "slow"),
                Task(os.rmdir, (tmp_path / "not-there",), tmp_path / "x"),
            ],
            2,
            silent,
        )
    assert time.monotonic() - began < 30
    assert not [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


def test_a_function_that_workers_cannot_import_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    def inner() -> None: ...

    with pytest.raises(ValueError, match="put it at the top of a module"):
        run_tasks([Task(inner, (), tmp_path / "x")], 1, silent)
    with pytest.raises(ModuleNotFoundError):
        run_tasks([Task(test_the_environment_is_left_as_it_was, (), tmp_path / "x")], 1, silent)


def test_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    client = cluster_client(1)
    (first,) = client.run(os.getpid).values()
    killer = threading.Timer(0.5, os.kill, (first, signal.SIGKILL))
    killer.start()
    # The program sleeps when it is run first, is killed with its worker, and ends at once when it is run again.
    program = "test -e begun || { touch begun; sleep 5; }; touch x"
    command = ["sh", "-c", f"cd {shlex.quote(str(tmp_path))}; {program}"]
    run_tasks([Task(subprocess.check_call, (command,), tmp_path / "x")], 1, silent)
    assert (tmp_path / "x").exists()
    assert list(client.run(os.getpid).values()) != [first]


def worker_processes() -> set[int]:
    """Of this process, those that are up and those that are being started."""
    found = set()
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # ended meanwhile
            if "spawn_main" in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


def test_a_worker_killed_before_it_was_up_is_replaced_too(tmp_path: Path) -> None:
    """Its nanny gives up on it."""
    client = cluster_client(1)

    def kill() -> None:
        time.sleep(0.5)
        first = worker_processes()
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        while not (second := worker_processes() - first):
            time.sleep(0.005)
        os.kill(second.pop(), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    program = "test -e begun || { touch begun; sleep 5; }; touch x"
    command = ["sh", "-c", f"cd {shlex.quote(str(tmp_path))}; {program}"]
    run_tasks([Task(subprocess.check_call, (command,), tmp_path / "x")], 1, silent)
    killer.join()
    assert len(client.nthreads()) == 1


def test_one_cluster_serves_stages_that_follow_each_other() -> None:
    first = cluster_client(1)
    assert cluster_client(1) is first
    other = cluster_client(1, threads_per_worker=3)
    assert other is not first
    assert {value for name in THREAD_COUNTS for value in other.run(os.getenv, name).values()} == {"3"}


def test_a_scheduler_that_is_there_is_used_and_left(tmp_path: Path) -> None:
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as theirs:
        address = theirs.scheduler_address
        shutil.copy(__file__, tmp_path / "in")
        task = Task(shutil.copyfile, (tmp_path / "in", tmp_path / "out"), tmp_path / "out")
        run_tasks([task], 1, silent, cluster=address)
        close_cluster()
        assert (tmp_path / "out").read_bytes() == Path(__file__).read_bytes()
        assert len(theirs.workers) == 1


def test_the_environment_is_left_as_it_was() -> None:
    before = dict(os.environ)
    cluster_client(1)
    close_cluster()
    assert dict(os.environ) == before


def test_only_loopback_is_listened_on() -> None:
    cluster_client(1)
    me = psutil.Process()
    heard = [c for p in (me, *me.children(recursive=True)) for c in p.net_connections() if c.status == "LISTEN"]
    assert heard
    assert {c.laddr.ip for c in heard} == {"127.0.0.1"}


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_workers_end_with_their_run(how: str, tmp_path: Path) -> None:
    """Killed alone (signal 9), or Ctrl-C to the whole process group, in the middle of a task."""
    program = textwrap.dedent(
        """
        import os, signal, time
        from pathlib import Path
        from gristmill.data.executor import Task, cluster_client, run_tasks
        from gristmill.data.stage_types import silent
        if __name__ == "__main__":
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
            print(*cluster_client(2).run(os.getpid).values(), flush=True)
            run_tasks([Task(time.sleep, (60,), Path("never"))], 2, silent)
        """
    )
    file = tmp_path / "holder.py"
    file.write_text(program)
    holder = subprocess.Popen(
        [sys.executable, "-P", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
    )
    assert holder.stdout is not None
    workers = [int(p) for p in holder.stdout.readline().split()]
    assert len(workers) == 2
    time.sleep(0.5)
    if how == "killed":
        os.kill(holder.pid, signal.SIGKILL)
    else:
        os.killpg(holder.pid, signal.SIGINT)
    holder.wait(timeout=30)
    until = time.monotonic() + 15
    while left := [p for p in workers if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < until, f"workers {left} outlive their run"
        time.sleep(0.1)
