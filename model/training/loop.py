"""The training loop that pretraining and fine-tuning share.

Everything a step does is a function of (configuration, seed, step, state), and the state is in the checkpoint: a run
that was killed anywhere goes on from its last checkpoint and ends in the same bytes (CPU, same ranks and threads).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gristmill.model.signs_of_life import LONG_SECONDS, SignOfLife, seconds_to_move
from gristmill.model.stage_types import Progress
from gristmill.model.training.batches import Batches
from gristmill.model.training.checkpoints import KEPT_FOLDER, CheckpointWriter, checkpoints, last_checkpoint
from gristmill.model.training.config import (
    LayoutConfig,
    OptimizerConfig,
    Precision,
    ScheduleConfig,
    SpikeConfig,
    TailConfig,
)
from gristmill.model.training.engine import Engine
from gristmill.model.training.keeping import KeptCheckpoints, write_from
from gristmill.model.training.profiling import profiled
from gristmill.model.training.recording import Recorder, Spent
from gristmill.model.training.schedules import factor, tail_factor
from gristmill.model.training.spikes import Spikes
from gristmill.model.transformer import Transformer

BYTES_TRAINED = 16  # of a number in training: itself, its gradient and two moments, in float32

Row = dict[str, Any]
HeldOut = Callable[[int, Engine], Row]
Texts = Callable[[int], list[Row]]


@dataclass(frozen=True)
class Training:
    """What the loop is asked to do, apart from the model and its batches."""

    steps: int
    batch_sequences: int
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    checkpoint_every: int
    mtp_loss_weight: float = 0.0
    mtp_weight_tails: tuple[TailConfig, ...] = ()  # factors on that weight in the last steps
    bias_speed_tails: tuple[TailConfig, ...] = ()  # and on the speed of the experts' biases
    load_every: int = 0  # record the experts' load every so many steps; 0 never
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    keep_every: int = 0  # steps between checkpoints that are kept in kept/; 0 none
    keep_best: bool = False  # the latest checkpoint that no held-out check up to it was better than, as well
    ema_decay: float = 0.0  # of the average of the weights; 0 makes none
    seed: int = 0  # of the rounding of moments, where it is stochastic
    precision: Precision = "float32"  # that was applied to the model: its speed is held against what that can do


@dataclass
class History:
    """What a run has to tell: a row a step, the experts' load and texts now and then, the steps that were left out."""

    curves: list[Row] = field(default_factory=list)
    loads: list[Row] = field(default_factory=list)
    spikes: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)

    def last_taken(self) -> Row:
        """The last step that was not left out.

        Raises:
            FloatingPointError: every step was.
        """
        for row in reversed(self.curves):
            if "spike" not in row:
                return row
        raise FloatingPointError("no step was taken, since no loss was finite: lower the rates and run again")


def train(
    model: Transformer,
    batches: Batches,
    training: Training,
    out: Path,
    progress: Progress,
    held_out: HeldOut | None = None,
    layout: LayoutConfig | None = None,
    texts: Texts | None = None,
) -> History:
    """Train `model` and leave it in `out/model`; returns what there is to tell.

    `held_out(step, engine)` gives further numbers for the rows of some steps; all ranks call it. `texts(step)` gives
    samples of the model's text at some steps; the first rank calls it.

    Raises:
        FloatingPointError: a loss, a gradient or the weights were not finite and `spikes` says stop, or too often.
        ValueError: the batch does not divide among ranks and micro-batches, or a checkpoint is damaged.
    """
    return Run(model, batches, training, out, layout or LayoutConfig(), progress).train(held_out, texts)


