"""The `rl_zero` and `rl` stages: GRPO with rule rewards. The work is in `rl/training.py`."""

from __future__ import annotations

from pathlib import Path

from gristmill.model.launch import launch
from gristmill.model.rl.config import GRPOConfig
from gristmill.model.stage_types import Metrics, Progress


def reinforce(
    config: GRPOConfig,
    model: Path,
    problems: Path,
    tokenizer: Path,
    out: Path,
    seed: int,
    *,
    threads: int,
    device: str,
    progress: Progress,
) -> Metrics:
    """Reinforce `model` on `problems/train.jsonl` and leave the policy in `out/model`.

    Raises:
        JobFailed: the process ended badly (NaN loss, responses past the position limit, a signal).
    """
    job = {
        "config": config.model_dump(mode="json"),
        "model": str(model),
        "problems": str(problems),
        "tokenizer": str(tokenizer),
        "seed": seed,
    }
    return launch("gristmill.model.rl.training:run", job, out, threads=threads, device=device, progress=progress)
