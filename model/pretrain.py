"""The `pretrain` stage: a base model from token shards (V3 section 4). The work is in `training/pretraining.py`."""

from __future__ import annotations

from pathlib import Path

from gristmill.model.launch import launch
from gristmill.model.stage_types import Metrics, Progress
from gristmill.model.training.config import LayoutConfig, PretrainConfig


def pretrain(
    config: PretrainConfig,
    tokens: Path,
    mixture: Path,
    out: Path,
    seed: int,
    *,
    threads: int,
    ranks: int,
    device: str,
    layout: LayoutConfig,
    progress: Progress,
) -> Metrics:
    """Train a base model and leave it in `out/model`, the average of its weights (`ema_decay`) in `out/model-ema`.

    `tokens` is the folder of the tokenize stage, `mixture` that of the mix stage, made from these tokens for a run of
    this sequence length and as many sequences as `config.sequences`.

    Raises:
        JobFailed: the training process ended badly (NaN loss, a mixture that does not fit, a signal).
    """
    job = {"config": config.model_dump(mode="json"), "tokens": str(tokens), "mixture": str(mixture), "seed": seed}
    job["layout"] = layout.model_dump(mode="json")
    return launch(
        "gristmill.model.training.pretraining:run",
        job,
        out,
        threads=threads,
        device=device,
        progress=progress,
        ranks=ranks,
        layout=layout,
    )
