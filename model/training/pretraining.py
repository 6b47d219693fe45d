"""Pretraining as a job: token shards in, a base model, its curves and samples of its text out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from gristmill.data.mixture import Mixture
from gristmill.data.shards import TokenShards
from gristmill.model.batch_sizes import BatchSizes
from gristmill.model.config import LayoutConfig, PretrainConfig
from gristmill.model.stage_types import Metrics, Progress
from gristmill.model.training.batches import IGNORED, TokenBatches, torch_seed
from gristmill.model.training.engine import Engine, start_distributed
from gristmill.model.training.layout import Layout
from gristmill.model.training.loop import History, Row, Training, train, write_rows
from gristmill.model.training.precision import apply_precision
from gristmill.model.transformer import Transformer, flops_per_token, parameter_counts

HELD_OUT_BATCH = 16


def run(job: dict[str, Any], out: Path, device: torch.device, progress: Progress) -> Metrics:
    """Train the base model of `job["config"]` on `job["tokens"]`, in the order of `job["mixture"]`."""
    config, seed = PretrainConfig.model_validate(job["config"]), int(job["seed"])
    shards = TokenShards(Path(job["tokens"]) / "tokens")
    mixture = Mixture(Path(job["mixture"]), shards)
    _check_run(config, mixture)
    rank, ranks = start_distributed(device)
    layout = LayoutConfig.model_validate(job["layout"])
    place = Layout(ranks, layout.expert_parallel, layout.sequence_parallel)
    config.batches.refuse_ranks(place.data_parallel * layout.micro_batches)
    model = Transformer(config.model, shards.vocab_size)
    model.initialise(torch_seed(seed, "initialise"))
    model.to(device)
    products = apply_precision(model, config.precision)

    def batches(split: str, sizes: BatchSizes) -> TokenBatches:
        across = config.attend_across_documents
        return TokenBatches(mixture, split, sizes=sizes, across_documents=across, device=device)

    checks = batches("held_out", BatchSizes(HELD_OUT_BATCH, config.sequence_length, None))

    def held_out(step: int, engine: Engine) -> Row:
        if (step + 1) % config.evaluate_every and step + 1 != config.steps:
            return {}
        loss, bpb = held_out_loss(engine, checks, config.held_out_sequences)
        row = {"held_out_loss": loss, "held_out_bpb": bpb}
        if config.ema_decay:
            with engine.averaged():
                row["held_out_bpb_ema"] = held_out_loss(engine, checks, config.held_out_sequences)[1]
        return row

    train_batches = batches("train", config.batches)
    history = train(
        model,
        train_batches,
        Training(
            steps=config.steps,
            batch_sequences=config.batch_sequences,
            optimizer=config.optimizer,
            schedule=config.schedule,
            checkpoint_every=config.checkpoint_every,
            mtp_loss_weight=config.model.mtp_loss_weight if config.model.num_nextn_predict_layers else 0.0,
            load_every=max(1, config.steps // 40),
            spikes=config.spikes,
            keep_every=config.keep_every,
            keep_best=config.keep_best,
            ema_decay=config.ema_decay,
        ),
        out,
        progress,
        held_out,
        layout,
    )
    if rank == 0:
        write_rows(out / "curves.jsonl", history.curves)
        write_rows(out / "expert_load.jsonl", history.loads)
        write_rows(out / "spikes.jsonl", history.spikes)
    unigram = unigram_bits_per_byte(train_batches, checks, config.held_out_sequences, shards.vocab_size)
    dist.barrier()
    return _metrics(config, model, history, shards.vocab_size, unigram) | products


def held_out_loss(engine: Engine, batches: TokenBatches, sequences: int) -> tuple[float, float]:
    """Held-out cross-entropy in nats a token, and in bits per byte of the text (mixture of the training weights)."""
    nats = text_bytes = 0.0
    tokens = 0
    for step in range(-(-sequences // HELD_OUT_BATCH)):
        batch = batches.step(step, 0, 1)
        predicted = int((batch.target_BS != IGNORED).sum())
        nats += engine.evaluate(batch) * predicted
        tokens += predicted
        text_bytes += batches.text_bytes(step)
    return nats / tokens, nats / math.log(2) / text_bytes


def unigram_bits_per_byte(train: TokenBatches, checks: TokenBatches, sequences: int, vocab_size: int) -> float:
    """What a model that knows only how often each token occurs would need on the same held-out sequences.

    Frequencies are those of the training streams in their parts of the run, each count plus one.
    """
    share_V = np.zeros(vocab_size)
    for source, share in zip(train.mixture.sources(), train.mixture.shares(), strict=True):
        count_V = train.mixture.token_counts(source) + 1.0
        share_V += share * count_V / count_V.sum()
    surprise_V = torch.from_numpy(-np.log2(share_V))
    bits = text_bytes = 0.0
    for step in range(-(-sequences // HELD_OUT_BATCH)):
        target_BS = checks.step(step, 0, 1).target_BS.cpu()
        bits += float(surprise_V[target_BS[target_BS != IGNORED]].sum())
        text_bytes += checks.text_bytes(step)
    return bits / text_bytes


def _check_run(config: PretrainConfig, mixture: Mixture) -> None:
    """The mixture was made for this run.

    Raises:
        ValueError: it has sequences of another length, or another number of them.
    """
    asked = {"sequence_length": config.sequence_length, "sequences": config.sequences}
    for name, value in asked.items():
        if value != getattr(mixture, name):
            raise ValueError(
                f"pretrain asks for {name} {value} (sequences: those of all its steps), and the mixture was made "
                f"for {getattr(mixture, name)}: let mix.{name} agree"
            )


def _metrics(config: PretrainConfig, model: Transformer, history: History, vocab_size: int, unigram: float) -> Metrics:
    curves = [row for row in history.curves if "spike" not in row] or history.curves
    total, active = parameter_counts(config.model, vocab_size)
    tokens = config.sequences * config.sequence_length
    last = history.curves[-1]
    averaged = {name: round(last[name], 5) for name in ("held_out_bpb_ema",) if name in last}
    each = flops_per_token(config.model, vocab_size, config.sequence_length, mtp=len(model.mtp) > 0)
    return {
        "parameters": total,
        "active_parameters": active,
        "tokens": tokens,
        "flops": each * tokens,
        "steps": config.steps,
        "loss": round(curves[-1]["main_loss"], 5),
        "held_out_loss": round(last["held_out_loss"], 5),
        "held_out_bpb": round(last["held_out_bpb"], 5),
        **averaged,
        "unigram_bpb": round(unigram, 5),
        "bpb_vs_unigram": round(last["held_out_bpb"] / unigram, 5),
        "load_violation": round(curves[-1].get("load_violation", 0.0), 5),
        "steps_left_out": len(history.spikes),
    }
