"""Estimates before anything runs: how long, how much energy, what price.

The numbers come from `hardware.yaml`. They are estimates: a roofline (the slower of arithmetic and memory
traffic) at the share of the peak that training reaches in practice, never a promise.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

TABLE = Path(__file__).with_name("hardware.yaml")
PRECISIONS = ("bf16", "fp32", "fp8")


class HardwareError(ValueError):
    """The hardware table or a question to it is wrong; the message says what, where and what to do."""


@dataclass(frozen=True)
class Device:
    """A row of the hardware table: one accelerator, or one core of a processor."""

    name: str
    aliases: tuple[str, ...]
    kind: str  # "gpu" or "core"
    peak_tflops: dict[str, float]  # dense, by precision
    memory_gib: float
    bandwidth_gb_per_s: float
    watts: float
    utilisation: float  # share of the peak that training reaches, 0 to 1
    price_per_hour: float  # US dollars
    price_source: str
    seen: str
    source: str

    def peak(self, precision: str = "bf16") -> float:
        """Peak FLOP/s in `precision`; a device without it is taken at bf16, else at fp32.

        Raises:
            HardwareError: the precision is none of bf16, fp32, fp8.
        """
        if precision not in PRECISIONS:
            raise HardwareError(f"precision {precision!r} is unknown: choose one of {', '.join(PRECISIONS)}")
        tflops = self.peak_tflops.get(precision) or self.peak_tflops.get("bf16") or self.peak_tflops["fp32"]
        return tflops * 1e12


@dataclass(frozen=True)
class Estimate:
    """What some work would take on `count` devices of one kind."""

    device: str
    count: int
    seconds: float
    energy_kwh: float
    cost: float  # US dollars
    bound: str  # "arithmetic" or "memory": which of the two decides the time

    @property
    def device_hours(self) -> float:
        return self.seconds * self.count / 3600


@cache
def load_hardware(path: Path = TABLE) -> dict[str, Device]:
    """The devices of a hardware table by name, in its order.

    Raises:
        HardwareError: a row lacks a field, has one too many, or a number is not positive.
    """
    table: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {device.name: device for device in (_device(row, path) for row in table["devices"])}


def _device(row: dict[str, Any], path: Path) -> Device:
    named = f"{path.name}, device {row.get('name', '?')!r}"
    wanted = set(Device.__dataclass_fields__)
    if odd := sorted(set(row) ^ wanted):
        raise HardwareError(
            f"{named}: field {odd[0]!r} is missing or unknown; the fields are {', '.join(sorted(wanted))}"
        )
    device = Device(**{**row, "aliases": tuple(row["aliases"])})
    numbers = {f: getattr(device, f) for f in ("memory_gib", "bandwidth_gb_per_s", "watts", "utilisation")}
    for field, value in {**numbers, **{f"peak_tflops.{p}": v for p, v in device.peak_tflops.items()}}.items():
        if not value > 0:
            raise HardwareError(f"{named}: {field} is {value}, and it must be more than 0")
    if device.utilisation > 1 or "fp32" not in device.peak_tflops:
        raise HardwareError(f"{named}: utilisation must be at most 1 and peak_tflops must have fp32")
    return device


def find_device(name: str, path: Path = TABLE) -> Device:
    """The device of that name or alias; in a longer description (`NVIDIA H100 80GB`) the longest one wins.

    Raises:
        HardwareError: there is none; the nearest name is suggested.
    """
    devices = load_hardware(path).values()
    known = {label.lower(): device for device in devices for label in (device.name, *device.aliases)}
    asked = name.lower().strip()
    if asked in known:
        return known[asked]
    standing = [label for label in known if re.search(rf"(?<!\w){re.escape(label)}(?!\w)", asked)]
    if standing:
        return known[max(standing, key=len)]
    near = difflib.get_close_matches(asked, known, n=1, cutoff=0.0)
    raise HardwareError(
        f"device {name!r} is not in {path.name}: did you mean {known[near[0]].name!r}? "
        f"It has {', '.join(d.name for d in devices)}; add a row for another"
    )


def estimate(
    flops: float, bytes_moved: float, device: str | Device, *, count: int = 1, precision: str = "bf16"
) -> Estimate:
    """Time, energy and price of `flops` operations that move `bytes_moved` bytes to and from memory.

    Seconds are the larger of the two times (roofline), each at the device's utilisation; energy takes the
    full board power for all of that time, without cooling or the rest of the machine.

    Raises:
        HardwareError: the device is unknown, or a quantity is negative, or `count` is less than 1.
    """
    found = find_device(device) if isinstance(device, str) else device
    if flops < 0 or bytes_moved < 0 or count < 1:
        raise HardwareError(
            f"an estimate of {flops} operations and {bytes_moved} bytes on {count} devices makes no sense: "
            f"give quantities from 0 and at least one device"
        )
    arithmetic = flops / (found.peak(precision) * found.utilisation * count)
    memory = bytes_moved / (found.bandwidth_gb_per_s * 1e9 * found.utilisation * count)
    seconds = max(arithmetic, memory)
    return measured(seconds, found, count=count, bound="arithmetic" if arithmetic >= memory else "memory")


def measured(seconds: float, device: Device, *, count: int = 1, bound: str = "measured") -> Estimate:
    """Energy and price of work that took `seconds` on `count` devices."""
    hours = seconds * count / 3600
    return Estimate(device.name, count, seconds, hours * device.watts / 1000, hours * device.price_per_hour, bound)
