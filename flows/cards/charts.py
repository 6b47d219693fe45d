"""The hand in which cards and report are drawn: colours, type, small charts, and a figure's way to a page.

Colours are Okabe and Ito's, told apart by every common kind of colour vision; each model keeps its colour
everywhere. Figures are made without pyplot, so nothing global is touched, and matplotlib is imported when the
first is drawn.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = tuple[Sequence[float], Sequence[float]]

# Each value is used for one thing alone: in an SVG it is replaced by the CSS variable of its name.
PALETTE = {
    "ink": "#1f2429",
    "muted": "#67707b",
    "rule": "#dfe3e8",
    "paper": "#fffffe",
    "base": "#868e99",
    "cold_start": "#0072b2",
    "zero": "#009e73",
    "rl": "#d55e00",
    "thorough": "#4a2f86",
    "hasty": "#9a82c8",
    "guess": "#d9cdee",
    "other": "#c9ced4",
}
MODEL_NAMES = {"base": "Base", "cold_start": "Cold start", "zero": "R1-Zero", "rl": "R1 (RL)"}
FEW = 12  # a curve of at most so many points shows them

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so the layout is the same on every machine
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 8.5,
    "axes.labelcolor": PALETTE["muted"],
    "axes.edgecolor": PALETTE["muted"],
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlecolor": PALETTE["ink"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.unicode_minus": True,
    "grid.color": PALETTE["rule"],
    "grid.linewidth": 0.6,
    "text.color": PALETTE["ink"],
    "xtick.color": PALETTE["muted"],
    "ytick.color": PALETTE["muted"],
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.major.width": 0.6,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "gristmill",
    "path.simplify": True,
}


def house_style() -> Any:
    """The context in which every figure is drawn and saved."""
    import matplotlib

    return matplotlib.rc_context(cast(Any, _STYLE))


def panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes in rows of `columns`, each `width` × `height` inches; in `house_style`."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", facecolor="none")
    grid = figure.subplots(rows, columns, squeeze=False)
    axes = [ax for row in grid for ax in row]
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def line(ax: Axes, xs: Sequence[float], ys: Sequence[float], colour: str, smooth: int = 1, **more: Any) -> None:
    """A curve: its points where they are few; a running mean over the raw, light one where `smooth` > 1."""
    if not xs:
        return
    if len(xs) <= FEW:
        ax.plot(xs, ys, color=colour, marker="o", markersize=4, **more)
        return
    if smooth <= 1 or min(ys) == max(ys):
        ax.plot(xs, ys, color=colour, **more)
        return
    ax.plot(xs, ys, color=colour, linewidth=0.7, alpha=0.35)
    ax.plot(xs, running_mean(ys, smooth), color=colour, **more)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of about `window` values around each place; of those there are, towards both ends."""
    sums, half = [0.0, *itertools.accumulate(values)], window // 2
    spans = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def smoothing(points: int) -> int:
    """The window of the running mean that suits a curve of `points`; 1 where it should be shown as it is."""
    return 1 if points <= 3 * FEW else max(2, points // 20)


def end_labels(ax: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write (x, y, text, colour) beside the curves' ends, moved apart where they would lie on each other."""
    low, high = ax.get_ylim()
    gap, ordered = (high - low) * 0.09, sorted(ends, key=lambda end: end[1])
    heights = [end[1] for end in ordered]
    for i in range(1, len(heights)):
        short = gap - (heights[i] - heights[i - 1])
        if short > 0:  # both move, half each, so that neither is far from its curve
            heights[i - 1] -= short / 2
            heights[i] += short / 2
    for height, (x, _, text, colour) in zip(heights, ordered, strict=True):
        ax.annotate(
            text,
            (x, height),
            xytext=(6, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=8.5,
            fontweight="bold",
            annotation_clip=False,
        )


def bars(ax: Axes, table: dict[str, float], colour: str = PALETTE["cold_start"], form: str = "{:,.0f}") -> None:
    """Horizontal bars, the first on top, each with its number at its end."""
    names, values = list(table), list(table.values())
    places = list(range(len(names)))[::-1]
    ax.barh(places, values, height=0.62, color=colour)
    ax.set_yticks(places, names)
    ax.tick_params(axis="y", labelcolor=PALETTE["ink"])
    ax.set_xlim(0, max([*values, 0]) * 1.18 or 1)
    ax.set_xticks([])
    ax.spines[["bottom", "left"]].set_visible(False)
    ax.grid(False)
    for place, value in zip(places, values, strict=True):
        ax.annotate(form.format(value), (value, place), xytext=(4, 0), textcoords="offset points", va="center")


def heat_map(ax: Axes, shares: Sequence[Sequence[float]], steps: Sequence[int], colours: str = "PuOr_r") -> Any:
    """Load of experts (rows) over time (columns) in fair shares: 1 is pale, 0 and 2 are the ends."""
    experts = len(shares[0])
    relative = [[column[e] * experts for column in shares] for e in range(experts)]
    image = ax.imshow(relative, aspect="auto", cmap=colours, vmin=0, vmax=2, interpolation="nearest", origin="lower")
    shown = sorted({0, len(steps) // 2, len(steps) - 1})
    ax.set_xticks(shown, [str(steps[i]) for i in shown])
    ends = sorted({0, experts - 1})
    ax.set_yticks(ends, [str(e + 1) for e in ends])
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return image


def svg(figure: Figure, name: str) -> str:
    """The figure as inline SVG: text is text, colours are the page's variables, ids carry `name`."""
    buffer = io.StringIO()
    with house_style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for variable, value in PALETTE.items():
        text = text.replace(value, f"var(--{variable.replace('_', '-')})")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    pointed_to = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in pointed_to else "", text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    width, height = (float(v) for v in re.findall(r'(?:width|height)="([\d.]+)pt"', text)[:2])
    head = f'<svg role="img" style="max-width:{width * 4 / 3:.0f}px" viewBox="0 0 {width:g} {height:g}"'
    return re.sub(r"<svg[^>]*?viewBox=\"[^\"]*\"", head, text, count=1).replace(
        "<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1
    )


def png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as a PNG on white."""
    buffer = io.BytesIO()
    with house_style():
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def png_uri(figure: Figure, dpi: int = 110) -> str:
    """The figure as a `data:` URI of a PNG, for places that show pictures and no SVG."""
    return "data:image/png;base64," + base64.b64encode(png(figure, dpi)).decode("ascii")
