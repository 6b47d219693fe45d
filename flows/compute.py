"""One stage's work: its function in its folder, and the manifest that makes a result of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from gristmill.data.executor import running_on
from gristmill.flows import tombstones
from gristmill.flows.errors import StoreDamaged
from gristmill.flows.execution import Execution, environment
from gristmill.flows.ledger import ledger_line
from gristmill.flows.manifest import (
    FORMAT,
    Manifest,
    checked_metrics,
    content_hash,
    described_files,
    is_content,
    listed_files,
    write_json,
)
from gristmill.flows.mirror import failed_uploads
from gristmill.flows.stage import Call
from gristmill.flows.store import Store
from gristmill.flows.watching import Watcher

RETURNED = "log/returned.json"
SAMPLE_SECONDS = 1.0
ATTEMPT_SECONDS = 2.0


def compute(call: Call, store: Store, execution: Execution, watcher: Watcher) -> Manifest:
    """Run a stage's function in its folder and write its manifest; the inputs are in the store.

    Raises:
        Exception: whatever the function raises; its traceback is in log/error.txt.
    """
    stage, key = call.stage, call.key
    if "workers" not in stage.services:
        release_workers()
    out = store.prepare(stage.name, key, watcher.say)
    (out / "log").mkdir(exist_ok=True)
    tombstones.lay_down(store, call.identity["config"], call.sources, out)
    attempts, memory = Attempts(out / "log" / "attempts.json"), PeakMemory()
    returned = _returned(out)
    if returned is None:
        (out / "log" / "error.txt").unlink(missing_ok=True)
        with memory, attempts, store.mirror(stage.name, key, watcher.say):
            try:
                metrics = checked_metrics(_work(call, store, execution, watcher, attempts, out), stage.name)
                _refuse_leftovers(call, out)
            except Exception:
                (out / "log" / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
                raise
        returned = {"metrics": metrics, "seconds": attempts.seconds, "started": attempts.started}
        returned |= {"peak_bytes": memory.peak, "boot": _boot(), "sizes": _content_sizes(out)}
        write_json(out / RETURNED, returned)
    files = described_files(out)
    manifest: Manifest = {
        "format": FORMAT,
        "title": stage.title,
        "key": key,
        **call.identity,
        "inputs": {name: _input(store, a.stage, a.key) for name, a in call.inputs.items()},
        "files": files,
        "metrics": returned["metrics"],
        "content_hash": content_hash(files, returned["metrics"]),
        "fingerprint": stage.fingerprint,
        "environment": environment(execution),
        "started": returned["started"],
        "seconds": returned["seconds"],
        "work_seconds": attempts.total,
        "attempts": max(1, len(attempts.rows)),
        "peak_bytes": returned["peak_bytes"],
        "failed_uploads": failed_uploads(out),
        "notes": _notes(out),
        "code_version": code_version(),
    }
    manifest["ledger"] = ledger_line(manifest, execution, stage.services)
    manifest["device_hours"] = manifest["ledger"]["device_hours"]
    store.record_ledger(manifest["ledger"])  # first: a finished stage is not looked at again
    store.finish(manifest)
    return manifest


def release_workers() -> None:
    """Stop the Dask cluster, if one is up: even idle workers would take time from a training process's barriers."""
    executor = sys.modules.get("gristmill.data.executor")
    if executor is not None:
        executor.close_cluster()


def _work(
    call: Call, store: Store, execution: Execution, watcher: Watcher, attempts: Attempts, out: Path
) -> dict[str, Any]:
    """Call the function with what it asks for by name."""
    stage = call.stage

    def progress(done: int, total: int, **values: float) -> None:
        attempts.beat()
        watcher.progress(stage.name, done, total, **values)

    services = {n: progress if n == "progress" else getattr(execution, n) for n in stage.services}
    folders = {name: store.folder(a.stage, a.key) for name, a in call.inputs.items()}
    seed = {"seed": call.seed} if stage.seeded else {}
    with running_on(execution.cluster):
        return stage.function(config=call.config, **stage.arguments(folders), out=out, **seed, **services)


