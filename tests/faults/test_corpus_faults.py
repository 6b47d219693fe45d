"""A corpus stage under faults: the same bytes, or a clear stop that resumes; nothing lost, none twice."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from gristmill.data import executor
from gristmill.data.documents import encoded, open_rows, read_rows, shards, write_rows
from gristmill.data.executor import ClusterLost, Task, WorkerDied, close_cluster, cluster_client, run_tasks, running_on
from gristmill.data.sieve import tally_path
from gristmill.data.stage_types import silent

sys.path.insert(0, str(Path(__file__).parent))  # a worker's path is its run's

import slow_sieve

Bytes = Callable[[Path], str]


@pytest.fixture(autouse=True, scope="module")
def _no_cluster_is_left() -> Iterator[None]:
    yield
    close_cluster()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen shards of 50 documents."""
    folder, draw = tmp_path_factory.mktemp("corpus"), random.Random(3)
    for shard in range(16):
        rows = [
            {
                "id": f"{shard}/{number}",
                "text": " ".join(str(draw.random()) for _ in range(40)),
                "metadata": {"source": f"s{number % 3}", "kind": "prose", "url": None, "date": None, "licence": None},
            }
            for number in range(50)
        ]
        write_rows(folder / "documents" / f"{shard:05d}.jsonl.zst", rows)
    return folder


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    slow_sieve.sieve(corpus, out, 0, workers=0, progress=silent)
    ids = [r["id"] for kind in ("documents", "removed") for s in shards(out, kind) for r in read_rows(s)]
    assert sorted(ids) == sorted(r["id"] for s in shards(corpus) for r in read_rows(s))  # none lost, none twice
    return out


def worker_processes() -> set[int]:
    """Of this process, those that are up and those that are being started."""
    found = set()
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # ended meanwhile
            if "spawn_main" in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


class Killer(threading.Thread):
    """Kills workers, drawn by a seed, at moments drawn by it."""

    def __init__(self, client: Any, kills: int, seed: int, how: Callable[[int], None]) -> None:
        super().__init__(daemon=True)
        self.client, self.kills, self.how = client, kills, how
        self.draw = random.Random(seed)
        self.killed: list[int] = []
        self.over = threading.Event()

    def run(self) -> None:
        while len(self.killed) < self.kills and not self.over.wait(self.draw.uniform(0.05, 0.8)):
            alive = sorted(worker_processes() - set(self.killed))
            if alive:
                self.killed.append(self.draw.choice(alive))
                self.how(self.killed[-1])


def killed_run(corpus: Path, out: Path, kills: int, seed: int) -> int:
    """The stage with workers killed by signal 9 on the way; how many were."""
    killer = Killer(cluster_client(2), kills, seed, lambda pid: os.kill(pid, signal.SIGKILL))
    killer.start()
    slow_sieve.sieve(corpus, out, 0.005, workers=2, progress=silent)
    killer.over.set()
    killer.join()
    return len(killer.killed)


def test_workers_killed_at_random_moments(corpus: Path, undisturbed: Path, tmp_path: Path, bytes_of: Bytes) -> None:
    assert killed_run(corpus, tmp_path / "out", 4, seed=1) == 4
    assert bytes_of(tmp_path / "out") == bytes_of(undisturbed)


@pytest.mark.slow
def test_workers_killed_at_twenty_random_moments(
    corpus: Path, undisturbed: Path, tmp_path: Path, bytes_of: Bytes
) -> None:
    kills, runs = 0, 0
    while kills < 20:
        kills += killed_run(corpus, tmp_path / str(runs), min(5, 20 - kills), seed=100 + runs)
        assert bytes_of(tmp_path / str(runs)) == bytes_of(undisturbed)
        runs += 1


