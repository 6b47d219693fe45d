"""What people see of a sweep: its picture, its table of rungs, and what the fit says, for the card and the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gristmill.flows.cards import charts, text
from gristmill.flows.cards.charts import PALETTE
from gristmill.flows.cards.folder import Row, StageFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROLES = {"rung": "rung", "further": "further budget", "held_out": "held out"}
COLUMNS = ("width", "layers", "active", "tokens", "FLOPs", "seed", "loss", "bits/byte", "law says", "off by", "role")
CURVE = 200


def rung_cells(rows: Sequence[Row]) -> list[list[str]]:
    """A line a run, in `COLUMNS`."""
    return [
        [
            str(row["width"]),
            str(row["layers"]),
            text.short(row["active_parameters"]),
            text.short(row["tokens"]),
            f"{row['flops']:.3g}",
            str(row["seed"]),
            f"{row['loss']:.4f}",
            f"{row['bits_per_byte']:.4f}",
            "–" if row["forecast"] is None else f"{row['forecast']:.4f}",
            "–" if row["error_percent"] is None else f"{row['error_percent']:+.2f} %",
            ROLES[row["role"]],
        ]
        for row in rows
    ]


def findings(fit: Row) -> list[str]:
    """What was found, a sentence each: the law, the forecast's error, the best split; then the fit's own notes."""
    law, forecast, surface = fit["law"], fit["forecast"], fit["surface"]
    floor = f"{law['floor']:.3f}" if law["fitted_floor"] else "0 (assumed)"
    if law["floor_interval"] is not None:
        floor += f" ({law['floor_interval'][0]:.3f} to {law['floor_interval'][1]:.3f} at 95 %)"
    said = [
        f"L(C) = E + A · C^-α in nats a token: E {floor}, A {law['scale']:.4g}, α {law['exponent']:.4f}; "
        f"{law['agreeing']} of {law['starts']} starts found this minimum.",
        f"Forecast at width {forecast['width']}, {forecast['times_largest_rung']:.1f} times the compute of the largest "
        f"rung: {forecast['loss']:.4f} nats a token; it came to {forecast['actual']:.4f}: off by "
        f"{forecast['error_percent']:+.2f} %. To say that nothing changes after the largest rung would be off by "
        f"{forecast['unchanged_error_percent']:+.2f} %.",
    ]
    for name, of in (("interval_by_irreducible_loss", "the E that the rungs allow"), ("interval_by_seeds", "seeds")):
        if forecast[name] is not None:
            low, high = forecast[name]
            said.append(f"Interval of the forecast over {of} (95 %): {low:.4f} to {high:.4f}.")
    if surface is not None:
        best, exponents = surface["optimal"], (surface["parameter_exponent"], surface["token_exponent"])
        said.append(
            f"L(N, D) = E + A · N^-α + B · D^-β: E {surface['floor']:.3f}, A {surface['parameter_scale']:.4g}, "
            f"B {surface['token_scale']:.4g}, α {exponents[0]:.4f}, β {exponents[1]:.4f}; "
            f"its forecast is {surface['forecast']:.4f}, off by {surface['error_percent']:+.2f} %. Of the held-out "
            f"compute it would make {text.short(best['active_parameters'])} active parameters and "
            f"{text.short(best['tokens'])} tokens ({best['tokens_per_parameter']:.1f} a parameter), with a loss of "
            f"{best['loss']:.4f}."
        )
    return [*said, *fit["notes"]]


def loss_against_compute(fit: Row, rows: Sequence[Row]) -> Figure:
    """Losses of all runs over their FLOPs, the law through the rungs, and the forecast where it was tried."""
    with charts.house_style():
        figure, (ax,) = charts.panels(1, 1, 6.4, 3.9)
        ax.set_xscale("log")
        ax.set_yscale("log")
        _draw_law(ax, fit, rows)
        for role, colour, filled in (
            ("further", PALETTE["other"], False),
            ("rung", PALETTE["ink"], True),
            ("held_out", PALETTE["rl"], True),
        ):
            own = [r for r in rows if r["role"] == role]
            face = colour if filled else "none"
            xs, ys = [r["flops"] for r in own], [r["loss"] for r in own]
            ax.plot(xs, ys, "o", color=colour, markerfacecolor=face, markersize=5.5, zorder=3)
        _name_widths(ax, rows)
        _plain_losses(ax)
        ax.set_title("Held-out loss against compute")
        ax.set_ylabel("nats a token")
        ax.set_xlabel("training compute, FLOPs")
    return figure


def _draw_law(ax: Axes, fit: Row, rows: Sequence[Row]) -> None:
    law, forecast = fit["law"], fit["forecast"]
    low, high = min(r["flops"] for r in rows), forecast["flops"]
    most = max(r["flops"] for r in rows if r["role"] == "rung")

    def curve(start: float, end: float) -> tuple[list[float], list[float]]:
        xs = [start * (end / start) ** (i / CURVE) for i in range(CURVE + 1)]
        return xs, [law["floor"] + law["scale"] * x ** -law["exponent"] for x in xs]

    ax.plot(*curve(low / 1.3, most), color=PALETTE["cold_start"])
    ax.plot(*curve(most, high * 1.3), color=PALETTE["cold_start"], linestyle=(0, (4, 3)))
    interval = forecast["interval_by_seeds"] or forecast["interval_by_irreducible_loss"]
    if interval is not None:
        ax.plot([high, high], interval, color=PALETTE["cold_start"], linewidth=1.1, marker="_", markersize=7)
    ax.plot(high, forecast["loss"], "D", color=PALETTE["cold_start"], markerfacecolor="white", markersize=6, zorder=3)
    ax.annotate(
        f"forecast {forecast['loss']:.3f}, came to {forecast['actual']:.3f} ({forecast['error_percent']:+.1f} %)",
        (1.0, 1.0),
        xycoords="axes fraction",
        ha="right",
        va="top",
        color=PALETTE["rl"],
        fontweight="bold",
    )


def _name_widths(ax: Axes, rows: Sequence[Row]) -> None:
    """The width beside the highest point of each rung and of the held-out model."""
    named = [r for r in rows if r["role"] != "further"]
    for width in dict.fromkeys(r["width"] for r in named):
        x, y = max(((r["flops"], r["loss"]) for r in named if r["width"] == width), key=lambda point: point[1])
        ax.annotate(str(width), (x, y), xytext=(6, 5), textcoords="offset points", color=PALETTE["muted"], fontsize=8)


def _plain_losses(ax: Axes) -> None:
    """Ticks on a logarithmic axis that say losses as people do."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    low, high = ax.get_ylim()
    step = 10 ** math.floor(math.log10(high - low))
    step = step / 2 if (high - low) / step < 4 else step
    first = math.ceil(low / step)
    places = [i * step for i in range(first, math.floor(high / step) + 1)]
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_locator(FixedLocator(places))
    ax.set_yticks(places, [f"{p:.4g}" for p in places])


def scaling_parts(stage: StageFolder) -> list[str]:
    """What the card of the stage `scaling` shows beyond every card."""
    file = stage.path / "fit.json"
    rows = stage.rows("rungs.jsonl")
    if not file.exists() or not rows:
        return []
    fit = json.loads(file.read_text(encoding="utf-8"))
    return [
        "## Loss against compute",
        f"![Loss against compute]({charts.png_uri(loss_against_compute(fit, rows))})",
        "\n".join(f"- {text.escaped(sentence, 1000)}" for sentence in findings(fit)),
        text.table(COLUMNS, rung_cells(rows), right=tuple(range(len(COLUMNS) - 1))),
    ]
