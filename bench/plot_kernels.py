"""A plot a kernel, from what `python -P -m gristmill.kernels.bench --json` said.

    python -P bench/plot_kernels.py RESULT [--out build/kernels] [--kernels moe_mlp …] [--table]

RESULT holds the benchmark's output, of which the last line is read. Each panel is one operation at one shape in one
dtype: milliseconds of ours and of each peer, less is better. A dashed line is where a goal lies, and ours has to end
left of it. Goals of memory are written below. Bars are cut off, with dots, at five times ours (or the goal). With
--table it prints the Markdown table of kernels/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gristmill.flows.cards import charts
from gristmill.flows.cards.charts import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, BAR, AROUND = 5.0, 0.26, 1.0  # inches: of a panel; of a bar; of title, axis and note
COLUMNS = 2
LABEL = 26  # letters of a line
CUT = 5  # times ours, or the goal
Row = Mapping[str, Any]
Key = tuple[str, str, str]  # operation, shape, dtype


def key_of(row: Row) -> Key:
    return row["op"], row["shape"], row["dtype"]


def read(file: Path) -> dict[str, Any]:
    """The benchmark's object.

    Raises:
        ValueError: the last line is none, as where the benchmark was cut off or ran without `--json`.
    """
    lines = file.read_text(encoding="utf-8").splitlines()
    try:
        result = json.loads(lines[-1])
        return {name: result[name] for name in ("rows", "measured", "device_name", "torch")}
    except (IndexError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the last line of {file} is not the benchmark's: run it with --json, to its end") from error


def plot(measured: Sequence[Row], goals: Sequence[Row], title: str) -> Figure:
    """One kernel's panels, in the order in which they were measured."""
    panels: dict[Key, list[Row]] = {}
    for row in measured:
        panels.setdefault(key_of(row), []).append(row)
    most = max(len(rows) for rows in panels.values()) + 1
    with charts.house_style():
        figure, axes = charts.panels(len(panels), COLUMNS, WIDTH, AROUND + BAR * most)
        for ax, (key, rows) in zip(axes, panels.items(), strict=True):
            panel(ax, rows, [goal for goal in goals if key_of(goal) == key], most)
        figure.suptitle(title, fontsize=8.5, color=PALETTE["muted"])
    return figure


