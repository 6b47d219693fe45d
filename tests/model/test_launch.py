"""How jobs are started and followed: commands for several nodes, and ranks that die or hang."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed

from gristmill.model.launch import JobFailed, JobHung, command, launch
from gristmill.model.stage_types import silent
from gristmill.model.training.config import LayoutConfig

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
    assert tail_of(made) == [
        "torch.distributed.run", "--nnodes=2", "--nproc-per-node=8", "--rdzv-backend=c10d",
        f"--rdzv-endpoint={first}:29442", "--rdzv-id=42", "-m", "gristmill.model.worker", str(JOB),
    ]  # fmt: skip


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
    for _ in range(600):
        progress(0, 1)
        torch.distributed.barrier()
        time.sleep(0.05)
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
