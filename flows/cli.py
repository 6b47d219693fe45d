"""The command `gristmill`."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from gristmill.flows.checkpoint_cli import checkpoint_app
from gristmill.flows.data_cli import data_app
from gristmill.flows.errors import StageFailed, UsageError
from gristmill.flows.terminal import duration, key_metric, memory, print_table, size, watcher

DEFAULT_STORE = ".gristmill/store"
PATIENCE_SECONDS = 30.0

app = typer.Typer(
    help="Raw text to a reasoning model: the DeepSeek-V3 / R1 recipe as a resumable, observable pipeline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")

RecipeArgument = Annotated[str, typer.Argument(help="A shipped recipe (tiny, smoke, long) or a YAML file.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Lay section.field=value over the recipe; may be repeated.")
]
StoreOption = Annotated[str, typer.Option("--store", help="Where results lie: a folder or s3://bucket/prefix.")]
Until = Annotated[str | None, typer.Option("--until", help="Run no further than this stage needs.")]
From = Annotated[str | None, typer.Option("--from", help="Run this stage and what follows from it again.")]


@app.command()
def run(
    recipe: RecipeArgument,
    settings: Settings = None,
    store: StoreOption = DEFAULT_STORE,
    until: Until = None,
    from_: From = None,
    plain: Annotated[bool, typer.Option("--plain", help="Without Prefect.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for a store that is in use.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse results whose code changed since.")] = False,
) -> None:
    """Run a recipe; what is there already is not computed again."""
    from gristmill.flows.r1 import r1
    from gristmill.flows.recipe import load_recipe
    from gristmill.flows.store import Store

    asked, place = load_recipe(recipe, settings), Store(store)
    _conclude(place, _run(r1, asked, place, until, from_, plain=plain, wait=wait, strict=strict))


def _run(
    pipeline: Any,
    asked: Any,
    place: Any,
    until: str | None,
    from_: str | None,
    *,
    plain: bool,
    wait: bool,
    strict: bool,
) -> dict[str, Any]:
    """Run a pipeline under Prefect, or without where nothing is to be computed; the run's record."""
    from gristmill.flows.runners import Plain, Plan, release_workers

    place.check_usable()
    shown = watcher()
    plan = Plan(place, verify=False).run(pipeline, asked, until, from_)
    if plain or plan.cached:
        runner: Any = Plain(place, asked.execution, shown, wait=wait, strict=strict)
    else:
        from gristmill.flows.orchestrated import Orchestrated

        runner = Orchestrated(place, asked.execution, shown, wait=wait, strict=strict)
    try:
        return runner.run(pipeline, asked, until, from_)
    finally:
        release_workers()


def _conclude(store: Any, record: dict[str, Any]) -> None:
    """The table at the end, what it cost, and where the report is."""
    rows, cost, hours = [], 0.0, 0.0
    report = None
    for entry in record["stages"]:
        manifest = store.manifest(entry["stage"], entry["key"])
        if manifest is None:
            continue
        held = sum(f["bytes"] for f in manifest["files"])
        state = "cached" if entry["state"] == "cached" else "done"
        rows.append([entry["stage"], state, duration(manifest["seconds"]), size(held), key_metric(manifest)])
        if state == "done":
            cost += manifest["ledger"]["estimated_cost_usd"]
            hours += manifest["device_hours"]
        if entry["stage"] == "report":
            report = store.folder("report", entry["key"]) / "view" / "report.html"
    print_table(f"run {record['run']} of {record['recipe']}", ["stage", "state", "took", "size", "result"], rows)
    print(f"{duration(record['seconds'])}; {hours:.3f} device-hours computed, about ${cost:.4f} (estimated)")
    if report is not None and report.exists():
        print(f"report: {report}")


@app.command()
def plan(
    recipe: RecipeArgument,
    settings: Settings = None,
    store: StoreOption = DEFAULT_STORE,
    until: Until = None,
    from_: From = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse results whose code changed since.")] = False,
) -> None:
    """Say what would run and why; nothing is executed or written."""
    from gristmill.flows.r1 import r1
    from gristmill.flows.recipe import load_recipe

    _show_plan(r1, load_recipe(recipe, settings), store, until, from_, strict=strict)


