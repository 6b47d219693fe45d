"""The figures of context extension: needles found by length and depth, and loss by position, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gristmill.flows.cards import charts
from gristmill.flows.cards.charts import PALETTE
from gristmill.flows.cards.folder import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {"base": "As it came", "yarn": "YaRN, untrained", "extended": "Extended"}
COLOURS = {"base": PALETTE["base"], "yarn": PALETTE["hasty"], "extended": PALETTE["rl"]}
CHANCE = 0.1  # of the right digit being the likeliest of ten


def needle_maps(rows: Sequence[Row], trained: int | None) -> Figure | None:
    """A map a model, length (columns) by depth (rows): how often the right digit is the likeliest of the ten.

    The shares of whole numbers retrieved are written into the cells; a line marks `trained`, the context of the base.
    """
    models = _models(rows)
    if not models:
        return None
    with charts.house_style():
        figure, axes = charts.panels(len(models), 3, 2.9, 2.5)
        image: Any = None
        for ax, model in zip(axes, models, strict=True):
            image = _map(ax, [r for r in rows if r["model"] == model], trained)
            ax.set_title(NAMES[model])
        axes[0].set_ylabel("depth of the needle")
        bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=30, pad=0.03)
        bar.set_ticks([CHANCE, 0.5, 1], labels=["chance", "50%", "every right digit in front"])
        bar.outline.set_visible(False)
    return figure


def _map(ax: Axes, rows: list[Row], trained: int | None) -> Any:
    lengths, depths = sorted({r["length"] for r in rows}), sorted({r["depth"] for r in rows})
    cells = {(r["length"], r["depth"]): r for r in rows}
    shares = [[cells[length, depth]["digits_in_front"] for length in lengths] for depth in depths]
    image = ax.imshow(shares, aspect="auto", cmap="YlGnBu", vmin=CHANCE, vmax=1, interpolation="nearest")
    for (length, depth), row in cells.items():
        ink = PALETTE["paper"] if row["digits_in_front"] > 0.6 else PALETTE["ink"]
        place = lengths.index(length), depths.index(depth)
        ax.text(*place, f"{row['retrieved']:.0%}", ha="center", va="center", fontsize=7, color=ink)
    ax.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    shown = sorted({0, len(depths) // 2, len(depths) - 1})
    ax.set_yticks(shown, [f"{depths[i]:.0%}" for i in shown])
    ax.set_xlabel("tokens")
    within = sum(length <= trained for length in lengths) if trained else 0
    if 0 < within < len(lengths):
        ax.axvline(within - 0.5, color=PALETTE["rl"], linewidth=1.2, linestyle=(0, (4, 3)))
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return image


def loss_by_position(rows: Sequence[Row], trained: int | None) -> Figure | None:
    """Held-out loss against the position in the context, a curve a model; a line marks the context of the base."""
    models = _models(rows)
    if not models:
        return None
    with charts.house_style():
        figure, (ax,) = charts.panels(1, 1, 5.4, 2.75)
        ends = []
        for model in models:
            own = sorted((r for r in rows if r["model"] == model), key=lambda r: r["start"])
            middles = [(r["start"] + r["end"]) / 2 for r in own]
            ax.plot(middles, [r["loss"] for r in own], color=COLOURS[model], marker="o", markersize=3)
            ends.append((middles[-1], own[-1]["loss"], NAMES[model], COLOURS[model]))
        if trained:
            ax.axvline(trained, color=PALETTE["muted"], linewidth=1, linestyle=(0, (4, 3)))
        ax.set_title("Held-out loss by position")
        ax.set_xlabel("position (dashed: the context of the base)")
        ax.set_ylabel("nats a token")
        charts.end_labels(ax, ends)
    return figure


def _models(rows: Sequence[Row]) -> list[str]:
    return [name for name in NAMES if any(r["model"] == name for r in rows)]
