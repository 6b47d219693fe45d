"""Factors on learning rates and other weights, as pure functions of the step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

from gristmill.model.training.config import ScheduleConfig, TailConfig


def factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Factor on the peak rate at `step` (0-based) of `steps`: warm-up, constant, decay, tails (V3 section 4.2).

    A warm-up that reaches into the decay or the tails shortens them.

    Raises:
        ValueError: the step is not one of the run's.
    """
    _refuse_others(step, steps)
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    decay_until = steps - sum(_lengths(config.tails, steps))
    if step < decay_until:
        return _before_tails(config, step, steps, decay_until)
    return tail_factor(config.tails, step, steps)


def tail_factor(tails: Sequence[TailConfig], step: int, steps: int) -> float:
    """The ratio of the tail that `step` (0-based) of `steps` lies in; 1 before them.

    Raises:
        ValueError: the step is not one of the run's.
    """
    _refuse_others(step, steps)
    lengths = _lengths(tails, steps)
    ends = itertools.accumulate(lengths, initial=steps - sum(lengths))
    ratios = [1.0, *(tail.ratio for tail in tails)]
    return next(ratio for ratio, end in zip(ratios, ends, strict=True) if step < end)


def _refuse_others(step: int, steps: int) -> None:
    if not 0 <= step < steps:
        raise ValueError(f"step {step} is not one of the {steps} steps of the schedule: ask for one below {steps}")


def _lengths(tails: Sequence[TailConfig], steps: int) -> list[int]:
    """Steps of each tail."""
    return [round(steps * tail.share) for tail in tails]


def _before_tails(config: ScheduleConfig, step: int, steps: int, decay_until: int) -> float:
    """Factor at a step after the warm-up and before `decay_until`."""
    decay_from = config.warmup_steps
    if config.kind != "linear":
        decay_from = max(decay_from, decay_until - round(steps * config.decay_fraction))
    if step < decay_from:
        return 1.0
    shape = config.wsd_decay if config.kind == "wsd" else config.kind
    through = (step - decay_from + 1) / (decay_until - decay_from)
    return config.final_ratio + (1 - config.final_ratio) * _remaining(shape, through)


def _remaining(shape: Literal["cosine", "linear", "1-sqrt"], through: float) -> float:
    """What is left of the decay, 1 to 0, when `through` of its steps are done."""
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * through))
    return 1 - (through if shape == "linear" else math.sqrt(through))
