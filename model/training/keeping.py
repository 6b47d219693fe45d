"""What stays of checkpoints: the finished model, and those that are kept for good on the way."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gristmill.model.training.checkpoints import Checkpoint
from gristmill.model.training.files import sync_folder
from gristmill.model.training.models import own_tensors, write_model
from gristmill.model.transformer import Transformer

log = logging.getLogger("gristmill.model")
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


class KeptCheckpoints:
    """`kept/step-…` every so many steps and `kept/best`, by the curves' held-out bits a byte: whole checkpoints.

    Killed before one is kept, a run resumes from the checkpoint that was to be, and keeps it then.
    """

    def __init__(self, folder: Path, every: int, best: bool) -> None:
        self.folder, self.every, self.best = folder, every, best

    def due(self, step: int, curves: list[dict[str, Any]]) -> list[str]:
        """Under which names the checkpoint of a step is to be kept: the best where no check up to it was better."""
        names = []
        if self.every and step % self.every == 0 and not (self.folder / f"step-{step:08d}").exists():
            names.append(f"step-{step:08d}")
        losses = {row["step"] + 1: row["held_out_bpb"] for row in curves if "held_out_bpb" in row}
        if self.best and step in losses and losses[step] == min(v for s, v in losses.items() if s <= step):
            names.append("best")
        return names

    def keep(self, checkpoint: Path, name: str) -> None:
        """Keep a published checkpoint under this name, in place of what had it.

        Its files get a second name each, which takes neither time nor room; where the file system has no such, they
        are copied, which the log says.
        """
        part = self.folder / f"{name}.tmp"
        shutil.rmtree(part, ignore_errors=True)
        try:
            shutil.copytree(checkpoint, part, copy_function=os.link)
        except shutil.Error as error:
            log.warning("%s is copied, for its files cannot have a second name here: %s", checkpoint, error)
            shutil.rmtree(part)
            shutil.copytree(checkpoint, part)
        shutil.rmtree(self.folder / name, ignore_errors=True)
        part.rename(self.folder / name)
        sync_folder(self.folder)