def _refuse_leftovers(call: Call, out: Path) -> None:
    """A finished stage has no work/ left, and was made of what its key says.

    Raises:
        RuntimeError: work/ is there.
        ValueError: a source changed while the stage read it.
    """
    stage = call.stage
    if (out / "work").exists():
        raise RuntimeError(f"stage {stage.name} left its work/ folder behind: a finished stage removes it")
    if stage.sources is None:
        return
    now = stage.sources(call.config)
    for name in sorted((call.sources.keys() | now.keys()) - {tombstones.SOURCE}):
        if now.get(name) != call.sources.get(name):
            raise ValueError(f"source {name!r} changed while stage {stage.name} read it: run again when it is at rest")


def _input(store: Store, stage: str, key: str) -> dict[str, str]:
    manifest = store.manifest(stage, key)
    if manifest is None:
        raise StoreDamaged(f"{stage}/{key} was removed from the store while the run went on")
    return {"stage": stage, "key": key, "content_hash": manifest["content_hash"]}


def _returned(out: Path) -> dict[str, Any] | None:
    """What an earlier attempt returned before it was killed between its last byte and its manifest.

    Hashing and sending a large result takes time; a kill in it must not cost the work. After a restart of the machine
    it does not count, since files that were never flushed may hold anything.
    """
    path = out / RETURNED
    if not path.exists():
        return None
    returned = json.loads(path.read_text(encoding="utf-8"))
    if returned["boot"] == _boot() and returned["sizes"] == _content_sizes(out):
        return returned
    path.unlink()
    return None


def _notes(out: Path) -> list[str]:
    """What a stage has to say of how it ran, that is no part of its result: sentences in log/notes.json."""
    path = out / "log" / "notes.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _content_sizes(out: Path) -> dict[str, int]:
    return {p: (out / p).stat().st_size for p in listed_files(out) if is_content(p)}


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


@dataclass
class Attempts:
    """When a stage was started and how long each attempt worked, killed ones up to their last sign of life."""

    path: Path
    rows: list[dict[str, float]] = field(default_factory=list)
    _last: float = 0.0

    def __post_init__(self) -> None:
        if self.path.exists():
            self.rows = json.loads(self.path.read_text(encoding="utf-8"))

    def __enter__(self) -> Attempts:
        self.rows.append({"started": time.time(), "seconds": 0.0})
        self._began = time.monotonic()
        self._write()
        return self

    def __exit__(self, *_: object) -> None:
        self._write()

    def beat(self) -> None:
        """Note that the stage is alive; cheap to call often."""
        if time.monotonic() - self._last > ATTEMPT_SECONDS:
            self._write()

    def _write(self) -> None:
        self._last = time.monotonic()
        self.rows[-1]["seconds"] = round(self._last - self._began, 3)
        write_json(self.path, self.rows)

    @property
    def started(self) -> float:
        return self.rows[-1]["started"]

    @property
    def seconds(self) -> float:
        return self.rows[-1]["seconds"]

    @property
    def total(self) -> float:
        return round(sum(row["seconds"] for row in self.rows), 3)


class PeakMemory:
    """The largest memory of this process and its descendants while it is entered, sampled each second (bytes)."""

    def __init__(self) -> None:
        self.peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="peak-memory")

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        own = psutil.Process(os.getpid())
        while True:
            held = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    full = process.memory_full_info()
                    held += getattr(full, "pss", full.uss)
                except psutil.Error:
                    continue  # it ended between the listing and the look
            self.peak = max(self.peak, held)
            if self._over.wait(SAMPLE_SECONDS):
                return


@cache
def code_version() -> str:
    """The commit of the code, where it lies in a git checkout; else the package's version."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=False,
        )
        commit = found.stdout.strip() if found.returncode == 0 else ""
    except OSError:
        commit = ""
    return commit or metadata.version("gristmill")
