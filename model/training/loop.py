"""The training loop that pretraining and fine-tuning share, around a DeepSpeed engine.

Everything a step does is a function of (configuration, seed, step, state), and the state is in the checkpoint: a run
that was killed anywhere goes on from its last checkpoint and ends in the same bytes (CPU, same ranks and threads).
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gristmill.model.config import OptimizerConfig, ScheduleConfig
from gristmill.model.stage_types import Progress
from gristmill.model.training import checkpoints
from gristmill.model.training.batches import Batches, TrainingBatch
from gristmill.model.training.ema import WeightAverage
from gristmill.model.training.optimizers import MuonAdamW
from gristmill.model.training.schedules import factor
from gristmill.model.transformer import Routing, Transformer, token_behind

Row = dict[str, Any]
AVERAGE = "average.safetensors"


@dataclass(frozen=True)
class Training:
    """What the loop is asked to do, apart from the model and its batches."""

    steps: int
    batch_sequences: int
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    checkpoint_every: int
    mtp_loss_weight: float = 0.0
    load_every: int = 0  # record the experts' load every so many steps; 0 never


class Objective(nn.Module):
    """The loss of one batch, as the module that DeepSpeed wraps."""

    def __init__(self, model: Transformer, mtp_loss_weight: float) -> None:
        super().__init__()
        self.model, self.mtp_loss_weight = model, mtp_loss_weight
        self.routing = Routing()

    def forward(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        self.routing = Routing()
        next_target = batch.next_target_BS if self.mtp_loss_weight else None
        main, ahead = self.model.losses(batch.inputs, batch.target_BS, next_target, batch.weight_BS, self.routing)
        main = main * batch.share
        total, parts = main, {"main_loss": main.detach()}
        if ahead:
            shares = _shares_ahead(batch, len(ahead))
            mtp = torch.stack([loss * share for loss, share in zip(ahead, shares, strict=True)]).mean()
            total = total + self.mtp_loss_weight * mtp
            parts["mtp_loss"] = mtp.detach()
        if self.routing.balance_loss:
            balance = torch.stack(self.routing.balance_loss).sum()
            total = total + balance
            parts["balance_loss"] = balance.detach()
        return total, {"loss": total.detach(), **parts}


def _shares_ahead(batch: TrainingBatch, modules: int) -> list[float]:
    """This rank's part of the targets of each MTP module, times the ranks; as `TrainingBatch.share`."""
    ranks = dist.get_world_size()
    shares, target_BS = [batch.next_share], batch.next_target_BS
    for _ in range(1, modules):
        assert target_BS is not None
        target_BS = token_behind(target_BS)
        own = (batch.weight_BS * (target_BS >= 0)).sum()
        whole = own.clone()
        if ranks > 1:
            dist.all_reduce(whole)
        shares.append(float(own) * ranks / max(float(whole), 1e-9))
    return shares


