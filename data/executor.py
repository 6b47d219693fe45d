"""Runs independent shard tasks on Dask, and runs again only what is not on disk yet.

A task is a plain function of picklable arguments that writes one marker file when it is done, atomically; which
worker runs it, and in which order, changes no byte. A worker that dies is replaced and its tasks run again.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gristmill.data.stage_types import Progress

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "POLARS_MAX_THREADS": "1",
}
MEMORY_LIMIT = "1GiB"


@dataclass(frozen=True)
class Task:
    """`function(*arguments)` makes `result`; if that file is there, the task is done."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    result: Path


class _Cluster:
    """One Dask cluster for the stages of a process that follow each other: starting it costs seconds."""

    client: Any = None
    workers = 0


def run_tasks(tasks: Sequence[Task], workers: int, progress: Progress, done_before: int = 0, total: int = 0) -> None:
    """Run the tasks whose results are missing, on `workers` processes (0: in this one).

    Args:
        done_before, total: where these tasks stand in the stage's whole, for its progress.

    Raises:
        Exception: what a task raised, after the others were cancelled.
        RuntimeError: a task left no result behind.
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
        _on_dask(missing, workers, progress, done, whole)
    for task in missing:
        if not task.result.exists():
            raise RuntimeError(f"the task for {task.result} ended without writing it")


def _on_dask(missing: list[Task], workers: int, progress: Progress, done: int, total: int) -> None:
    from distributed import as_completed

    client = cluster_client(workers)
    futures = [client.submit(t.function, *t.arguments, pure=False, retries=3) for t in missing]
    try:
        for future in as_completed(futures):
            future.result()
            done += 1
            progress(done, total)
    finally:
        client.cancel(futures)


def cluster_client(workers: int) -> Any:
    """The client of this process's cluster, started on first use; DASK_SCHEDULER_ADDRESS names one that exists."""
    from distributed import Client, LocalCluster

    logging.getLogger("distributed").setLevel(logging.ERROR)  # what a task raises reaches the caller by itself
    if _Cluster.client is not None and _Cluster.workers != workers:
        close_cluster()
    if _Cluster.client is None:
        address = os.environ.get("DASK_SCHEDULER_ADDRESS")
        if address:
            _Cluster.client = Client(address)
        else:
            scratch = Path(".gristmill/dask").absolute()
            scratch.mkdir(parents=True, exist_ok=True)
            before = dict(os.environ)
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                dashboard_address=None,  # type: ignore[arg-type]  # Dask documents None as "no dashboard"
                memory_limit=MEMORY_LIMIT,
                local_directory=str(scratch),
                env=ONE_THREAD,
                silence_logs=40,
                preload=["gristmill.data.worker_watch"],
            )
            # Dask leaves its workers' environment in ours (MALLOC_TRIM_THRESHOLD_ among it, which halves the speed of
            # a training process that inherits it).
            os.environ.clear()
            os.environ.update(before)
            _Cluster.client = Client(cluster)
        _Cluster.workers = workers
        atexit.register(close_cluster)
    return _Cluster.client


def close_cluster() -> None:
    """Stop the cluster of this process, if there is one."""
    client, _Cluster.client = _Cluster.client, None
    if client is not None:
        cluster = client.cluster
        client.close()
        if cluster is not None:
            cluster.close()
