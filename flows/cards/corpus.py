"""What the card of a corpus stage shows, by the files that it left and not by its name.

funnel.jsonl        documents, bytes and (where a stage counts them) tokens, by source, outcome and reason
histograms.jsonl    lengths in powers of two, named values in twentieths: kept against removed
samples.jsonl       rows with `outcome`, `reason` and a text whose places to see stand between ⟦ and ⟧
pairs.jsonl         near duplicates: what was removed, what was kept, and how they differ
repeats.jsonl, matches.jsonl, compression.jsonl    tables
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gristmill.flows.cards import charts, corpus_figures, figures, text
from gristmill.flows.cards.folder import Row, StageFolder, is_number
from gristmill.flows.funnel import by_reason, by_source, joined_histograms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 20  # documents of an outcome
REASONS, SOURCES = 30, 40  # rows of a table
PAIRS, DIFF_LINES, DIFF_WIDTH = 6, 40, 200
CONTEXT = 12  # words beside a difference
ROWS, WIDE_CELL = 20, 700
TABLES = {
    "repeats.jsonl": "Spans that repeat",
    "matches.jsonl": "Matches with evaluation sets",
    "compression.jsonl": "Compression",
    "packing.jsonl": "What each packing does",
    "sources.jsonl": "Sources in the run",
}
BEFORE_AND_AFTER = {"tokens_by_source": "run_tokens_by_source"}
OUTCOMES = {
    "removed": "Removed, and why",
    "changed": "Kept with another text",
    "kept": "Kept as they are",
    "quarantined": "Set aside",
}


def corpus_parts(stage: StageFolder) -> list[str]:
    """The parts of a card that come from the corpus's conventions; none for a stage that follows none of them."""
    return [
        *_funnel(stage),
        *_before_and_after(stage),
        *_histograms(stage),
        *_classifiers(stage),
        *_tables(stage),
        *_pairs(stage),
        *_decisions(stage),
    ]


def holds_decisions(stage: StageFolder) -> bool:
    """Whether the stage's samples say what became of each document, and so are shown here."""
    return "outcome" in (next(iter(stage.rows("samples.jsonl", 1)), {}))


def shown_in_funnel(stage: StageFolder, metric: str) -> bool:
    """Whether a table of the metrics says what the funnel says."""
    tables = ("removed_by_reason", "removed_by_source", "changed_by_reason", "documents_by_source", "bytes_by_source")
    return metric in tables and bool(funnel_rows(stage))


def _picture(title: str, figure: Figure | None, dpi: int = 90) -> list[str]:
    return [] if figure is None else [f"![{title}]({charts.png_uri(figure, dpi)})"]


def funnel_rows(stage: StageFolder) -> list[Row]:
    """The rows of funnel.jsonl; of a stage that only takes in documents, what its metrics count by source."""
    rows = stage.rows("funnel.jsonl")
    if rows:
        return rows
    documents, sizes = (stage.metrics.get(f"{what}_by_source") or {} for what in ("documents", "bytes"))
    quarantined = stage.metrics.get("quarantined_by_source") or {}
    kept = [
        {"source": s, "outcome": "kept", "reason": "", "documents": n, "bytes_out": sizes.get(s, 0)}
        for s, n in documents.items()
    ]
    aside = [
        {"source": s, "outcome": "removed", "reason": "set aside", "documents": n, "bytes_out": 0}
        for s, n in quarantined.items()
        if n
    ]
    return [*kept, *aside]


def _funnel(stage: StageFolder) -> list[str]:
    rows = funnel_rows(stage)
    if not rows:
        return []
    sources = by_source(rows)
    head, right = _columns(sources)
    parts = [
        "## Funnel",
        *_picture("Documents by source", corpus_figures.funnel(sources)),
        text.table(head, [_cells(row, head) for row in sources[:SOURCES]], right=right),
    ]
    if len(sources) > SOURCES:
        parts.append(f"The {SOURCES} largest of {len(sources) - 1} sources.")
    if reasons := by_reason(rows):
        every = sum(row["documents"] for row in rows)
        head, right = _columns(reasons)
        shares = [[*_cells(row, head), f"{row['documents'] / every:.2%}"] for row in reasons[:REASONS]]
        removed = {row["reason"]: row["documents"] for row in reasons if row["outcome"] == "removed"}
        parts += [
            "### By reason",
            *_picture("Removed by reason", figures.counts(removed, "documents")),
            text.table([*head, "of all documents"], shares, right=[*right, len(head)]),
        ]
    return parts


def _columns(rows: Sequence[Row]) -> tuple[list[str], list[int]]:
    """Columns of a table of the funnel, and which of them are numbers."""
    head = list(rows[0])
    return head, [i for i, name in enumerate(head) if is_number(rows[0][name])]


def _cells(row: Row, head: Sequence[str]) -> list[Any]:
    return [text.size(row[name]) if name.startswith("bytes") else row[name] for name in head]


