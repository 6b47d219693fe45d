"""Starts a training, sampling or conversion job in a process of its own and follows it to its end.

The job's process holds torch, its threads and its memory; what starts it stays small, and a stage that dies takes
nothing with it. A job whose launcher is gone ends itself (`gristmill.model.worker`), so no orphan keeps the cores; one
on several nodes does not notice, and is not started twice.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from gristmill.model.failures import SPARING, kills_for_memory
from gristmill.model.signs_of_life import SignsOfLife, allowed_silence, rank_of
from gristmill.model.stage_types import Metrics, Progress
from gristmill.model.training.config import LayoutConfig

POLL_SECONDS = 0.2
END_SECONDS = 10.0  # that a job has to end by itself
LAST_WORDS = 20_000  # bytes of a log in which torchrun says what failed
MEETING_PORTS = range(29_400, 30_400)  # of the first node, where the ranks find each other: one a job, if chance wills
# Beginnings of names that other nodes have to know as well, where somebody set them. DeepSpeed's launcher prints all
# that it passes on, so that no credentials are among them; a job reads folders, and none on S3.
PASSED_ON = ("GRISTMILL_KERNELS", "GLOO_", "NCCL_", "TORCH", "PYTORCH_", "CUBLAS_", "TRITON_", "LD_LIBRARY_PATH")


class JobFailed(RuntimeError):
    """A job's process ended badly; the message is the job's own sentence and where its log lies."""


class JobHung(JobFailed):
    """A rank of a job showed no sign of life for too long, or never one, and the whole job was stopped."""


class JobRefused(JobFailed, ValueError):
    """A job that would fail of the same again: of its input, of numbers that diverge, of too little memory."""


def launch(
    entry: str,
    job: dict[str, Any],
    out: Path,
    *,
    threads: int,
    device: str,
    progress: Progress,
    ranks: int | None = None,
    layout: LayoutConfig | None = None,
) -> Metrics:
    """Run `entry` ("module:function" of gristmill.model) on `job`, remove out/work and return the metrics it wrote.

    With several `ranks` the job is started by torchrun with that many processes, on the nodes of `layout`; otherwise as
    one plain process. A job that had ended when its launcher was killed is not run again.

    Raises:
        JobFailed: the process ended with an error; JobRefused: with one that would come again.
        JobHung: a rank showed no sign of life for `layout.hang_seconds`, or none came when another's had.
        KeyboardInterrupt: Ctrl-C, also where only the job's process was told of it.
    """
    log, work = out / "log", out / "work"
    log.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    told, failure, metrics = log / "progress.jsonl", log / "error.json", work / "metrics.json"
    if (ended := _ended(metrics)) is not None:
        return _cleared(work, metrics, ended)
    if layout is not None and layout.nodes > 1:
        _refuse_beside_another(log, layout.hang_seconds)
    for stale in (told, failure, metrics, log / "nodes.env", *log.glob("alive-*")):
        stale.unlink(missing_ok=True)
    described = {"entry": entry, "job": job, "out": str(out), "threads": threads, "device": device}
    (log / "job.json").write_text(json.dumps(described, indent=1, sort_keys=True), encoding="utf-8")
    fixed = job_environment(threads, device, ranks, layout.nodes if layout else 1)
    told_nodes = log / "nodes.env"
    if layout is not None and layout.hostfile is not None:
        told_nodes.touch(mode=0o600)  # it may hold what the user keeps to himself
        told_nodes.write_text(_passed_on(fixed, os.environ), encoding="utf-8")
        fixed["DS_ENV_FILE"] = str(told_nodes.resolve())
    killed = kills_for_memory()
    with (log / "output.log").open("ab") as output:
        before = output.tell()
        process = subprocess.Popen(
            command(log / "job.json", ranks, layout or LayoutConfig(), os.environ),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**_not_printed(os.environ), **fixed} if told_nodes.exists() else {**os.environ, **fixed},
        )
        try:
            signs = SignsOfLife(log, layout.hang_seconds if layout else math.inf, ranks or 1)
            code = _follow(process, told, progress, signs)
        finally:
            _end(process)
            told_nodes.unlink(missing_ok=True)
    if code and _was_interrupted(log / "output.log", code):
        raise KeyboardInterrupt
    ended = None if code else _ended(metrics)
    if ended is None:
        raise _failure(failure, log / "output.log", before, code, kills_for_memory() > killed)
    return _cleared(work, metrics, ended)


def _refuse_beside_another(log: Path, seconds: float) -> None:
    """Ranks on other nodes do not see that their launcher was killed: wait until they are silent.

    Raises:
        JobFailed: a rank of an earlier start showed life a moment ago.
    """
    for path in log.glob("alive-*"):
        with suppress(FileNotFoundError):
            silent_for, allowed = time.time() - path.stat().st_mtime, allowed_silence(path, seconds)
            if silent_for < allowed:
                raise JobFailed(
                    f"rank {rank_of(path.name)} of an earlier start was alive {silent_for:.0f} s ago: end that job, or "
                    f"start again once it has been silent for {allowed:g} s"
                )


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


def command(described: Path, ranks: int | None, layout: LayoutConfig, environment: Mapping[str, str]) -> list[str]:
    """What starts a job: a plain process, torchrun here or by Slurm on several nodes, or DeepSpeed's launcher.

    Raises:
        ValueError: there are several nodes and neither a host file nor a Slurm job; or ranks do not divide among them.
    """
    python = [sys.executable, "-P", "-m"]
    worker = ["gristmill.model.worker", str(described)]
    nodes = layout.nodes
    if ranks is None or ranks == nodes == 1:
        return [*python, *worker]
    if nodes == 1:
        return [*python, "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", *worker]
    if ranks % nodes:
        raise ValueError(f"ranks {ranks} do not divide among {nodes} nodes: choose a multiple of {nodes}")
    if layout.hostfile is not None:
        several = [f"--hostfile={layout.hostfile}", f"--num_nodes={nodes}", f"--num_gpus={ranks // nodes}"]
        several += [f"--master_port={MEETING_PORTS[os.getpid() % len(MEETING_PORTS)]}", "--no_local_rank"]
        return [*python, "deepspeed.launcher.runner", *several, "--module", *worker]
    if "SLURM_JOB_ID" not in environment:
        raise ValueError(
            f"layout.nodes is {nodes}, and this is no Slurm job: start the run by sbatch on that many nodes, or name a "
            f"layout.hostfile"
        )
    port = MEETING_PORTS[int(environment["SLURM_JOB_ID"]) % len(MEETING_PORTS)]
    meeting = f"{_first_host(environment['SLURM_JOB_NODELIST'])}:{port}"
    several = [f"--nnodes={nodes}", f"--nproc-per-node={ranks // nodes}", "--rdzv-backend=c10d"]
    several += [f"--rdzv-endpoint={meeting}", f"--rdzv-id={environment['SLURM_JOB_ID']}"]
    srun = ["srun", f"--nodes={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    return [*srun, *python, "torch.distributed.run", *several, "-m", *worker]


def _first_host(nodes: str) -> str:
    """The first name of Slurm's list: `node[07-09,12],other3` begins with node07."""
    name, bracket, rest = nodes.partition("[")
    if not bracket or "," in name:
        return nodes.partition(",")[0]
    return name + re.split("[-,\\]]", rest, maxsplit=1)[0]


