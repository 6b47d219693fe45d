"""Where tasks run: processes here, a Dask scheduler's address, or a cluster that a short description asks for.

    kind: slurm                    # or pbs, sge, lsf, moab, oar, htcondor: by dask-jobqueue
    workers: 64                    # worker processes in all
    processes: 16                  # of them in one job
    options: {queue: cpu, walltime: "08:00:00"}

    kind: kubernetes               # by dask-kubernetes and its operator
    workers: 64
    image: registry.example/gristmill:0.1
    volumes: [{claim: corpus, mount: /corpus}]

infra/slurm and infra/kubernetes hold whole ones. Every worker runs one task at a time under a memory limit; workers,
the process that starts the run and the store must see the same files under the same paths.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from gristmill.data.config import Config

THREAD_COUNTS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "POLARS_MAX_THREADS",
)
MEMORY_LIMIT = "1GiB"  # a worker above 95 % of it is ended, and its task run again
NANNY_MEMORY = "256MiB"  # of a job or pod, beside its workers: the process that starts them, and starts them anew
GIVEN_UP = 4.0  # seconds without a process after which nobody will start it; a nanny takes milliseconds
SCHEDULER = "DASK_SCHEDULER_ADDRESS"
# Spilling and pausing are for results kept in memory; tasks here keep none. A worker that pauses on the memory of its
# libraries never goes on: only the limit itself is acted on. The profiler would take a few percent of each worker, and
# measuring the machine twice a second and the loop's ticks fifty times as much of the process that starts them.
SETTINGS = {
    "DASK_DISTRIBUTED__WORKER__MEMORY__TARGET": "False",
    "DASK_DISTRIBUTED__WORKER__MEMORY__SPILL": "False",
    "DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE": "False",
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
    "DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL": "1s",
    "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__INTERVAL": "5s",
}
OWN_SETTINGS = {"distributed.admin.tick.interval": "1s", "distributed.admin.system-monitor.interval": "5s"}
JOB_QUEUES = {
    "slurm": "SLURMCluster",
    "pbs": "PBSCluster",
    "sge": "SGECluster",
    "lsf": "LSFCluster",
    "moab": "MoabCluster",
    "oar": "OARCluster",
    "htcondor": "HTCondorCluster",
}


class JobQueue(Config):
    """Workers as jobs of a batch system, made by dask-jobqueue."""

    kind: Literal["slurm", "pbs", "sge", "lsf", "moab", "oar", "htcondor"] = Field(
        title="Kind", description="The batch system."
    )
    workers: int = Field(ge=1, le=100_000, title="Workers", description="Worker processes in all; the most of them.")
    fewest: int | None = Field(
        default=None,
        ge=0,
        title="Fewest workers",
        description="Where given, jobs come and go with the work, between this number of workers and all.",
    )
    processes: int = Field(default=1, ge=1, le=1024, title="Processes", description="Worker processes in one job.")
    memory: str = Field(
        default=MEMORY_LIMIT, pattern=r"^\d+(\.\d+)? ?[kMGT]i?B$", title="Memory", description="Of one worker process."
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        title="Options",
        description="Of dask-jobqueue's class, as they are: queue, account, walltime, interface, job_extra_directives, "
        "job_script_prologue, log_directory, python, …",
    )


class Volume(Config):
    """A persistent volume claim in every worker's pod."""

    claim: str = Field(min_length=1, title="Claim", description="Name of the persistent volume claim.")
    mount: str = Field(pattern=r"^/", title="Mount", description="Path of it in the pods.")


class Kubernetes(Config):
    """Workers as pods, made by dask-kubernetes through its operator."""

    kind: Literal["kubernetes"] = Field(title="Kind", description="Kubernetes.")
    workers: int = Field(ge=1, le=100_000, title="Workers", description="Pods with one worker each; the most of them.")
    fewest: int | None = Field(
        default=None,
        ge=0,
        title="Fewest workers",
        description="Where given, pods come and go with the work, between this number and all.",
    )
    name: str = Field(
        default="gristmill", pattern=r"^[a-z]([-a-z0-9]{0,51}[a-z0-9])?$", title="Name", description="Of the cluster."
    )
    namespace: str | None = Field(default=None, title="Namespace", description="The context's own by default.")
    image: str = Field(min_length=1, title="Image", description="With this package in it; see infra/docker.")
    memory: str = Field(
        default=MEMORY_LIMIT, pattern=r"^\d+(\.\d+)? ?[kMGT]i?B$", title="Memory", description="Of one worker."
    )
    cpu: str = Field(default="1", pattern=r"^\d+m?$", title="CPU", description="Of one worker, in Kubernetes' words.")
    volumes: tuple[Volume, ...] = Field(default=(), title="Volumes", description="The shared files.")
    environment: dict[str, str] = Field(
        default_factory=dict, title="Environment", description="More variables for the pods, such as AWS_ENDPOINT_URL."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, title="Options", description="Of dask_kubernetes.operator.KubeCluster, as they are."
    )


