"""Figures of the corpus: the funnel by source, histograms of kept against removed, a mixture before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gristmill.flows.cards import charts, text
from gristmill.flows.cards.charts import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE = 7.2  # inches: the funnel's bars need room for their names
MOST_SOURCES, MOST_PANELS = 16, 12
COLOURS = {"kept": PALETTE["cold_start"], "changed": PALETTE["hasty"], "removed": PALETTE["rl"]}
STEP = 0.05  # width of a bin of values
LENGTHS = "characters"  # the histogram whose bins are powers of two


def funnel(sources: Sequence[Mapping[str, Any]]) -> Figure | None:
    """A bar a source: which share of its documents went on, went on changed, or was removed."""
    shown = [row for row in sources if row["documents in"]]
    if not shown:
        return None
    if len(shown) > MOST_SOURCES:
        shown = [*shown[: MOST_SOURCES - 1], shown[-1]]  # the last is the sum of all
    with charts.house_style():
        figure, (ax,) = charts.panels(1, 1, WIDE, 0.75 + 0.33 * len(shown))
        places = list(range(len(shown)))[::-1]
        for place, row in zip(places, shown, strict=True):
            left = 0.0
            for outcome, colour in COLOURS.items():
                share = row.get(outcome, 0) / row["documents in"]
                ax.barh(place, share, left=left, height=0.62, color=colour, edgecolor="none")
                if share >= 0.06:
                    ink = PALETTE["ink"] if outcome == "changed" else PALETTE["paper"]
                    ax.text(left + share / 2, place, f"{share:.1%}", ha="center", va="center", color=ink, fontsize=8)
                left += share
            ax.annotate(
                f"{text.short(row['documents in'])} documents",
                (1, place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                color=PALETTE["muted"],
            )
        _legend(ax, places[0] + 0.75, (0.0, 0.13, 0.3))
        ax.set_yticks(places, [str(row["source"]) for row in shown])
        ax.tick_params(axis="y", labelcolor=PALETTE["ink"])
        ax.set_ylim(-0.55, places[0] + 1.05)
        ax.set_xlim(0, 1.24)
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25%", "50%", "75%", "100%"])
        ax.spines["bottom"].set_bounds(0, 1)
        ax.spines["left"].set_visible(False)
        ax.grid(False)
    return figure


def _legend(ax: Axes, height: float, lefts: Sequence[float]) -> None:
    for left, (outcome, colour) in zip(lefts, COLOURS.items(), strict=True):
        ax.plot(left + 0.01, height, "s", color=colour, markersize=7, clip_on=False)
        ax.text(left + 0.03, height, outcome, va="center", fontsize=8.5)


def histograms(joined: Mapping[str, Mapping[str, Mapping[float, int]]]) -> Figure | None:
    """A panel a name: kept as an area, removed as a line, each as shares of its own documents.

    Lengths come first, then what tells the two outcomes apart best.
    """
    names = sorted(joined, key=lambda name: (name != LENGTHS, -apart(joined[name]), name))[:MOST_PANELS]
    if not names:
        return None
    with charts.house_style():
        figure, axes = charts.panels(len(names), 3, 3.0, 2.1)
        for ax, name in zip(axes, names, strict=True):
            _histogram(ax, name, joined[name])
    return figure


def apart(outcomes: Mapping[str, Mapping[float, int]]) -> float:
    """The total variation between two histograms, as shares: 0 where they are alike, 1 where they share no bin."""
    shares = [{low: n / sum(bins.values()) for low, n in bins.items()} for bins in outcomes.values() if bins]
    if len(shares) < 2:
        return 0.0
    return sum(abs(shares[0].get(low, 0.0) - shares[1].get(low, 0.0)) for low in {*shares[0], *shares[1]}) / 2


def _histogram(ax: Axes, name: str, outcomes: Mapping[str, Mapping[float, int]]) -> None:
    powers, highest = name == LENGTHS, 0.0
    for outcome, bins in outcomes.items():
        if not bins:
            continue
        lows, shares = _steps(bins, powers)
        highest = max(highest, *shares)
        if outcome == "kept":
            ax.fill_between(lows, shares, step="post", color=COLOURS[outcome], alpha=0.35, linewidth=0)
        else:
            ax.step(lows, shares, where="post", color=COLOURS[outcome], linewidth=1.4)
        number = sum(bins.values())
        height = 0.93 if outcome == "kept" else 0.82
        ax.text(
            0.98,
            height,
            f"{outcome} {text.short(number)}",
            transform=ax.transAxes,
            ha="right",
            fontsize=8,
            color=COLOURS[outcome],
            fontweight="bold",
        )
    if powers:
        ax.set_xscale("log", base=2)
        lows = sorted({low for bins in outcomes.values() for low in bins})
        ticks = lows[:: max(1, len(lows) // 4)]
        ax.set_xticks(ticks, [text.short(t).replace(" ", "") for t in ticks])
        ax.minorticks_off()
    else:
        ax.set_xlim(0, 1)
    ax.set_yticks([tick for tick in ax.get_yticks() if 0 <= tick <= 1.0])
    ax.set_ylim(0, highest * 1.4)  # room for the two lines of words
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_title(name.replace("_", " "))


def _steps(bins: Mapping[float, int], powers: bool) -> tuple[list[float], list[float]]:
    """Every bin from the first to the last, empty ones too, and the end of the last; shares of the whole."""
    if powers:
        first, last = (round(math.log2(f(bins))) for f in (min, max))
        lows = [2.0**power for power in range(first, last + 2)]
    else:
        lows = [round(STEP * i, 2) for i in range(round(1 / STEP) + 1)]
    held = {round(low, 2): number for low, number in bins.items()}
    whole = sum(bins.values())
    return lows, [held.get(low, 0) / whole for low in lows]


def deciles(rows: Sequence[Mapping[str, float]]) -> Figure | None:
    """The share of good examples in each tenth of the scores, and the tenth's middle score: calibrated ones agree."""
    if not rows:
        return None
    with charts.house_style():
        figure, (ax,) = charts.panels(1, 1, 4.5, 2.75)
        places = list(range(1, len(rows) + 1))
        ax.bar(places, [row["good"] for row in rows], width=0.7, color=COLOURS["kept"])
        middles = [(row["from"] + row["to"]) / 2 for row in rows]
        ax.plot(places, middles, "D", color="none", mec=PALETTE["ink"], markersize=5)
        ax.set_ylim(0, 1.05)
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        ax.set_xticks(places)
        ax.set_xlabel("tenth of the scores (◇ the score itself)", loc="left")
        ax.set_title("good examples")
    return figure


