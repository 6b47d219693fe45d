"""What stays of checkpoints: the finished model, and those that are kept for good on the way."""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gristmill.model.signs_of_life import unwatched
from gristmill.model.training.checkpoints import Checkpoint, said_if_full
from gristmill.model.training.files import copy, sync_folder
from gristmill.model.training.models import own_tensors, write_model
from gristmill.model.transformer import Transformer

log = logging.getLogger("gristmill.model")
WITHOUT_LINKS = {errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}
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

    Killed before one is kept, a run resumes from the checkpoint that was to be, and keeps it then. `alive` is called as
    files are copied, where that has to be.
    """

    def __init__(self, folder: Path, every: int, best: bool, alive: Callable[[], None] = unwatched) -> None:
        self.folder, self.every, self.best, self.alive = folder, every, best, alive

    def due(self, step: int, curves: list[dict[str, Any]]) -> list[str]:
        """Under which names the checkpoint of a step is to be kept: the best where no check up to it was better."""
        names = []
        if self.every and step % self.every == 0 and not (self.folder / f"step-{step:08d}").exists():
            names.append(f"step-{step:08d}")
        losses = {row["step"] + 1: row["held_out_bpb"] for row in curves if "held_out_bpb" in row}
        if self.best and step in losses and losses[step] == min(v for s, v in losses.items() if s <= step):
            names.append("best")
        return names

    def keep(self, checkpoint: Path, name: str) -> list[Path]:
        """Keep a published checkpoint under this name; what had the name before is to be removed, and returned.

        Its files get a second name each, which takes neither time nor room; where the file system has no such, they
        are copied, which the log says.

        Raises:
            OSError: the disk is full, or will not be written.
        """
        part, before = self.folder / f"{name}.tmp", self.folder / f"{name}-before.tmp"
        for left in (part, before):
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        with said_if_full(part):
            self._second_names(checkpoint, part)
        sync_folder(part)
        replaced = (self.folder / name).exists()
        if replaced:
            (self.folder / name).rename(before)
        part.rename(self.folder / name)
        sync_folder(self.folder)
        sync_folder(self.folder.parent)
        return [before] if replaced else []

    def _second_names(self, checkpoint: Path, part: Path) -> None:
        for file in sorted(checkpoint.iterdir()):
            try:
                os.link(file, part / file.name)
            except OSError as error:
                if error.errno not in WITHOUT_LINKS:
                    raise
                log.warning("%s is copied, for it cannot have a second name here: %s", file, error)
                copy(file, part / file.name, self.alive)

    def tidy(self) -> None:
        """Remove what a kill left unfinished."""
        for left in self.folder.glob("*.tmp"):
            shutil.rmtree(left)