def start_distributed(device: torch.device) -> tuple[int, int]:
    """(rank, ranks), with the process group up: NCCL on CUDA, gloo on CPU.

    DeepSpeed's shared-memory reduction is left out: it would be compiled on first use, 40 s and a C++ compiler for a
    reduction that gloo does as well at this size, and its sums would be in another order than gloo's.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    return dist.get_rank(), dist.get_world_size()


def train(
    model: Transformer,
    batches: Batches,
    training: Training,
    out: Path,
    progress: Progress,
    held_out: Callable[[int], Row] | None = None,
    average: WeightAverage | None = None,
) -> tuple[list[Row], list[Row]]:
    """Train `model` in place; returns the curves (a row a step) and the experts' load (a row a layer now and then).

    `held_out(step)` gives further numbers for the rows of some steps; `average` follows the weights, step by step.

    Raises:
        FloatingPointError: the loss, its gradient or the weights were not finite; the last checkpoint is kept.
        ValueError: the batch does not divide among the ranks.
    """
    import deepspeed

    rank, ranks = dist.get_rank(), dist.get_world_size()
    if training.batch_sequences % ranks:
        raise ValueError(
            f"batch_sequences {training.batch_sequences} does not divide among {ranks} ranks: choose a multiple of it"
        )
    optimizer = MuonAdamW(model.named_parameters(), training.optimizer)
    objective = Objective(model, training.mtp_loss_weight)
    engine, *_ = deepspeed.initialize(
        model=objective, optimizer=optimizer, config=_engine_config(training, ranks), dist_init_required=False
    )
    state = checkpoints.load_checkpoint(out / "work", model, optimizer)
    first: int = state["step"] if state else 0
    if state and average is not None:
        average.load_named_state(checkpoints.further_tensors(out / "work", AVERAGE), updates=first)
    curves: list[Row] = state["curves"] if state else []
    loads: list[Row] = state["loads"] if state else []
    _record_start(out, rank, first)
    for step in range(first, training.steps):
        began = time.perf_counter()
        engine.train()
        loss, parts = engine(batches.step(step, rank, ranks))
        row = _agreed(parts, ranks)
        _refuse_not_finite(row, step, training)
        engine.backward(loss)
        norm = nn.utils.clip_grad_norm_(model.parameters(), training.optimizer.gradient_clip, foreach=True)
        _refuse_not_finite({"grad_norm": float(norm)}, step, training)
        optimizer.scale = factor(training.schedule, step, training.steps)
        engine.step()
        violation, load = _balance(model, objective.routing, ranks)
        if average is not None:
            average.update(model)
        row |= {
            "grad_norm": float(norm),
            "learning_rate": optimizer.scale * training.optimizer.adam_learning_rate,
        }
        if violation is not None:
            row["load_violation"] = violation
        if training.load_every and (step % training.load_every == 0 or step + 1 == training.steps):
            loads += [{"step": step, "layer": i, "load": share} for i, share in enumerate(load)]
        if held_out is not None:
            row |= held_out(step)
        curves.append({"step": step, **row})
        done = step + 1
        if rank == 0:
            _record_time(out, step, time.perf_counter() - began)
            if done % training.checkpoint_every == 0 and done < training.steps:
                further = {AVERAGE: average.named_state()} if average is not None else {}
                kept = {"curves": curves, "loads": loads}
                checkpoints.save_checkpoint(out / "work", done, model, optimizer, kept, further)
        progress(done, training.steps, loss=row["main_loss"], grad_norm=row["grad_norm"])
    return curves, loads


def _refuse_not_finite(row: Row, step: int, training: Training) -> None:
    """Stop before a step that would spoil the weights, and with them the next checkpoint.

    Raises:
        FloatingPointError: a loss or the gradient is infinite or not a number.
    """
    if not all(math.isfinite(value) for value in row.values()):
        raise FloatingPointError(
            f"the loss or its gradient is not finite at step {step} ({row}); the last good checkpoint is of step "
            f"{step // training.checkpoint_every * training.checkpoint_every}: lower the rates and resume"
        )


def _engine_config(training: Training, ranks: int) -> dict[str, Any]:
    """ZeRO stage 0: each rank holds the whole (small) model, so that Muon sees whole matrices; gradients are averaged.

    Clipping is the loop's, which records the norm.
    """
    return {
        "train_micro_batch_size_per_gpu": training.batch_sequences // ranks,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def _agreed(parts: dict[str, Tensor], ranks: int) -> Row:
    """The parts of the loss, averaged over ranks."""
    values = torch.stack([v.float() for v in parts.values()])
    if ranks > 1:
        dist.all_reduce(values)
        values /= ranks
    return dict(zip(parts, values.tolist(), strict=True))


@torch.no_grad()
def _balance(model: Transformer, routing: Routing, ranks: int) -> tuple[float | None, list[list[float]]]:
    """Move the experts' biases by the load of all ranks; mean over layers of (max load / mean − 1), and the shares."""
    if not routing.load_LE:
        return None, []
    load_LE = torch.stack(routing.load_LE).float()
    if ranks > 1:
        dist.all_reduce(load_LE)
    for mixture, load_E in zip(model.mixtures(), load_LE, strict=False):
        mixture.update_bias(load_E)
    share_LE = load_LE / load_LE.sum(1, keepdim=True)
    violation = share_LE.amax(1) * share_LE.shape[1] - 1
    return float(violation.mean()), [[round(v, 5) for v in row] for row in share_LE.tolist()]


def _record_start(out: Path, rank: int, first: int) -> None:
    """Leave a line for each start of the job, so that a resume can be seen to begin where it should."""
    if rank == 0:
        with (out / "log" / "starts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"pid": os.getpid(), "from_step": first}) + "\n")


def _record_time(out: Path, step: int, seconds: float) -> None:
    with (out / "log" / "timings.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "seconds": round(seconds, 5)}) + "\n")


def write_rows(path: Path, rows: list[Row]) -> None:
    """JSON lines, atomically, keys sorted as a checkpoint sorts them; floats keep the seven digits they have."""
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        for row in rows:
            short = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in row.items()}
            file.write(json.dumps(short, ensure_ascii=False, sort_keys=True) + "\n")
    part.replace(path)