def job_environment(threads: int, device: str, ranks: int | None, nodes: int) -> dict[str, str]:
    """What a job's processes find in their environment, whoever starts it."""
    fixed = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONSAFEPATH": "1",
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # libgomp's threads spin for milliseconds at each barrier before they sleep, which on a processor shared with
        # others takes the time of those it waits for; a tenth of a millisecond costs nothing when alone.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
    }
    if nodes == 1:
        fixed |= {"GRISTMILL_LAUNCHER": str(os.getpid()), "GLOO_SOCKET_IFNAME": "lo"}
    if ranks == nodes == 1:
        fixed |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    return fixed | ({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {})


def _not_printed(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what DeepSpeed's launcher would of its own accord print into the log, credentials among it."""
    return {name: value for name, value in environment.items() if not name.startswith("MLFLOW")}


def _passed_on(fixed: Mapping[str, str], environment: Mapping[str, str]) -> str:
    """What DeepSpeed's launcher is to set on other nodes, as the file that it reads: `name=value`, a line each.

    By itself it passes on PYTHON…, UCX…, MV2… and, where it finds a GPU, NCCL…, and has the working directory on
    PYTHONPATH, where folders hide packages of their names. The files that it would read without this one come first.
    """
    named = environment.get("DS_ENV_FILE", ".deepspeed_env")
    theirs = [path.read_text(encoding="utf-8") for path in (Path.home() / named, Path(named)) if path.is_file()]
    ours = {name: value for name, value in sorted(environment.items()) if name.startswith(PASSED_ON)}
    ours |= {"PYTHONPATH": environment.get("PYTHONPATH", ""), **fixed}
    # The launcher puts what a shell might take apart into double quotes, where these keep a meaning.
    lines = [f"{name}=" + re.sub(r'[\\"$`]', r"\\\g<0>", value) for name, value in ours.items()]
    return "".join(f"{line}\n" for line in [*"\n".join(theirs).splitlines(), *lines] if line)


def _follow(process: subprocess.Popen[bytes], told: Path, progress: Progress, signs: SignsOfLife) -> int:
    """Pass on what the job tells of its progress until it ends; the exit code. Raises JobHung."""
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
        hung, absent = signs.hung(), signs.absent()
        if absent is not None:  # for which the others wait, who are silent too
            raise JobHung(
                f"rank {absent} of {signs.ranks} has not appeared, {signs.seconds:g} s after the first one did, so the "
                f"job was stopped: see that its machine is up and shares this store. If its start takes longer, raise "
                f"execution.layout.hang_seconds"
            )
        if hung is not None:
            raise JobHung(
                f"rank {hung[0]} showed no sign of life for {hung[1]:g} s, so the job was stopped; started again it "
                f"goes on from its last checkpoint. If a batch takes longer, raise execution.layout.hang_seconds"
            )
        time.sleep(POLL_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave no process behind, whatever ended the following of it: a rank that hangs does not hear a signal."""
    if process.poll() is not None:
        return
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for one in below:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    deadline = time.monotonic() + END_SECONDS
    while not all(map(_is_over, below)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _is_over(process: psutil.Process) -> bool:
    """Whether it runs no more; its parent may not have asked for its exit code yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


ROOT_CAUSE = re.compile(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*-(\d+)", re.DOTALL)


def _failure(failure: Path, output: Path, before: int, code: int, for_memory: bool) -> JobFailed:
    """What ended a job: the signal that torchrun or the launcher saw, a rank's own error, or its last words.

    `before`: bytes of the log that earlier starts wrote. `for_memory`: the kernel ended a process of this machine for
    want of memory meanwhile.
    """
    with output.open("rb") as file:
        file.seek(max(before, output.stat().st_size - LAST_WORDS))
        ended = ROOT_CAUSE.search(file.read().decode("utf-8", errors="replace"))
    rank, sent = (0, -code) if code < 0 else (int(ended[1]), int(ended[2])) if ended else (0, 0)
    if sent == signal.SIGKILL and for_memory:
        return JobRefused(f"rank {rank} was ended by the kernel: out of memory; {SPARING} (log: {output})")
    if sent:
        return JobFailed(f"rank {rank} was ended by signal {sent}, and the job with it (log: {output})")
    with suppress(FileNotFoundError, json.JSONDecodeError):  # it is cut off where the disk is full
        told = json.loads(failure.read_text(encoding="utf-8"))
        return (JobFailed if told["may_pass"] else JobRefused)(f"{told['error']} (log: {output})")
    last = _last_line(output) or "nothing"
    return JobFailed(f"the job ended with exit code {code} and last printed {last!r}; its log is {output}")


def _was_interrupted(output: Path, code: int) -> bool:
    """Whether Ctrl-C ended the job: it goes to the whole process group, and torchrun says so in its last line."""
    return code in (-signal.SIGINT, 128 + signal.SIGINT) or _last_line(output).endswith("got signal: 2")


def _last_line(output: Path) -> str:
    with output.open(encoding="utf-8", errors="replace") as file:
        return next((line.strip() for line in reversed(deque(file, 40)) if line.strip()), "")