def _show_plan(pipeline: Any, asked: Any, store: str, until: str | None, from_: str | None, *, strict: bool) -> None:
    from gristmill.flows.runners import Plan
    from gristmill.flows.store import Store

    found = Plan(Store(store)).run(pipeline, asked, until, from_)
    rows = []
    for stage in found.stages:
        seconds = stage.estimate.seconds
        rows.append(
            [
                stage.call.stage.name,
                stage.call.key,
                stage.state,
                "" if not stage.runs else "?" if seconds is None else f"about {duration(seconds)}",
                memory(stage.estimate.memory_bytes, stage.estimate.device_bytes, "about") if stage.runs else "",
                stage.reason,
            ]
        )
    print_table(f"plan of {asked.name} in {store}", ["stage", "key", "state", "time", "memory", "why"], rows)
    if not found.cached:
        total = "unknown" if found.seconds is None else f"about {duration(found.seconds)}"
        held = memory(found.memory_bytes, found.device_bytes, ", at most about")
        of_memory = f"{held} of memory" if held else ""
        print(f"time to run: {total}{of_memory}, about {size(found.disk_bytes)} of disk")
    for warning in found.warnings:
        print(f"warning: {warning}")
    if strict and found.warnings:
        raise UsageError(found.warnings[0])


@app.command()
def sweep(
    recipe: RecipeArgument,
    sizes: Annotated[str | None, typer.Option("--sizes", help="Widths of the rungs: 32,48,64,96.")] = None,
    hold_out: Annotated[int | None, typer.Option("--hold-out", help="Width of the larger model to forecast.")] = None,
    tokens_per_parameter: Annotated[
        str | None, typer.Option("--tokens-per-parameter", help="Tokens an active parameter; several: 2,8.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option("--steps", help="Optimizer steps in their place; several: 50,200.")
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Runs of each rung.")] = None,
    settings: Settings = None,
    store: StoreOption = DEFAULT_STORE,
    from_: From = None,
    plan_only: Annotated[bool, typer.Option("--plan", help="Say what would run and what it may take.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Without Prefect.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for a store that is in use.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse results whose code changed since.")] = False,
) -> None:
    """Train a ladder of small models and forecast a larger one's loss from their compute."""
    from gristmill.flows.recipe import load_recipe
    from gristmill.flows.store import Store
    from gristmill.flows.sweep import sweep as pipeline

    lists = {"sizes": sizes, "tokens_per_parameter": tokens_per_parameter, "steps": steps}
    given = [f"sweep.{name}=[{value}]" for name, value in lists.items() if value is not None]
    numbers = {"hold_out": hold_out, "seeds": seeds}
    given += [f"sweep.{name}={value}" for name, value in numbers.items() if value is not None]
    asked = load_recipe(recipe, [*(settings or []), *given])
    if plan_only:
        _show_plan(pipeline, asked, store, None, from_, strict=strict)
        return
    place = Store(store)
    record = _run(pipeline, asked, place, None, from_, plain=plain, wait=wait, strict=strict)
    _conclude(place, record)
    _show_forecast(place.folder("scaling", record["stages"][-1]["key"]))


def _show_forecast(folder: Path) -> None:
    """The rungs of a sweep, what was found, and where its picture is."""
    from gristmill.flows.cards.folder import StageFolder
    from gristmill.flows.cards.scaling import COLUMNS, findings, rung_cells

    stage = StageFolder.open("scaling", folder)
    print_table("rungs", list(COLUMNS), rung_cells(stage.rows("rungs.jsonl")))
    for sentence in findings(json.loads((folder / "fit.json").read_text(encoding="utf-8"))):
        print(sentence)
    print(f"picture: {folder / 'view' / 'scaling.png'}")


@app.command()
def runs(store: StoreOption = DEFAULT_STORE) -> None:
    """List the runs of a store, newest last."""
    from datetime import datetime

    from gristmill.flows.inspection import state_of
    from gristmill.flows.lock import holder_of
    from gristmill.flows.store import Store

    place = Store(store)
    running = bool(holder_of(place))
    rows = [
        [
            r["run"],
            r["recipe"],
            state_of(r, running),
            datetime.fromtimestamp(r["started"]).isoformat(sep=" ", timespec="seconds"),
            duration(r.get("seconds", 0.0)),
            f"{sum(s['state'] == 'cached' for s in r['stages'])} of {len(r['stages'])} cached",
        ]
        for r in place.runs()
    ]
    print_table(f"runs in {store}", ["run", "recipe", "state", "started", "took", "stages"], rows)


@app.command()
def show(
    what: Annotated[str, typer.Argument(help="A stage (its result in the latest run) or a run.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: Annotated[bool, typer.Option("--json", help="The manifest or run record as JSON.")] = False,
) -> None:
    """Show a stage's manifest, metrics and first samples, or a run's record."""
    from gristmill.flows.inspection import describe_run, describe_stage, find
    from gristmill.flows.store import Store

    place = Store(store)
    kind, found = find(place, what)
    if as_json:
        print(json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False))
    else:
        print(describe_run(found) if kind == "run" else describe_stage(place, found))


@app.command("lineage")
def lineage_(
    what: Annotated[str, typer.Argument(help="A stage (its result in the latest run) or a result's key.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object: made_of and used_for.")] = False,
) -> None:
    """Show what a result was made of, and what was made of it."""
    from gristmill.flows.inspection import describe_lineage, find_result
    from gristmill.flows.lineage import descendants, lineage
    from gristmill.flows.store import Store

    place = Store(store)
    found = find_result(place, what)
    if as_json:
        both = {"made_of": lineage(place, found["key"]), "used_for": descendants(place, found["key"])}
        print(json.dumps(both, indent=1, sort_keys=True))
    else:
        print(describe_lineage(place, found))


@app.command()
def verify(
    store: StoreOption = DEFAULT_STORE,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Hash everything in a store again; exit code 1 if anything is damaged."""
    from gristmill.flows.inspection import verify_store
    from gristmill.flows.store import Store

    found = verify_store(Store(store))
    if as_json:
        print(json.dumps(found, indent=1, sort_keys=True))
    else:
        for name, content in found["stages"].items():
            print(f"{name:<13} {content}")
        for wrong in found["bad"]:
            print(f"bad: {wrong}")
        print(f"{len(found['stages'])} stages of the latest run, {len(found['bad'])} bad")
    if found["bad"]:
        raise typer.Exit(1)


@app.command()
def chat(
    checkpoint: Annotated[str, typer.Argument(help="A stage of the latest run (rl, cold_start, …) or a model folder.")],
    question: Annotated[str | None, typer.Option("--question", "-q", help="Ask this and leave.")] = None,
    store: StoreOption = DEFAULT_STORE,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.6,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the likeliest that are kept.")] = 0.95,
    top_k: Annotated[int, typer.Option(min=0, help="So many of the likeliest are kept; 0 keeps all.")] = 0,
    min_p: Annotated[float, typer.Option(min=0.0, max=0.999, help="Least share of the likeliest's weight.")] = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string that ends the response; several are several.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Talk with a model: its thought first, then its answer."""
    from gristmill.flows.inspection import chat_folders
    from gristmill.flows.store import Store

    folders = chat_folders(Store(store), checkpoint)
    from gristmill.model.generate import Sampling, load_chat, stream_chat

    model, tokenizer = load_chat(*folders)
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, min_p)

    def answer(asked: str, turn: int) -> None:
        dim, plain_again = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
        print(dim, end="")
        for piece in stream_chat(model, tokenizer, asked, sampling, seed=seed + turn, stop=tuple(stop or ())):
            print(piece.replace("</think>", f"</think>{plain_again}"), end="", flush=True)
        print(plain_again)

    if question is not None:
        answer(question, 0)
        return
    print("Ask (an empty line ends):")
    turn = 0
    while asked := input("> ").strip():
        answer(asked, turn)
        turn += 1


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 4200,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Start the Prefect server and serve the deployments, until Ctrl-C."""
    from gristmill.flows import server

    server.check_port(port)
    server.HOME.mkdir(parents=True, exist_ok=True)  # Prefect looks for it as soon as it is imported
    from gristmill.flows.deployments import serve_ui

    serve_ui(port, store)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe."""
    from gristmill.flows.recipe import recipe_schema

    print(json.dumps(recipe_schema(), indent=1))


def _interrupt(_signal: int, _frame: object) -> None:
    """Ctrl-C or a request to end: an orderly end, and a hard one where that takes too long.

    What a stage was doing may swallow the exception or wait for ever; its processes end with this one.
    """
    timer = threading.Timer(PATIENCE_SECONDS, _give_up)
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def _give_up() -> None:
    print(f"gristmill: still not at an end after {PATIENCE_SECONDS:.0f} s; ended at once", file=sys.stderr, flush=True)
    _interrupted()
    os._exit(130)


def guarded(command: Callable[[], Any]) -> int:
    """Run the command line; its exit code. 0 well, 1 failed, 2 bad input, 130 interrupted."""
    try:
        command()
    except UsageError as error:
        print(f"gristmill: {error}", file=sys.stderr)
        return 2
    except StageFailed as error:
        print(f"gristmill: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, EOFError, typer.Abort):
        return _interrupted()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _interrupted() -> int:
    print("gristmill: interrupted; what was finished is kept, the same command resumes", file=sys.stderr, flush=True)
    return 130


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    code = 0

    def command() -> None:
        nonlocal code
        result = app(standalone_mode=False)
        code = result if isinstance(result, int) else 0

    try:
        failed = guarded(command)
    except typer.Exit as stopped:
        sys.exit(stopped.exit_code)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            print(f"gristmill: {error.format_message()}; see gristmill --help", file=sys.stderr)  # type: ignore[attr-defined]
            sys.exit(2)
        raise
    # typer answers Ctrl-C with the exit code 130 instead of letting it through
    sys.exit(_interrupted() if code == 130 else failed or code)
