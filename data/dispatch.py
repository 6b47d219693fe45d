"""Keeps a bounded number of jobs in flight on a Dask cluster, and submits again what a fault took from it.

The scheduler holds what is in flight and no more, so a hundred thousand jobs cost it as much as a hundred. A worker
that dies gives its jobs back; a connection that is lost is waited for; a job that ends its worker again and again,
and a scheduler that stays away, are told to the caller.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from gristmill.data.cluster import Revival

LOG = logging.getLogger(__name__)
QUEUED = 2  # jobs in flight for a thread: the one at work and the next, so that no worker waits for this process
FEWEST = 8  # jobs in flight where no worker has come yet: an adaptive cluster starts workers for what it sees
ROUNDS = 2  # Dask blames every job a dead worker held, those that only waited there too: a second round clears them
CANCELS = 10  # restarts of the whole cluster, and lost connections, that one job is submitted again after
TICK = 1.0  # seconds between looks at the cluster while nothing ends
COUNT = 5.0  # seconds between counts of the workers
GONE = 15.0  # seconds without any worker process on this machine before the cluster counts as lost
PATIENCE = 60.0  # seconds without any worker before it is said


class ClusterLost(RuntimeError):
    """The scheduler is gone, or has no workers left; what is done stays done."""


class WorkerDied(RuntimeError):
    """A job ended its worker again and again."""


@dataclass(frozen=True)
class Job:
    """`function(*arguments)` on some worker; run twice it must do no harm. `name` is for people."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def dispatch(
    client: Any, jobs: Iterable[Job], most: int | None = None, *, memory: str = ""
) -> Generator[tuple[Job, BaseException | None], None, None]:
    """Run the jobs; each is given back as it ends, with what it raised.

    Whoever stops taking (an exception, `close`) cancels what is in flight; what runs already is not ended by that.

    Args:
        client: a `distributed.Client`.
        jobs: taken one by one as there is room.
        most: jobs in flight at once; by default two for each thread the cluster has at the time.
        memory: a worker's limit, for the message about a job that ends its workers.

    Raises:
        ClusterLost: the scheduler went away and did not come back, or all processes of a local cluster are gone.
    """
    flight = _Flight(client, most)
    waiting = iter(jobs)
    try:
        while True:
            while flight.has_room() and (job := next(waiting, None)) is not None:
                flight.submit(job, 1, 0)
            if not flight.held:
                return
            yield from flight.landed(memory)
    finally:
        flight.cancel()


class _Flight:
    """The jobs that the scheduler knows of."""

    def __init__(self, client: Any, most: int | None) -> None:
        self.client = client
        self.address = str(client.scheduler.address)  # the client forgets it when it is closed
        self.most = most
        self.held: dict[Any, tuple[Job, int, int]] = {}
        self._ended: SimpleQueue[Any] = SimpleQueue()
        self._threads, self._counted = 0, 0.0
        local = type(client.cluster).__name__ == "LocalCluster"
        self._revival = Revival(client.cluster) if local else None
        self._revived = 0.0
        self._alone_since: float | None = None  # since when there has been no worker
        self._told = False

    def has_room(self) -> bool:
        return len(self.held) < (self.most or max(FEWEST, QUEUED * self._count()))

    def submit(self, job: Job, round_: int, cancels: int) -> None:
        self._wait_for_connection()
        future = self.client.submit(job.function, *job.arguments, pure=False)
        self.held[future] = (job, round_, cancels)
        future.add_done_callback(self._ended.put)

    def landed(self, memory: str) -> Iterator[tuple[Job, BaseException | None]]:
        """Wait a moment for a job to end; what a fault took is submitted again."""
        from distributed import CancelledError, KilledWorker

        if self._revival is not None and time.monotonic() - self._revived >= TICK:
            self._revived = time.monotonic()
            self._revival.look()
        try:
            future = self._ended.get(timeout=TICK)
        except Empty:
            self._look()
            return
        self._alone_since = None
        job, round_, cancels = self.held.pop(future)
        error = _error(future)
        if isinstance(error, KilledWorker):
            if round_ < ROUNDS:
                self.submit(job, round_ + 1, cancels)
                return
            error = _died(job, ROUNDS * (error.allowed_failures + 1), memory, error)
        elif isinstance(error, CancelledError) and cancels < CANCELS:
            self._wait_for_connection()
            self.submit(job, round_, cancels + 1)
            return
        yield job, error

    def cancel(self) -> None:
        if self.held and self.client.status == "running":
            self.client.cancel(list(self.held), force=True)
        self.held.clear()

    def _wait_for_connection(self) -> None:
        """Dask's client connects anew by itself for a while (`distributed.comm.timeouts.connect`), then closes."""
        while self.client.status != "running":
            if self.client.status in ("closed", "closing"):
                raise ClusterLost(
                    f"the Dask scheduler at {self.address} is gone: start it again and run the same command again; "
                    "what is done is kept, and only the rest is made"
                )
            time.sleep(0.1)

    def _look(self) -> None:
        """Nothing ended for a moment: is anybody at work?"""
        self._wait_for_connection()
        if self._count() or (self._revival is not None and self._revival.at_work()):
            self._alone_since, self._told = None, False
            return
        now = time.monotonic()
        self._alone_since = now if self._alone_since is None else self._alone_since
        if now - self._alone_since < (GONE if self._revival else PATIENCE) or self._told:
            return
        if self._revival is not None:
            raise ClusterLost(
                "all worker processes are gone and none came back (memory of the machine, or the disk of "
                ".gristmill/dask, is full?): make room and run again, what is done is kept"
            )
        LOG.warning(
            "no worker has been at %s for %.0f s: the run waits; look at the cluster's own queue and logs",
            self.address,
            PATIENCE,
        )
        self._told = True

    def _count(self) -> int:
        """Threads of all workers, counted now and then; also while the scheduler is away, as they were."""
        now = time.monotonic()
        if now - self._counted >= COUNT and self.client.status == "running":
            self._counted = now
            try:
                self._threads = sum(self.client.nthreads().values())
            except OSError:  # the connection broke under the question; the jobs in flight will tell
                return self._threads
        return self._threads


def _error(future: Any) -> BaseException | None:
    """What the job raised. What it returned is not fetched: its files are its result."""
    from distributed import CancelledError

    status = future.status
    if status == "finished":
        return None
    error = future.exception(timeout=30) if status == "error" else None
    # Cancelled with its connection or its cluster; or lost: done, and then its worker died, the note of it with it.
    return error.with_traceback(future.traceback(timeout=30)) if error is not None else CancelledError(future.key)


def _died(job: Job, times: int, memory: str, cause: BaseException) -> WorkerDied:
    limit = f"memory above {memory} a worker" if memory else "memory above a worker's limit"
    error = WorkerDied(
        f"the task for {job.name} ended its worker {times} times; the usual cause is {limit}: "
        "make the documents per shard fewer, or give workers more"
    )
    error.__cause__ = cause
    return error
