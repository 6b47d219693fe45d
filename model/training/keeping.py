"""Whole models made of checkpoints: the finished one, and those that are kept for good on the way."""

from __future__ import annotations

import math
import shutil
import threading
import time
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
    """`kept/step-…` every so many steps and `kept/best`, by the curves' held-out bits a byte; written by a thread.

    What is begun must be awaited before the next checkpoint is published: killed in between, the run resumes from the
    checkpoint that was to be kept, and keeps it then. `before_waiting` is called where it is not written yet.
    """

    def __init__(self, folder: Path, every: int, best: bool, before_waiting: Callable[[], None]) -> None:
        self.folder, self.every, self.best, self.before_waiting = folder, every, best, before_waiting
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __bool__(self) -> bool:
        return bool(self.every or self.best)

    def due(self, step: int, curves: list[dict[str, Any]]) -> list[str]:
        """Under which names the checkpoint of a step is to be kept: the best where no check up to it was better."""
        names = []
        if self.every and step % self.every == 0 and not (self.folder / f"step-{step:08d}").exists():
            names.append(f"step-{step:08d}")
        losses = {row["step"] + 1: row["held_out_bpb"] for row in curves if "held_out_bpb" in row}
        if self.best and step in losses and losses[step] == min(v for s, v in losses.items() if s <= step):
            names.append("best")
        return names

    def begin(self, checkpoint: Checkpoint, model: Transformer, names: list[str]) -> None:
        """Keep a checkpoint's model under these names; what an earlier call began is over. The checkpoint is closed."""
        self._thread = threading.Thread(target=self._write, args=(checkpoint, model, names), name="keep", daemon=True)
        self._thread.start()

    def written(self) -> bool:
        """Whether nothing is being written."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Until what was begun is written; raises as `write_from`."""
        if not self.written():
            self.before_waiting()
        while not self.written():
            time.sleep(0.01)
        self._thread = None
        if self._failure is not None:
            raise self._failure

    def _write(self, checkpoint: Checkpoint, model: Transformer, names: list[str]) -> None:
        try:
            with checkpoint:
                for name in names:
                    part = self.folder / f"{name}.tmp"
                    shutil.rmtree(part, ignore_errors=True)
                    write_from(checkpoint, model, part, lambda: None)  # the thread that trains shows life
                    shutil.rmtree(self.folder / name, ignore_errors=True)
                    part.rename(self.folder / name)
        except BaseException as error:  # raised again by `wait`, in the thread that trains
            self._failure = error
