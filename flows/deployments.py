"""What the Prefect UI can start: the flows as deployments, and the server they are served beside."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path

from gristmill.flows import server

os.environ.update(server.environment())  # before Prefect reads its settings

from prefect import flow, serve
from prefect.deployments.runner import EntrypointType, RunnerDeployment
from prefect.schedules import Cron

from gristmill.flows.corpus import corpus
from gristmill.flows.orchestrated import Orchestrated
from gristmill.flows.r1 import r1
from gristmill.flows.recipe import Recipe, load_recipe
from gristmill.flows.runners import release_workers
from gristmill.flows.store import Store
from gristmill.flows.terminal import Lines

NIGHTLY = "30 2 * * *"


class Stage(StrEnum):
    """The stages, as the choices of a form."""

    ingest = "ingest"
    dedup = "dedup"
    spans = "spans"
    filter = "filter"
    exam = "exam"
    decontaminate = "decontaminate"
    tokenize = "tokenize"
    mix = "mix"
    problems = "problems"
    pretrain = "pretrain"
    mix_longer_1 = "mix_longer_1"
    extend_1 = "extend_1"
    mix_longer_2 = "mix_longer_2"
    extend_2 = "extend_2"
    mix_longer_3 = "mix_longer_3"
    extend_3 = "extend_3"
    mix_longer_4 = "mix_longer_4"
    extend_4 = "extend_4"
    rl_zero = "rl_zero"
    cold_start = "cold_start"
    rl = "rl"
    traces = "traces"
    student = "student"
    distill = "distill"
    evaluate = "evaluate"
    export = "export"
    report = "report"


@flow(name="r1", flow_run_name="r1-{recipe.name}", persist_result=False)
def r1_flow(
    from_stage: Stage | None = None,
    until_stage: Stage | None = None,
    *,
    recipe: Recipe,
    store: str = ".gristmill/store",
) -> None:
    """Raw text to an evaluated, exported reasoning model. What is in the store already is not computed again.

    Args:
        from_stage: Run this stage, and all that follows from it, again.
        until_stage: Run no further than this stage needs.
        recipe: What is asked of each stage.
        store: Where results lie: a folder or s3://bucket/prefix.
    """
    _run(r1, recipe, from_stage, until_stage, store)


@flow(name="corpus", flow_run_name="corpus-{recipe.name}", persist_result=False)
def corpus_flow(
    from_stage: Stage | None = None,
    until_stage: Stage | None = None,
    *,
    recipe: Recipe,
    store: str = ".gristmill/store",
) -> None:
    """Sources to packed token shards: the nightly refresh of the corpus.

    Args:
        from_stage: Run this stage, and all that follows from it, again.
        until_stage: Run no further than this stage needs.
        recipe: What is asked of the corpus stages; the others are not looked at.
        store: Where results lie: a folder or s3://bucket/prefix.
    """
    _run(corpus, recipe, from_stage, until_stage, store)


def _run(pipeline, recipe: Recipe, from_stage: Stage | None, until: Stage | None, store: str) -> None:
    import sys

    runner = Orchestrated(Store(store), recipe.execution, Lines(sys.stdout), wait=True)
    try:
        runner.run(pipeline, recipe, until and until.value, from_stage and from_stage.value)
    finally:
        release_workers()


def deployments(store: str) -> list[RunnerDeployment]:
    """r1 with the recipes that ship, and the nightly corpus, paused."""
    place = store if "://" in store else str(Path(store).absolute())

    def parameters(recipe: str) -> dict[str, object]:
        return {"recipe": load_recipe(recipe).model_dump(mode="json"), "store": place}

    named = [
        r1_flow.to_deployment(
            name=recipe,
            description=load_recipe(recipe).description,
            parameters=parameters(recipe),
            tags=["gristmill"],
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        for recipe in ("tiny", "smoke")
    ]
    nightly = corpus_flow.to_deployment(
        name="nightly",
        description="Refreshes the corpus of `tiny` every night; paused until you turn its schedule on.",
        parameters=parameters("tiny"),
        schedule=Cron(NIGHTLY, timezone="UTC", active=False),
        paused=True,
        tags=["gristmill"],
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    return [*named, nightly]  # type: ignore[list-item]


def serve_ui(port: int, store: str) -> None:
    """Start the server on a free port, serve the deployments, say where, and stop both on Ctrl-C."""
    note = server.HOME / "server.json"
    with server.started(port) as url:
        note.write_text(json.dumps({"url": url, "pid": os.getpid()}), encoding="utf-8")
        os.environ["PREFECT_API_URL"] = url
        try:
            from prefect.settings import PREFECT_API_URL, temporary_settings

            with temporary_settings({PREFECT_API_URL: url}):
                served = deployments(store)
                names = ", ".join(f"{d.flow_name}/{d.name}{' (paused)' if d.paused else ''}" for d in served)
                print(f"Prefect UI: {url.removesuffix('/api')}  (Ctrl-C stops it)\ndeployments: {names}", flush=True)
                serve(*served, pause_on_shutdown=False, print_starting_message=False, limit=1)
        finally:
            note.unlink(missing_ok=True)
