"""`gristmill data …`: look at what the corpus stages decided, follow a document, take one out."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from itertools import islice
from typing import Annotated, Any

import typer

from gristmill.flows.errors import StoreDamaged, UsageError
from gristmill.flows.terminal import print_table, size

DEFAULT_STORE = ".gristmill/store"
BAR = 28  # characters of a histogram's longest bar

data_app = typer.Typer(
    help="Look at what the corpus stages decided, follow a document through them, take one out.", no_args_is_help=True
)

Store = Annotated[str, typer.Option("--store", help="Where results lie: a folder or s3://bucket/prefix.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON in place of lines for people.")]
StageOrKey = Annotated[str, typer.Argument(help="A stage (its result in the latest run) or a result's key.")]
RunOrKey = Annotated[str, typer.Argument(help="A run, or a result's key, or a stage of the latest run.")]


def _refusing(command: Callable[..., None]) -> Callable[..., None]:
    """A command that says in one sentence what is damaged in a store."""

    @functools.wraps(command)
    def guarded(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except (StoreDamaged, ValueError) as error:
            raise UsageError(str(error)) from error

    return guarded


@data_app.command()
@_refusing
def show(
    what: StageOrKey,
    removed: Annotated[bool, typer.Option("--removed", help="What the stage removed.")] = False,
    kept: Annotated[bool, typer.Option("--kept", help="What went on (the default).")] = False,
    changed: Annotated[bool, typer.Option("--changed", help="What went on with another text.")] = False,
    reason: Annotated[str, typer.Option(help="Only where the rule's name holds this; implies --removed.")] = "",
    source: Annotated[str, typer.Option(help="Only of this source.")] = "",
    identifier: Annotated[str, typer.Option("--id", help="Only this document, whatever became of it.")] = "",
    count: Annotated[int, typer.Option("-n", min=1, help="So many rows.")] = 10,
    characters: Annotated[int, typer.Option(min=20, help="Of each text.")] = 320,
    store: Store = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Show documents of a stage, what became of each, and what in it decided."""
    from gristmill.flows.corpus_results import Result, chain_of
    from gristmill.flows.corpus_rows import OUTCOMES, Asked, as_lines, found_rows, shards_with
    from gristmill.flows.inspection import find_result
    from gristmill.flows.store import Store as Place

    asked = [name for name, given in (("removed", removed), ("changed", changed), ("kept", kept)) if given]
    if not asked:
        asked = list(OUTCOMES) if identifier else ["removed"] if reason else ["kept"]
    place = Place(store)
    result = Result(place, find_result(place, what))
    if not result.has_documents:
        raise UsageError(f"{result.name} holds no documents: name a stage between ingest and tokenize")
    shards = shards_with(chain_of(result), identifier) if identifier else None
    rows = (
        row
        for outcome in asked
        for row in found_rows(result, Asked(outcome, reason, source, identifier), shards)
        if not (identifier and outcome == "kept" and "changed" in asked and _seen(row, result, shards or []))
    )
    shown = 0
    for row in islice(rows, count):
        shown += 1
        if as_json:
            print(json.dumps(row, ensure_ascii=False, sort_keys=True))
        else:
            print("\n".join(as_lines(row, characters, sys.stdout.isatty())))
    if not shown and not as_json:
        print(f"{result.name} has no such documents")


def _seen(row: dict[str, Any], result: Any, shards: list[str]) -> bool:
    """Whether a document that went on was changed, and so was shown as such."""
    return any(change["id"] == row["id"] for name in shards for change in result.rows("changed", name))


