"""Runs independent shard tasks on Dask, and runs again only what is not on disk yet.

A task is a plain function of picklable arguments that writes one marker file when it is done, atomically; which
worker runs it, and in which order, changes no byte. A worker that dies is replaced and its tasks run again. Where the
tasks run (`data/cluster.py`) is not a stage's concern: whoever calls the stage says it, by `running_on`.
"""

from __future__ import annotations

import atexit
import errno
import importlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gristmill.data.cluster import (
    MEMORY_LIMIT,
    SCHEDULER,
    THREAD_COUNTS,
    asked_for,
    described,
    described_cluster,
    local_cluster,
    read_cluster,
    unchanged_environment,
)
from gristmill.data.dispatch import ClusterLost, Job, WorkerDied, dispatch
from gristmill.data.stage_types import Progress

__all__ = [
    "MEMORY_LIMIT",
    "SCHEDULER",
    "THREAD_COUNTS",
    "ClusterLost",
    "Task",
    "WorkerDied",
    "close_cluster",
    "cluster_client",
    "kept_cluster",
    "remove_work",
    "run_tasks",
    "running_on",
]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SETTLE_SECONDS = 90.0  # a file that another machine wrote may be seen so much later (NFS keeps "not there" for 60 s)
CONNECT_SECONDS = 30.0
CLUSTERS = 3  # local ones, one after another, before it is said that their workers do not stay

_PLACE: ContextVar[str | None] = ContextVar("cluster", default=None)


