"""The `pretrain` stage: a base model from token shards (V3 section 4). The work is in `training/pretraining.py`."""

from __future__ import annotations

from pathlib import Path

from gristmill.model.config import PretrainConfig
from gristmill.model.launch import launch
from gristmill.model.stage_types import Metrics, Progress


def pretrain(
    config: PretrainConfig,
    tokens: Path,
    out: Path,
    seed: int,
    *,
    threads: int,
    ranks: int,
    device: str,
    progress: Progress,
) -> Metrics:
    """Train a base model on `tokens` (the folder of the tokenize stage) and leave it in `out/model`.

    Raises:
        JobFailed: the training process ended badly (NaN loss, shards that do not fit, a signal).
    """
    job = {"config": config.model_dump(mode="json"), "tokens": str(tokens), "seed": seed}
    return launch(
        "gristmill.model.training.pretraining:run",
        job,
        out,
        threads=threads,
        device=device,
        progress=progress,
        ranks=ranks,
    )
