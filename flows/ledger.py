"""What a stage cost: tokens, operations, device-hours, and estimates of energy and price."""

from __future__ import annotations

from typing import Any

from gristmill.flows.execution import Execution


def ledger_line(manifest: dict[str, Any], execution: Execution) -> dict[str, Any]:
    """One line of the ledger. Energy and price are estimates from infra/hardware.yaml, and say so."""
    from gristmill.infra.planner import load_hardware

    row = load_hardware()[execution.hardware]
    devices = max(1, execution.ranks) * (execution.threads if execution.hardware == "cpu-core" else 1)
    hours = manifest["seconds"] / 3600 * devices
    metrics = manifest["metrics"]
    return {
        "stage": manifest["stage"],
        "key": manifest["key"],
        "started": manifest["started"],
        "seconds": manifest["seconds"],
        "attempts": manifest["attempts"],
        "tokens": metrics.get("tokens"),
        "flops": metrics.get("flops"),
        "device": execution.hardware,
        "devices": devices,
        "device_hours": round(hours, 6),
        "estimated_kwh": round(hours * row.watts / 1000, 6),
        "estimated_cost_usd": round(hours * row.price_per_hour, 6),
    }
