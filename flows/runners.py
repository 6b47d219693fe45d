"""What a stage call means: `Plan` says what would run and why, `Plain` runs it in this process."""

from __future__ import annotations

import getpass
import platform
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from gristmill.flows.errors import StageFailed, UsageError
from gristmill.flows.execution import Execution
from gristmill.flows.identity import first_difference, likeness
from gristmill.flows.ledger import ledger_line
from gristmill.flows.lock import StoreLock
from gristmill.flows.stage import RUNNER, Artifact, Call
from gristmill.flows.store import Store, content_hash, described_files

Pipeline = Callable[[Any], Any]


class Watcher(Protocol):
    """Who is told what happens in a run: a terminal, a log, Prefect."""

    def stage(self, name: str, state: str, **values: Any) -> None: ...

    def progress(self, name: str, done: int, total: int, **values: float) -> None: ...

    def say(self, text: str) -> None: ...


class Silent:
    """A run that nobody watches."""

    def stage(self, name: str, state: str, **values: Any) -> None: ...

    def progress(self, name: str, done: int, total: int, **values: float) -> None: ...

    def say(self, text: str) -> None: ...


@dataclass(frozen=True)
class Planned:
    """One stage of a plan: whether it is there, and if not, why it would run."""

    call: Call
    state: str  # cached, run, partial, damaged, forced, skipped
    reason: str
    manifest: dict[str, Any] | None = None
    drifted: bool = False  # cached, but its code is no longer the code that made it
    seconds: float | None = None  # what its nearest earlier run took

    @property
    def runs(self) -> bool:
        return self.state not in ("cached", "skipped")


@dataclass
class PlanResult:
    """All stages of a pipeline in the order of their calls."""

    stages: list[Planned] = field(default_factory=list)

    @property
    def cached(self) -> bool:
        return not any(s.runs for s in self.stages)

    @property
    def warnings(self) -> list[str]:
        return [
            f"stage {s.call.stage.name}: its code changed since its result was made and its version did not; raise the "
            f"version if the bytes differ"
            for s in self.stages
            if s.drifted
        ]

    def named(self, name: str) -> Planned:
        return next(s for s in self.stages if s.call.stage.name == name)


class Plan:
    """Answers what would run, without running anything: keys depend on configurations and input keys alone."""

    def __init__(self, store: Store, *, verify: bool = True) -> None:
        self.store, self.verify = store, verify
        self.calls: list[Call] = []

    def call(self, call: Call) -> Artifact:
        if call.stage.check:
            call.stage.check(call.config)
        if any(c.stage.name == call.stage.name for c in self.calls):
            raise TypeError(f"stage {call.stage.name!r} is called twice in one pipeline: declare it under two names")
        self.calls.append(call)
        return call.artifact

    def run(self, pipeline: Pipeline, recipe: Any, until: str | None = None, from_: str | None = None) -> PlanResult:
        """The plan of `pipeline(recipe)`; `until` leaves out what that stage does not need, `from_` forces a stage
        and all that follows from it to run again.

        Raises:
            UsageError: `until` or `from_` names no stage; a stage refuses its configuration.
        """
        self.calls = []
        token = RUNNER.set(self)
        try:
            pipeline(recipe)
        except ValueError as error:
            raise error if isinstance(error, UsageError) else UsageError(str(error)) from error
        finally:
            RUNNER.reset(token)
        names = [c.stage.name for c in self.calls]
        wanted = self._ancestors(known(until, names, "--until")) if until else set(names)
        forced = self._descendants(known(from_, names, "--from")) if from_ else set()
        stale: set[str] = set()
        result = PlanResult()
        for call in self.calls:
            planned = self._planned(call, wanted, forced)
            if planned.runs:
                stale.add(call.stage.name)
            result.stages.append(planned)
        return result

    def _planned(self, call: Call, wanted: set[str], forced: set[str]) -> Planned:
        name, key = call.stage.name, call.key
        if name not in wanted:
            return Planned(call, "skipped", "not needed for --until")
        manifest = self.store.manifest(name, key)
        earlier = self._nearest(call)
        seconds = earlier["seconds"] if earlier else None
        if name in forced:
            return Planned(call, "forced", "asked for by --from", manifest, seconds=seconds)
        if manifest is None:
            reason = self._cause(call, earlier)
            if self.store.partial(name, key):
                return Planned(call, "partial", f"unfinished work is there ({reason})", seconds=seconds)
            return Planned(call, "run", reason, seconds=seconds)
        if self.verify and (wrong := self.store.damage(manifest)):
            return Planned(call, "damaged", wrong[0], manifest, seconds=seconds)
        drifted = manifest["fingerprint"] != call.stage.fingerprint
        return Planned(call, "cached", "its result is there", manifest, drifted, manifest["seconds"])

    def _nearest(self, call: Call) -> dict[str, Any] | None:
        """The earlier result of the same stage that has most in common with this call; the newest of equals."""
        earlier = self.store.manifests(call.stage.name)
        return max(earlier, key=lambda m: (likeness(m["identity"], call.identity), m["started"]), default=None)

    def _cause(self, call: Call, earlier: dict[str, Any] | None) -> str:
        if earlier is None:
            return "never run in this store"
        return first_difference(earlier["identity"], call.identity) or "its result was removed"

    def _ancestors(self, name: str) -> set[str]:
        needed = {name}
        for call in reversed(self.calls):
            if call.stage.name in needed:
                needed |= {a.stage for a in call.inputs.values()}
        return needed

    def _descendants(self, name: str) -> set[str]:
        after = {name}
        for call in self.calls:
            if any(a.stage in after for a in call.inputs.values()):
                after.add(call.stage.name)
        return after


