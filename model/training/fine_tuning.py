"""Supervised fine-tuning as a job: a base model and chains of thought in, a model that converses out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gristmill.model.chat import Chat
from gristmill.model.stage_types import Metrics, Progress
from gristmill.model.training.batches import Conversation, ConversationBatches
from gristmill.model.training.config import LayoutConfig, SFTConfig
from gristmill.model.training.engine import start_distributed
from gristmill.model.training.layout import Layout
from gristmill.model.training.loop import Training, train, write_rows
from gristmill.model.training.models import load_model
from gristmill.model.training.precision import apply_precision
from gristmill.model.transformer import flops_per_token


def run(job: dict[str, Any], out: Path, device: torch.device, progress: Progress) -> Metrics:
    """Fine-tune `job["model"]` on `cold_start.jsonl` of `job["problems"]`; the MTP module stays behind."""
    config, seed = SFTConfig.model_validate(job["config"]), int(job["seed"])
    chat = Chat(Path(job["tokenizer"]) / "tokenizer")
    with (Path(job["problems"]) / "cold_start.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    conversations = [Conversation(chat.prompt(r["question"]), chat.response(r["thought"], r["final"])) for r in rows]
    rank, _ = start_distributed(device)
    model = load_model(Path(job["model"]) / "model", device, mtp=False)
    products = apply_precision(model, config.precision)
    batches = ConversationBatches(
        conversations,
        sequences=config.batch_sequences,
        length=config.sequence_length,
        steps=config.steps,
        seed=seed,
        pad=chat.pad,
        device=device,
    )
    training = Training(
        steps=config.steps,
        batch_sequences=config.batch_sequences,
        optimizer=config.optimizer,
        schedule=config.schedule,
        checkpoint_every=config.checkpoint_every,
        precision=config.precision,
        spikes=config.spikes,
    )
    layout = LayoutConfig.model_validate(job["layout"])
    Layout.of(dist.get_world_size(), layout).check(model.config, config.sequence_length, config.batch_sequences)
    history = train(model, batches, training, out, progress, layout=layout)
    if rank == 0:
        write_rows(out / "curves.jsonl", history.curves)
        write_rows(out / "spikes.jsonl", history.spikes)
        shown = [{k: r[k] for k in ("question", "thought", "final")} for r in rows[:12]]
        write_rows(out / "samples.jsonl", shown)
    dist.barrier()
    tokens = config.steps * config.batch_sequences * config.sequence_length
    return {
        "conversations": len(conversations),
        "sequences": len(batches.packs),
        "padding": round(
            1
            - sum(len(c.prompt) + len(c.response) - 1 for c in conversations)
            / (len(batches.packs) * config.sequence_length),
            5,
        ),
        "epochs": round(config.steps * config.batch_sequences / len(batches.packs), 4),
        "tokens": tokens,
        "flops": flops_per_token(model.config, model.vocab_size, config.sequence_length, mtp=False) * tokens,
        "steps": config.steps,
        "loss": round(history.last_taken()["main_loss"], 5),
        "steps_left_out": len(history.spikes),
        **products,
    }