class Run:
    """One start of a training run."""

    def __init__(
        self,
        model: Transformer,
        batches: Batches,
        training: Training,
        out: Path,
        layout: LayoutConfig,
        progress: Progress,
    ) -> None:
        self.model, self.batches, self.training, self.out = model, batches, training, out
        self.progress, self.at = progress, 0
        self.life = SignOfLife(out / "log", dist.get_rank())
        self.life.ask_for(seconds_to_move(BYTES_TRAINED * sum(p.numel() for p in model.parameters())))
        self.engine = Engine(
            model,
            training.optimizer,
            mtp_loss_weight=training.mtp_loss_weight,
            batch_sequences=training.batch_sequences,
            layout=layout,
            alive=self.alive,
            ema_decay=training.ema_decay,
            seed=training.seed,
        )
        self.rank, self.ranks = self.engine.rank, self.engine.ranks
        self.owner = {**model.config.model_dump(mode="json"), "vocab_size": model.vocab_size}
        self.writer = CheckpointWriter(
            out / "work", self.owner, rank=self.rank, ranks=self.ranks, keep=layout.kept_checkpoints
        )
        self.kept = KeptCheckpoints(out / KEPT_FOLDER, training.keep_every, training.keep_best, self.alive)
        self.history = History()

    def alive(self) -> None:
        """Say that this rank works."""
        self.progress(self.at, self.training.steps)

    def train(self, held_out: HeldOut | None, texts: Texts | None) -> History:
        """All steps, from the last checkpoint where there is one."""
        first, steps = self._resume(), self.training.steps
        self.spikes = Spikes(self.training.spikes, self.history.curves)
        recorder = self._recorder(first) if self.rank == 0 and first < steps else None
        began = time.perf_counter()
        for step in range(first, steps):
            self.at = step
            with self._profiled(step):
                row = self._step(step)
                trained = time.perf_counter()
            if held_out is not None:
                row |= held_out(step, self.engine)
            self.history.curves.append({"step": step, **row})
            if texts is not None and self.rank == 0:
                self.alive()
                self.history.samples += texts(step)
            worked = time.perf_counter()
            copying = self._save(step + 1)
            now = time.perf_counter()
            if recorder is not None:
                stalled = now - worked - copying
                spent = Spent(now - began, self.engine.data_seconds, worked - trained, copying, stalled)
                began = now  # to write this down is part of the next step
                self._record(recorder, step, spent)
            shown = {"loss": row.get("main_loss"), "grad_norm": row.get("grad_norm")}
            self.progress(step + 1, steps, **{name: value for name, value in shown.items() if value is not None})
        self.at = steps
        if recorder is not None:
            recorder.close()
        if first < steps:
            self._publish()
        self.life.ask_for(self._saving_seconds())
        self.writer.close()
        if self.rank == 0:
            self.kept.tidy()
        self._leave_model()
        return self.history

    def _recorder(self, first: int) -> Recorder:
        return Recorder(
            self.out,
            self.model,
            torch.device(self.engine.engine.device),
            mtp=self.training.mtp_loss_weight > 0,
            precision=self.training.precision,
            ranks=self.ranks,
            first=first,
        )

    def _profiled(self, step: int) -> AbstractContextManager[None]:
        if self.rank or step not in self.engine.layout.profile:
            return nullcontext()
        device = torch.device(self.engine.engine.device)
        return profiled(step, self.out / "log", device, partial(self.life.ask_for, LONG_SECONDS))

    def _record(self, recorder: Recorder, step: int, spent: Spent) -> None:
        timings = recorder.step(step, spent, self.engine.tokens, self.engine.sequence_length)
        recorder.follow("curves", self.history.curves)
        recorder.follow("spikes", self.history.spikes)
        loads = recorder.follow("expert_load", self.history.loads)
        samples = recorder.follow("samples", self.history.samples)
        recorder.show(step, self.history.curves[-1], timings, loads, samples)

    def _step(self, step: int) -> Row:
        """Take a step, or leave it out; its row of the curves."""
        training = self.training
        mtp_scale = tail_factor(training.mtp_weight_tails, step, training.steps)
        row = self.engine.accumulate(self.batches, step, mtp_scale)
        why = self.spikes.judge(row)
        scale = factor(training.schedule, step, training.steps)
        applied = self.engine.step(scale, admitted=why is None)
        row |= {"grad_norm": self.engine.norm, **self.engine.norms}
        row |= {"learning_rate": scale * training.optimizer.adam_learning_rate}
        if not applied:
            return self._left_out(step, row, why or "gradient")
        self.spikes.taken(row["main_loss"])
        load_LE = self.engine.balance(tail_factor(training.bias_speed_tails, step, training.steps))
        if load_LE is not None:
            row |= self._record_load(step, load_LE)
        return row

    def _left_out(self, step: int, row: Row, why: str) -> Row:
        """Skip the batch, or go back to the last checkpoint's weights, or stop: as the configuration says."""
        score = round(self.spikes.score(row["main_loss"]), 3) if why == "spike" else None
        self.spikes.left_out(step, row)
        told: Row = {"step": step, "why": why, "score": score, "policy": self.training.spikes.policy}
        told |= {name: value if math.isfinite(value) else str(value) for name, value in row.items()}
        if self.training.spikes.policy == "rollback":
            told["weights_of_step"] = self._roll_back()
        self.history.spikes.append({**told, "documents": self.batches.documents(step)})
        return {**{name: value for name, value in row.items() if math.isfinite(value)}, "spike": why}

    def _roll_back(self) -> int:
        """Take up the last checkpoint's weights, moments and biases; the step they are of. The data goes on."""
        if self.writer.busy:
            self._publish()
        dist.barrier()
        checkpoint = last_checkpoint(self.out / "work", self.owner, trusted=True)
        if checkpoint is None:
            raise FloatingPointError(
                "the loss is not finite or far above those before it, and there is no checkpoint to roll back to yet: "
                "lower the rates or checkpoint_every, and run again"
            )
        with checkpoint:
            self.engine.load(checkpoint)
        return checkpoint.step

    def _record_load(self, step: int, load_LE: Tensor) -> Row:
        """How even the experts' load is, noting the shares now and then."""
        share_LE = load_LE / load_LE.sum(1, keepdim=True)
        every = self.training.load_every
        if every and (step % every == 0 or step + 1 == self.training.steps):
            self.history.loads += [
                {"step": step, "layer": i, "load": [round(v, 5) for v in row]}
                for i, row in enumerate(share_LE.tolist())
            ]
        return evenness(share_LE)

    def _save(self, done: int) -> float:
        """Begin a checkpoint where one is due, and publish the one before it once all ranks have written it.

        Returns the seconds that the copy took. Training waits beyond it for the save before, where the next is due and
        that one is not written; for the ranks to agree, at each step while one is being written; and for the manifest
        and the folder's new name.
        """
        due = done % self.training.checkpoint_every == 0 or done == self.training.steps
        if self.writer.busy and (due or self.engine.agree(self.writer.written())):
            self._publish()
        if not due:
            return 0.0
        tensors = {f"{kind}/{name}@{start}": numbers for kind, name, start, numbers in self.engine.tensors()}
        state = {**vars(self.history), "optimizer_steps": self.engine.optimizer.steps_done}
        return self.writer.begin(done, tensors, state, settled=done == self.training.steps)

    def _publish(self) -> None:
        if not self.writer.written():
            self.life.ask_for(self._saving_seconds())  # and no more signs: a disk may hang
        while not self.writer.written():
            time.sleep(0.01)
        dist.barrier()
        if (step := self.writer.publish()) is not None:
            self._keep(step)

    def _keep(self, step: int) -> None:
        """Keep the last checkpoint, of this step, where that is asked for."""
        for name in self.kept.due(step, self.history.curves):
            if before := self.kept.keep(checkpoints(self.out / "work")[-1], name):
                self.writer.remove(before)

    def _saving_seconds(self) -> float:
        """What this machine's ranks may take to save what they hold, and to remove as much."""
        return seconds_to_move(self.writer.size * self.ranks // self.engine.layout.nodes)

    def _resume(self) -> int:
        """Take up the last checkpoint, whose files the first rank hashes; the step to begin with."""
        dist.barrier()
        checkpoint = last_checkpoint(self.out / "work", self.owner, trusted=self.rank > 0, alive=self.alive)
        first = 0
        if checkpoint is not None:
            with checkpoint:
                self.engine.load(checkpoint)
                state, first = checkpoint.state(), checkpoint.step
            self.history = History(**{name: state[name] for name in vars(self.history) if name in state})
        if self.rank == 0:
            if first:
                self._keep(first)
            with (self.out / "log" / "starts.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"pid": os.getpid(), "from_step": first}) + "\n")
        return first

    def _leave_model(self) -> None:
        """Write the finished model from the last checkpoint: no rank need hold it whole."""
        if self.rank == 0:
            checkpoint = last_checkpoint(self.out / "work", self.owner, trusted=True)
            assert checkpoint is not None
            with checkpoint:
                write_from(checkpoint, self.model, self.out / "model", self.alive)
                if self.training.ema_decay:
                    write_from(checkpoint, self.model, self.out / "model-ema", self.alive, "average")
        dist.barrier()


def evenness(share_LE: Tensor) -> dict[str, float]:
    """How even the load is, given each expert's share of its layer's rows.

    `load_violation`: (largest / mean − 1), the mean over layers (MaxVio of Wang et al. 2024, arXiv 2408.15664);
    `load_violation_max`: the largest over layers; `load_entropy`: that of the shares over that of even ones, the mean
    over layers; 1 is even, and so is the load of a single expert.
    """
    experts = share_LE.shape[1]
    violation_L = share_LE.amax(1) * experts - 1
    entropy_L = -torch.xlogy(share_LE, share_LE).sum(1)
    return {
        "load_violation": float(violation_L.mean()),
        "load_violation_max": float(violation_L.max()),
        "load_entropy": float(entropy_L.mean() / math.log(experts)) if experts > 1 else 1.0,
    }


def write_rows(path: Path, rows: list[Row]) -> None:
    """JSON lines, atomically, keys sorted as a checkpoint sorts them; floats keep the seven digits they have."""
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        for row in rows:
            short = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in row.items()}
            file.write(json.dumps(short, ensure_ascii=False, sort_keys=True) + "\n")
    part.replace(path)
