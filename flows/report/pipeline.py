"""The pipeline as a picture: a box a stage, an arrow an input, with times and sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from gristmill.flows.cards import text
from gristmill.flows.cards.folder import StageFolder
from gristmill.model.training.config import MOST_PHASES

# Column and row of each stage; the main line runs through row 1.
PLACES = {
    "ingest": (0, 1),
    "dedup": (1, 1),
    "spans": (1, 2),
    "filter": (2, 1),
    "problems": (6, 2),
    "exam": (2, 2),
    "decontaminate": (3, 1),
    "tokenize": (4, 1),
    "mix": (5, 1),
    "pretrain": (6, 1),
    "cold_start": (7, 0),
    "rl_zero": (7, 2),
    "rl": (8, 0),
    "evaluate": (9, 1),
    "export": (9, 0),
}
# Phases of context extension stand behind pretraining, and move what follows it to the right.
PHASES = [f"extend_{phase}" for phase in range(1, MOST_PHASES + 1)]
LABELS = {"rl_zero": "R1-Zero", "rl": "RL (R1)", "cold_start": "cold start"} | {
    name: name.replace("_", " ") for name in PHASES
}
TINTS = {"pretrain": "base", "cold_start": "cold-start", "rl_zero": "zero", "rl": "rl"}
# Everything that reads text needs the tokenizer, and the check for seen problems the documents: those arrows
# would hide the rest.
UNDRAWN = {"tokenizer"}
WIDE, HIGH, ACROSS, DOWN = 104, 64, 124, 88
WIDEST = 11  # characters of a label at its full size


def diagram(folders: Mapping[str, StageFolder], earlier: set[str]) -> str:
    """Inline SVG of the stages that have a place; stages of an earlier run are drawn pale."""
    places = _places([name for name in PHASES if name in folders])
    shown = {name: folder for name, folder in folders.items() if name in places and folder.manifest}
    width, height = max(column for column, _ in places.values()) * ACROSS + WIDE + 4, 2 * DOWN + HIGH + 4
    parts = [
        f'<svg role="img" aria-label="The pipeline" class="pipeline" viewBox="0 0 {width} {height}">',
        '<defs><marker id="arrow" viewBox="0 0 6 6" refX="5.4" refY="3" markerWidth="6" markerHeight="6" '
        'orient="auto"><path d="M0,0.6 L5.4,3 L0,5.4 z"/></marker></defs>',
    ]
    for name, folder in shown.items():
        for given, source in (folder.manifest.get("inputs") or {}).items():
            if source.get("stage") in shown and given not in UNDRAWN and (name, given) != ("evaluate", "documents"):
                parts.append(_arrow(places[source["stage"]], places[name], faint=source["stage"] == "problems"))
    parts += [_box(name, places[name], folder, name in earlier) for name, folder in shown.items()]
    return "".join([*parts, "</svg>"])


def _places(phases: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Column and row of each stage of a run with these phases of context extension."""
    base, row = PLACES["pretrain"]
    moved = {name: (c + len(phases) if c > base else c, r) for name, (c, r) in PLACES.items()}
    return moved | {name: (base + number, row) for number, name in enumerate(phases, 1)}


def _corner(place: tuple[int, int]) -> tuple[int, int]:
    column, row = place
    return 2 + column * ACROSS, 2 + row * DOWN


def _arrow(source: tuple[int, int], target: tuple[int, int], faint: bool) -> str:
    (x0, y0), (x1, y1) = _corner(source), _corner(target)
    kind = ' class="faint"' if faint else ""
    if x0 == x1:
        start, end = (
            (x0 + WIDE / 2, y0 + (HIGH if y1 > y0 else 0)),
            (x1 + WIDE / 2, y1 + (0 if y1 > y0 else HIGH)),
        )
        return f'<path{kind} d="M{start[0]:g},{start[1]:g} L{end[0]:g},{end[1]:g}" marker-end="url(#arrow)"/>'
    start, end = (x0 + WIDE, y0 + HIGH / 2), (x1, y1 + HIGH / 2)
    bend = min(60, (end[0] - start[0]) * 0.75)
    curve = f"C{start[0] + bend:g},{start[1]:g} {end[0] - bend:g},{end[1]:g} {end[0]:g},{end[1]:g}"
    return f'<path{kind} d="M{start[0]:g},{start[1]:g} {curve}" marker-end="url(#arrow)"/>'


def _narrow(label: str) -> str:
    """A style for a label that its box would not hold."""
    return "" if len(label) <= WIDEST else f' style="font-size: {14 * WIDEST // len(label)}px"'


def _box(name: str, place: tuple[int, int], folder: StageFolder, earlier: bool) -> str:
    x, y = _corner(place)
    tint = f' style="stroke: var(--{TINTS[name]}); stroke-width: 2"' if name in TINTS else ""
    time, size = text.duration(folder.seconds), text.size(folder.content_bytes)
    kind = "box earlier" if earlier else "box"
    label = escape(LABELS.get(name, name))
    said = "made earlier, found in the store" if earlier else "made in this run"
    return (
        f'<g class="{kind}"><title>{label}: {time}, {size}, {said}</title>'
        f'<rect x="{x}" y="{y}" width="{WIDE}" height="{HIGH}" rx="7"{tint}/>'
        f'<text class="name" x="{x + WIDE / 2:g}" y="{y + 22}"{_narrow(label)}>{label}</text>'
        f'<text class="facts" x="{x + WIDE / 2:g}" y="{y + 39}">{time}</text>'
        f'<text class="facts" x="{x + WIDE / 2:g}" y="{y + 54}">{size}</text></g>'
    )