Description = Annotated[JobQueue | Kubernetes, Field(discriminator="kind")]
_DESCRIPTION: TypeAdapter[JobQueue | Kubernetes] = TypeAdapter(Description)


def read_cluster(cluster: str) -> str | JobQueue | Kubernetes:
    """What `cluster` names: a scheduler's address as it is, or the description in a YAML or JSON file.

    Dask's own scheduler files (`dask scheduler --scheduler-file`) are descriptions as well: of an address.

    Raises:
        ValueError: no such file, or it describes no cluster.
    """
    if "://" in cluster:
        return cluster
    path = Path(cluster)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(
            f"cluster is {cluster!r}: give a scheduler's address such as tcp://10.0.0.1:8786, or the path of a .yaml "
            "or .json description (infra/slurm and infra/kubernetes hold examples)"
        )
    if not path.is_file():
        raise ValueError(f"there is no cluster description at {path.absolute()}")
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if isinstance(told, dict) and isinstance(told.get("address"), str):
        return told["address"]
    try:
        return _DESCRIPTION.validate_python(told)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{path} describes no cluster: {wrong}") from error


def worker_environment(threads: int = 1) -> dict[str, str]:
    """Variables of every worker: its libraries' threads, and what Dask is to leave alone."""
    return {
        **{name: str(threads) for name in THREAD_COUNTS},
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_TRIM_THRESHOLD_": "65536",  # freed memory goes back to the system, and so under the limit
        **SETTINGS,
    }


def local_cluster(workers: int, threads: int = 1, memory: str = MEMORY_LIMIT, scratch: Path | None = None) -> Any:
    """Worker processes of this machine, which end with this process.

    Args:
        threads: of the libraries inside one worker, which runs one task at a time.
        scratch: folder for Dask's own small files; .gristmill/dask by default.
    """
    import dask
    from distributed import LocalCluster

    scratch = (scratch or Path(".gristmill/dask")).absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    with unchanged_environment(), dask.config.set(OWN_SETTINGS):
        return LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            memory_limit=memory,
            local_directory=str(scratch),
            env=worker_environment(threads),
            silence_logs=logging.ERROR,
            preload=["gristmill.data.worker_watch"],
            # No dashboard; what is left of its HTTP server takes any free port, and not a fixed one with a warning.
            # No time to live: a task that holds the interpreter for minutes is at work; a process that ends is seen.
            scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0", "worker_ttl": None},
        )


class Revival:
    """Replaces the workers of a local cluster that nobody starts anew.

    Dask's nanny starts its worker again when that dies; but when the start itself fails (no room for the worker's
    folder, say) the nanny gives up, and the cluster has a worker less for ever.
    """

    def __init__(self, cluster: Any) -> None:
        self.cluster, self.wanted = cluster, len(cluster.worker_spec)
        self._still: dict[Any, float] = {}  # by worker: since when it has had no process

    def at_work(self) -> bool:
        """Is any worker's process there, be it only starting (a minute, on a machine that has too much to do)?"""
        return any(nanny.is_alive() for nanny in list(self.cluster.workers.values()))

    def look(self) -> None:
        """Cheap; to be called now and then."""
        now = time.monotonic()
        still = [name for name, nanny in list(self.cluster.workers.items()) if not nanny.is_alive()]
        self._still = {name: self._still.get(name, now) for name in still}
        gone = [name for name, since in self._still.items() if now - since >= GIVEN_UP]
        for name in gone:
            self.cluster.worker_spec.pop(name, None)
            del self._still[name]
        if gone:
            self.cluster.scale(self.wanted)


def described_cluster(told: JobQueue | Kubernetes, threads: int = 1) -> Any:
    """The cluster that a description asks for, with its workers on their way.

    Raises:
        ValueError: its package is not installed, or does not know an option.
    """
    made = job_queue_cluster(told, threads) if isinstance(told, JobQueue) else kubernetes_cluster(told, threads)
    if told.fewest is not None:
        made.adapt(minimum=told.fewest, maximum=told.workers)
    elif isinstance(told, JobQueue):
        made.scale(told.workers)
    return made


