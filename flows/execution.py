"""Where and how a run happens; never part of a key, because no byte of a result depends on it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from functools import cache
from importlib import metadata
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from gristmill.infra.planner import find_device
from gristmill.model.training.config import LayoutConfig

RECORDED = ("torch", "deepspeed", "triton", "numpy", "tokenizers", "datatrove", "dask", "transformers")


def _cores() -> int:
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)


class Execution(BaseModel):
    """Workers, threads, device, retries and price of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: int = Field(
        default_factory=_cores,
        ge=0,
        le=1024,
        title="Workers",
        description="Dask worker processes for the corpus stages; 0 works in the run's own process.",
    )
    cluster: str | None = Field(
        default=None,
        title="Cluster",
        description="Dask scheduler address, or path of a cluster's description (Slurm, Kubernetes), for the corpus "
        "stages; none starts workers here.",
    )
    threads: int = Field(
        default_factory=_cores,
        ge=1,
        le=1024,
        title="Threads",
        description="Threads of a training process. Another number rounds sums otherwise: the manifest records it.",
    )
    ranks: int = Field(
        default=1, ge=1, le=4096, title="Ranks", description="Data-parallel training processes; recorded likewise."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", title="Device", description="auto takes CUDA where it is."
    )
    layout: LayoutConfig = Field(
        default_factory=LayoutConfig,
        title="Layout",
        description="How training is laid out over its processes; recorded likewise.",
    )
    retries: int = Field(
        default=0, ge=0, le=20, title="Retries", description="How often a failed stage is tried again."
    )
    hardware: str = Field(
        default="cpu-core", title="Hardware", description="Row of infra/hardware.yaml for the estimates."
    )
    price_per_device_hour: float | None = Field(
        default=None, ge=0, title="Price", description="US dollars a device-hour, in place of the table's."
    )
    watts: float | None = Field(
        default=None, ge=0, title="Power", description="Watts a device, in place of the table's."
    )

    @field_validator("cluster")
    @classmethod
    def _is_one(cls, cluster: str | None) -> str | None:
        if cluster is not None:
            from gristmill.data.cluster import read_cluster

            read_cluster(cluster)
        return cluster

    @field_validator("hardware")
    @classmethod
    def _in_the_table(cls, name: str) -> str:
        find_device(name)
        return name

    @property
    def device_name(self) -> str:
        """The device in words of the hardware table: the accelerator where one is used, else the named row."""
        if self.hardware != "cpu-core":
            return self.hardware
        return "cpu" if self.device == "cpu" else accelerator() or "cpu"


@cache
def accelerator() -> str | None:
    """The name of the first CUDA device, asked of the driver and not of torch, whose import takes seconds."""
    if shutil.which("nvidia-smi") is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    names = found.stdout.splitlines() if found.returncode == 0 else []
    return names[0].strip() if names else None


def environment(execution: Execution) -> dict[str, Any]:
    """What the bytes of a result may depend on to rounding: recorded, never in a key."""
    versions = {}
    for package in RECORDED:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "torch": versions.get("torch"),
        "device": execution.device_name,
        "workers": execution.workers,
        "threads": execution.threads,
        "ranks": execution.ranks,
        "layout": execution.layout.model_dump(mode="json"),
        "versions": versions,
    }
