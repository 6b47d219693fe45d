"""Starts a training, sampling or conversion job in a process of its own and follows it to its end.

The job's process holds torch, its threads and its memory; what starts it stays small, and a stage that dies takes
nothing with it. A job whose launcher is gone ends itself (`gristmill.model.worker`), so no orphan keeps the cores.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from gristmill.model.stage_types import Metrics, Progress

POLL_SECONDS = 0.2


class JobFailed(RuntimeError):
    """A job's process ended badly; the message is the job's own sentence and where its log lies."""


def launch(
    entry: str,
    job: dict[str, Any],
    out: Path,
    *,
    threads: int,
    device: str,
    progress: Progress,
    ranks: int | None = None,
) -> Metrics:
    """Run `entry` ("module:function" of gristmill.model) on `job`, remove out/work and return the metrics it wrote.

    With `ranks` the job is started by torchrun with that many processes, otherwise as one plain process. A job that
    had ended when its launcher was killed is not run again.

    Raises:
        JobFailed: the process ended with an error.
        KeyboardInterrupt: Ctrl-C, also where only the job's process was told of it.
    """
    log, work = out / "log", out / "work"
    log.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    told, failure, metrics = log / "progress.jsonl", log / "error.json", work / "metrics.json"
    if (ended := _ended(metrics)) is not None:
        return _cleared(work, metrics, ended)
    for stale in (told, failure, metrics):
        stale.unlink(missing_ok=True)
    described = {"entry": entry, "job": job, "out": str(out), "threads": threads, "device": device}
    (log / "job.json").write_text(json.dumps(described, indent=1, sort_keys=True), encoding="utf-8")
    with (log / "output.log").open("ab") as output:
        process = subprocess.Popen(
            _command(log / "job.json", ranks),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=_environment(threads, device),
        )
        try:
            code = _follow(process, told, progress)
        finally:
            _end(process)
    if code and _was_interrupted(log / "output.log", code):
        raise KeyboardInterrupt
    ended = None if code else _ended(metrics)
    if ended is None:
        raise JobFailed(_sentence(failure, log / "output.log", code))
    return _cleared(work, metrics, ended)


def boot() -> str:
    """What changes when the machine starts again, and files that were never flushed may hold anything."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="ascii").strip() if path.exists() else ""


def _ended(metrics: Path) -> Metrics | None:
    """The metrics of a job that has written all that it makes, since the machine's last start."""
    if not metrics.exists():
        return None
    written = json.loads(metrics.read_text(encoding="utf-8"))
    return written["metrics"] if written["boot"] == boot() else None


def _cleared(work: Path, metrics: Path, ended: Metrics) -> Metrics:
    """Remove work/, the word that the job has ended last: killed in between, the next start goes on removing."""
    for path in sorted(work.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        elif path != metrics:
            path.unlink()
    shutil.rmtree(work)
    return ended


def _command(described: Path, ranks: int | None) -> list[str]:
    python = [sys.executable, "-P", "-m"]
    worker = ["gristmill.model.worker", str(described)]
    if ranks is None:
        return [*python, *worker]
    return [*python, "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", *worker]


def _environment(threads: int, device: str) -> dict[str, str]:
    fixed = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONSAFEPATH": "1",
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "GRISTMILL_LAUNCHER": str(os.getpid()),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return {**os.environ, **fixed, **({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {})}


def _follow(process: subprocess.Popen[bytes], told: Path, progress: Progress) -> int:
    """Pass on what the job tells of its progress until it ends; the exit code."""
    position = 0
    while True:
        code = process.poll()
        if told.exists():
            with told.open("rb") as file:
                file.seek(position)
                lines = file.read()
            whole = lines.rfind(b"\n") + 1
            position += whole
            for line in lines[:whole].splitlines()[-1:]:
                row = json.loads(line)
                progress(row["done"], row["total"], **row["values"])
        if code is not None:
            return code
        time.sleep(POLL_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave no process behind, whatever ended the following of it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _sentence(failure: Path, output: Path, code: int) -> str:
    if failure.exists():
        return f"{json.loads(failure.read_text(encoding='utf-8'))['error']} (log: {output})"
    last = _last_line(output) or "nothing"
    return f"the job ended with exit code {code} and last printed {last!r}; its log is {output}"


def _was_interrupted(output: Path, code: int) -> bool:
    """Whether Ctrl-C ended the job: it goes to the whole process group, and torchrun says so in its last line."""
    return code in (-signal.SIGINT, 128 + signal.SIGINT) or _last_line(output).endswith("got signal: 2")


def _last_line(output: Path) -> str:
    with output.open(encoding="utf-8", errors="replace") as file:
        return next((line.strip() for line in reversed(deque(file, 40)) if line.strip()), "")
