"""Descriptions of clusters: what is read, what is refused, and what Slurm and Kubernetes would be asked for."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from distributed import LocalCluster

from gristmill.data import executor
from gristmill.data.cluster import (
    JobQueue,
    Kubernetes,
    job_queue_cluster,
    kubernetes_spec,
    read_cluster,
    worker_environment,
)
from gristmill.data.executor import ClusterLost, Task, close_cluster, cluster_client, run_tasks, running_on
from gristmill.data.stage_types import silent

INFRA = Path(__file__).parents[2] / "infra"


@pytest.fixture(autouse=True)
def _no_cluster_is_left() -> Iterator[None]:
    yield
    close_cluster()


def test_an_address_a_schedulers_file_and_descriptions_are_read(tmp_path: Path) -> None:
    assert read_cluster("tls://10.0.0.1:8786") == "tls://10.0.0.1:8786"
    (tmp_path / "scheduler.json").write_text(json.dumps({"type": "Scheduler", "address": "tcp://a:1", "workers": {}}))
    assert read_cluster(str(tmp_path / "scheduler.json")) == "tcp://a:1"
    slurm = read_cluster(str(INFRA / "slurm" / "cluster.yaml"))
    assert isinstance(slurm, JobQueue)
    assert (slurm.workers, slurm.processes, slurm.options["queue"]) == (64, 16, "cpu")
    kubernetes = read_cluster(str(INFRA / "kubernetes" / "cluster.yaml"))
    assert isinstance(kubernetes, Kubernetes)
    assert kubernetes.volumes[0].mount == "/corpus"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (None, r"there is no cluster description at .*/c\.yaml"),
        ("kind: [", r"c\.yaml is not YAML"),
        ("kind: nomad", r"c\.yaml describes no cluster: .*'nomad'"),
        ("just text", r"c\.yaml describes no cluster"),
        ("{kind: slurm, workers: 0}", r"slurm\.workers: Input should be greater than or equal to 1"),
        ("{kind: slurm, workers: 2, memory: lots}", r"slurm\.memory: String should match"),
        ("{kind: kubernetes, workers: 2}", r"kubernetes\.image: Field required"),
        ("{kind: slurm, workers: 2, queue: cpu}", r"slurm\.queue: Extra inputs are not permitted"),
    ],
)
def test_what_is_no_cluster_is_refused_before_any_work(written: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    if written is not None:
        path.write_text(written)
    with pytest.raises(ValueError, match=message), running_on(str(path)):
        raise AssertionError("the block was entered")


def test_a_bare_name_is_no_cluster() -> None:
    with pytest.raises(ValueError, match=r"cluster is '10\.0\.0\.1:8786': give a scheduler's address such as tcp://"):
        read_cluster("10.0.0.1:8786")


def test_nobody_at_the_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(executor, "CONNECT_SECONDS", 0.5)
    task = Task(os.mkdir, (tmp_path / "x",), tmp_path / "x")
    with pytest.raises(ClusterLost, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:1 "):
        run_tasks([task], 1, silent, cluster="tcp://127.0.0.1:1")
    assert not (tmp_path / "x").exists()


def test_the_job_that_slurm_would_get() -> None:
    pytest.importorskip("dask_jobqueue")
    told = read_cluster(str(INFRA / "slurm" / "cluster.yaml"))
    assert isinstance(told, JobQueue)
    there = {k: v for k, v in told.options.items() if k not in ("interface", "log_directory")}  # of another machine
    with job_queue_cluster(told.model_copy(update={"options": there}), threads=2) as cluster:
        script = cluster.job_script()
        assert not cluster.workers  # no job yet
    # The shell is the judge of the script, Slurm's directives are its comments.
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    lines = script.splitlines()
    directives = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert {"-J gristmill", "-p cpu", "-n 1", "--cpus-per-task=32", "--mem=16640M", "-t 08:00:00"} <= directives
    worker = lines[-1].split()
    assert worker[1:3] == ["-m", "distributed.cli.dask_worker"]
    for name, value in {
        "--nthreads": "1",
        "--memory-limit": "1.00GiB",
        "--nworkers": "16",
        "--lifetime": "7h30m",
    }.items():
        assert worker[worker.index(name) + 1] == value
    assert {"--nanny", "--no-dashboard"} <= set(worker)
    shell = "\n".join(line for line in lines if line.startswith("export ")) + "\nenv"
    said = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout.splitlines()
    assert {f"{name}={value}" for name, value in worker_environment(2).items()} <= set(said)


def test_options_that_jobqueue_does_not_know_are_refused() -> None:
    pytest.importorskip("dask_jobqueue")
    with pytest.raises(ValueError, match=r"dask-jobqueue refuses the options of the slurm cluster: .*colour"):
        job_queue_cluster(JobQueue(kind="slurm", workers=1, options={"colour": "red"}))


def test_the_pods_that_kubernetes_would_get() -> None:
    pytest.importorskip("dask_kubernetes")
    told = read_cluster(str(INFRA / "kubernetes" / "cluster.yaml"))
    assert isinstance(told, Kubernetes)
    spec = kubernetes_spec(told)
    assert (spec["apiVersion"], spec["kind"], spec["metadata"]) == (
        "kubernetes.dask.org/v1", "DaskCluster", {"name": "gristmill"},
    )  # fmt: skip
    worker = spec["spec"]["worker"]
    assert worker["replicas"] == 64
    (container,) = worker["spec"]["containers"]
    said = " ".join([*container["command"], *container["args"]])
    assert said.startswith("env dask worker --nthreads 1 --memory-limit 1073741824 --name $(DASK_WORKER_NAME)")
    assert container["resources"]["requests"] == {"cpu": "1", "memory": str(1280 * 2**20)}
    assert {e["name"]: e["value"] for e in container["env"]}.items() >= worker_environment().items()
    for part in ("worker", "scheduler"):
        pod = spec["spec"][part]["spec"]
        assert pod["volumes"] == [{"name": "corpus", "persistentVolumeClaim": {"claimName": "corpus"}}]
        assert pod["containers"][0]["volumeMounts"] == [{"name": "corpus", "mountPath": "/corpus"}]
        assert pod["containers"][0]["image"] == told.image
    json.dumps(spec)  # what is sent


def test_the_manifests_of_infra_agree_with_each_other() -> None:
    """The claim, its namespace and its mount are one thing in three files."""
    run = list(yaml.safe_load_all((INFRA / "kubernetes" / "run.yaml").read_text()))
    claim = yaml.safe_load((INFRA / "kubernetes" / "volume.yaml").read_text())
    told = read_cluster(str(INFRA / "kubernetes" / "cluster.yaml"))
    assert isinstance(told, Kubernetes)
    pod: dict[str, Any] = run[-1]["spec"]["template"]["spec"]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"] == told.volumes[0].claim
    assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == told.volumes[0].mount
    assert {part["metadata"]["namespace"] for part in [*run, claim]} == {told.namespace}


SBATCH = """#!/bin/sh
cp "$1" "$0.$$.sh"
setsid bash "$0.$$.sh" > /dev/null 2>&1 < /dev/null &
echo "Submitted batch job $!"
"""
SCANCEL = """#!/bin/sh
kill -9 -- "-$1"
"""


def test_a_described_cluster_is_started_kept_and_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """dask-jobqueue's own class and job script, with commands in place of Slurm's that run the job here."""
    pytest.importorskip("dask_jobqueue")
    for name, text in {"sbatch": SBATCH, "scancel": SCANCEL}.items():
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    options = {
        "queue": "cpu",
        "worker_extra_args": ["--host", "127.0.0.1"],
        "scheduler_options": {"host": "127.0.0.1"},
        "local_directory": str(tmp_path),
    }
    description = tmp_path / "c.json"
    description.write_text(json.dumps({"kind": "slurm", "workers": 2, "processes": 2, "options": options}))
    tasks = [Task(os.mkdir, (tmp_path / f"{i}",), tmp_path / f"{i}") for i in range(6)]
    with running_on(str(description)):
        run_tasks(tasks, 1, silent)
        client = cluster_client(1, cluster=str(description))
        client.wait_for_workers(2, timeout=60)
        found = client.run(os.getenv, "DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE")
        pids = list(client.run(os.getpid).values())
    assert list(found.values()) == ["False", "False"]
    assert all((tmp_path / str(i)).is_dir() for i in range(6))
    assert len(list((tmp_path / "bin").glob("sbatch.*.sh"))) == 1  # two processes, one job
    close_cluster()
    until = time.monotonic() + 20
    while any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids):
        assert time.monotonic() < until, "the job outlives its run"
        time.sleep(0.1)


def test_a_cluster_without_a_shared_filesystem_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The worker has its result, this process never sees it."""
    monkeypatch.setattr(executor, "SETTLE_SECONDS", 1.0)
    task = Task(os.mkdir, (tmp_path / "x",), tmp_path / "x")
    with LocalCluster(n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as theirs:
        monkeypatch.setattr(Path, "exists", lambda path: False)  # here, not on the worker
        with pytest.raises(
            RuntimeError, match=r"a worker wrote .*/x, which is not to be seen from here: .*shared filesystem"
        ):
            run_tasks([task], 1, silent, cluster=theirs.scheduler_address)
        monkeypatch.undo()
