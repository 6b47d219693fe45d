"""What a stage call means: `Plan` says what would run and why, `Plain` runs it in this process."""

from __future__ import annotations

import getpass
import time
import uuid
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel

from gristmill.data.stage_types import ConfigRefused
from gristmill.flows.compute import compute, release_workers
from gristmill.flows.errors import StageFailed, UsageError
from gristmill.flows.execution import Execution
from gristmill.flows.identity import dumped
from gristmill.flows.lock import StoreLock
from gristmill.flows.manifest import Manifest
from gristmill.flows.plan import Pipeline, Plan, Planned, PlanResult, Sources, check_inputs, known
from gristmill.flows.stage import RUNNER, Artifact, Call, Stage
from gristmill.flows.store import Store
from gristmill.flows.watching import Silent, Watcher

__all__ = ["Pipeline", "Plain", "Plan", "PlanResult", "Planned", "Silent", "Watcher", "known", "release_workers"]

LONGEST_PAUSE = 30.0


class Plain:
    """Runs what the plan says, stage by stage, in this process.

    A runner that wraps a run or a stage in something of its own overrides `execute` or `perform`.
    """

    def __init__(
        self,
        store: Store,
        execution: Execution | None = None,
        watcher: Watcher | None = None,
        *,
        wait: bool = False,
        strict: bool = False,
    ) -> None:
        """Args:
        wait: wait for a store that is in use, in place of refusing.
        strict: refuse a result whose stage's code has changed since, in place of warning.
        """
        self.store, self.execution = store, execution or Execution()
        self.watcher: Watcher = watcher or Silent()
        self.wait, self.strict = wait, strict
        self.plan = PlanResult()
        self.record: dict[str, Any] = {}
        self.note: dict[str, Any] = {}  # what else the run's record should say
        self.attempts = self.execution.retries + 1
        self.lock: StoreLock | None = None
        self._sources = Sources(store)

    def run(
        self, pipeline: Pipeline, recipe: Any, until: str | None = None, from_: str | None = None
    ) -> dict[str, Any]:
        """Run `pipeline(recipe)`; the run's record, which is also in the store under runs/.

        Raises:
            UsageError: the input is bad, or the store cannot be used or is in use; nothing has run or been written. Or
                what stages made does not fit the next one: that has not begun, and what was finished stays.
            StageFailed: a stage raised; what was finished stays, and the next run resumes.
        """
        self._sources = Sources(self.store)
        before = self._planned(pipeline, recipe, until, from_, verify=False)  # refuses bad input before it locks
        self.store.check_usable(before.disk_bytes)
        with StoreLock(self.store, wait=self.wait, say=self.watcher.say) as self.lock:
            started = time.time()
            self.store.sweep()
            self.plan = self._planned(pipeline, recipe, until, from_, verify=True)
            for warning in self.plan.warnings:
                self.watcher.say(f"warning: {warning}")
            self.record = {**new_record(recipe, self.plan, started, until, from_), **self.note}
            self.store.record_run(self.record)
            for planned in self.plan.stages:
                if planned.state == "forced":
                    self.store.discard(planned.name, planned.call.key)
            try:
                self._inside(pipeline, recipe)
                self.record["state"] = "completed"
            except BaseException as error:
                reason = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
                self.record |= {"state": "failed", "error": reason}
                raise
            finally:
                self.record["seconds"] = round(time.time() - self.record["started"], 3)
                self.store.record_run(self.record)
        return self.record

    def _planned(
        self, pipeline: Pipeline, recipe: Any, until: str | None, from_: str | None, *, verify: bool
    ) -> PlanResult:
        plan = Plan(self.store, verify=verify, sources=self._sources).run(pipeline, recipe, until, from_)
        if self.strict and plan.warnings:
            raise UsageError(plan.warnings[0])
        return plan

    def _inside(self, pipeline: Pipeline, recipe: Any) -> None:
        token = RUNNER.set(self)
        try:
            self.execute(pipeline, recipe)
        finally:
            RUNNER.reset(token)

    def execute(self, pipeline: Pipeline, recipe: Any) -> None:
        """Call the pipeline."""
        pipeline(recipe)

    def sources(self, stage: Stage, config: BaseModel) -> dict[str, str]:
        return self._sources.of(stage, config)

    def call(self, call: Call) -> Artifact:
        """Take a result that is there, or make it."""
        name = call.stage.name
        planned = self.plan.of(call.artifact)
        if planned.state == "skipped":
            return call.artifact
        if planned.state == "cached" and planned.manifest is not None:
            self.store.fetch(planned.manifest, shown_only=True)
            self._note(call, state="cached", content_hash=planned.manifest["content_hash"])
            self.watcher.stage(name, "cached", manifest=planned.manifest, reason=planned.reason)
            return call.artifact
        self._note(call, state="running")
        try:
            self._mend_inputs(call)
            check_inputs(call, self.store)
            manifest = self.perform(call, planned)
        except BaseException as error:
            self._note(call, state="failed", error=str(error) or type(error).__name__)
            raise
        self._note(call, state="completed", content_hash=manifest["content_hash"], seconds=manifest["seconds"])
        return call.artifact

    def _note(self, call: Call, **values: Any) -> None:
        """What became of a stage, in the run's record."""
        entry = next(e for e in self.record["stages"] if (e["stage"], e["key"]) == (call.stage.name, call.key))
        entry.update(values)
        self.store.record_run(self.record)

    def _mend_inputs(self, call: Call) -> None:
        """Bring a remote store's inputs here; one that turns out to be damaged is made again."""
        for artifact in call.inputs.values():
            manifest = self.store.manifest(artifact.stage, artifact.key)
            wrong = self.store.fetch(manifest) if manifest else [f"{artifact.stage}/{artifact.key} is no longer there"]
            if wrong:
                planned = replace(self.plan.of(artifact), state="damaged", reason=wrong[0])
                self._mend_inputs(planned.call)
                self.perform(planned.call, planned)

    def perform(self, call: Call, planned: Planned) -> Manifest:
        """Compute one stage, with retries; its manifest.

        Raises:
            UsageError: its function refused its configuration.
            StageFailed: it raised anything else.
        """
        name = call.stage.name
        self.watcher.stage(name, "running", reason=planned.reason, planned=planned)
        if planned.state == "damaged":
            self.watcher.say(f"stage {name}: {planned.reason}; it is made again")
            self.store.discard(name, call.key)
        for attempt in range(self.attempts):
            try:
                if self.lock is not None:
                    self.lock.check()
                manifest = compute(call, self.store, self.execution, self.watcher)
                break
            except ConfigRefused as error:
                self.watcher.stage(name, "failed", error=error)
                raise UsageError(f"stage {name}: {error}") from error
            except Exception as error:
                if attempt + 1 == self.attempts or isinstance(error, ValueError):
                    self.watcher.stage(name, "failed", error=error)
                    raise StageFailed(self._sentence(call, error), name) from error
                self.watcher.say(f"stage {name} failed ({error}); trying again")
                time.sleep(min(2.0**attempt, LONGEST_PAUSE))
        self._compare(planned, manifest)
        self.watcher.stage(name, "done", manifest=manifest)
        return manifest

    def _sentence(self, call: Call, error: Exception) -> str:
        folder = self.store.folder(call.stage.name, call.key)
        command = "without --from " if self.record.get("from") else ""
        return (
            f"stage {call.stage.name} failed: {str(error).rstrip('.') or type(error).__name__}. Its log is in "
            f"{folder / 'log'}. What was finished is kept: run the same command again {command}to resume"
        )

    def _compare(self, planned: Planned, manifest: Manifest) -> None:
        """Say where a result that was made again differs from what it was."""
        before = planned.manifest
        if before is None or before["content_hash"] == manifest["content_hash"]:
            return
        names = ("device", "threads", "ranks", "torch", "machine")
        old, new = before["environment"], manifest["environment"]
        changed = [f"{n} {old.get(n)} → {new.get(n)}" for n in names if old.get(n) != new.get(n)]
        why = ", ".join(changed) or "nothing in its environment changed, so its code or the old files did"
        self.watcher.say(f"stage {planned.name}: made again with other bytes than before ({why})")


def new_record(recipe: Any, plan: PlanResult, started: float, until: str | None, from_: str | None) -> dict[str, Any]:
    """The beginning of a run's record; `started` in seconds since the epoch, before what is there was checked."""
    stamp = datetime.fromtimestamp(started, UTC).strftime("%Y%m%dT%H%M%S")
    return {
        "run": f"{stamp}-{uuid.uuid4().hex[:6]}",
        "recipe": getattr(recipe, "name", type(recipe).__name__),
        "config": dumped(recipe) if isinstance(recipe, BaseModel) else {},
        "until": until,
        "from": from_,
        "started": started,
        "seconds": 0.0,
        "user": _user(),
        "state": "running",
        "stages": [
            {"stage": p.name, "key": p.call.key, "state": "waiting", "reason": p.reason}
            for p in plan.stages
            if p.state != "skipped"
        ],
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
