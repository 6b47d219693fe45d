"""Runs independent shard tasks on Dask, and runs again only what is not on disk yet.

A task is a plain function of picklable arguments that writes one marker file when it is done, atomically; which
worker runs it, and in which order, changes no byte. A worker that dies is replaced and its tasks run again.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gristmill.data.stage_types import Progress

THREAD_COUNTS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "POLARS_MAX_THREADS",
)
MEMORY_LIMIT = "2GiB"  # a worker above it is ended and its task run again: one task's shards, numba's compiler at most
SCHEDULER = "DASK_SCHEDULER_ADDRESS"


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
    """What a cluster must be like to be used again: its workers, or its scheduler's address."""

    workers: int
    threads_per_worker: int
    address: str | None


class _Cluster:
    """One Dask cluster for the stages of a process that follow each other: starting it costs seconds."""

    lock = threading.RLock()
    client: Any = None
    is_like: _Wanted | None = None
    closed_at_exit = False


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
        cluster: address of a Dask scheduler to use in place of processes here; DASK_SCHEDULER_ADDRESS by default.

    Raises:
        Exception: what a task raised; the others are ended, and this process's workers with them.
        RuntimeError: a task left no result behind, or ended its worker again and again.
    """
    whole = total or len(tasks)
    missing = [t for t in tasks if not t.result.exists()]
    done = done_before + len(tasks) - len(missing)
    progress(done, whole)
    if workers == 0 or not missing:
        for task in missing:
            task.function(*task.arguments)
            done += 1
            progress(done, whole)
    else:
        _on_dask(missing, cluster_client(workers, threads_per_worker, cluster), progress, done, whole)
    for task in missing:
        if not task.result.exists():
            raise RuntimeError(f"the task for {task.result} ended without writing it")


def _on_dask(missing: list[Task], client: Any, progress: Progress, done: int, total: int) -> None:
    from distributed import KilledWorker, as_completed

    # A task that raises is not tried again (bad input stays bad); one whose worker died is, three times.
    made = {client.submit(_run, *_name(t.function), t.arguments, pure=False): t for t in missing}
    try:
        for future in as_completed(made):
            try:
                future.result()
            except KilledWorker as error:
                raise RuntimeError(
                    f"the task for {made[future].result} ended its worker {error.allowed_failures + 1} times; the "
                    f"usual cause is memory above {MEMORY_LIMIT} a worker: make the documents per shard fewer"
                ) from error
            done += 1
            progress(done, total)
    except BaseException:
        # Cancelling leaves running tasks at work, and whoever tries this stage again would meet them: end them.
        client.cancel(list(made), force=True)
        close_cluster()
        raise


def _name(function: Callable[..., Any]) -> tuple[str, str]:
    """Module and name of a function at the top of a module.

    By name, since a worker that receives a function which it cannot import loses its connection, and Dask waits for
    ever; importing it inside the task raises there, and so reaches the caller.
    """
    module, name = function.__module__, function.__qualname__
    if module == "__main__" or not name.isidentifier():
        raise ValueError(f"workers cannot import {name!r} of {module!r}: put it at the top of a module")
    return module, name


def _run(module: str, name: str, arguments: tuple[Any, ...]) -> None:
    """On a worker: one task. What it returns stays there; its result is its file."""
    getattr(importlib.import_module(module), name)(*arguments)


def cluster_client(workers: int, threads_per_worker: int = 1, cluster: str | None = None) -> Any:
    """The client of this process's cluster: started on first use, and anew when something else is asked for."""
    from distributed import Client

    logging.getLogger("distributed").setLevel(logging.ERROR)  # what a task raises reaches the caller by itself
    address = cluster or os.environ.get(SCHEDULER)
    wanted = _Wanted(workers, threads_per_worker, None) if not address else _Wanted(0, 1, address)
    with _Cluster.lock:
        if _Cluster.client is not None and (_Cluster.is_like != wanted or _Cluster.client.status != "running"):
            close_cluster()
        if _Cluster.client is None:
            _Cluster.client = Client(address or _local_cluster(workers, threads_per_worker))
            _Cluster.is_like = wanted
            if not _Cluster.closed_at_exit:
                atexit.register(close_cluster)  # after Dask's import, and so before Dask's own way out
                _Cluster.closed_at_exit = True
        return _Cluster.client


def _local_cluster(workers: int, threads_per_worker: int) -> Any:
    from distributed import LocalCluster

    scratch = Path(".gristmill/dask").absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    before = dict(os.environ)
    try:
        return LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            memory_limit=MEMORY_LIMIT,
            local_directory=str(scratch),
            env={name: str(threads_per_worker) for name in THREAD_COUNTS} | {"TOKENIZERS_PARALLELISM": "false"},
            silence_logs=logging.ERROR,
            preload=["gristmill.data.worker_watch"],
            # No dashboard; what is left of its HTTP server takes any free port, and not a fixed one with a warning.
            scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
        )
    finally:
        _restore_environment(before)


def _restore_environment(before: dict[str, str]) -> None:
    """Undo what Dask set for its workers in our own environment.

    MALLOC_TRIM_THRESHOLD_ is among it, which halves the speed of a training process that inherits it. Only what changed
    is touched, since other threads read the environment meanwhile.
    """
    for name in set(os.environ) - set(before):
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


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