@dataclass(frozen=True)
class Task:
    """`function(*arguments)` makes `result`; if that file is there, the task is done.

    The function lies at the top of a module that workers can import: it is sent to them by name.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    result: Path


@dataclass(frozen=True)
class _Wanted:
    """What a cluster must be like to be used again: its workers, or where it is."""

    workers: int
    threads_per_worker: int
    place: str | None


class _Cluster:
    """One Dask cluster for the stages of a process that follow each other: starting it costs seconds."""

    lock = threading.RLock()
    client: Any = None
    is_like: _Wanted | None = None
    keepers = 0
    closed_at_exit = False


@contextmanager
def running_on(cluster: str | None) -> Iterator[None]:
    """In this block (and thread), tasks run on this cluster: an address, or the path of a description; None: here.

    Raises:
        ValueError: `cluster` is neither; at the door, before any work.
    """
    if cluster:
        read_cluster(cluster)
    token = _PLACE.set(cluster)
    try:
        yield
    finally:
        _PLACE.reset(token)


def run_tasks(
    tasks: Sequence[Task],
    workers: int,
    progress: Progress,
    done_before: int = 0,
    total: int = 0,
    *,
    threads_per_worker: int = 1,
    cluster: str | None = None,
) -> None:
    """Run the tasks whose results are missing, on `workers` processes (0: in this one).

    Args:
        done_before, total: where these tasks stand in the stage's whole, for its progress.
        threads_per_worker: threads that the libraries inside one worker may use; a worker runs one task at a time.
        cluster: where to run in place of processes here: a scheduler's address, or the path of a description
            (`data/cluster.py`); by default what `running_on` says, else DASK_SCHEDULER_ADDRESS.

    Raises:
        Exception: what a task raised; the others are ended, and this process's workers with them.
        OSError: the disk is full (its errno says so); run again when there is room.
        ClusterLost: the scheduler is gone; run again when it is back.
        WorkerDied: a task ended its worker again and again.
        RuntimeError: a task left no result behind.
    """
    whole = total or len(tasks)
    missing = [t for t in tasks if not t.result.exists()]
    done = done_before + len(tasks) - len(missing)
    progress(done, whole)
    if not missing:
        return
    if workers == 0:
        for task in missing:
            _here(task)
            done += 1
            progress(done, whole)
    else:
        place = asked_for(cluster or _PLACE.get())
        for attempt in range(CLUSTERS):
            left = [t for t in missing if not t.result.exists()]
            done = done_before + len(tasks) - len(left)
            try:
                client = cluster_client(workers, threads_per_worker, place)
                _on_dask(left, client, place, workers, progress, done, whole)
                break
            except ClusterLost:  # all workers here were ended while they started: their nannies give up, so new ones
                if place or attempt == CLUSTERS - 1:
                    raise


def _here(task: Task) -> None:
    try:
        task.function(*task.arguments)
    except OSError as error:
        raise _explained(error, task) from error
    _require(task.result)


def _on_dask(
    missing: Sequence[Task], client: Any, place: str | None, workers: int, progress: Progress, done: int, total: int
) -> None:
    # A task that raises is not tried again (bad input stays bad); one whose worker died is.
    by_name = {str(t.result): t for t in missing}
    jobs = (Job(str(t.result), _run, (*_name(t.function), t.arguments, t.result)) for t in missing)
    running = dispatch(client, jobs, None if place else 2 * workers, memory="" if place else MEMORY_LIMIT)
    try:
        for job, error in running:
            if error is not None:
                raise _explained(error, by_name[job.name]) from error.__cause__
            if not _seen(by_name[job.name].result, SETTLE_SECONDS if place else 0):
                raise RuntimeError(
                    f"a worker wrote {job.name}, which is not to be seen from here: workers and the process that "
                    "starts the run need one shared filesystem, mounted at the same path"
                )
            done += 1
            progress(done, total)
    except BaseException:
        # Cancelling leaves running tasks at work, and whoever tries this stage again would meet them: end them.
        running.close()
        close_cluster()
        raise


def _seen(path: Path, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() >= until:
            return False
        time.sleep(0.5)
        if path.parent.is_dir():
            os.listdir(path.parent)  # makes a network filesystem ask its server again
    return True


def _explained(error: BaseException, task: Task) -> BaseException:
    """A full disk in words; everything else as it is."""
    if isinstance(error, OSError) and error.errno in FULL:
        return OSError(
            error.errno,
            f"{os.strerror(error.errno or 0)}: no room for the task for {task.result}. Make room and run the same "
            "command again: what is done is kept, and only the rest is made",
        )
    return error


def _name(function: Callable[..., Any]) -> tuple[str, str]:
    """Module and name of a function at the top of a module.

    By name, since a worker that receives a function which it cannot import loses its connection, and Dask waits for
    ever; importing it inside the task raises there, and so reaches the caller.
    """
    module, name = function.__module__, function.__qualname__
    if module == "__main__" or not name.isidentifier():
        raise ValueError(f"workers cannot import {name!r} of {module!r}: put it at the top of a module")
    return module, name


def _run(module: str, name: str, arguments: tuple[Any, ...], result: Path) -> None:
    """One task, on a worker; what it returns stays there, its result is its file.

    A task that was done while its worker was taken for dead is not done a second time.
    """
    if not result.exists():
        getattr(importlib.import_module(module), name)(*arguments)
        _require(result)


def _require(result: Path) -> None:
    if not result.exists():
        raise RuntimeError(f"the task for {result} ended without writing it")


def remove_work(work: Path) -> None:
    """Remove the folder of a stage's results, all at once: after a kill, half of them would pass for what is done.

    What a kill left of an earlier removal goes too; its name is that of unfinished work, which no manifest takes in.
    """
    gone = work.with_name(f"{work.name}.tmp")
    shutil.rmtree(gone, ignore_errors=True)
    if work.exists():
        os.replace(work, gone)
        shutil.rmtree(gone, ignore_errors=True)


def cluster_client(workers: int, threads_per_worker: int = 1, cluster: str | None = None) -> Any:
    """The client of this process's cluster: started on first use, and anew when something else is asked for.

    Raises:
        ValueError: `cluster` names no cluster.
        ClusterLost: nobody answers at the scheduler's address.
    """
    from distributed import Client

    logging.getLogger("distributed").setLevel(logging.ERROR)  # what a task raises reaches the caller by itself
    asked = asked_for(cluster)
    place = read_cluster(asked) if asked else None
    wanted = _Wanted(0 if place else workers, threads_per_worker, described(place) if place else None)
    with _Cluster.lock:
        if _Cluster.client is not None and (_Cluster.is_like != wanted or _Cluster.client.status != "running"):
            close_cluster()
        if _Cluster.client is None:
            with unchanged_environment():
                if isinstance(place, str):
                    target = place
                elif place is not None:
                    target = described_cluster(place, threads_per_worker)
                else:
                    target = _started(workers, threads_per_worker)
                try:
                    _Cluster.client = Client(target, timeout=CONNECT_SECONDS)
                except OSError as error:
                    raise ClusterLost(
                        f"no Dask scheduler answers at {asked} ({error}): start it, or correct the address, and run "
                        "again"
                    ) from error
            _Cluster.is_like = wanted
            if not _Cluster.closed_at_exit:
                atexit.register(close_cluster)  # after Dask's import, and so before Dask's own way out
                _Cluster.closed_at_exit = True
        return _Cluster.client


@contextmanager
def kept_cluster() -> Iterator[None]:
    """A cluster that is started in this block serves to its end, and is stopped there; blocks may lie in each other."""
    found = _Cluster.client is not None
    _Cluster.keepers += 1
    try:
        yield
    finally:
        _Cluster.keepers -= 1
        if not found and _Cluster.keepers == 0:
            close_cluster()


def _started(workers: int, threads_per_worker: int) -> Any:
    try:
        return local_cluster(workers, threads_per_worker)
    except RuntimeError as error:
        raise ClusterLost(f"worker processes end while they start ({error}): make room, and run again") from error


def close_cluster() -> None:
    """Stop the cluster of this process, if there is one; a scheduler that was there before is only left."""
    with _Cluster.lock:
        client, _Cluster.client, _Cluster.is_like = _Cluster.client, None, None
        if client is None:
            return
        cluster = client.cluster
        client.close()
        if cluster is not None:
            cluster.close()
