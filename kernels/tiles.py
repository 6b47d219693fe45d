"""Sizes of tiles that were found by measurement, by the device's name: `tiles.json`, which `bench --tune` writes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

FILE = Path(__file__).with_name("tiles.json")
Sizes = TypeVar("Sizes")  # a dataclass of numbers
Table = dict[str, dict[str, dict[str, int]]]  # device → kernel → field → number


def tuned(kernel: str, device: torch.device, usual: Sizes) -> Sizes:
    """What was found for this kernel on devices of that name, else the usual; nothing is tried here."""
    return _found_on(device, kernel, usual) if device.type == "cuda" else usual


@cache
def _found_on(device: torch.device, kernel: str, usual: Sizes) -> Sizes:
    """Kept by the device: asking for its name takes a part of the time of a launch."""
    return _found(FILE, kernel, torch.cuda.get_device_name(device), usual)


@cache
def _found(file: Path, kernel: str, device: str, usual: Sizes) -> Sizes:
    numbers = read(file).get(device, {}).get(kernel, {})
    sizes: Any = usual
    return replace(sizes, **numbers)


def read(file: Path = FILE) -> Table:
    """All that was found; nothing where there is no file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def put(device: str, kernel: str, sizes: Any, file: Path = FILE) -> None:
    """Write down what was found for a kernel on a device, beside what is there."""
    table = read(file)
    table.setdefault(device, {})[kernel] = asdict(sizes)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(file)
    _found.cache_clear()
    _found_on.cache_clear()
