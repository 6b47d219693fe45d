"""What a run tells while it goes on, all of it in log/ and none of it content: rows, and event files of TensorBoard.

curves.jsonl, expert_load.jsonl, spikes.jsonl, samples.jsonl   what will be content in the end, as far as it is known
timings.jsonl     of every step that was taken, also of those that a killed run takes again: seconds, tokens, memory
peak.json         what model FLOP utilisation is held against
tensorboard/      the same numbers, the experts' load as a picture, the samples as text
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gristmill.model.costs import flops_per_token
from gristmill.model.training.config import Precision
from gristmill.model.training.throughput import COUNTED, measured_peak, peak_memory
from gristmill.model.transformer import Transformer

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

Row = dict[str, Any]

CELL = 12  # pixels of an expert in the picture of their load
FLUSH_SECONDS = 10

log = logging.getLogger("gristmill.recording")


@dataclass(frozen=True)
class Spent:
    """Seconds of a step: in all, and of these on data (waited for by the first rank), on checks and on checkpoints.

    Of checkpoints, `copying_seconds` is the copy of what is saved; `stalled_seconds` all else that training waited for:
    the save before it where that is not written yet, the ranks' agreement that it is, its publication.
    """

    seconds: float
    data_seconds: float
    evaluating_seconds: float
    copying_seconds: float
    stalled_seconds: float

    @property
    def saving_seconds(self) -> float:
        """All of checkpoints."""
        return self.copying_seconds + self.stalled_seconds


class Recorder:
    """Writes down a run's rows as they come; the first rank has one.

    Args:
        first: the step that the run begins with; what an earlier attempt wrote of later ones is written anew.
        ranks: processes that share the work, each with a device of the measured kind.
    """

    def __init__(
        self,
        out: Path,
        model: Transformer,
        device: torch.device,
        *,
        mtp: bool,
        precision: Precision,
        ranks: int,
        first: int,
    ) -> None:
        self.log, self.model, self.device, self.mtp, self.ranks = out / "log", model, device, mtp, ranks
        self.peak = measured_peak(device, precision)
        self.flops_per_token: int | None = None
        self.written: dict[str, int] = {}
        self.board = _board(self.log / "tensorboard", first)

    def follow(self, name: str, rows: list[Row]) -> list[Row]:
        """Bring `name`.jsonl up to these rows, which only grow; those that are new."""
        known = self.written.get(name)
        new = rows[known:]  # all of them at first: what an earlier attempt left is of steps that are taken again
        if known is not None and not new:
            return []
        with (self.log / f"{name}.jsonl").open("w" if known is None else "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in new)
        self.written[name] = len(rows)
        return new

    def step(self, step: int, spent: Spent, tokens: int, sequence_length: int) -> Row:
        """Note what a step took; the row of timings.jsonl."""
        told = {**vars(spent), "saving_seconds": spent.saving_seconds}
        row = {"step": step, **{name: round(value, 5) for name, value in told.items()}}
        working = max(spent.seconds - spent.evaluating_seconds - spent.saving_seconds, 1e-9)
        rate = tokens / working
        possible = self.peak.flops_per_second * self.ranks
        row |= {"tokens": tokens, "tokens_per_second": round(rate, 1)}
        row |= {"mfu": round(self._flops_per_token(sequence_length) * rate / possible, 5)}
        row |= {"memory_bytes": peak_memory(self.device)}
        with (self.log / "timings.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def show(self, step: int, curves: Row, timings: Row, loads: list[Row], samples: list[Row]) -> None:
        """Add a step to the event files, counted from one as people do."""
        if self.board is None:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        numbers = {_tag("training", name): value for name, value in curves.items() if _is_number(value)}
        numbers |= {_tag("speed", name): value for name, value in timings.items() if _is_number(value)}
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()]
        assert self.board.file_writer is not None
        self.board.file_writer.add_summary(Summary(value=values), step + 1)  # one event for all of them
        if loads:
            self.board.add_image("expert_load", load_picture(loads), step + 1, dataformats="HW")
        for i, row in enumerate(samples):
            self.board.add_text(f"samples/{i}", f"{row['prompt']}⟦{row['text']}⟧", step + 1)

    def close(self) -> None:
        """Write out what is still on its way."""
        if self.board is not None:
            self.board.close()

    def _flops_per_token(self, sequence_length: int) -> int:
        if self.flops_per_token is None:
            vocab = self.model.vocab_size
            self.flops_per_token = flops_per_token(self.model.config, vocab, sequence_length, mtp=self.mtp)
            told = {**vars(self.peak), "device": _name(self.device), "ranks": self.ranks}
            told |= {"flops_per_token": self.flops_per_token, "counted": COUNTED}
            (self.log / "peak.json").write_text(json.dumps(told, ensure_ascii=False, indent=1), encoding="utf-8")
        return self.flops_per_token


def load_picture(rows: list[Row]) -> np.ndarray:
    """Experts (across) by layers (down), grey, (H, W) uint8: black is none, mid-grey a fair share, white twice that."""
    share_LE = np.array([row["load"] for row in sorted(rows, key=lambda row: row["layer"])])
    grey_LE = np.clip(share_LE * share_LE.shape[1] / 2, 0, 1) * 255
    return np.kron(grey_LE, np.ones((CELL, CELL))).astype(np.uint8)


def _board(folder: Path, first: int) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        log.warning("no event files of TensorBoard are written (%s): install tensorboard to have them", error)
        return None
    return SummaryWriter(str(folder), purge_step=first + 1, flush_secs=FLUSH_SECONDS)


def _tag(room: str, name: str) -> str:
    """Numbers of one kind (`held_out_bpb.web`) lie together, as TensorBoard groups by what stands before a slash."""
    return name.replace(".", "/", 1) if "." in name else f"{room}/{name}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
