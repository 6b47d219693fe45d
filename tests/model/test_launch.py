"""How jobs are started and followed: commands for several nodes, and ranks that die or hang."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch.distributed
from torch.distributed import run as torchrun

from gristmill.model.failures import kills_for_memory
from gristmill.model.launch import JobFailed, JobHung, JobRefused, _follow, command, launch
from gristmill.model.signs_of_life import SignOfLife, SignsOfLife
from gristmill.model.stage_types import silent
from gristmill.model.training.config import LayoutConfig
from gristmill.model.worker import TELL_SECONDS

JOB = Path("/store/pretrain/key/log/job.json")


def tail_of(made: list[str]) -> list[str]:
    """Without the interpreter and its flags."""
    return made[made.index("-m") + 1 :]


@pytest.mark.parametrize("ranks", [None, 1])
def test_one_process_needs_no_launcher(ranks: int | None) -> None:
    assert tail_of(command(JOB, ranks, LayoutConfig(), {})) == ["gristmill.model.worker", str(JOB)]


def test_one_node_is_torchruns_own() -> None:
    made = command(JOB, 2, LayoutConfig(), {})
    assert tail_of(made) == [
        "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "gristmill.model.worker", str(JOB),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node[07-09,12],other3", "node07"), ("gpu1", "gpu1"), ("gpu1,gpu2", "gpu1"), ("a,b[1-2]", "a"), ("n[3,5]", "n3")],
)
def test_slurms_nodes_meet_at_the_first(nodes: str, first: str) -> None:
    made = command(JOB, 16, LayoutConfig(nodes=2), {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": nodes})
    assert made[:4] == ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    module, *arguments = tail_of(made)
    assert module == "torch.distributed.run"
    asked = torchrun.get_args_parser().parse_args(arguments)
    assert (asked.nnodes, asked.nproc_per_node, asked.standalone) == ("2", "8", False)
    assert (asked.rdzv_backend, asked.rdzv_endpoint, asked.rdzv_id) == ("c10d", f"{first}:29442", "42")
    assert (asked.module, asked.training_script) == (True, "gristmill.model.worker")
    assert asked.training_script_args == [str(JOB)]


def test_a_host_file_is_deepspeeds(tmp_path: Path) -> None:
    """DeepSpeed's own parser takes the command, and reads the file."""
    from deepspeed.launcher import runner

    hosts = tmp_path / "hosts"
    hosts.write_text("alpha slots=4\nbeta slots=4\n")
    made = command(JOB, 8, LayoutConfig(nodes=2, hostfile=str(hosts)), {})
    module, *arguments = tail_of(made)
    assert module == "deepspeed.launcher.runner"
    asked = runner.parse_args(arguments)
    assert (asked.num_nodes, asked.num_gpus, asked.module, asked.user_script) == (2, 4, True, "gristmill.model.worker")
    assert asked.no_local_rank  # or the worker's first argument would be one
    assert asked.user_args == [str(JOB)]
    assert dict(runner.fetch_hostfile(asked.hostfile)) == {"alpha": 4, "beta": 4}