def test_workers_restarted_by_their_nannies(corpus: Path, undisturbed: Path, tmp_path: Path, bytes_of: Bytes) -> None:
    """One worker, as from a dashboard; then the whole cluster, which forgets every task it held."""
    client = cluster_client(2)
    client.wait_for_workers(2, timeout=60)  # the last test may have killed one

    def restart() -> None:
        time.sleep(0.4)
        client.restart_workers([min(client.nthreads())])
        client.restart()

    thread = threading.Thread(target=restart)
    thread.start()
    slow_sieve.sieve(corpus, tmp_path / "out", 0.005, workers=2, progress=silent)
    thread.join()
    assert bytes_of(tmp_path / "out") == bytes_of(undisturbed)


class Elsewhere:
    """A scheduler and workers as processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, []
        self.scheduler, self.address = self._scheduler(0)
        self.workers = [self._worker(), self._worker()]

    def _start(self, *arguments: str) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        process = subprocess.Popen(
            [sys.executable, "-m", "dask", *arguments, "--no-dashboard"],
            cwd=self.folder,
            env=environment,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def _scheduler(self, port: int) -> tuple[subprocess.Popen, str]:
        file = self.folder / f"scheduler-{len(self.started)}.json"
        process = self._start(
            "scheduler", "--host", "127.0.0.1", "--port", str(port), "--dashboard-address", "127.0.0.1:0",
            "--scheduler-file", str(file),
        )  # fmt: skip
        until = time.monotonic() + 60
        while not file.exists() or not file.read_text().endswith("}"):
            assert time.monotonic() < until, "the scheduler did not start"
            time.sleep(0.05)
        return process, executor.read_cluster(str(file))  # type: ignore[return-value]

    def _worker(self) -> subprocess.Popen:
        return self._start("worker", "--nthreads", "1", "--host", "127.0.0.1", "--death-timeout", "60", self.address)

    def again(self) -> None:
        """The scheduler at the address where it was, and workers."""
        self.scheduler, self.address = self._scheduler(int(self.address.rpartition(":")[2]))
        self.workers = [self._worker(), self._worker()]

    def stop(self) -> None:
        for process in reversed(self.started):
            for child in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
                child.kill()
            process.kill()
            process.wait(timeout=20)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Elsewhere]:
    (tmp_path / "cluster").mkdir()
    cluster = Elsewhere(tmp_path / "cluster")
    yield cluster
    close_cluster()
    cluster.stop()


@contextmanager
def when(condition: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """Acts in another thread as soon as the condition holds."""

    def watch() -> None:
        while not condition():
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    thread.join(timeout=60)
    assert not thread.is_alive()


def some_done(out: Path) -> bool:
    return len(list((out / "work").glob("*.json"))) >= 3


def test_a_nanny_killed_with_its_worker_and_then_the_scheduler(
    corpus: Path,
    undisturbed: Path,
    tmp_path: Path,
    bytes_of: Bytes,
    elsewhere: Elsewhere,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other worker goes on; without a scheduler the run stops, says so, and resumes when told to."""
    out = tmp_path / "out"
    monkeypatch.setattr(executor, "CONNECT_SECONDS", 3.0)  # how long a lost scheduler is waited for
    address = elsewhere.address

    def lose() -> None:
        os.kill(elsewhere.workers[0].pid, signal.SIGKILL)
        before, until = len(list((out / "work").glob("*.json"))), time.monotonic() + 60
        while len(list((out / "work").glob("*.json"))) < before + 2 and time.monotonic() < until:
            time.sleep(0.02)
        elsewhere.scheduler.kill()

    cluster_client(2, cluster=address).wait_for_workers(2, timeout=60)
    with (
        running_on(address),
        when(lambda: some_done(out), lose),
        pytest.raises(ClusterLost, match=rf"the Dask scheduler at {address} is gone: start it again and run the same"),
    ):
        slow_sieve.sieve(corpus, out, 0.01, workers=2, progress=silent)
    done = {p: p.stat().st_mtime_ns for p in (out / "work").glob("*.json")}
    assert 5 <= len(done) < 16
    with running_on(address), pytest.raises(ClusterLost, match="no Dask scheduler answers at"):
        slow_sieve.sieve(corpus, out, 0, workers=2, progress=silent)
    seen = []
    slow_sieve.sieve(corpus, out, 0, workers=2, progress=lambda done, total, **_: seen.append(done))
    assert seen[0] >= len(done)  # a worker that had lost its scheduler may have ended its task
    assert bytes_of(out) == bytes_of(undisturbed)