@data_app.command()
@_refusing
def stats(
    what: Annotated[str | None, typer.Argument(help="A stage or a result's key; none: all stages of a run.")] = None,
    store: Store = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Show a stage's funnel by source and reason and its histograms, or the funnel through all stages."""
    from gristmill.flows.corpus_results import Result, corpus_of
    from gristmill.flows.funnel import by_reason, by_source, joined_histograms
    from gristmill.flows.inspection import find_result
    from gristmill.flows.store import Store as Place

    place = Place(store)
    if what is None:
        _overview(corpus_of(place, None), as_json)
        return
    result = Result(place, find_result(place, what))
    rows, bins = result.small_rows("funnel.jsonl"), joined_histograms(result.small_rows("histograms.jsonl"))
    if not rows:
        _print_metrics(result, as_json)
        return
    if as_json:
        found = {"stage": result.stage, "key": result.key, "by_source": by_source(rows), "by_reason": by_reason(rows)}
        histograms = {
            name: {outcome: {f"{low:g}": n for low, n in sorted(b.items())} for outcome, b in outcomes.items()}
            for name, outcomes in bins.items()
        }
        print(json.dumps({**found, "histograms": histograms}, indent=1, ensure_ascii=False))
        return
    _print_rows(f"{result.name}, by source", by_source(rows))
    if reasons := by_reason(rows):
        _print_rows("by reason", reasons)
    for name, outcomes in bins.items():
        print(f"{name.replace('_', ' ')}: share of the documents kept, and of those removed")
        for line in histogram_lines(outcomes):
            print(line)


def _print_metrics(result: Any, as_json: bool) -> None:
    """What a stage without a funnel counts."""
    metrics = result.manifest["metrics"]
    if as_json:
        print(json.dumps({"stage": result.stage, "key": result.key, "metrics": metrics}, indent=1, ensure_ascii=False))
        return
    plain = {name: value for name, value in metrics.items() if not isinstance(value, dict)}
    for title, table in {result.name: plain, **{n: v for n, v in metrics.items() if isinstance(v, dict)}}.items():
        print_table(title, ["", ""], [[name, _said(name, value)] for name, value in table.items()])


def _print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    head = list(rows[0])
    print_table(title, head, [[_said(name, row[name]) for name in head] for row in rows])


def _said(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if name.startswith("bytes"):
        return size(value)
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def histogram_lines(outcomes: dict[str, dict[float, int]]) -> list[str]:
    """A line a bin, from the first to the last that holds a document: bars of shares, kept and removed."""
    sums = {o: sum(b.values()) for o, b in outcomes.items()}
    shares = {o: {low: n / sums[o] for low, n in b.items()} for o, b in outcomes.items()}
    most = max(share for b in shares.values() for share in b.values())
    lines = []
    for low in sorted({low for b in shares.values() for low in b}):
        cells = []
        for outcome in ("kept", "removed"):
            share = shares.get(outcome, {}).get(low, 0.0)
            bar = "█" * round(BAR * share / most)
            cells.append(f"{bar:<{BAR}} {share:6.1%}")
        lines.append(f"  {low:>9,g}  {'  '.join(cells)}")
    return lines


def _overview(chain: list[Any], as_json: bool) -> None:
    """A row a stage of a run: what went on, what was removed."""
    rows = []
    for result in chain:
        metrics = result.manifest["metrics"]
        into, out = metrics.get("documents_in"), metrics.get("documents_out")
        rows.append(
            {
                "stage": result.stage,
                "key": result.key,
                "documents in": into if into is not None else out,
                "documents out": out,
                "changed": metrics.get("changed", 0),
                "bytes out": metrics.get("bytes_out"),
            }
        )
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        _print_rows("the corpus, stage by stage", rows)


@data_app.command()
@_refusing
def diff(
    first: RunOrKey,
    second: RunOrKey,
    count: Annotated[int, typer.Option("-n", min=0, help="Examples of each rule.")] = 3,
    characters: Annotated[int, typer.Option(min=20, help="Of each example's text.")] = 160,
    store: Store = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Show what one run kept that the other did not, and the rule that decided."""
    from gristmill.flows.corpus_diff import difference
    from gristmill.flows.corpus_results import corpus_of
    from gristmill.flows.corpus_rows import as_lines
    from gristmill.flows.store import Store as Place

    place = Place(store)
    chains = [corpus_of(place, first), corpus_of(place, second)]
    found = difference(*chains, examples=count)
    names = [f"{name} ({chain[-1].name})" for name, chain in zip((first, second), chains, strict=True)]
    if as_json:
        print(json.dumps([_as_json(d, names) for d in found], indent=1, ensure_ascii=False, sort_keys=True))
        return
    for side, other, part in ((0, 1, found[0]), (1, 0, found[1])):
        if part.edited:
            print_table(f"{names[side]} alone edited", ["stage", "reason", "documents"], _counted(part.edited))
        if not part.documents:
            print(f"{names[side]} kept nothing that {names[other]} did not")
            continue
        number = f"{part.documents:,} document{'' if part.documents == 1 else 's'}"
        title = f"{names[side]} kept {number} that {names[other]} did not"
        print_table(title, ["removed there by", "reason", "documents"], _counted(part.counts))
        for row in part.examples:
            print("\n".join(as_lines(row, characters, sys.stdout.isatty())))


def _counted(counts: dict[tuple[str, str], int]) -> list[list[str]]:
    """Rows of a table, the most first."""
    return [[s, r, f"{n:,}"] for (s, r), n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def _as_json(part: Any, names: list[str]) -> dict[str, Any]:
    side = 0 if part.kept_by == "first" else 1
    counts, edited = (
        [{"stage": s, "reason": r, "documents": n} for (s, r), n in sorted(table.items())]
        for table in (part.counts, part.edited)
    )
    return {
        "kept_by": names[side],
        "not_by": names[1 - side],
        "documents": part.documents,
        "rules": counts,
        "edited": edited,
        "examples": part.examples,
    }


@data_app.command()
@_refusing
def trace(
    identifier: Annotated[str, typer.Argument(metavar="DOC-ID", help="As `gristmill data show` prints it.")],
    run: Annotated[str | None, typer.Option(help="A run; by default the latest that has documents.")] = None,
    store: Store = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Follow a document: what each stage decided, its tokens, the training steps that read it, the models after it."""
    from gristmill.flows.corpus_results import run_with_documents
    from gristmill.flows.corpus_rows import visible
    from gristmill.flows.corpus_trace import describe
    from gristmill.flows.corpus_trace import trace as follow
    from gristmill.flows.inspection import find
    from gristmill.flows.store import Store as Place

    place = Place(store)
    kind, record = find(place, run) if run is not None else ("run", run_with_documents(place))
    if kind != "run":
        raise UsageError(f"--run {run!r} is no run: see `gristmill runs`")
    found = follow(place, record, identifier)
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True))
    else:
        print("\n".join(visible(line) for line in describe(found)))


@data_app.command()
@_refusing
def remove(
    identifiers: Annotated[list[str] | None, typer.Argument(metavar="[DOC-ID]…", help="Ids of documents.")] = None,
    url: Annotated[str | None, typer.Option(help="Every document from this address.")] = None,
    match: Annotated[
        str | None, typer.Option(metavar="FILE", help="Every document that holds this file's text.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Why; kept with the tombstone.")] = "",
    duplicates: Annotated[bool, typer.Option("--duplicates", help="Also what was removed as their duplicate.")] = False,
    absent: Annotated[bool, typer.Option("--absent", help="Also ids that no document has, for later runs.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    store: Store = DEFAULT_STORE,
) -> None:
    """Take documents out of the store and out of all later runs; lists the checkpoints that saw them."""
    from pathlib import Path

    from gristmill.data.urls import normalised_url
    from gristmill.flows import takedown, tombstones
    from gristmill.flows.lock import StoreLock
    from gristmill.flows.store import Store as Place

    asked = list(dict.fromkeys(identifiers or []))
    if not asked and url is None and match is None:
        raise UsageError("name what is to go: ids of documents, --url or --match")
    place = Place(store)
    place.check_usable()
    text = takedown.text_of(Path(match)) if match is not None else None
    url = normalised_url(url) if url is not None else None
    with StoreLock(place, say=print):
        place.sweep()
        targets = takedown.find_targets(place, asked, url, text)
        if duplicates and (more := sorted({d for t in targets for d in t.duplicates})):
            targets = takedown.find_targets(place, [*(t.identifier for t in targets), *more])
        rows = takedown.graves(targets, url, reason, _missing(asked, targets, place, absent))
        _describe_targets(targets, url)
        if not yes and not typer.confirm("Take them out of this store and of all later runs?"):
            print("nothing was changed")
            raise typer.Exit(1)
        tombstones.record(place, rows)
        done = takedown.settle(place)
    _describe_settled(done)


def _missing(asked: list[str], targets: list[Any], place: Any, absent: bool) -> list[str]:
    """Ids that no document has: refused, unless they are to be recorded for later runs or were taken out before."""
    from gristmill.flows import tombstones

    known = {t.identifier for t in targets} | {row.get("id") for row in tombstones.read(place)}
    missing = [identifier for identifier in asked if identifier not in known]
    if missing and not absent:
        raise UsageError(
            f"no document of the store has the id {missing[0]!r}: correct it (`gristmill data show ingest` lists ids), "
            f"or add --absent to keep it out of later runs"
        )
    return missing


def _describe_targets(targets: list[Any], url: str | None) -> None:
    from gristmill.flows.corpus_rows import visible
    from gristmill.flows.corpus_trace import steps_said

    if not targets:
        where = f" from {url}" if url else ""
        print(f"no document{where} is in the store (any more)")
    for target in targets:
        print(visible(f"{target.identifier}  ({target.source}{f', {target.url}' if target.url else ''})"))
        if target.duplicates:
            print(visible(f"  also removed as duplicates of it: {', '.join(target.duplicates)}"))
        if target.copy_of:
            print(visible(f"  removed as a duplicate of {', '.join(target.copy_of)}, which stays unless it is named"))
        for row in target.results:
            steps = f" in {steps_said(row['steps'])}" if row.get("steps") else ""
            held = ", held out" if row.get("held_out") else ""
            print(f"  seen by {row['stage']} {row['key']}{steps}{held}")
        if not target.results:
            print("  no checkpoint saw it")


def _describe_settled(done: Any) -> None:
    rows = [[stage, old, new, str(w), str(t)] for stage, old, new, w, t in done.amended]
    if rows:
        print_table("amended", ["stage", "was", "is now", "files written", "files kept"], rows)
    for stage, key, why in done.removed:
        print(f"removed {stage} {key}: {why}")
    if not rows and not done.removed:
        print("nothing in the store had to change")
    if done.left:
        named = ", ".join(f"{stage} {key}" for stage, key in done.left)
        print(f"no longer what the recipe makes, and left as they are: {named}")
    print("The same recipe takes the amended results and trains anew; checkpoints keep what they learned.")
