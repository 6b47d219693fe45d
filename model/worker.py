"""The process in which a job runs: `python -m gristmill.model.worker JOB.json`, alone or under torchrun."""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from gristmill.kernels import compiling
from gristmill.model import failures
from gristmill.model.launch import boot
from gristmill.model.signs_of_life import SignOfLife

WATCH_SECONDS = 0.5
TELL_SECONDS = 0.2


class Teller:
    """Progress as lines in a file, at most a few a second, from the first rank alone; and each rank's sign of life.

    A call that tells nothing new is a sign of life and no more.
    """

    def __init__(self, log: Path, rank: int) -> None:
        self.path, self.life, self.rank = log / "progress.jsonl", SignOfLife(log, rank), rank
        self.told = self.shown = 0.0
        self.done = -1

    def __call__(self, done: int, total: int, **values: float) -> None:
        now = time.monotonic()
        if now - self.shown > TELL_SECONDS:
            self.shown = now
            self.life.show()
        new = done != self.done or values
        if self.rank == 0 and new and (now - self.told > TELL_SECONDS or done == total):
            self.told, self.done = now, done
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"done": done, "total": total, "values": values}) + "\n")


def chosen_device(asked: str) -> torch.device:
    """`auto` takes CUDA where there is one.

    Raises:
        ValueError: CUDA was asked for and there is none.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("execution.device is 'cuda' and torch finds no CUDA device here: set it to 'auto' or 'cpu'")
    return torch.device(asked)


def watch(launcher: int) -> None:
    """End this process at once when the one that started the job is gone: nobody would collect its work."""

    def look() -> None:
        while True:
            try:
                os.kill(launcher, 0)
            except ProcessLookupError:
                os._exit(75)
            time.sleep(WATCH_SECONDS)

    threading.Thread(target=look, daemon=True, name="launcher-watch").start()


def settle(threads: int) -> None:
    """Let torch compute as a job does: by so many threads, deterministically.

    New memory is not filled with NaN meanwhile, for some percent of a step. In tests that run a job in their process
    (tests/model/in_process.py) it is, so that what reads of it is found there.
    """
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms loads all of torch.compile as well
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def main(described: Path) -> int:
    """Run the job; its metrics go to work/metrics.json, its error (one sentence) to log/error.json."""
    job: dict[str, Any] = json.loads(described.read_text(encoding="utf-8"))
    out, rank = Path(job["out"]), int(os.environ.get("RANK", "0"))
    if launcher := os.environ.get("GRISTMILL_LAUNCHER"):
        watch(int(launcher))
    settle(int(job["threads"]))
    module, _, function = job["entry"].partition(":")
    tell = Teller(out / "log", rank)
    tell.life.show()
    compiling.tell(tell.life.show)
    try:
        run = getattr(importlib.import_module(module), function)
        tell.life.show()
        metrics = run(job["job"], out, chosen_device(job["device"]), tell)
    except (ValueError, RuntimeError, ArithmeticError, OSError, MemoryError) as error:
        # The first rank's error counts: those that waited for it fail of that, a moment later.
        with suppress(FileExistsError), (out / "log" / "error.json").open("x", encoding="utf-8") as file:
            file.write(json.dumps({"error": failures.sentence(error), "may_pass": failures.may_pass(error)}))
        raise
    finally:
        tell.life.end()
    if rank == 0:
        part = out / "work" / "metrics.tmp"
        part.write_text(json.dumps({"metrics": metrics, "boot": boot()}, sort_keys=True), encoding="utf-8")
        part.replace(out / "work" / "metrics.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
