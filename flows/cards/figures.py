"""The figures that cards and report share, one a function; none where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gristmill.flows.cards import charts
from gristmill.flows.cards.charts import MODEL_NAMES, PALETTE
from gristmill.flows.cards.folder import Row, curve, is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.5, 2.75  # inches of one chart: legible on a phone at its full width
WIDE = 5.4
MOST_LAYERS = 4  # heat maps shown of a deep model
STYLES = ("thorough", "hasty", "guess", "other")


def accuracy(results: Sequence[Row]) -> Figure | None:
    """Pass@1 of each model with its 95 % interval, and its majority answer as a diamond."""
    shown = [r for r in results if is_number(r.get("pass1"))]
    if not shown:
        return None
    with charts.house_style():
        figure, (ax,) = charts.panels(1, 1, WIDE, 0.62 + 0.46 * len(shown))
        places = list(range(len(shown)))[::-1]
        for place, row in zip(places, shown, strict=True):
            low, high = row.get("pass1_low", row["pass1"]), row.get("pass1_high", row["pass1"])
            ax.barh(place, row["pass1"], height=0.6, color=PALETTE.get(row["model"], PALETTE["muted"]))
            ax.plot([low, high], [place, place], color=PALETTE["ink"], linewidth=1.3, marker="|", markersize=7)
            ends = [high]
            if is_number(row.get("cons")):
                ax.plot(row["cons"], place, "D", color="none", mec=PALETTE["ink"], markersize=5)
                ends.append(row["cons"])
            text = f"{row['pass1']:.3f}  [{low:.3f}, {high:.3f}]"
            ax.annotate(text, (max(ends), place), xytext=(9, 0), textcoords="offset points", va="center")
        ax.set_yticks(places, [MODEL_NAMES.get(str(r["model"]), str(r["model"])) for r in shown])
        ax.tick_params(axis="y", labelcolor=PALETTE["ink"], labelsize=9)
        ax.set_xlim(0, 1.5)
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25%", "50%", "75%", "100%"])
        ax.spines["bottom"].set_bounds(0, 1)
        ax.spines["left"].set_visible(False)
        ax.grid(False)
        ax.set_xlabel("right answers among the samples (◇ majority of the samples)", loc="left")
    return figure


def training_loss(rows: Sequence[Row], title: str, colour: str = PALETTE["base"]) -> Figure | None:
    """Loss of the next token, and of the one after it where MTP was trained, in nats."""
    names = {"main_loss": "next token", "mtp_loss": "MTP"}
    if not curve(list(rows), "main_loss")[0]:
        names = {"loss": "loss"}
    colours = (PALETTE["ink"], colour)
    lines = [(*curve(list(rows), name), text, c) for (name, text), c in zip(names.items(), colours, strict=False)]
    return _curves(lines, title, "nats a token")


def bits_per_byte(rows: Sequence[Row], unigram: float | None) -> Figure | None:
    """Held-out bits per byte over the steps, against those of a model that knows token frequencies alone."""
    steps, values = curve(list(rows), "held_out_bpb")
    if not steps:
        return None
    with charts.house_style():
        figure, (ax,) = charts.panels(1, 1, WIDTH, HEIGHT)
        charts.line(ax, steps, values, PALETTE["ink"])
        highest = max([*values, unigram or 0.0])
        ax.set_ylim(0, highest * 1.15)
        if unigram:
            ax.axhline(unigram, color=PALETTE["rl"], linewidth=1.1, linestyle=(0, (4, 3)))
            ax.annotate(
                f"unigram tokens {unigram:.2f}",
                (max(steps), unigram),
                xytext=(0, 4),
                textcoords="offset points",
                ha="right",
                color=PALETTE["rl"],
                fontweight="bold",
            )
        below = (0, -11) if len(steps) > 1 else (8, 0)
        ax.annotate(
            f"{values[-1]:.2f}",
            (steps[-1], values[-1]),
            xytext=below,
            textcoords="offset points",
            ha="right" if len(steps) > 1 else "left",
            va="center",
            fontweight="bold",
        )
        _label(ax, "Held-out text", "bits per byte", steps)
    return figure


def load_violation(rows: Sequence[Row]) -> Figure | None:
    """How much more than its share the busiest expert got, at each step."""
    steps, values = curve(list(rows), "load_violation")
    if not steps:
        return None
    with charts.house_style():
        figure, (ax,) = charts.panels(1, 1, WIDTH, HEIGHT)
        charts.line(ax, steps, values, PALETTE["ink"], charts.smoothing(len(steps)))
        ax.set_ylim(bottom=0)
        _label(ax, "Imbalance: busiest expert over its share", "max load / mean load − 1", steps)
    return figure


def expert_loads(rows: Sequence[Row]) -> Figure | None:
    """A heat map a MoE layer (of at most `MOST_LAYERS`, evenly chosen): experts over steps."""
    layers = sorted({row["layer"] for row in rows})
    if not layers:
        return None
    if len(layers) > MOST_LAYERS:
        layers = [layers[i * (len(layers) - 1) // (MOST_LAYERS - 1)] for i in range(MOST_LAYERS)]
    with charts.house_style():
        figure, axes = charts.panels(len(layers), 1, WIDTH, 1.45)
        image: Any = None
        for ax, layer in zip(axes, layers, strict=True):
            own = sorted((r for r in rows if r["layer"] == layer), key=lambda r: r["step"])
            image = charts.heat_map(ax, [r["load"] for r in own], [r["step"] + 1 for r in own])
            ax.set_title(f"MoE layer {layer + 1}")
            ax.set_ylabel("expert")
        axes[-1].set_xlabel("step")
        bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=30, pad=0.03)
        bar.set_ticks([0, 1, 2], labels=["none", "fair share", "twice or more"])
        bar.outline.set_visible(False)
    return figure


def rl_curve(runs: Mapping[str, Sequence[Row]], name: str, title: str, unit: str, small: bool = False) -> Figure | None:
    """One number of RL runs (by model name) against the step; a running mean over the raw curve."""
    with charts.house_style():
        figure, (ax,) = charts.panels(1, 1, *((3.2, 2.0) if small else (WIDTH, HEIGHT)))
        _draw_rl(ax, runs, name, title, unit)
    return figure if ax.lines else None


def rl_overview(runs: Mapping[str, Sequence[Row]]) -> Figure:
    """Reward and thought length of RL runs side by side."""
    with charts.house_style():
        figure, (left, right) = charts.panels(2, 2, 3.9, 2.6)
        _draw_rl(left, runs, "reward", "Reward", "mean reward of a response")
        _draw_rl(right, runs, "thought_length", "Thought length", "tokens")
    return figure


def shares_by_model(shares: dict[str, dict[str, float]]) -> Figure | None:
    """Stacked bars: the shares of thorough, hasty, guessed and other thoughts, a bar a model."""
    if not shares:
        return None
    with charts.house_style():
        figure, (ax,) = charts.panels(1, 1, WIDE, 0.75 + 0.4 * len(shares))
        places = list(range(len(shares)))[::-1]
        for place, parts in zip(places, shares.values(), strict=True):
            left = 0.0
            for style in STYLES:
                share = parts.get(style, 0.0)
                ax.barh(place, share, left=left, height=0.62, color=PALETTE[style], edgecolor="none")
                if share >= 0.07:
                    ink = PALETTE["paper"] if style == "thorough" else PALETTE["ink"]
                    ax.text(left + share / 2, place, f"{share:.0%}", ha="center", va="center", color=ink)
                left += share
        for position, style in zip((0.0, 0.26, 0.47, 0.68), STYLES, strict=True):
            ax.plot(position + 0.01, places[0] + 0.72, "s", color=PALETTE[style], markersize=7, clip_on=False)
            ax.text(position + 0.035, places[0] + 0.72, style, va="center", fontsize=8.5)
        ax.set_ylim(-0.5, places[0] + 1.0)
        ax.set_yticks(places, list(shares))
        ax.tick_params(axis="y", labelcolor=PALETTE["ink"], labelsize=9)
        ax.set_xlim(0, 1)
        ax.set_xticks([0, 0.5, 1.0], ["0", "50%", "100% of thoughts"])
        ax.spines["left"].set_visible(False)
        ax.grid(False)
    return figure


def counts(table: dict[str, float], title: str) -> Figure | None:
    """Horizontal bars of a table of counts, the largest first."""
    if not table:
        return None
    ordered = dict(sorted(table.items(), key=lambda item: (-item[1], item[0]))[:14])
    with charts.house_style():
        figure, (ax,) = charts.panels(1, 1, WIDTH, 0.6 + 0.27 * len(ordered))
        charts.bars(ax, ordered)
        ax.set_title(title)
    return figure


def small_multiples(rows: Sequence[Row], most: int = 12) -> Figure | None:
    """Every number of a stage's `curves.jsonl` in a small panel of its own, but parts of another (`loss.of_this`)."""
    every = [name for name in dict.fromkeys(k for row in rows for k in row) if name != "step" and "." not in name]
    names = [name for name in every if curve(list(rows), name)[0]]
    if not names:
        return None
    with charts.house_style():
        figure, axes = charts.panels(len(names[:most]), 3, 2.7, 1.75)
        for ax, name in zip(axes, names[:most], strict=True):
            steps, values = curve(list(rows), name)
            charts.line(ax, steps, values, PALETTE["cold_start"], charts.smoothing(len(steps)))
            ax.set_title(name.replace("_", " "))
            ax.set_xlabel("step")
    return figure


