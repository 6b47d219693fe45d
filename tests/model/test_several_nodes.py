"""Jobs on several nodes: the very commands run, by stand-ins for srun, pdsh and ssh (`cluster.py`)."""

from __future__ import annotations

import os
import random
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from gristmill.model.launch import MEETING_PORTS, job_environment, launch
from gristmill.model.stage_types import Metrics, silent
from gristmill.model.training.config import LayoutConfig
from tests.model import cluster


@pytest.fixture(autouse=True)
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins are found first, and a job's process finds `cluster.py`."""
    monkeypatch.setenv("PATH", cluster.install(tmp_path / "bin"))
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")


def summed(out: Path, layout: LayoutConfig, *names: str) -> Metrics:
    """What the ranks say, of their environment these names."""
    return launch(
        "cluster:summing",
        {"names": names},
        out,
        threads=1,
        device="cpu",
        progress=silent,
        ranks=layout.nodes,
        layout=layout,
    )


def free_port(among: range) -> int:
    """One of these ports that nobody listens at."""
    for port in random.sample(among, len(among)):
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"no port of {among} is free")


def test_slurms_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very line, by a stand-in for srun that starts both nodes' torchruns here."""
    port = free_port(MEETING_PORTS)
    monkeypatch.setenv("SLURM_JOB_ID", str(7 * len(MEETING_PORTS) + port - MEETING_PORTS[0]))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "localhost,other")
    found = summed(tmp_path / "out", LayoutConfig(nodes=2), "SLURM_NODEID", "GROUP_RANK", "LOCAL_RANK")
    assert found["sum"] == 1 + 2
    nodes = [(e["SLURM_NODEID"], e["GROUP_RANK"], e["LOCAL_RANK"]) for e in found["environments"]]
    assert {node for node, _, _ in nodes} == {"0", "1"}
    assert [rest for _, *rest in nodes] == [["0", "0"], ["1", "0"]]  # a rank each, on a node of its own


def test_deepspeeds_command_runs_and_other_nodes_know_what_is_set_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very line, by stand-ins for pdsh and ssh whose shells begin with an empty environment."""
    hosts, home, odd = tmp_path / "hosts", tmp_path / "home", 'a "b" $HOME `c` \\ d'
    hosts.write_text("alpha slots=1\nbeta slots=1\n")
    home.mkdir()
    (home / ".deepspeed_env").write_text("OF_THE_USER=there\n\nOMP_NUM_THREADS=63")
    monkeypatch.setenv("HOME", str(home))
    here = {"GRISTMILL_KERNELS": "torch", "GLOO_SOCKET_IFNAME": "lo", "NCCL_DEBUG": "WARN", "TORCH_ODD": odd}
    secret = dict.fromkeys(("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_TOKEN"), "hidden-from-all")
    for name, value in {**here, **secret}.items():
        monkeypatch.setenv(name, value)
    out, set_here = tmp_path / "out", job_environment(1, "cpu", 2, 2)
    asked = (*set_here, *here, *secret, "OF_THE_USER", "PYTHONPATH", "PDSH_HOST")
    found = summed(out, LayoutConfig(nodes=2, hostfile=str(hosts)), *asked)
    assert found["sum"] == 1 + 2
    assert {"OMP_NUM_THREADS", "GOMP_SPINCOUNT", "DS_ACCELERATOR", "HF_HUB_OFFLINE"} <= set(set_here)
    wanted = {**set_here, **here, "OF_THE_USER": "there", "PYTHONPATH": os.environ["PYTHONPATH"]}
    for host, environment in zip(("alpha", "beta"), found["environments"], strict=True):
        assert environment["PDSH_HOST"] == host
        assert {name: environment.get(name) for name in wanted} == wanted
        assert not secret.keys() & environment.keys()
    for told in (out / "log").iterdir():
        assert "hidden-from-all" not in told.read_text()
    assert [path.name for path in home.iterdir()] == [".deepspeed_env"]