def test_a_scheduler_that_comes_back_at_its_address(
    corpus: Path, undisturbed: Path, tmp_path: Path, bytes_of: Bytes, elsewhere: Elsewhere
) -> None:
    out = tmp_path / "out"

    def lose() -> None:
        elsewhere.scheduler.kill()
        elsewhere.scheduler.wait()
        elsewhere.again()

    with running_on(elsewhere.address), when(lambda: some_done(out), lose):
        slow_sieve.sieve(corpus, out, 0.01, workers=2, progress=silent)
    assert bytes_of(out) == bytes_of(undisturbed)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk(workers: int, corpus: Path, undisturbed: Path, tmp_path: Path, bytes_of: Bytes) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=False).returncode
    ):
        pytest.skip("a small disk needs the right to mount one")
    try:
        with pytest.raises(
            OSError, match=r"No space left on device: no room for the task for .*Make room and run"
        ) as full:
            slow_sieve.sieve(corpus, disk / "out", 0, workers=workers, progress=silent)
        assert full.value.errno == errno.ENOSPC
        assert not list(disk.rglob("*.tmp"))
        done = len(list((disk / "out" / "work").glob("*.json")))
        assert 1 <= done < 16
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        seen = []
        slow_sieve.sieve(corpus, disk / "out", 0, workers=workers, progress=lambda done, total, **_: seen.append(done))
        assert seen[0] == done
        assert bytes_of(disk / "out") == bytes_of(undisturbed)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_task_above_the_memory_limit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker is ended and replaced each time; others' tasks are done meanwhile."""
    from gristmill.data import dispatch

    monkeypatch.setattr(dispatch, "ROUNDS", 1)
    tasks = [Task(slow_sieve.hold, (3 * 2**29, tmp_path / "big"), tmp_path / "big")]
    with pytest.raises(
        WorkerDied, match=r"big ended its worker 4 times; the usual cause is memory above 1GiB a worker"
    ):
        run_tasks(tasks, 1, silent)


def test_the_scheduler_holds_what_is_in_flight_and_no_more(tmp_path: Path) -> None:
    """However many tasks there are: two for each worker, and what it has not forgotten yet."""
    client, held = cluster_client(2), []

    def progress(done: int, total: int, **_: float) -> None:
        if done % 20 == 1:
            held.append(client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)))

    tasks = [Task(slow_sieve.touch, (tmp_path / str(i),), tmp_path / str(i)) for i in range(200)]
    run_tasks(tasks, 2, progress)
    assert len(held) == 10
    assert max(held) <= 8
    assert len(list(tmp_path.iterdir())) == 200


@pytest.mark.slow
def test_a_worker_stays_below_a_gibibyte_on_a_large_shard(tmp_path: Path) -> None:
    """600 MB of text in one shard; the worker is ended at 95 % of its limit."""
    draw = random.Random(5)
    texts = [" ".join(str(draw.random()) for _ in range(3000)) for _ in range(20)]
    folder = tmp_path / "in"
    written = 0
    with open_rows(folder / "documents" / "00000.jsonl.zst") as shard:
        number = 0
        while written < 600_000_000:
            row = {"id": str(number), "text": texts[number % 20], "metadata": {"source": "s", "kind": "prose"}}
            shard.write(row)
            written += len(encoded(row))
            number += 1
    (big,) = shards(folder)
    out = tmp_path / "out"
    client = cluster_client(1)
    (worker,) = client.run(os.getpid).values()
    run_tasks([Task(slow_sieve.keep_all, (big, out), tally_path(out, big))], 1, silent)
    assert list(client.run(os.getpid).values()) == [worker]
    (peak,) = client.run(slow_sieve.peak).values()
    print(f"peak {peak / 2**20:.0f} MiB")
    assert peak < 0.95 * 2**30
    assert sum(1 for _ in read_rows(out / "documents" / big.name)) == number
