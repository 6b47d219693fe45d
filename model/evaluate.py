"""The `evaluate` stage: pass@1, majority and thought length of every model of a run. The work is in `evaluation.py`."""

from __future__ import annotations

from pathlib import Path

from gristmill.model.config import EvaluateConfig
from gristmill.model.launch import launch
from gristmill.model.stage_types import Metrics, Progress


def evaluate(
    config: EvaluateConfig,
    problems: Path,
    tokenizer: Path,
    documents: Path,
    base: Path,
    cold_start: Path,
    zero: Path,
    rl: Path,
    out: Path,
    seed: int,
    *,
    threads: int,
    device: str,
    progress: Progress,
) -> Metrics:
    """Answer held-out problems with each model; a problem found in `documents` or a training set is left out.

    Raises:
        JobFailed: the process ended badly.
    """
    models = {"base": base, "cold_start": cold_start, "zero": zero, "rl": rl}
    job = {
        "config": config.model_dump(mode="json"),
        "problems": str(problems),
        "tokenizer": str(tokenizer),
        "documents": str(documents),
        "models": {name: str(folder) for name, folder in models.items()},
        "seed": seed,
    }
    return launch("gristmill.model.evaluation:run", job, out, threads=threads, device=device, progress=progress)