def panel(ax: Axes, rows: Sequence[Row], goals: Sequence[Row], most: int) -> None:
    """Ours on top, then the peers; as high as a panel of `most` bars, so that bars are alike."""
    times = {"ours": rows[0]["seconds"] * 1e3} | {row["peer"]: row["peer_seconds"] * 1e3 for row in rows}
    ours, places = times["ours"], list(range(len(times)))
    lines = [(goal["peer_seconds"] * 1e3 / goal["goal"], goal) for goal in goals if goal["metric"] != "memory"]
    cut = CUT * max(ours, *(at for at, _ in lines), 0)
    shown = [min(taken, cut) for taken in times.values()]
    ax.barh(places, shown, height=0.66, color=[PALETTE["cold_start"]] + [PALETTE["other"]] * len(rows))
    for at, goal in lines:
        ax.axvline(at, color=PALETTE["zero" if goal["met"] else "rl"], linewidth=1.3, linestyle=(0, (4, 2)))
    for place, taken, end in zip(places, times.values(), shown, strict=True):
        text = f"{'… ' if taken > cut else ''}{_milliseconds(taken)}{f'  × {taken / ours:.2f}' if place else ''}"
        ax.annotate(
            text, (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    ax.set_yticks(places, [textwrap.fill(side, LABEL, break_long_words=False) for side in times])
    ax.tick_params(axis="y", labelcolor=PALETTE["ink"], labelsize=7)
    ax.set_ylim(most - 0.4, -0.6)
    ax.set_xlim(0, max([*shown, *(at for at, _ in lines)]) * 1.6)
    ax.grid(False)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("\n".join(["milliseconds", *map(_note, goals)]), loc="left")
    ax.set_title(f"{rows[0]['op']}\n{rows[0]['shape']}, {rows[0]['dtype']}", fontsize=8.5)


def _milliseconds(taken: float) -> str:
    return f"{taken:,.0f} ms" if taken >= 100 else f"{taken:.3g} ms"


def _note(goal: Row) -> str:
    bound = "at most" if goal["metric"] == "memory" else "at least"
    return f"goal: {goal['metric']} {bound} {goal['goal']:g}, is {goal['ratio']:.3g}: {_outcome(goal)}"


def _outcome(goal: Row) -> str:
    return "met" if goal["met"] else "missed"


def table(measured: Sequence[Row], goals: Sequence[Row]) -> str:
    """Lines of Markdown: a row a peer, with the goal that it decides; and one for each goal against something else."""
    lines = ["| operation | shape | ours | rate | against | theirs | ratio | goal |", "| --- " * 8 + "|"]
    timed = {(*key_of(row), row["peer"]) for row in measured}
    for place, row in enumerate(measured):
        decided = [goal for goal in goals if (*key_of(goal), goal["peer"]) == (*key_of(row), row["peer"])]
        ours, theirs = (_milliseconds(row[name] * 1e3) for name in ("seconds", "peer_seconds"))
        rate = f"{row['tflops'] * 1e3:.3g} GFLOP/s"
        if "bandwidth" in row:
            rate = f"{row['bandwidth'] / 1e9:.3g} GB/s, {row['bandwidth_share']:.2f} of a copy"
        speed = [goal for goal in decided if goal["metric"] != "memory"]
        lines.append(_line(row, ours, rate, theirs, row["ratio"], "; ".join(map(_said, speed))))
        if place + 1 < len(measured) and key_of(measured[place + 1]) == key_of(row):
            continue
        for goal in goals:  # the last row of the case: what is compared with no peer's time follows
            timed_peer = (*key_of(goal), goal["peer"]) in timed and goal["metric"] != "memory"
            if key_of(goal) == key_of(row) and not timed_peer:
                memory = goal["metric"] == "memory"
                ours = f"{goal['memory'] / 2**20:.1f} MiB" if memory else ours
                theirs = (
                    f"{goal['peer_memory'] / 2**20:.0f} MiB" if memory else _milliseconds(goal["peer_seconds"] * 1e3)
                )
                lines.append(_line(goal, ours, "", theirs, goal["ratio"], f"{goal['metric']} {_said(goal)}"))
    return "\n".join(lines)


def _line(row: Row, ours: str, rate: str, theirs: str, ratio: float, goal: str) -> str:
    op = row["op"] if row["dtype"] == "float32" else f"{row['op']}, {row['dtype']}"
    return f"| {op} | {row['shape']} | {ours} | {rate} | {row['peer']} | {theirs} | {ratio:.3g} | {goal} |"


def _said(goal: Row) -> str:
    return f"{goal['goal']:g}: {_outcome(goal)}"


def main() -> None:
    """Read the result and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/kernels"))
    parser.add_argument("--kernels", nargs="+", help="these folders alone")
    parser.add_argument("--table", action="store_true", help="print a table of Markdown, and draw nothing")
    arguments = parser.parse_args()
    result = read(arguments.result)
    if arguments.table:
        print(table(result["measured"], result["rows"]))
        return
    title = f"{result['device_name']}, torch {result['torch']}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    for kernel in dict.fromkeys(row["kernel"] for row in result["measured"]):
        if kernel not in (arguments.kernels or [kernel]):
            continue
        rows = [row for row in result["measured"] if row["kernel"] == kernel]
        picture = arguments.out / f"{kernel}.png"
        picture.write_bytes(charts.png(plot(rows, result["rows"], f"{kernel} · {title}"), dpi=90))
        print(picture)


if __name__ == "__main__":
    main()
