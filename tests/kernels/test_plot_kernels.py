"""Plots of the kernels' benchmark: what a panel shows, and what is no result of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from matplotlib.figure import Figure

from tests.model.benches import bench

COMMON = {"shape": "2 × 3", "dtype": "float32", "device": "cpu", "seconds": 0.002}


def row(op: str, peer: str, seconds: float, **more: object) -> dict[str, object]:
    return {"op": op, **COMMON, "peer": peer, "peer_seconds": seconds, "ratio": seconds / 0.002, **more}


MEASURED = [
    row("some", "a", 0.004, kernel="one", tflops=0.1),
    row("some", "b", 0.003, kernel="one", tflops=0.1),
    row("other", "a", 0.001, kernel="two", tflops=0.2, bandwidth=5e9, bandwidth_share=0.5),
]
GOALS = [
    row("some", "b", 0.003, metric="speed", goal=1.5, met=True),
    {
        **row("some", "all", 0.0, metric="memory", goal=0.05, met=False),
        "peer_seconds": None, "ratio": 0.07, "memory": 7 << 20, "peer_memory": 100 << 20,
    },
    row("other", "a copy of as many bytes", 0.001, metric="share of copy", goal=0.8, met=False),
]  # fmt: skip


@pytest.fixture(scope="module")
def plots() -> ModuleType:
    return bench("plot_kernels")


def test_a_panel_has_each_side_s_time_and_the_goals(plots: ModuleType) -> None:
    figure: Figure = plots.plot(MEASURED[:2], GOALS, "title")
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["ours", "a", "b"]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([2.0, 4.0, 3.0])
    (line,) = ax.lines
    assert line.get_xdata()[0] == pytest.approx(2.0)  # 3 ms over 1.5
    assert "speed at least 1.5, is 1.5: met" in ax.get_xlabel()
    assert "memory at most 0.05, is 0.07: missed" in ax.get_xlabel()


def test_what_is_far_slower_is_cut_off_and_says_so(plots: ModuleType) -> None:
    (ax,) = plots.plot([row("some", "a", 3.0), row("some", "b", 0.004)], [], "title").axes
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([2.0, 10.0, 4.0])
    assert [text.get_text() for text in ax.texts] == ["2 ms", "… 3,000 ms  × 1500.00", "4 ms  × 2.00"]


def test_a_table_has_a_row_a_peer_and_every_goal_once(plots: ModuleType) -> None:
    lines = plots.table(MEASURED, GOALS).splitlines()[2:]
    assert lines == [
        "| some | 2 × 3 | 2 ms | 100 GFLOP/s | a | 4 ms | 2 |  |",
        "| some | 2 × 3 | 2 ms | 100 GFLOP/s | b | 3 ms | 1.5 | 1.5: met |",
        "| some | 2 × 3 | 7.0 MiB |  | all | 100 MiB | 0.07 | memory 0.05: missed |",
        "| other | 2 × 3 | 2 ms | 5 GB/s, 0.50 of a copy | a | 1 ms | 0.5 |  |",
        "| other | 2 × 3 | 2 ms |  | a copy of as many bytes | 1 ms | 0.5 | share of copy 0.8: missed |",
    ]


def test_a_picture_a_kernel(plots: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"rows": GOALS, "measured": MEASURED, "device_name": "some", "torch": "2"}
    (tmp_path / "result").write_text("a line before\n" + json.dumps(said) + "\n")
    monkeypatch.setattr(sys, "argv", ["plot", str(tmp_path / "result"), "--out", str(tmp_path / "out")])
    plots.main()
    pictures = sorted((tmp_path / "out").iterdir())
    assert [picture.name for picture in pictures] == ["one.png", "two.png"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


@pytest.mark.parametrize("text", ["", "no JSON\n", "{}\n", "[1]\n"])
def test_what_is_no_result_is_refused(plots: ModuleType, tmp_path: Path, text: str) -> None:
    (tmp_path / "result").write_text(text)
    with pytest.raises(ValueError, match="run it with --json"):
        plots.read(tmp_path / "result")
