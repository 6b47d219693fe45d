"""The profile of chosen steps (`LayoutConfig.profile`), taken by `torch.profiler` on the first rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

OPERATORS = 20  # of the table beside the trace


@contextmanager
def profiled(step: int, log: Path, device: torch.device, before_export: Callable[[], None]) -> Iterator[None]:
    """Leave `profile-step-….json.gz`, a Chrome trace, and a table of the costliest operators in `log`.

    `before_export` is called before the events are gathered and written, which takes minutes for a large model.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as taken:
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        before_export()
    name = f"profile-step-{step:04d}"
    taken.export_chrome_trace(str(log / f"{name}.json.gz"))
    order = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    table = taken.key_averages().table(sort_by=order, row_limit=OPERATORS)
    (log / f"{name}.txt").write_text(table, encoding="utf-8")
