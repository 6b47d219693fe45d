"""The runner under Prefect: each stage call becomes a task run, with its progress, its card and its state."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

from gristmill.flows import server
from gristmill.flows.errors import StageFailed, UsageError
from gristmill.flows.execution import Execution
from gristmill.flows.live_card import LiveCard, artifact_key, show_card
from gristmill.flows.runners import Pipeline, Plain, Planned, PlanResult, Watcher
from gristmill.flows.stage import RUNNER, Artifact, Call
from gristmill.flows.store import Store
from gristmill.flows.terminal import stage_line

PROGRESS_SECONDS = 3.0


class Orchestrated(Plain):
    """`Plain` with Prefect watching. The server is the project's own if `gristmill ui` runs, else one for the run."""

    def __init__(
        self,
        store: Store,
        execution: Execution | None = None,
        watcher: Watcher | None = None,
        *,
        wait: bool = False,
        strict: bool = False,
    ) -> None:
        super().__init__(store, execution, watcher, wait=wait, strict=strict)
        self.watcher: _Reporting = _Reporting(self.watcher)
        self.attempts = 1  # retries are the Prefect task's

    def run(
        self, pipeline: Pipeline, recipe: Any, until: str | None = None, from_: str | None = None
    ) -> dict[str, Any]:
        if _inside_flow():
            return super().run(pipeline, recipe, until, from_)
        os.environ.update(server.environment())
        with ExitStack() as stack:
            url = server.running()
            if url is None:
                try:
                    url = stack.enter_context(server.started())
                except RuntimeError as error:
                    self.watcher.say(f"warning: {error}; the run goes on without Prefect, and its record says so")
                    plain = Plain(self.store, self.execution, self.watcher, wait=self.wait, strict=self.strict)
                    plain.note = {"prefect": str(error)}
                    return plain.run(pipeline, recipe, until, from_)
            os.environ["PREFECT_API_URL"] = url
            stack.callback(_flush_logs)  # before the server that takes them is stopped
            return super().run(pipeline, recipe, until, from_)

    def execute(self, pipeline: Pipeline, recipe: Any) -> None:
        if _inside_flow():
            self._followed(pipeline, recipe)
            return
        from prefect import flow

        named = flow(
            name=getattr(pipeline, "__name__", "pipeline"),
            flow_run_name=f"{recipe.name}-{self.record['run'][-6:]}",
            validate_parameters=False,
            persist_result=False,
        )
        named(lambda: self._followed(pipeline, recipe))()

    def _followed(self, pipeline: Pipeline, recipe: Any) -> None:
        """The body of the flow: the plan as the first artifact, then the stages."""
        from prefect.artifacts import create_markdown_artifact

        create_markdown_artifact(plan_markdown(self.plan), key="plan", description="What would run, and why")
        token = RUNNER.set(self)  # a flow's body may have a context of its own
        try:
            pipeline(recipe)
        finally:
            RUNNER.reset(token)

    def call(self, call: Call) -> Artifact:
        planned = self.plan.of(call.artifact)
        if planned.state != "cached":
            return super().call(call)
        from prefect.states import Completed

        def cached() -> Any:
            Plain.call(self, call)
            assert planned.manifest is not None
            show_card(call.stage.name, call.stage.title, self._card(call, planned.manifest))
            return Completed(name="Cached", message=planned.reason)

        self._task(call, cached, 0)()
        return call.artifact

    def perform(self, call: Call, planned: Planned) -> dict[str, Any]:
        made: dict[str, Any] = {}
        refused = False

        def work() -> None:
            nonlocal refused
            live = LiveCard(call.stage.name, call.stage.title, self.store.folder(call.stage.name, call.key))
            self.watcher.live = live
            try:
                made.update(Plain.perform(self, call, planned))
            except (StageFailed, UsageError) as error:
                refused = isinstance(error.__cause__, ValueError)
                raise
            try:
                live.finish(self._card(call, made))
            except Exception as error:  # the stage is done whether or not the server shows it
                self.watcher.say(f"the card of {call.stage.name} is not shown: {error or type(error).__name__}")

        self._task(call, work, self.execution.retries, lambda *_: not refused)()
        return made

    def _task(self, call: Call, body: Any, retries: int, again: Callable[..., bool] | None = None) -> Any:
        from prefect import task
        from prefect.cache_policies import NO_CACHE

        return task(
            body,
            name=call.stage.name,
            task_run_name=f"{call.stage.name}-{call.key}",
            description=call.stage.title,
            tags={"gristmill", f"stage:{call.stage.name}"},
            retries=retries,
            retry_condition_fn=again,
            cache_policy=NO_CACHE,
            persist_result=False,
            log_prints=False,
        )

    def _card(self, call: Call, manifest: dict[str, Any]) -> str:
        from gristmill.flows.cards import card_markdown

        return card_markdown(manifest, self.store.folder(call.stage.name, call.key))


class _Reporting:
    """Passes everything on, and shows progress in the Prefect UI as well, at most every few seconds."""

    def __init__(self, inner: Watcher) -> None:
        self.inner = inner
        self.live: LiveCard | None = None
        self.artifact: Any = None
        self.named, self.quiet, self.last = "", "", 0.0  # stages shown, and not shown any more

    def stage(self, name: str, state: str, **values: Any) -> None:
        if self.artifact is not None and state == "done":
            with suppress(Exception):  # as in `progress`: what is done is done
                self._update(100.0)
        self.inner.stage(name, state, **values)
        self._log(stage_line(name, state, **values))

    def progress(self, name: str, done: int, total: int, **values: float) -> None:
        self.inner.progress(name, done, total, **values)
        due = name != self.quiet and time.monotonic() - self.last >= PROGRESS_SECONDS
        if _inside_flow() and due and total:
            self.last = time.monotonic()
            try:
                self._show(name, 100.0 * done / total)
                if self.live is not None:
                    self.live.refresh()
            except Exception as error:  # a server that is away must not end the work that it would show
                self.artifact, self.named, self.quiet = None, "", name
                self.say(f"{name} is not shown in the UI while it runs: {error or type(error).__name__}")

    def _show(self, name: str, percent: float) -> None:
        if self.named != name:
            from prefect.artifacts import create_progress_artifact

            self.named = name
            self.artifact = create_progress_artifact(percent, key=f"{artifact_key(name)}-progress", description=name)
        else:
            self._update(percent)

    def _update(self, percent: float) -> None:
        from prefect.artifacts import update_progress_artifact

        update_progress_artifact(self.artifact, percent)
        if percent >= 100.0:
            self.artifact, self.named = None, ""

    def say(self, text: str) -> None:
        self.inner.say(text)
        self._log(text)

    def _log(self, text: str) -> None:
        """The same line in the log of the flow run, which the UI shows."""
        if _inside_flow():
            from prefect import get_run_logger

            get_run_logger().info(text)


def plan_markdown(plan: PlanResult) -> str:
    """The plan as a table."""
    rows = [f"| {s.call.stage.name} | `{s.call.key}` | {s.state} | {s.reason} |" for s in plan.stages]
    warnings = [f"\n> **Warning.** {w}\n" for w in plan.warnings]
    return "\n".join(["# Plan", "", "| stage | key | state | why |", "| --- | --- | --- | --- |", *rows, *warnings])


def _flush_logs() -> None:
    """Wait until the server has the log lines that are still on their way."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        for handler in logging.getLogger(name).handlers:
            handler.flush()


def _inside_flow() -> bool:
    import sys

    if "prefect" not in sys.modules:
        return False
    from prefect.context import FlowRunContext

    return FlowRunContext.get() is not None
