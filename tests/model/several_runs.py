"""Several pretraining runs as one job: the ranks of test_layouts.py start once for all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gristmill.model.signs_of_life import unwatched
from gristmill.model.stage_types import Metrics, Progress
from gristmill.model.training import pretraining
from gristmill.model.training.checkpoints import CheckpointWriter
from gristmill.model.training.engine import start_distributed

BESIDE_THE_STEPS = ("checkpoint", "removal")


class Stopped(Exception):
    """A run was to end here."""


def stopping_at(step: int | None, alive: Callable[[], None] = unwatched) -> Progress:
    """A progress that ends the run when so many steps are done, and till then shows that it is alive.

    It waits at each step for what is written beside the steps: a checkpoint is published by the step after it is
    written, and which one that is must not depend on how fast a disk is.
    """

    def stop(done: int, total: int, **values: float) -> None:
        alive()
        for thread in threading.enumerate():
            if thread.name in BESIDE_THE_STEPS:
                thread.join()
        if done == step:
            raise Stopped

    return stop


def run(job: dict[str, Any], out: Path, device: torch.device, progress: Progress) -> Metrics:
    """Each of `job["runs"]` in a folder of its own below `out`, to its end or to the step at which it is to stop.

    What is watched is the job's own folder, and not the runs'.
    """
    start_distributed(device)
    for name, asked in job["runs"].items():
        for folder in ("log", "work"):
            (out / name / folder).mkdir(parents=True, exist_ok=True)
        with suppress(Stopped):
            pretraining.run(asked["job"], out / name, device, stopping_at(asked["stop_at"], partial(progress, 0, 1)))
        dist.barrier()
    return {}


def run_into_a_save(job: dict[str, Any], out: Path, device: torch.device, progress: Progress) -> Metrics:
    """The run `job["job"]`, which never publishes the checkpoint of step `job["unpublished"]`: it is to be killed."""
    publish = CheckpointWriter.publish

    def held(self: CheckpointWriter) -> None:
        while self._step == job["unpublished"]:
            time.sleep(0.01)
        publish(self)

    CheckpointWriter.publish = held
    return pretraining.run(job["job"], out, device, progress)
