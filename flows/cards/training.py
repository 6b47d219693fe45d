"""What the card of a training stage shows beyond every card, and the card of one that still runs."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from gristmill.flows.cards import charts, figures, text, training_figures
from gristmill.flows.cards.folder import Row, StageFolder, is_number
from gristmill.flows.cards.run_log import RunLog

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECENT = 50  # steps whose median stands for the speed now
LATEST = 4  # samples of the last check


def training_parts(stage: StageFolder) -> list[str]:
    """Speed, held-out text by source and the gradient by group of a finished stage."""
    log = RunLog(stage.path)
    return _sections(stage.rows("curves.jsonl"), log.timings(), log.peak())


def live_card(name: str, title: str, log: RunLog) -> str | None:
    """The card of the stage of this name while it still runs, as Markdown; none where it has told nothing yet."""
    rows = log.curves()
    if not rows:
        return None
    last = {key: value for row in rows for key, value in row.items() if is_number(value) and key != "step"}
    shown = {key: value for key, value in last.items() if not key.startswith("grad_norm.")}
    parts = [
        f"# {text.cell(title)}",
        f"**Running**: {rows[-1]['step'] + 1:,} steps are done.",
        *map(text.cell, log.notes()),
        text.table(("latest", "value"), sorted(shown.items()), right=(1,)),
        *_pictures("Curves", f"Curves of {name}", figures.small_multiples(rows), 80),
        *_sections(rows, log.timings(), log.peak()),
        *_pictures("Load of the experts", "Load of the experts", figures.expert_loads(log.loads()), 90),
        *_samples(log.samples()),
    ]
    return "\n\n".join(parts) + "\n"


def _sections(rows: list[Row], timings: list[Row], peak: Row) -> list[str]:
    parts = _pictures("Speed", "Tokens a second and utilisation", training_figures.speed(timings), 90)
    if parts:
        parts.insert(1, _speed_now(timings, peak))
    parts += _pictures("Held-out text", "Held-out text by source", training_figures.held_out_by_source(rows), 90)
    return parts + _pictures("Gradient", "Gradient by group", training_figures.gradient_norms(rows), 90)


def _speed_now(timings: list[Row], peak: Row) -> str:
    recent = [row for row in timings if "mfu" in row][-RECENT:]
    rate, used, data, seconds = (
        median(row[name] for row in recent) for name in ("tokens_per_second", "mfu", "data_seconds", "seconds")
    )
    memory = max(row["memory_bytes"] for row in recent)
    said = (
        f"The last {len(recent)} steps at the median: **{text.number(round(rate))} tokens a second**, "
        f"{text.number(seconds)} s a step, of which {text.number(1000 * data)} ms waiting for data; "
        f"{text.size(memory)} of memory at most (first rank)."
    )
    if not peak:
        return said
    return (
        f"{said} **{used:.1%} of the peak**, which is {text.short(peak['flops_per_second'])}FLOP a second a rank, "
        f"measured on this device ({text.cell(peak['device'])}) with a product {text.cell(peak['product'])}. "
        f"{text.short(peak['flops_per_token'])}FLOP a token are counted: {text.cell(peak['counted'])}."
    )


def _samples(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    latest = [row for row in rows if row["step"] == rows[-1]["step"]][:LATEST]
    table = text.table(("prompt", "goes on"), [(row["prompt"], row["text"]) for row in latest])
    return [f"## What it writes after {rows[-1]['step'] + 1:,} steps", table]


def _pictures(title: str, caption: str, figure: Figure | None, dpi: int) -> list[str]:
    return [] if figure is None else [f"## {title}", f"![{caption}]({charts.png_uri(figure, dpi)})"]
