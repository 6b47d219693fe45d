"""Pretraining as a job: token shards in, a base model, its curves and samples of its text out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from gristmill.data.mixture import Mixture
from gristmill.data.shards import TokenShards
from gristmill.model.batch_sizes import BatchSizes
from gristmill.model.costs import flops_per_token, parameter_counts
from gristmill.model.signs_of_life import SignOfLife, seconds_to_move
from gristmill.model.stage_types import Metrics, Progress
from gristmill.model.training.batches import TokenBatches, torch_seed
from gristmill.model.training.checks import Checks
from gristmill.model.training.config import ExtendConfig, LayoutConfig, PretrainConfig
from gristmill.model.training.engine import Engine, start_distributed
from gristmill.model.training.held_out import HeldOut
from gristmill.model.training.inputs import check_mixture
from gristmill.model.training.layout import Layout
from gristmill.model.training.loop import History, Row, Training, train, write_rows
from gristmill.model.training.models import load_model
from gristmill.model.training.precision import apply_precision
from gristmill.model.training.text_samples import TextSamples, beginnings
from gristmill.model.transformer import Transformer

HELD_OUT_BATCH = 16

MixtureRun = PretrainConfig | ExtendConfig


def run(job: dict[str, Any], out: Path, device: torch.device, progress: Progress) -> Metrics:
    """Train the base model of `job["config"]` on `job["tokens"]`, in the order of `job["mixture"]`."""
    config, seed = PretrainConfig.model_validate(job["config"]), int(job["seed"])
    shards = TokenShards(Path(job["tokens"]) / "tokens")
    mixture = Mixture(Path(job["mixture"]), shards)
    check_mixture("pretrain", config, mixture)
    layout = LayoutConfig.model_validate(job["layout"])
    rank, _ = start_distributed(device)
    numbers, _ = parameter_counts(config.model, shards.vocab_size)
    SignOfLife(out / "log", rank).ask_for(seconds_to_move(4 * numbers))
    model = Transformer(config.model, shards.vocab_size)
    model.initialise(torch_seed(seed, "initialise"))
    model.to(device)
    asked = replace(
        training_of(config, model, seed),
        keep_every=config.keep_every,
        keep_best=config.keep_best,
        ema_decay=config.ema_decay,
    )
    held_out = held_out_of(config, mixture, HELD_OUT_BATCH, device)
    prompts = beginnings(shards, tokenizer_of(Path(job["tokens"])), config.model.max_position_embeddings)
    texts = TextSamples(model, prompts, layout, seed, out / "log")
    metrics = train_on_mixture(model, config, asked, mixture, held_out, texts, layout, out, progress)
    unigram = held_out.unigram_bits_per_byte(token_batches(config, mixture, "train", device), shards.vocab_size)
    dist.barrier()
    return metrics | {
        "unigram_bpb": round(unigram, 5),
        "bpb_vs_unigram": round(metrics["held_out_bpb"] / unigram, 5),
    }


def tokenizer_of(tokens: Path) -> Tokenizer:
    """The tokenizer in the folder of a tokenize stage."""
    return Tokenizer.from_file(str(tokens / "tokenizer" / "tokenizer.json"))


def token_batches(config: MixtureRun, mixture: Mixture, split: str, device: torch.device) -> TokenBatches:
    """A split's sequences as the run reads them."""
    sizes = config.batches if split == "train" else BatchSizes(HELD_OUT_BATCH, config.sequence_length, None)
    across = config.attend_across_documents
    return TokenBatches(mixture, split, sizes=sizes, across_documents=across, device=device)


def held_out_of(config: MixtureRun, mixture: Mixture, at_once: int, device: torch.device) -> HeldOut:
    """The held-out sequences of a run, so many of them read at once."""
    return HeldOut(token_batches(config, mixture, "held_out", device), config.held_out_sequences, at_once)


def training_of(config: MixtureRun, model: Transformer, seed: int) -> Training:
    """What the loop is asked to do, of what every run on a mixture has."""
    return Training(
        steps=config.steps,
        batch_sequences=config.batch_sequences,
        optimizer=config.optimizer,
        schedule=config.schedule,
        checkpoint_every=config.checkpoint_every,
        mtp_loss_weight=model.config.mtp_loss_weight if model.config.num_nextn_predict_layers else 0.0,
        mtp_weight_tails=config.mtp_weight_tails,
        bias_speed_tails=config.bias_speed_tails,
        load_every=max(1, config.steps // 40),
        spikes=config.spikes,
        seed=torch_seed(seed, "moments"),
        precision=config.precision,
    )


def train_on_mixture(
    model: Transformer,
    config: MixtureRun,
    asked: Training,
    mixture: Mixture,
    held_out: HeldOut,
    texts: TextSamples,
    layout: LayoutConfig,
    out: Path,
    progress: Progress,
) -> Metrics:
    """Train `model`, leave it, its curves, load and texts in `out`; sizes, tokens, operations and last losses.

    Afterwards the module holds what its layout leaves to this rank: the whole model is in `out/model`.

    Raises:
        FloatingPointError, ValueError: as `train`.
    """
    device = model.lm_head.weight.device
    place = Layout.of(dist.get_world_size(), layout)
    place.check(model.config, config.sequence_length, config.batch_sequences)
    config.batches.refuse_ranks(place.shares)
    products = apply_precision(model, config.precision)

    def loss(engine: Engine) -> Row:
        row: Row = dict(held_out.loss(engine))
        if asked.ema_decay:
            with engine.averaged():
                row["held_out_bpb_ema"] = held_out.loss(engine)["held_out_bpb"]
        return row

    checks = Checks(config.evaluate_every, config.steps, loss, texts)
    batches = token_batches(config, mixture, "train", device)
    history = train(model, batches, asked, out, progress, checks.look, layout, checks.write)
    if dist.get_rank() == 0:
        write_rows(out / "curves.jsonl", history.curves)
        write_rows(out / "expert_load.jsonl", history.loads)
        write_rows(out / "spikes.jsonl", history.spikes)
        alive = partial(progress, config.steps, config.steps)
        finished = load_model(out / "model", device, alive=alive)  # whole, whatever the layout left here
        write_rows(out / "samples.jsonl", texts.rows_of(finished, config.steps - 1))
    dist.barrier()
    return _metrics(config, model, history) | products


def _metrics(config: MixtureRun, model: Transformer, history: History) -> Metrics:
    taken, last = history.last_taken(), history.curves[-1]
    total, active = parameter_counts(model.config, model.vocab_size)
    tokens = config.sequences * config.sequence_length
    each = flops_per_token(model.config, model.vocab_size, config.sequence_length, mtp=len(model.mtp) > 0)
    return {
        "parameters": total,
        "active_parameters": active,
        "tokens": tokens,
        "flops": each * tokens,
        "steps": config.steps,
        "loss": round(taken["main_loss"], 5),
        **{name: round(value, 5) for name, value in sorted(last.items()) if name.startswith("held_out")},
        "load_violation": round(taken.get("load_violation", 0.0), 5),
        "steps_left_out": len(history.spikes),
    }