def _draw_rl(ax: Axes, runs: Mapping[str, Sequence[Row]], name: str, title: str, unit: str) -> None:
    ends, every = [], []
    for model, rows in runs.items():
        steps, values = curve(list(rows), name)
        if not steps:
            continue
        window = charts.smoothing(len(steps))
        charts.line(ax, steps, values, PALETTE[model], window)
        smooth = charts.running_mean(values, window)
        ends.append((steps[-1], smooth[-1], MODEL_NAMES[model], PALETTE[model]))
        every += steps
    if every:
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
        _label(ax, title, unit, every)
        charts.end_labels(ax, ends)


def _curves(lines: list[tuple[list[float], list[float], str, str]], title: str, unit: str) -> Figure | None:
    drawn = [part for part in lines if part[0]]
    if not drawn:
        return None
    with charts.house_style():
        figure, (ax,) = charts.panels(1, 1, WIDTH, HEIGHT)
        for steps, values, _, colour in drawn:
            charts.line(ax, steps, values, colour, charts.smoothing(len(steps)))
        ax.set_ylim(bottom=0)
        _label(ax, title, unit, [s for part in drawn for s in part[0]])
        if len(drawn) > 1:
            charts.end_labels(ax, [(x[-1], y[-1], text, colour) for x, y, text, colour in drawn])
    return figure


def _label(ax: Axes, title: str, unit: str, steps: Sequence[float]) -> None:
    ax.set_title(title)
    ax.set_ylabel(unit)
    ax.set_xlabel("step")
    if min(steps) == max(steps):
        ax.set_xlim(min(steps) - 1, max(steps) + 1)
        ax.set_xticks([min(steps)])
    else:
        ax.locator_params(axis="x", integer=True)