def known(name: str, names: list[str], option: str) -> str:
    """The stage's name, or a refusal that suggests the nearest."""
    from difflib import get_close_matches

    if name in names:
        return name
    near = get_close_matches(name, names, 1, 0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"{option} names {name!r}, which is no stage: {hint}The stages are {', '.join(names)}")


class Plain:
    """Runs what the plan says, stage by stage, in this process."""

    def __init__(
        self,
        store: Store,
        execution: Execution | None = None,
        watcher: Watcher | None = None,
        *,
        wait: bool = False,
        strict: bool = False,
    ) -> None:
        self.store, self.execution = store, execution or Execution()
        self.watcher: Watcher = watcher or Silent()
        self.wait, self.strict = wait, strict
        self.plan = PlanResult()
        self.record: dict[str, Any] = {}
        self.note: dict[str, Any] = {}  # what else the run's record should say
        self.attempts = self.execution.retries + 1

    def run(
        self,
        pipeline: Pipeline,
        recipe: Any,
        until: str | None = None,
        from_: str | None = None,
    ) -> dict[str, Any]:
        """Run `pipeline(recipe)`; the run's record (also in the store, under runs/).

        Raises:
            UsageError: the input is bad, or the store is in use; nothing has run.
            StageFailed: a stage raised; what was finished stays, and the next run resumes.
        """
        Plan(self.store, verify=False).run(pipeline, recipe, until, from_)  # bad input is refused before a lock is made
        self.store.check_usable()
        with StoreLock(self.store, wait=self.wait, say=self.watcher.say):
            self.plan = Plan(self.store).run(pipeline, recipe, until, from_)
            if self.strict and self.plan.warnings:
                raise UsageError(self.plan.warnings[0])
            for warning in self.plan.warnings:
                self.watcher.say(f"warning: {warning}")
            self.record = {**new_record(recipe, until, from_), **self.note}
            for planned in self.plan.stages:
                if planned.state == "forced":
                    self.store.discard(planned.call.stage.name, planned.call.key)
            token = RUNNER.set(self)
            try:
                self.execute(pipeline, recipe)
                self.record["state"] = "completed"
            except BaseException as error:
                self.record |= {"state": "failed", "error": str(error) or type(error).__name__}
                raise
            finally:
                RUNNER.reset(token)
                self.record["seconds"] = round(time.time() - self.record["started"], 3)
                self.store.record_run(self.record)
        return self.record

    def execute(self, pipeline: Pipeline, recipe: Any) -> None:
        """Call the pipeline; a runner that wraps it (in a flow, say) overrides this."""
        pipeline(recipe)

    def call(self, call: Call) -> Artifact:
        planned = self.plan.named(call.stage.name)
        if planned.state == "skipped":
            return call.artifact
        entry = {"stage": call.stage.name, "key": call.key}
        self.record["stages"].append(entry)
        if planned.state == "cached":
            assert planned.manifest is not None
            entry |= {"state": "cached", "content_hash": planned.manifest["content_hash"]}
            self.watcher.stage(call.stage.name, "cached", manifest=planned.manifest, reason=planned.reason)
            return call.artifact
        entry["state"] = "failed"
        manifest = self.perform(call, planned)
        entry |= {"state": "completed", "content_hash": manifest["content_hash"]}
        return call.artifact

    def perform(self, call: Call, planned: Planned) -> dict[str, Any]:
        """Compute one stage, with retries; its manifest."""
        self.watcher.stage(call.stage.name, "running", reason=planned.reason)
        if planned.state == "damaged":
            self.watcher.say(f"stage {call.stage.name}: {planned.reason}; it is made again")
            self.store.discard(call.stage.name, call.key)
        for attempt in range(self.attempts):
            try:
                manifest = compute(call, self.store, self.execution, self.watcher)
                self.watcher.stage(call.stage.name, "done", manifest=manifest)
                return manifest
            except Exception as error:
                if attempt + 1 < self.attempts:
                    self.watcher.say(f"stage {call.stage.name} failed ({error}); trying again")
                    continue
                self.watcher.stage(call.stage.name, "failed", error=error)
                log = self.store.folder(call.stage.name, call.key) / "log"
                raise StageFailed(
                    f"stage {call.stage.name} failed: {error}. Its log is in {log}. What was finished is kept: run the "
                    f"same command again to resume"
                ) from error
        raise AssertionError("unreachable: the loop returns or raises")


