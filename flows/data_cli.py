"""`gristmill data …`: look at what the corpus stages decided, follow a document, take one out."""

from __future__ import annotations

import json
import sys
from itertools import islice
from typing import Annotated, Any

import typer

from gristmill.flows.errors import UsageError
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


@data_app.command()
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
        raise UsageError(f"{result.name} has no funnel.jsonl: name a stage that takes in documents")
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


def _print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    head = list(rows[0])
    print_table(title, head, [[_said(name, row[name]) for name in head] for row in rows])


def _said(name: str, value: Any) -> str:
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
        if not part.documents:
            print(f"{names[side]} kept nothing that {names[other]} did not")
            continue
        rows = [[s, r, f"{n:,}"] for (s, r), n in sorted(part.counts.items(), key=lambda item: (-item[1], item[0]))]
        title = f"{names[side]} kept {part.documents:,} documents that {names[other]} did not"
        print_table(title, ["removed there by", "reason", "documents"], rows)
        for row in part.examples:
            print("\n".join(as_lines(row, characters, sys.stdout.isatty())))


def _as_json(part: Any, names: list[str]) -> dict[str, Any]:
    side = 0 if part.kept_by == "first" else 1
    counts = [{"stage": s, "reason": r, "documents": n} for (s, r), n in sorted(part.counts.items())]
    return {
        "kept_by": names[side],
        "not_by": names[1 - side],
        "documents": part.documents,
        "rules": counts,
        "examples": part.examples,
    }