def compression(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Bytes of text a token, by source and language; the largest first by text."""
    shown = sorted(rows, key=lambda row: -row["bytes"])[:MOST_SOURCES]
    if not shown:
        return None
    names = [f"{r['source']} ({r['language']})" if r.get("language") else str(r["source"]) for r in shown]
    with charts.house_style():
        figure, (ax,) = charts.panels(1, 1, WIDE, 0.6 + 0.27 * len(shown))
        table = {name: r["bytes_per_token"] for name, r in zip(names, shown, strict=True)}
        charts.bars(ax, table, PALETTE["cold_start"], "{:.2f}")
        ax.set_title("bytes a token")
    return figure


def shares_before_and_after(before: Mapping[str, float], after: Mapping[str, float], title: str) -> Figure | None:
    """Two bars a source: its share of all before, and after."""
    names = [n for n in dict.fromkeys([*before, *after])][:MOST_SOURCES]
    sums = [sum(table.values()) for table in (before, after)]
    if not names or not all(sums):
        return None
    with charts.house_style():
        figure, (ax,) = charts.panels(1, 1, WIDE, 0.75 + 0.42 * len(names))
        places = list(range(len(names)))[::-1]
        for place, name in zip(places, names, strict=True):
            for shift, table, whole, colour in (
                (0.19, before, sums[0], PALETTE["other"]),
                (-0.19, after, sums[1], PALETTE["cold_start"]),
            ):
                share = table.get(name, 0) / whole
                ax.barh(place + shift, share, height=0.34, color=colour)
                ax.annotate(
                    f"{share:.1%}",
                    (share, place + shift),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
        ax.set_yticks(places, names)
        ax.tick_params(axis="y", labelcolor=PALETTE["ink"])
        ax.set_xticks([])
        ax.spines[["bottom", "left"]].set_visible(False)
        ax.grid(False)
        ax.set_title(f"{title}: share before (grey) and after (blue)")
    return figure