@pytest.mark.parametrize(
    ("ranks", "layout", "said"),
    [
        (3, LayoutConfig(nodes=2), "ranks 3 do not divide among 2 nodes"),
        (4, LayoutConfig(nodes=2), "this is no Slurm job"),
    ],
)
def test_nodes_that_cannot_be_are_refused(ranks: int, layout: LayoutConfig, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        command(JOB, ranks, layout, {})


def busy(job: dict[str, Any], out: Path, device: Any, progress: Any) -> dict[str, Any]:
    """A job of ranks that work for a while, wait for each other, and say that they are alive."""
    torch.distributed.init_process_group("gloo")
    (out / "log" / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    for _ in range(100):
        progress(0, 1)
        torch.distributed.barrier()
        time.sleep(2 * TELL_SECONDS)  # a step is longer than signs are apart, and each of them shows one
    return {}


@pytest.mark.parametrize("sent", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_hangs_or_dies_ends_the_job_on_all(
    sent: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr("gristmill.model.launch.END_SECONDS", 2.0)
    pids: list[int] = []

    def strike() -> None:
        names = [tmp_path / "log" / f"pid-{rank}" for rank in range(2)]
        while not all(name.exists() and name.read_text() for name in names):
            time.sleep(0.02)
        pids.extend(int(name.read_text()) for name in names)
        time.sleep(1)
        os.kill(pids[1], sent)

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    wanted = JobHung if sent == signal.SIGSTOP else JobFailed
    said = (
        "rank 1 showed no sign of life for 3 s"
        if sent == signal.SIGSTOP
        else "rank 1 was ended by signal 9, and the job with it"
    )
    with pytest.raises(wanted, match=said):
        launch(
            "test_launch:busy", {}, tmp_path, threads=1, device="cpu", progress=silent, ranks=2,
            layout=LayoutConfig(hang_seconds=3),
        )  # fmt: skip
    thread.join()
    for pid in pids:
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_by_default_a_hang_is_noticed_within_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on with each look: a rank shows life once, just behind the first look, and never again."""
    now, alive = [0.0], SignOfLife(tmp_path, 0)

    def sleep(seconds: float) -> None:
        if not now[0]:
            alive.show()
        now[0] += seconds

    monkeypatch.setattr("gristmill.model.launch.time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr("gristmill.model.signs_of_life.time", SimpleNamespace(monotonic=lambda: now[0]))
    working: Any = SimpleNamespace(poll=lambda: None if now[0] < 100 else 0)
    with pytest.raises(JobHung, match="rank 0 showed no sign of life"):
        _follow(working, tmp_path / "none", silent, SignsOfLife(tmp_path, LayoutConfig().hang_seconds, 1))
    assert now[0] < 60


@pytest.fixture
def here_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's process finds the functions of this file."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")


def greedy(job: dict[str, Any], out: Path, device: Any, progress: Any) -> dict[str, Any]:
    """A job that asks for a pebibyte: of the machine, or of torch."""
    return {"made": len(bytearray(1 << 50)) if job["plain"] else torch.empty(1 << 50, dtype=torch.uint8).numel()}


def refusing(job: dict[str, Any], out: Path, device: Any, progress: Any) -> dict[str, Any]:
    raise {"ValueError": ValueError, "FloatingPointError": FloatingPointError, "OSError": OSError}[job["kind"]]("no")


def meeting(job: dict[str, Any], out: Path, device: Any, progress: Any) -> dict[str, Any]:
    """A job whose ranks meet at a port of this machine."""
    address = f"tcp://127.0.0.1:{job['port']}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    torch.distributed.destroy_process_group()
    return {"met": True}


def started(entry: str, job: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    return launch(f"test_launch:{entry}", job, out, threads=1, device="cpu", progress=silent, **more)


@pytest.mark.usefixtures("here_importable")
@pytest.mark.parametrize("plain", [True, False])
def test_a_job_without_memory_says_what_takes_less(plain: bool, tmp_path: Path) -> None:
    with pytest.raises(JobRefused, match=r"out of memory .*micro_batches, recompute .*zero_stage.*offload.*`gristmill"):
        started("greedy", {"plain": plain}, tmp_path)


@pytest.mark.usefixtures("here_importable")
def test_a_job_that_the_kernel_ended_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own count tells its ending from anybody's."""
    counters = tmp_path / "vmstat"
    counters.write_text("nr_free_pages 5\noom_kill 7\nballoon_inflate 0\n")
    assert kills_for_memory(counters) == 7
    assert kills_for_memory(tmp_path / "none") == 0
    assert kills_for_memory() >= 0
    counted = iter([7, 8])
    monkeypatch.setattr("gristmill.model.launch.kills_for_memory", lambda: next(counted))
    with pytest.raises(JobRefused, match=r"rank 0 was ended by the kernel: out of memory; .*micro_batches"):
        started("suicidal", {}, tmp_path / "out")


def suicidal(job: dict[str, Any], out: Path, device: Any, progress: Any) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


@pytest.mark.usefixtures("here_importable")
@pytest.mark.parametrize(("kind", "refused"), [("ValueError", True), ("FloatingPointError", True), ("OSError", False)])
def test_what_would_fail_again_is_refused(kind: str, refused: bool, tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match=r"^no ") as raised:
        started("refusing", {"kind": kind}, tmp_path)
    assert isinstance(raised.value, ValueError) is refused


@pytest.mark.usefixtures("here_importable")
def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(JobFailed, match=f"port {port} is taken by another process"):
            started("meeting", {"port": port}, tmp_path)
    assert started("meeting", {"port": port}, tmp_path) == {"met": True}


@pytest.mark.usefixtures("here_importable")
def test_a_rank_that_never_appears_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two ranks is started, which waits for the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    worker = [sys.executable, "-P", "-m", "gristmill.model.worker", str(tmp_path / "log" / "job.json")]
    monkeypatch.setattr("gristmill.model.launch.command", lambda *_: worker)
    monkeypatch.setattr("gristmill.model.launch.END_SECONDS", 2.0)
    began = time.monotonic()
    with pytest.raises(JobHung, match=r"rank 1 of 2 has not appeared, 2 s after the first one did.*machine is up"):
        started("busy", {}, tmp_path, ranks=2, layout=LayoutConfig(hang_seconds=2))
    assert time.monotonic() - began < 60


@pytest.mark.usefixtures("here_importable")
def test_how_an_earlier_start_ended_is_not_how_this_one_did(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "output.log").write_text("Root Cause (first observed failure):\n rank : 1\n exitcode : -9\n")
    with pytest.raises(JobRefused, match=r"^no "):
        started("refusing", {"kind": "ValueError"}, tmp_path)


@pytest.mark.usefixtures("here_importable")
def test_a_rank_that_hangs_in_its_first_batch_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank waits for it in its first pass."""
    monkeypatch.setattr("gristmill.model.launch.END_SECONDS", 2.0)
    with pytest.raises(JobHung, match="rank 1 showed no sign of life for 4 s"):
        launch(
            "hanging_job:run", {}, tmp_path, threads=1, device="cpu", progress=silent, ranks=2,
            layout=LayoutConfig(hang_seconds=4),
        )  # fmt: skip
