"""A stage of the corpus made small: what the faults are tried on. Workers import it, so it lies in no test file."""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path

from gristmill.data.documents import Row, shards
from gristmill.data.executor import Task, run_tasks
from gristmill.data.sieve import KEEP, Edit, Verdict, conclude, remove, sieve_shard, tally_path
from gristmill.data.stage_types import Metrics, Progress


def sieve(documents: Path, out: Path, seconds: float, *, workers: int, progress: Progress) -> Metrics:
    """Removes a fifth of the documents, changes a fifth, and takes `seconds` for each."""
    found = shards(documents)
    tasks = [Task(sieve_one, (shard, out, seconds), tally_path(out, shard)) for shard in found]
    run_tasks(tasks, workers, progress)
    metrics = conclude(out, found)
    shutil.rmtree(out / "work")
    return metrics


def sieve_one(shard: Path, out: Path, seconds: float) -> None:
    """One shard."""

    def judge(row: Row, place: int) -> Verdict:
        time.sleep(seconds)
        draw = hashlib.sha256(row["id"].encode()).digest()[0] % 5
        if draw == 0:
            return remove("drawn: zero", detail=str(place))
        return Verdict(edits=[Edit(0, 4, "drawn: one", "XXXX")]) if draw == 1 else KEEP

    sieve_shard(shard, out, judge)


def keep_all(shard: Path, out: Path) -> None:
    """One shard, every document kept."""
    sieve_shard(shard, out, lambda row, place: KEEP)


def hold(size: int, result: Path) -> None:
    """Holds so many bytes of memory for a moment."""
    held = bytearray(size)
    time.sleep(2)
    result.write_text(str(len(held)))


def touch(result: Path) -> None:
    """The least a task can do."""
    result.touch()


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
