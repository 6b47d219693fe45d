"""Where and how a run happens; never part of a key, because no byte of a result depends on it."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Execution(BaseModel):
    """Workers, threads, device, retries and price of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: int = Field(
        default_factory=lambda: min(os.cpu_count() or 1, 8),
        ge=0,
        title="Workers",
        description="Dask worker processes for the corpus stages; 0 works in the run's own process.",
    )
    threads: int = Field(
        default_factory=lambda: min(os.cpu_count() or 1, 8),
        ge=1,
        title="Threads",
        description="Threads of a training process. Another number rounds sums otherwise: the manifest records it.",
    )
    ranks: int = Field(
        default=1, ge=1, title="Ranks", description="Data-parallel training processes; recorded likewise."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", title="Device", description="auto takes CUDA where it is."
    )
    retries: int = Field(
        default=0, ge=0, le=20, title="Retries", description="How often a failed stage is tried again."
    )
    hardware: str = Field(
        default="cpu-core", title="Hardware", description="Row of infra/hardware.yaml for the estimates."
    )
