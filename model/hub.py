"""Hugging Face in and out: a model that is adopted, and the `export` stage. The work is in `hugging_face/`."""

from __future__ import annotations

from pathlib import Path

from gristmill.model.config import ExportConfig
from gristmill.model.launch import launch
from gristmill.model.stage_types import Metrics, Progress


def export(
    config: ExportConfig,
    model: Path,
    tokenizer: Path,
    out: Path,
    *,
    threads: int,
    progress: Progress,
) -> Metrics:
    """Write `out/huggingface` (model, tokenizer, chat template) and compare the logits of `transformers` with ours.

    Raises:
        JobFailed: the model has no Hugging Face form, or `transformers` computes other logits from the folder.
    """
    job = {"config": config.model_dump(mode="json"), "model": str(model), "tokenizer": str(tokenizer)}
    return launch("gristmill.model.hugging_face.export:run", job, out, threads=threads, device="cpu", progress=progress)


def adopt(folder: Path, chat_template: str, out: Path, *, threads: int, progress: Progress) -> Metrics:
    """Write `out/model` and `out/tokenizer` from a model's Hugging Face folder, its conversations by this template.

    Raises:
        JobFailed: the folder holds no whole model, or a tokenizer that is not its own.
    """
    job = {"folder": str(folder), "chat_template": chat_template}
    return launch(
        "gristmill.model.hugging_face.adoption:run", job, out, threads=threads, device="cpu", progress=progress
    )
