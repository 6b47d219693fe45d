"""What the run took and what it would cost: measured times, and estimates from the hardware table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gristmill.flows.cards.folder import StageFolder, is_number
from gristmill.infra.planner import Device, Estimate, HardwareError, estimate, find_device, measured

ELSEWHERE = ("cpu-core", "4090", "A100", "H100", "H200")
V3_FLOPS = 6 * 37e9 * 14.8e12  # DeepSeek-V3's pretraining: 6 · active parameters · tokens (arXiv 2412.19437)


@dataclass(frozen=True)
class StageCost:
    """One stage: what was measured, and the estimate of energy and price that follows from it."""

    name: str
    seconds: float
    bytes: int
    tokens: float | None
    flops: float | None
    device: str
    devices: int  # accelerators, or cores
    estimate: Estimate | None

    @property
    def rate(self) -> float | None:
        """FLOP/s reached, over the whole wall time of the stage."""
        return self.flops / self.seconds if self.flops and self.seconds else None


@dataclass(frozen=True)
class RunCost:
    """All stages and their sums."""

    stages: list[StageCost]
    seconds: float
    device_hours: float
    energy_kwh: float
    cost: float
    flops: float
    devices: list[Device]

    @property
    def v3_share(self) -> float | None:
        """How many such runs DeepSeek-V3's pretraining would pay for, by arithmetic."""
        return V3_FLOPS / self.flops if self.flops else None


def run_cost(folders: Mapping[str, StageFolder]) -> RunCost:
    """The measured cost of all stages that say how long they took."""
    stages = [_stage(f) for f in folders.values() if f.seconds is not None]
    known = [s.estimate for s in stages if s.estimate]
    return RunCost(
        stages,
        seconds=sum(s.seconds for s in stages),
        device_hours=sum(e.device_hours for e in known),
        energy_kwh=sum(e.energy_kwh for e in known),
        cost=sum(e.cost for e in known),
        flops=sum(s.flops or 0 for s in stages),
        devices=[find_device(name) for name in dict.fromkeys(e.device for e in known)],
    )


def elsewhere(flops: float) -> list[tuple[Device, Estimate]]:
    """The arithmetic alone, on one of each device at the table's utilisation: bounds, not predictions."""
    return [(find_device(name), estimate(flops, 0, name)) for name in ELSEWHERE]


def _stage(folder: StageFolder) -> StageCost:
    environment, seconds = folder.environment, float(folder.seconds or 0.0)
    ledger = folder.manifest.get("ledger") or {}
    described = str(ledger.get("device") or environment.get("hardware") or environment.get("device") or "cpu")
    tokens, flops = folder.metrics.get("tokens"), folder.metrics.get("flops")
    try:
        device = find_device(described)
    except HardwareError:
        device = None
    count = int(ledger.get("devices") or _count(environment, device))
    return StageCost(
        folder.name,
        seconds,
        folder.content_bytes,
        tokens if is_number(tokens) else None,
        flops if is_number(flops) else None,
        described,
        count,
        measured(seconds, device, count=count) if device else None,
    )


def _count(environment: Mapping[str, Any], device: Device | None) -> int:
    """Accelerators, or cores: ranks times threads."""
    ranks = int(environment.get("ranks") or 1)
    cores = device is not None and device.kind == "core"
    return ranks * int(environment.get("threads") or 1) if cores else ranks


def made_earlier(folders: Mapping[str, StageFolder], gap_seconds: float = 120.0) -> set[str]:
    """Stages whose work was not of the latest run, as far as the manifests' times tell.

    Going back from the stage that ended last, the run reaches as far as no gap between stages is longer than
    `gap_seconds`: what was finished before such a gap was found in the store.
    """
    spans = []
    for name, folder in folders.items():
        begun = _timestamp(folder.manifest.get("started"))
        if begun is not None and folder.seconds is not None:
            spans.append((begun, begun + folder.seconds, name))
    earlier: set[str] = set()
    reached = math.inf
    for begun, ended, name in sorted(spans, key=lambda span: -span[1]):
        if earlier or (reached is not math.inf and ended < reached - gap_seconds):
            earlier.add(name)
        else:
            reached = min(reached, begun)
    return earlier


def _timestamp(value: object) -> float | None:
    """Seconds since 1970 of a manifest's time: a number, or ISO 8601."""
    from datetime import datetime

    if is_number(value):
        return float(value)
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp()
        except ValueError:
            return None
    return None
