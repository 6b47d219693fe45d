"""The `cold_start` stage: supervised fine-tuning on chains of thought (R1 section 2.3.1)."""

from __future__ import annotations

from pathlib import Path

from gristmill.model.launch import launch
from gristmill.model.stage_types import Metrics, Progress
from gristmill.model.training.config import LayoutConfig, SFTConfig


def fine_tune(
    config: SFTConfig,
    model: Path,
    problems: Path,
    tokenizer: Path,
    out: Path,
    seed: int,
    *,
    threads: int,
    ranks: int,
    device: str,
    layout: LayoutConfig,
    progress: Progress,
) -> Metrics:
    """Fine-tune `model` on `problems/cold_start.jsonl`, loss on the response only, and leave it in `out/model`.

    Chains that are longer than a sequence are left out, and counted in the metric `left_out_too_long`.

    Raises:
        JobFailed: the training process ended badly (NaN loss, no chain that fits into a sequence, a signal).
    """
    job = {
        "config": config.model_dump(mode="json"),
        "model": str(model),
        "problems": str(problems),
        "tokenizer": str(tokenizer),
        "seed": seed,
        "layout": layout.model_dump(mode="json"),
    }
    return launch(
        "gristmill.model.training.fine_tuning:run",
        job,
        out,
        threads=threads,
        device=device,
        progress=progress,
        ranks=ranks,
        layout=layout,
    )
