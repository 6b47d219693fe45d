"""datatrove's pipelines on Dask: any list of its steps, and of a user's own, unchanged.

    DaskPipelineExecutor(
        pipeline=[JsonlReader("in"), GopherQualityFilter(), JsonlWriter("out")],
        tasks=1000, logging_dir="logs", cluster="tcp://10.0.0.1:8786",
    ).run()

The interface and the logging folder are those of datatrove's own executors, so its tools (`merge_stats`,
`failed_logs`, `jobs_status`) read it: completions/<rank>, logs/task_<rank>.log (written while the task runs),
stats/<rank>.json, stats.json and executor.json. Tasks of killed workers run again, and end in the bytes they would
have had: see `data/staging.py` for what becomes of their files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import cloudpickle
from datatrove.executor.base import DistributedEnvVars, PipelineExecutor
from datatrove.io import DataFolderLike
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger
from datatrove.utils.stats import PipelineStats

from gristmill.data.cluster import MEMORY_LIMIT, asked_for
from gristmill.data.dispatch import Job, dispatch
from gristmill.data.executor import FULL, cluster_client, kept_cluster
from gristmill.data.stage_types import Progress
from gristmill.data.staging import Staging, staged_outputs

SHOWN = 3  # failed tasks named in the error
POLL_SECONDS = 5.0  # between looks at a dependency that another process runs
SAID_EVERY = 10.0  # seconds between lines of progress in this process's log

_ALONE = threading.Lock()  # datatrove's log and environment belong to a whole process: one task at a time in each


class PipelineFailed(RuntimeError):
    """Tasks of a pipeline failed; `ranks` says which, their logs why."""

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class DaskPipelineExecutor(PipelineExecutor):
    """Runs a datatrove pipeline on Dask.

    Args:
        pipeline: datatrove steps, functions of (data, rank, world_size), or lists of documents.
        tasks: into how many parts the input is divided; decides the bytes.
        workers: how many tasks run at once; -1 for as many as the cluster, or this machine, has cores.
        logging_dir: where logs, statistics and completions go; a folder that workers see too.
        depends: an executor that runs, or has run, before this one; of any kind, chains as well.
        skip_completed: run only tasks without a completion mark.
        local_tasks, local_rank_offset: run only the tasks [offset, offset + local_tasks); -1 for all.
        randomize_start_duration: seconds at most by which each task waits before it starts.
        cluster: where to run. None: DASK_SCHEDULER_ADDRESS, else processes here that end with `run`. A scheduler's
            address, or the path of a description (`data/cluster.py`). Or an object: a `distributed.Client`, or a
            cluster that has a scheduler (LocalCluster, SLURMCluster, KubeCluster); both are left running.
        stop_after: after so many failed tasks no more are started; those at work end, and are kept.
        progress: called with (tasks done, all tasks).

    Raises:
        ValueError: the tasks to run lie beyond all tasks, or there are none.
    """

    def __init__(
        self,
        pipeline: list[PipelineStep | Callable],
        tasks: int = 1,
        workers: int = -1,
        logging_dir: DataFolderLike = None,  # type: ignore[assignment]  # datatrove's own default
        depends: PipelineExecutor | None = None,
        skip_completed: bool = True,
        local_tasks: int = -1,
        local_rank_offset: int = 0,
        randomize_start_duration: int = 0,
        *,
        cluster: Any = None,
        stop_after: int = 10,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(pipeline, logging_dir, skip_completed, randomize_start_duration)
        self.tasks = tasks
        self.workers = workers
        self.local_tasks = local_tasks if local_tasks != -1 else tasks - local_rank_offset
        self.local_rank_offset = local_rank_offset
        self.depends = depends
        self.cluster = cluster
        self.stop_after = stop_after
        self.progress = progress
        self._launched = False
        self._staging: Staging | None = None
        if tasks < 1 or (workers < 1 and workers != -1):
            raise ValueError(f"tasks is {tasks} and workers {workers}: give 1 or more of each, or -1 workers for all")
        if not 0 <= local_rank_offset < tasks or not 1 <= self.local_tasks <= tasks - local_rank_offset:
            raise ValueError(
                f"tasks {local_rank_offset} to {local_rank_offset + self.local_tasks} are asked for, of {tasks} in all"
            )

    @property
    def world_size(self) -> int:
        return self.tasks

    def get_distributed_env(self, node_rank: int = -1) -> DistributedEnvVars:
        return DistributedEnvVars(
            datatrove_node_ips="localhost",
            datatrove_cpus_per_task="1",
            datatrove_mem_per_cpu="-1",
            datatrove_gpus_on_node="-1",
            datatrove_executor="DASK",
        )

    def __getstate__(self) -> dict[str, Any]:
        """What a worker needs: neither the executors before this one, nor the cluster, nor who watches."""
        return self.__dict__ | {"depends": None, "cluster": None, "progress": None}

    def run(self) -> PipelineStats:
        """Run what is not complete; the statistics of all complete tasks, whichever run made them.

        Raises:
            PipelineFailed: tasks raised, or ended their workers again and again; the others are complete.
            ClusterLost: the scheduler is gone. Run again: complete tasks are not run again.
            OSError: the disk is full. Make room, and run again.
        """
        with kept_cluster():
            self._wait_for_dependency()
            self._launched = True
            ranks = range(self.local_rank_offset, self.local_rank_offset + self.local_tasks)
            waiting = self.get_incomplete_ranks(ranks)
            logger.info(f"{len(waiting)} of {self.local_tasks} tasks are to be run")
            if waiting:
                self.save_executor_as_json()
                with self._client() as client:
                    self._run_on(client, waiting)
        return self._merged_stats()

    def run_staged(self, rank: int, task: str) -> None:
        """One task, on a worker; `task` names it among all that write to the same folders."""
        with staged_outputs(task, secrets.token_hex(4), apart=self.logging_dir) as self._staging:
            self._run_for_rank(rank, local_rank=1)  # 0 would print every task's log to the console

    def mark_rank_as_completed(self, rank: int) -> None:
        """After the task's files: a mark never stands for less than all of them."""
        if self._staging is not None:
            self._staging.end(whole=True)
        super().mark_rank_as_completed(rank)

    def _wait_for_dependency(self) -> None:
        if self.depends is None:
            return
        failed_before = isinstance(self.depends, DaskPipelineExecutor) and self.depends.get_incomplete_ranks()
        if failed_before or not getattr(self.depends, "_launched", False):
            self.depends.run()
        while left := len(self.depends.get_incomplete_ranks(skip_completed=True)):
            logger.info(f"waiting for {left} of {self.depends.world_size} tasks of {self.depends.logging_dir.path}")
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _client(self) -> Iterator[Any]:
        from distributed import Client

        if self.cluster is None or isinstance(self.cluster, str):
            yield cluster_client(self.workers if self.workers != -1 else _cores(), cluster=self.cluster)
        elif isinstance(self.cluster, Client):
            yield self.cluster
        else:
            with Client(self.cluster, set_as_default=False) as client:
                yield client

    def _run_on(self, client: Any, ranks: Sequence[int]) -> None:
        payload = _pickled(self)
        task = hashlib.sha256(str(self.logging_dir.resolve_paths("")).encode()).hexdigest()[:8]
        here = Path.cwd().as_posix()
        script = getattr(sys.modules["__main__"], "__file__", None)
        folder = str(Path(script).absolute().parent) if script else here
        failed: dict[int, BaseException] = {}

        def jobs() -> Iterator[Job]:
            for rank in ranks:
                if len(failed) >= self.stop_after:
                    return
                yield Job(f"rank {rank}", _run_rank, (payload, rank, f"{task}-{rank:05d}", here, folder))

        local = self.cluster is None and asked_for(None) is None
        most = self.workers if self.workers != -1 else _cores() if local else None
        said, done = time.monotonic(), self.local_tasks - len(ranks)
        self._tell(done)
        for job, error in dispatch(client, jobs(), most, memory=MEMORY_LIMIT if local else ""):
            if isinstance(error, OSError) and error.errno in FULL:
                raise self._no_room(job, error) from error
            if error is not None:
                failed[job.arguments[1]] = error
                continue
            done += 1
            self._tell(done)
            if time.monotonic() - said >= SAID_EVERY or done == self.local_tasks:
                logger.info(f"{done}/{self.local_tasks} tasks completed.")
                said = time.monotonic()
        if failed:
            raise self._failure(failed)

    def _tell(self, done: int) -> None:
        if self.progress is not None:
            self.progress(done, self.local_tasks)

    def _no_room(self, job: Job, error: OSError) -> OSError:
        return OSError(
            error.errno,
            f"{os.strerror(error.errno or errno.ENOSPC)}: no room for {job.name}. Make room and run the pipeline "
            "again: complete tasks are not run again",
        )

    def _failure(self, failed: dict[int, BaseException]) -> PipelineFailed:
        shown = "; ".join(
            f"rank {rank}: {type(error).__name__}: {error} "
            f"(log: {self.logging_dir.resolve_paths(f'logs/task_{rank:05d}.log')})"
            for rank, error in sorted(failed.items())[:SHOWN]
        )
        more = f"; and {len(failed) - SHOWN} more" if len(failed) > SHOWN else ""
        message = f"{len(failed)} of {self.local_tasks} tasks failed; run again when that is mended. {shown}{more}"
        failure = PipelineFailed(message, sorted(failed))
        failure.__cause__ = failed[min(failed)]
        return failure

    def _merged_stats(self) -> PipelineStats:
        """stats.json: the sum over all complete tasks, as datatrove's `merge_stats` would make it.

        From the tasks' files, not from what this run's tasks returned: after a restart those are not all.
        """
        complete = set(range(self.tasks)) - set(self.get_incomplete_ranks(skip_completed=True))
        told = set(self.logging_dir.list_files("stats"))
        merged = PipelineStats()
        for rank in sorted(complete):
            if f"stats/{rank:05d}.json" not in told:
                logger.warning(f"task {rank} is complete, but its statistics are gone: they are missing in the sum")
                continue
            with self.logging_dir.open(f"stats/{rank:05d}.json", "r") as file:
                merged = merged + PipelineStats.from_json(json.load(file))
        with self.logging_dir.open("stats.json", "wt") as file:
            merged.save_to_disk(file)
        logger.success(merged.get_repr(f"{len(complete)} of {self.tasks} tasks"))
        return merged


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pickled(executor: DaskPipelineExecutor) -> bytes:
    """The executor, with the code of what workers cannot import: scripts' own steps, lambdas, notebooks' classes.

    cloudpickle does so for `__main__` by itself. A module that was loaded by path is in no folder of `sys.path`.
    """
    found = {
        module
        for step in executor.pipeline
        for thing in (step, type(step), *getattr(step, "__dict__", {}).values())  # a list of documents has none
        for module in (sys.modules.get(getattr(thing, "__module__", None) or ""),)
        if module is not None and module.__name__ != "__main__" and not _importable(module.__name__)
    }
    for module in found:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(executor)
    finally:
        for module in found:
            cloudpickle.unregister_pickle_by_value(module)


def _importable(name: str) -> bool:
    top = name.partition(".")[0]
    return top in sys.builtin_module_names or PathFinder.find_spec(top) is not None


def _run_rank(payload: bytes, rank: int, task: str, here: str, folder: str) -> None:
    """On a worker: one task, in the folder where the run was started (if there), so that relative paths hold."""
    if folder not in sys.path:
        sys.path.append(folder)  # modules beside the script
    with _ALONE:
        if Path(here).is_dir():
            os.chdir(here)
        # Steps are code of the user's own: they come as every Dask task comes, by pickle from the client's scheduler.
        executor: DaskPipelineExecutor = cloudpickle.loads(payload)
        executor.run_staged(rank, task)