def compute(call: Call, store: Store, execution: Execution, watcher: Watcher) -> dict[str, Any]:
    """Run a stage's function in its folder and write its manifest."""
    stage, key = call.stage, call.key
    if "workers" not in stage.services:
        release_workers()
    out = store.prepare(stage.name, key)
    (out / "log").mkdir(exist_ok=True)
    inputs = {name: store.folder(a.stage, a.key) for name, a in call.inputs.items()}
    services: dict[str, Any] = {name: getattr(execution, name) for name in stage.services if name != "progress"}
    if "progress" in stage.services:

        def progress(done: int, total: int, **values: float) -> None:
            watcher.progress(stage.name, done, total, **values)

        services["progress"] = progress
    positional = {"config": call.config, **inputs, "out": out}
    if stage.seeded:
        positional["seed"] = call.seed
    began = time.time()
    attempts = count_attempt(out)
    with store.mirror(stage.name, key):
        try:
            metrics = stage.function(**positional, **services)
        except Exception:
            (out / "log" / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
            raise
    seconds = time.time() - began
    if (out / "work").exists():
        raise RuntimeError(f"stage {stage.name} left its work/ folder behind: a finished stage removes it")
    files = described_files(out)
    manifest = {
        "format": 1,
        "stage": stage.name,
        "title": stage.title,
        "key": key,
        **{k: v for k, v in call.identity.items() if k != "stage"},
        "identity": call.identity,
        "files": files,
        "metrics": metrics,
        "content_hash": content_hash(files, metrics),
        "fingerprint": stage.fingerprint,
        "environment": environment(execution),
        "started": began,
        "seconds": round(seconds, 3),
        "attempts": attempts,
        "code_version": code_version(),
    }
    manifest["ledger"] = ledger_line(manifest, execution)
    manifest["device_hours"] = manifest["ledger"]["device_hours"]
    store.finish(manifest)
    store.record_ledger(manifest["ledger"])
    return manifest


def release_workers() -> None:
    """Stop the Dask cluster, if one is up: even idle workers would take time from a training process's barriers."""
    executor = sys.modules.get("gristmill.data.executor")
    if executor is not None:
        executor.close_cluster()


def count_attempt(out: Path) -> int:
    """How often this stage has been started, this time included."""
    path = out / "log" / "attempts"
    count = (int(path.read_text()) if path.exists() and path.read_text().strip() else 0) + 1
    path.write_text(str(count))
    return count


def new_record(recipe: Any, until: str | None, from_: str | None) -> dict[str, Any]:
    """The beginning of a run's record."""
    started = time.time()
    stamp = datetime.fromtimestamp(started, UTC).strftime("%Y%m%dT%H%M%S")
    return {
        "run": f"{stamp}-{uuid.uuid4().hex[:6]}",
        "recipe": recipe.name,
        "config": recipe.model_dump(mode="json"),
        "until": until,
        "from": from_,
        "started": started,
        "user": getpass.getuser(),
        "state": "running",
        "stages": [],
    }


def environment(execution: Execution) -> dict[str, Any]:
    """What the bytes of a result may depend on to rounding: recorded, never in a key."""
    versions = {}
    for package in ("torch", "deepspeed", "tokenizers", "datatrove", "numpy", "dask", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        **execution.model_dump(mode="json"),
        "versions": versions,
    }


def code_version() -> str:
    """The commit of the code, where it lies in a git checkout; else the package's version."""
    here = Path(__file__).parent
    found = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() if found.returncode == 0 and found.stdout.strip() else metadata.version("gristmill")
