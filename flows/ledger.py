"""What a stage cost: tokens, operations, device-hours, and estimates of energy and price."""

from __future__ import annotations

from typing import Any

from gristmill.flows.execution import Execution
from gristmill.infra.planner import HardwareError, find_device


def ledger_line(manifest: dict[str, Any], execution: Execution, services: list[str]) -> dict[str, Any]:
    """One line of the ledger.

    A device-hour is one accelerator's hour, or one core's. Only what a stage asked for is charged to it: one that
    asked for no device holds cores alone. Energy and price are estimates from the hardware table.
    """
    name = manifest["environment"]["device"] if "device" in services else "cpu"
    try:
        device = find_device(name)
    except HardwareError:
        device = None
    ranks = execution.ranks if "ranks" in services else 1
    if device is None or device.kind == "gpu":
        devices = ranks
    else:
        devices = max(ranks * execution.threads if "threads" in services else 1, _workers(execution, services))
    hours = manifest["work_seconds"] / 3600 * devices
    watts = _first(execution.watts, device.watts if device else 0.0)
    price = _first(execution.price_per_device_hour, device.price_per_hour if device else 0.0)
    metrics = manifest["metrics"]
    return {
        "stage": manifest["stage"],
        "key": manifest["key"],
        "started": manifest["started"],
        "seconds": manifest["seconds"],
        "work_seconds": manifest["work_seconds"],
        "attempts": manifest["attempts"],
        "tokens": metrics.get("tokens"),
        "flops": metrics.get("flops"),
        "device": device.name if device else name,
        "devices": devices,
        "device_hours": round(hours, 6),
        "estimated_kwh": round(hours * watts / 1000, 6),
        "estimated_cost_usd": round(hours * price, 6),
    }


def _first(asked: float | None, otherwise: float) -> float:
    return otherwise if asked is None else asked


def _workers(execution: Execution, services: list[str]) -> int:
    return max(1, execution.workers) if "workers" in services else 1
