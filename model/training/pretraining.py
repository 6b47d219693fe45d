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
from gristmill.model.config import ExtendConfig, PretrainConfig
from gristmill.model.stage_types import Metrics, Progress
from gristmill.model.training.batches import IGNORED, TokenBatches, torch_seed
from gristmill.model.training.checkpoints import save_model
from gristmill.model.training.loop import Row, Training, start_distributed, train, write_rows
from gristmill.model.transformer import Routing, Transformer, flops_per_token, parameter_counts

HELD_OUT_BATCH = 16


def run(job: dict[str, Any], out: Path, device: torch.device, progress: Progress) -> Metrics:
    """Train the base model of `job["config"]` on `job["tokens"]`, in the order of `job["mixture"]`."""
    config, seed = PretrainConfig.model_validate(job["config"]), int(job["seed"])
    shards = TokenShards(Path(job["tokens"]) / "tokens")
    mixture = Mixture(Path(job["mixture"]), shards)
    check_mixture("pretrain", config, mixture)
    start_distributed(device)
    model = Transformer(config.model, shards.vocab_size)
    model.initialise(torch_seed(seed, "initialise"))
    model.to(device)
    curves = train_on_mixture(model, config, mixture, HELD_OUT_BATCH, out, progress)
    seen = token_batches(config, mixture, "train", config.batch_sequences, device)
    checks = token_batches(config, mixture, "held_out", HELD_OUT_BATCH, device)
    unigram = unigram_bits_per_byte(seen, checks, config.held_out_sequences, shards.vocab_size)
    dist.barrier()
    return training_metrics(config, model, curves) | {
        "unigram_bpb": round(unigram, 5),
        "bpb_vs_unigram": round(curves[-1]["held_out_bpb"] / unigram, 5),
    }


def token_batches(
    config: PretrainConfig | ExtendConfig, mixture: Mixture, split: str, sequences: int, device: torch.device
) -> TokenBatches:
    """Batches of so many sequences of a split, as the run reads them."""
    across = config.attend_across_documents
    return TokenBatches(mixture, split, sequences=sequences, across_documents=across, device=device)


def train_on_mixture(
    model: Transformer,
    config: PretrainConfig | ExtendConfig,
    mixture: Mixture,
    held_out_batch: int,
    out: Path,
    progress: Progress,
) -> list[Row]:
    """Train `model` in place and write it, its curves and its experts' load into `out`; the curves, a row a step.

    `held_out_batch` sequences are read at once where the held-out loss is taken.

    Raises:
        FloatingPointError, ValueError: as `train`.
    """
    device = model.lm_head.weight.device
    checks = token_batches(config, mixture, "held_out", held_out_batch, device)

    def held_out(step: int) -> Row:
        if (step + 1) % config.evaluate_every and step + 1 != config.steps:
            return {}
        return {"held_out_bpb": bits_per_byte(model, checks, config.held_out_sequences)}

    curves, loads = train(
        model,
        token_batches(config, mixture, "train", config.batch_sequences, device),
        Training(
            steps=config.steps,
            batch_sequences=config.batch_sequences,
            optimizer=config.optimizer,
            schedule=config.schedule,
            checkpoint_every=config.checkpoint_every,
            mtp_loss_weight=model.config.mtp_loss_weight if model.config.num_nextn_predict_layers else 0.0,
            load_every=max(1, config.steps // 40),
        ),
        out,
        progress,
        held_out,
    )
    if dist.get_rank() == 0:
        save_model(out / "model", model)
        write_rows(out / "curves.jsonl", curves)
        write_rows(out / "expert_load.jsonl", loads)
    return curves


@torch.no_grad()
def bits_per_byte(model: Transformer, batches: TokenBatches, sequences: int) -> float:
    """Held-out cross-entropy in bits per byte of the text the tokens stand for (mixture of the training weights)."""
    model.eval()
    bits = text_bytes = 0.0
    for step in range(-(-sequences // batches.sequences)):
        batch = batches.step(step, 0, 1)
        loss, _ = model.losses(batch.inputs, batch.target_BS, None, batch.weight_BS, Routing())
        bits += float(loss) / math.log(2) * int((batch.target_BS != IGNORED).sum())
        text_bytes += batches.text_bytes(step)
    model.train()
    return bits / text_bytes


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
    for step in range(-(-sequences // checks.sequences)):
        target_BS = checks.step(step, 0, 1).target_BS.cpu()
        bits += float(surprise_V[target_BS[target_BS != IGNORED]].sum())
        text_bytes += checks.text_bytes(step)
    return bits / text_bytes


def check_mixture(stage: str, config: PretrainConfig | ExtendConfig, mixture: Mixture) -> None:
    """The mixture was made for this run of `stage`.

    Raises:
        ValueError: it has sequences of another length, or another number of them.
    """
    asked = {"sequence_length": config.sequence_length, "sequences": config.steps * config.batch_sequences}
    for name, value in asked.items():
        if value != getattr(mixture, name):
            raise ValueError(
                f"{stage} asks for {name} {value} (sequences: steps times batch_sequences), and the mixture was made "
                f"for {getattr(mixture, name)}: let mix.{name} agree"
            )


def training_metrics(config: PretrainConfig | ExtendConfig, model: Transformer, curves: list[Row]) -> Metrics:
    """Sizes, tokens, operations and last losses of a run on a mixture."""
    total, active = parameter_counts(model.config, model.vocab_size)
    tokens = config.steps * config.batch_sequences * config.sequence_length
    each = flops_per_token(model.config, model.vocab_size, config.sequence_length, mtp=len(model.mtp) > 0)
    return {
        "parameters": total,
        "active_parameters": active,
        "tokens": tokens,
        "flops": each * tokens,
        "steps": config.steps,
        "loss": round(curves[-1]["main_loss"], 5),
        "held_out_bpb": round(curves[-1]["held_out_bpb"], 5),
        "load_violation": round(curves[-1].get("load_violation", 0.0), 5),
    }
