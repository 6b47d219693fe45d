"""Jobs in the test's own process: one with torch and DeepSpeed takes seconds to start, and most tests are not of that."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gristmill.model.training.engine import start_distributed

STAGES = ("pretrain", "sft", "extend", "hub", "traces")


@contextmanager
def only_rank() -> Iterator[None]:
    """This process is the only rank of a job."""
    told = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    mode = torch.get_deterministic_debug_mode()
    with pytest.MonkeyPatch.context() as patched:
        for name, value in told.items():
            patched.setenv(name, value)
        torch.set_deterministic_debug_mode("warn")
        try:
            start_distributed(torch.device("cpu"))
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)


@contextmanager
def jobs_here() -> Iterator[None]:
    """Stages of one rank run their jobs in this process; what a job raises is not made a `JobFailed`."""
    with only_rank(), pytest.MonkeyPatch.context() as patched:
        for stage in STAGES:
            patched.setattr(f"gristmill.model.{stage}.launch", _launch_here)
        yield


def _launch_here(
    entry: str,
    job: dict[str, Any],
    out: Path,
    *,
    threads: int,
    device: str,
    progress: Any,
    ranks: int | None = None,
    layout: Any = None,
) -> dict[str, Any]:
    assert (threads, ranks or 1) == (1, 1)
    for folder in (out / "log", out / "work"):
        folder.mkdir(parents=True, exist_ok=True)
    module, _, function = entry.partition(":")
    run = getattr(importlib.import_module(module), function)
    metrics = run(json.loads(json.dumps(job)), out, torch.device(device), progress)
    shutil.rmtree(out / "work")
    return metrics