def job_queue_cluster(told: JobQueue, threads: int = 1) -> Any:
    """dask-jobqueue's cluster, no job submitted yet; its `job_script()` shows what would be."""
    try:
        import dask_jobqueue
    except ImportError as error:
        raise ValueError(f"a {told.kind} cluster needs dask-jobqueue: pip install 'gristmill[cluster]'") from error
    from dask.utils import parse_bytes

    options = dict(told.options)
    exports = [f"export {name}={value}" for name, value in worker_environment(threads).items()]
    memory = told.processes * parse_bytes(told.memory)
    ours: dict[str, Any] = {
        "cores": told.processes,  # one task a process
        "processes": told.processes,
        "memory": f"{memory} B",
        "job_name": "gristmill",
        "job_script_prologue": [*exports, *options.pop("job_script_prologue", [])],
        "worker_extra_args": ["--no-dashboard", *options.pop("worker_extra_args", [])],
        "scheduler_options": {"dashboard": False, "dashboard_address": ":0", **options.pop("scheduler_options", {})},
    }
    if told.kind == "slurm":
        nanny = parse_bytes(NANNY_MEMORY)
        ours |= {"job_cpu": told.processes * threads, "job_mem": f"{-(-(memory + nanny) // 2**20)}M"}
    try:
        return getattr(dask_jobqueue, JOB_QUEUES[told.kind])(**{**ours, **options})
    except (TypeError, ValueError) as error:
        said = str(error).partition(" Very likely")[0]  # what follows repeats all options
        raise ValueError(f"dask-jobqueue refuses the options of the {told.kind} cluster: {said}") from error


def kubernetes_spec(told: Kubernetes, threads: int = 1) -> dict[str, Any]:
    """The DaskCluster resource that dask-kubernetes would create: its own, with the volumes in every pod."""
    try:
        from dask_kubernetes.operator import make_cluster_spec
    except ImportError as error:
        raise ValueError("a kubernetes cluster needs dask-kubernetes: pip install 'gristmill[cluster]'") from error
    from dask.utils import parse_bytes

    memory = str(parse_bytes(told.memory))
    asked = {"cpu": told.cpu, "memory": str(parse_bytes(told.memory) + parse_bytes(NANNY_MEMORY))}
    spec = make_cluster_spec(
        name=told.name,
        image=told.image,
        n_workers=told.workers if told.fewest is None else told.fewest,
        resources={"requests": asked, "limits": {"memory": asked["memory"]}},
        env={**worker_environment(threads), **told.environment},
        worker_command=f"dask worker --nthreads 1 --memory-limit {memory}",
    )
    for pod in (spec["spec"]["worker"]["spec"], spec["spec"]["scheduler"]["spec"]):
        pod["volumes"] = [{"name": v.claim, "persistentVolumeClaim": {"claimName": v.claim}} for v in told.volumes]
        for container in pod["containers"]:
            container["command"] = ["env"]  # runs what follows whatever the image's own entry point is
            container["volumeMounts"] = [{"name": v.claim, "mountPath": v.mount} for v in told.volumes]
    return spec


def kubernetes_cluster(told: Kubernetes, threads: int = 1) -> Any:
    """dask-kubernetes' cluster; its operator runs in the Kubernetes cluster already."""
    spec = kubernetes_spec(told, threads)
    from dask_kubernetes.operator import KubeCluster

    try:
        return KubeCluster(custom_cluster_spec=spec, namespace=told.namespace, quiet=True, **told.options)
    except TypeError as error:
        raise ValueError(f"dask-kubernetes refuses the options of the cluster: {error}") from error


@contextmanager
def unchanged_environment():
    """Undo what Dask sets for its workers in our own environment.

    MALLOC_TRIM_THRESHOLD_ is among it, which halves the speed of a training process that inherits it. Only what changed
    is touched, since other threads read the environment meanwhile.
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value


def described(told: str | JobQueue | Kubernetes) -> str:
    """One string that tells two places apart."""
    return told if isinstance(told, str) else json.dumps(told.model_dump(mode="json"), sort_keys=True)


def asked_for(cluster: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The place in force: the one given, else the scheduler that DASK_SCHEDULER_ADDRESS names."""
    return cluster or environment.get(SCHEDULER) or None
