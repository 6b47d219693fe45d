"""What a person sees while a run goes on: lines and bars on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, ClassVar, TextIO

from gristmill.model.training.config import MOST_PHASES

BAR_AFTER_SECONDS = 3.0
LOG_EVERY_SECONDS = 30.0
PHASES = range(1, MOST_PHASES + 1)
KEY_METRICS = {
    "ingest": "documents_out",
    "problems": "test_problems",
    "exam": "test_problems",
    "dedup": "documents_out",
    "spans": "bytes_out",
    "filter": "documents_out",
    "decontaminate": "documents_out",
    "tokenize": "tokens",
    "mix": "sequences",
    "pretrain": "held_out_bpb",
    **{f"mix_longer_{phase}": "sequences" for phase in PHASES},
    **{f"extend_{phase}": "held_out_bpb" for phase in PHASES},
    "cold_start": "loss",
    "rl_zero": "accuracy",
    "rl": "accuracy",
    "traces": "chains",
    "student": "parameters",
    "distill": "loss",
    "export": "parity_within",
    "scaling": "forecast_error_percent",
}


def watcher(out: TextIO | None = None) -> Lines | Bars:
    """Bars where there is a terminal, lines where there is none."""
    stream = out or sys.stdout
    return Bars() if stream.isatty() else Lines(stream)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def memory(machine: int | None, device: int | None, about: str) -> str:
    """Bytes of a machine, and of each of its accelerators where some are used; empty where nobody can say."""
    if machine is None:
        return ""
    return f"{about} {size(machine)}" + ("" if device is None else f" and {size(device)} a device")


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def key_metric(manifest: dict[str, Any]) -> str:
    """The one number of a stage that a table has room for."""
    metrics = manifest["metrics"]
    if manifest["stage"] == "evaluate":
        return " → ".join(f"{m} {v:.2f}" for m, v in metrics.get("pass1", {}).items())
    name = KEY_METRICS.get(manifest["stage"]) or next((k for k, v in metrics.items() if isinstance(v, int | float)), "")
    return f"{name} {metrics[name]:,}" if name in metrics else ""


def stage_line(name: str, state: str, **values: Any) -> str:
    """What a log says of a stage that changed its state; the values are those of `Watcher.stage`."""
    manifest = values.get("manifest")
    if state == "done" and manifest:
        text = f"{duration(manifest['seconds'])}, {key_metric(manifest)}".rstrip(", ")
    else:
        text = str(values.get("error") or values.get("reason") or "")
    return f"{name:<13} {state:<8} {text}".rstrip()


class Lines:
    """One line for each thing that happens, without control characters."""

    def __init__(self, out: TextIO) -> None:
        self.out, self.last = out, time.monotonic()

    def stage(self, name: str, state: str, **values: Any) -> None:
        self.say(stage_line(name, state, **values))
        self.last = time.monotonic()

    def progress(self, name: str, done: int, total: int, **values: float) -> None:
        if time.monotonic() - self.last >= LOG_EVERY_SECONDS:
            self.last = time.monotonic()
            shown = " ".join(f"{k} {v:.4g}" for k, v in values.items())
            self.say(f"{name:<13} {'':<8} {done}/{total} {shown}".rstrip())

    def say(self, text: str) -> None:
        print(text, file=self.out, flush=True)


class Bars:
    """A line for each stage, and a bar with rate and time left under the one that runs."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console, self.bar, self.task = Console(highlight=False), None, None
        self.began, self.guard = 0.0, threading.Lock()

    STYLES: ClassVar[dict[str, str]] = {"cached": "dim", "running": "cyan", "done": "green", "failed": "bold red"}

    def stage(self, name: str, state: str, **values: Any) -> None:
        self._clear()
        self.began = time.monotonic()
        manifest = values.get("manifest")
        if state == "done" and manifest:
            text = f"{duration(manifest['seconds'])}  {key_metric(manifest)}"
        else:
            text = str(values.get("error") or values.get("reason") or "")
        style = self.STYLES.get(state, "")
        self.console.print(f"{name:<13} [{style}]{state:<8}[/] {_escaped(text)}")

    def progress(self, name: str, done: int, total: int, **values: float) -> None:
        with self.guard:
            if time.monotonic() - self.began < BAR_AFTER_SECONDS:
                return
            if self.bar is None:
                self._open(name, total)
            assert self.bar is not None
            assert self.task is not None
            shown = " ".join(f"{k} {v:.4g}" for k, v in values.items())
            rate = done / max(time.monotonic() - self.began, 1e-9)
            self.bar.update(self.task, completed=done, total=total, shown=shown, rate=f"{rate:.2g}/s")

    def _open(self, name: str, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn(f"  {name}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=self.console,
            transient=True,
        )
        self.task = self.bar.add_task(name, total=total, shown="", rate="")
        self.bar.start()

    def _clear(self) -> None:
        with self.guard:
            if self.bar is not None:
                self.bar.stop()
            self.bar = self.task = None

    def say(self, text: str) -> None:
        self._clear()
        self.console.print(_escaped(text))


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def print_table(title: str, columns: list[str], rows: Iterable[Iterable[str]]) -> None:
    """A table on a terminal, aligned columns elsewhere."""
    listed = [[str(c) for c in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left", header_style="bold")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in listed:
            table.add_row(*map(_escaped, row))
        Console().print(table)
        return
    widths = [max(len(r[i]) for r in [columns, *listed]) for i in range(len(columns))]
    print(title)
    for row in [columns, *listed]:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
