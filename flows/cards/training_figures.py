"""The figures of a training run: held-out text by source, the gradient by group of parameters, and its speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gristmill.flows.cards import charts
from gristmill.flows.cards.charts import PALETTE
from gristmill.flows.cards.folder import Row, curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 6.2, 2.9
# Okabe and Ito's colours without their yellow, which is too pale for a line on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#1f2429", "#868e99")


def held_out_by_source(rows: Sequence[Row]) -> Figure | None:
    """Bits per byte of held-out text, a curve a source; none where there is one source alone."""
    parts = _parts(rows, "held_out_bpb.")
    return _together(rows, parts, "Held-out text by source", "bits per byte") if len(parts) > 1 else None


def gradient_norms(rows: Sequence[Row]) -> Figure | None:
    """The gradient's norm before clipping, a curve a group of parameters, on a logarithmic scale."""
    parts = _parts(rows, "grad_norm.")
    return _together(rows, parts, "Gradient by group of parameters", "norm", logarithmic=True) if parts else None


def speed(timings: Sequence[Row]) -> Figure | None:
    """Tokens a second and model FLOP utilisation over the steps."""
    rows = [row for row in timings if "mfu" in row]
    if not rows:
        return None
    panels = (("tokens_per_second", "Tokens a second", 1), ("mfu", "Model FLOP utilisation, %", 100))
    with charts.house_style():
        figure, axes = charts.panels(2, 2, 3.6, 2.1)
        for ax, (name, title, factor) in zip(axes, panels, strict=True):
            steps, values = curve(list(rows), name)
            shown = [value * factor for value in values]
            charts.line(ax, steps, shown, PALETTE["cold_start"], charts.smoothing(len(steps)))
            ax.set_ylim(bottom=0)
            ax.set_title(title)
            ax.set_xlabel("step")
    return figure


def _parts(rows: Sequence[Row], prefix: str) -> list[str]:
    return sorted({name for row in rows for name in row if name.startswith(prefix)})


def _together(
    rows: Sequence[Row], names: list[str], title: str, unit: str, *, logarithmic: bool = False
) -> Figure | None:
    with charts.house_style():
        figure, (ax,) = charts.panels(1, 1, WIDTH, HEIGHT)
        for i, name in enumerate(names):
            steps, values = curve(list(rows), name)
            seen = [(step, value) for step, value in zip(steps, values, strict=True) if value > 0 or not logarithmic]
            xs, ys = [step for step, _ in seen], [value for _, value in seen]
            if len(xs) > charts.FEW:
                ys = charts.running_mean(ys, charts.smoothing(len(xs)))
            style = "solid" if i < len(COLOURS) else "dashed"
            charts.line(ax, xs, ys, COLOURS[i % len(COLOURS)], linestyle=style, label=name.partition(".")[2])
        if logarithmic:
            ax.set_yscale("log")
        ax.set_title(title)
        ax.set_ylabel(unit)
        ax.set_xlabel("step")
        ax.locator_params(axis="x", integer=True)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    return figure
