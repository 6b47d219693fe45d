"""Whole models made of checkpoints: the finished one, and those that are kept for good on the way."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gristmill.model.training.checkpoints import Checkpoint
from gristmill.model.training.models import own_tensors, write_model
from gristmill.model.transformer import Transformer

PART_NUMBERS = 64 << 20  # of a tensor that is read at a time


def write_from(
    checkpoint: Checkpoint, model: Transformer, folder: Path, alive: Callable[[], None], kind: str | None = None
) -> None:
    """Write the model of a checkpoint, of the shape of `model`, a part of a tensor at a time.

    `alive` is called at each part; `kind` takes another set of its tensors than parameters and buffers: `average`.

    Raises:
        DamagedCheckpoint: it lacks numbers of the model.
        FloatingPointError: a weight is infinite or not a number.
    """
    with torch.device("meta"):
        like = own_tensors(Transformer(model.config, model.vocab_size))
    parameters = set(checkpoint.names("parameter"))

    def parts(name: str) -> Iterator[Tensor]:
        taken, size = kind or ("parameter" if name in parameters else "buffer"), math.prod(like[name].shape)
        for start in range(0, size, PART_NUMBERS):
            alive()
            yield checkpoint.read(taken, name, start, min(size, start + PART_NUMBERS))

    write_model(folder, model.config, model.vocab_size, like, parts)


class KeptModels:
    """`kept/step-…` every so many steps and `kept/best`, by the curves' held-out loss."""

    def __init__(self, folder: Path, every: int, best: bool, alive: Callable[[], None]) -> None:
        self.folder, self.every, self.best, self.alive = folder, every, best, alive

    def __bool__(self) -> bool:
        return bool(self.every or self.best)

    def look(self, checkpoint: Checkpoint, model: Transformer, curves: list[dict[str, Any]]) -> None:
        """Keep a checkpoint's model where it is due; raises as `write_from`."""
        step = checkpoint.step
        if self.every and step % self.every == 0 and not (self.folder / f"step-{step:08d}").exists():
            self._keep(checkpoint, model, f"step-{step:08d}")
        losses = {row["step"] + 1: row["held_out_bpb"] for row in curves if "held_out_bpb" in row}
        if self.best and step in losses and losses[step] == min(v for s, v in losses.items() if s <= step):
            self._keep(checkpoint, model, "best")

    def _keep(self, checkpoint: Checkpoint, model: Transformer, name: str) -> None:
        part = self.folder / f"{name}.tmp"
        shutil.rmtree(part, ignore_errors=True)
        write_from(checkpoint, model, part, self.alive)
        shutil.rmtree(self.folder / name, ignore_errors=True)
        part.rename(self.folder / name)
