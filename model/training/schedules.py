"""Learning-rate factors as pure functions of the step."""

from __future__ import annotations

import math

from gristmill.model.config import ScheduleConfig


def factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Factor on the peak rate at `step` (0-based) of `steps`: warm-up, constant, cosine (V3 section 4.2)."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    decay_from = max(config.warmup_steps, steps - round(steps * config.decay_fraction))
    if step < decay_from or steps <= decay_from:
        return 1.0
    through = (step - decay_from + 1) / (steps - decay_from)
    return config.final_ratio + (1 - config.final_ratio) * 0.5 * (1 + math.cos(math.pi * through))
