"""The `traces` stage: what a reasoner answers rightly, to be learned by another model (R1 sections 2.3.3, 2.4)."""

from __future__ import annotations

from pathlib import Path

from gristmill.model.config import TracesConfig
from gristmill.model.launch import launch
from gristmill.model.stage_types import Metrics, Progress


def sample_traces(
    config: TracesConfig,
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
    """Answer the training problems with `model` and keep what is right and in form, in `out/cold_start.jsonl`.

    Raises:
        JobFailed: no answer is right, or the process ended badly.
    """
    job = {
        "config": config.model_dump(mode="json"),
        "model": str(model),
        "problems": str(problems),
        "tokenizer": str(tokenizer),
        "seed": seed,
    }
    return launch("gristmill.model.rl.rejection:run", job, out, threads=threads, device=device, progress=progress)