def _before_and_after(stage: StageFolder) -> list[str]:
    """Tokens of each source that there are, and those that the run reads, side by side."""
    parts = []
    for name, name_after in BEFORE_AND_AFTER.items():
        before, after = stage.metrics.get(name), stage.metrics.get(name_after)
        if not isinstance(before, dict) or not isinstance(after, dict):
            continue
        names = list(dict.fromkeys([*before, *after]))
        title = "tokens by source"
        sums = [sum(t.get(n, 0) for n in names) or 1 for t in (before, after)]
        rows = [
            (n, b, f"{b / sums[0]:.1%}", a, f"{a / sums[1]:.1%}", f"{a / b:.2f} ×" if b else "–")
            for n, b, a in ((n, before.get(n, 0), after.get(n, 0)) for n in names)
        ]
        parts += [
            f"## {title.capitalize()}, before and after",
            *_picture(title, corpus_figures.shares_before_and_after(before, after, title)),
            text.table(("source", "before", "share", "after", "share", "after / before"), rows, right=range(1, 6)),
        ]
    return parts


def _histograms(stage: StageFolder) -> list[str]:
    joined = joined_histograms(stage.rows("histograms.jsonl"))
    drawn = _picture("Histograms", corpus_figures.histograms(joined), 80)
    return ["## Kept against removed", "Each outcome by its own total.", *drawn] if drawn else []


def _classifiers(stage: StageFolder) -> list[str]:
    """Of each classifier that was trained here: how well it tells, and the deciles of its scores."""
    parts = []
    for file in sorted(stage.path.glob("classifiers/*/classifier.json")):
        report = json.loads(file.read_text(encoding="utf-8"))["report"]
        rows = [(f"{d['from']:g} – {d['to']:g}", d["examples"], f"{d['good']:.1%}") for d in report["deciles"]]
        said = (
            f"On examples that training did not see: area under the curve {report['auc']:.4g}, calibration error "
            f"{report['calibration_error']:.4g}. A tenth of them a row, by score."
        )
        parts += [
            f"## Quality classifier of {text.cell(file.parent.name)}",
            said,
            *_picture("Deciles", corpus_figures.deciles(report["deciles"])),
            text.table(("score", "examples", "good ones"), rows, right=(1, 2)),
        ]
    return parts


def _tables(stage: StageFolder) -> list[str]:
    parts = []
    for file, title in TABLES.items():
        if rows := stage.rows(file, ROWS):
            columns = list(dict.fromkeys(name for row in rows for name in row))
            numbers = [i for i, c in enumerate(columns) if all(is_number(r.get(c, 0)) for r in rows)]
            lines = [[text.Marked(row.get(c)) for c in columns] for row in rows]
            drawn = corpus_figures.compression(stage.rows(file)) if file == "compression.jsonl" else None
            parts += [f"## {title}", *_picture(title, drawn), text.table(columns, lines, right=numbers)]
    return parts


def _pairs(stage: StageFolder) -> list[str]:
    """Near duplicates: which was removed, which kept, how alike, and where they differ."""
    parts = []
    for row in stage.rows("pairs.jsonl", PAIRS):
        facts = [f"{k} {text.cell(row[k])}" for k in ("removed", "kept", "similarity", "reason") if k in row]
        lines = diff_lines(row)
        shown = [line if len(line) <= DIFF_WIDTH else f"{line[:DIFF_WIDTH]}…" for line in lines[:DIFF_LINES]]
        if len(lines) > DIFF_LINES:
            shown.append(f"  … {len(lines) - DIFF_LINES} lines more")
        parts += [" · ".join(facts), text.code("\n".join(shown), "diff")]
    return ["## Duplicates, as diffs", *parts] if parts else []


def diff_lines(row: Row) -> list[str]:
    """How two texts differ: `-` of the kept one, `+` of the removed one, between the words that they have in common."""
    kept, removed = (str(row.get(f"{which}_text", "")).split() for which in ("kept", "removed"))
    lines: list[str] = []
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, kept, removed, autojunk=False).get_opcodes():
        if kind == "equal":
            same = kept[a0:a1]
            lines.append(
                f"  {' '.join(same if len(same) <= 2 * CONTEXT else [*same[:CONTEXT], '…', *same[-CONTEXT:]])}"
            )
            continue
        lines += [f"- {' '.join(kept[a0:a1])}"] * (a1 > a0) + [f"+ {' '.join(removed[b0:b1])}"] * (b1 > b0)
    if any(line[0] in "-+" for line in lines):
        return lines
    # what was kept of the texts is the same: the words that differ come later
    return [*lines, *(_run_line(run) for part in str(row.get("differs", "")).split(" … ") for run in _runs(part))]


def _runs(part: str) -> list[str]:
    """`−of the kept one +of the removed one` as its two halves."""
    kept, plus, removed = part.partition(" +")
    return [kept, f"+{removed}"] if plus else [kept]


def _run_line(run: str) -> str:
    return f"- {run[1:]}" if run.startswith("−") else f"+ {run[1:]}" if run.startswith("+") else f"  {run}"


def _decisions(stage: StageFolder) -> list[str]:
    if not holds_decisions(stage):
        return []
    rows = stage.rows("samples.jsonl")
    parts = ["## Samples", "What decided stands in bold."]
    for outcome, title in OUTCOMES.items():
        chosen = [row for row in rows if row.get("outcome") == outcome][:SHOWN]
        if not chosen:
            continue
        extra = [c for c in dict.fromkeys(k for row in chosen for k in row) if c not in ("outcome", "text")]
        columns = [c for c in extra if any(row.get(c) not in (None, "") for row in chosen)]
        lines = [[*(row.get(c, "") for c in columns), text.Marked(row.get("text"), WIDE_CELL)] for row in chosen]
        parts += [f"### {title}", text.table([*columns, "text"], lines)]
    return parts
