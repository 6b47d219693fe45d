"""The card of a training stage while it runs, from what it has told by then, and what a finished one shows of it."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from gristmill.flows import live_card as module
from gristmill.flows.cards import card_markdown, training_figures
from gristmill.flows.cards.run_log import GrowingRows, RunLog
from gristmill.flows.cards.training import live_card
from gristmill.flows.live_card import LiveCard

GROUPS = {"embedding": 0.02, "attention": 0.3, "feed_forward": 0.2, "experts": 0.5, "gates": 0.01, "mtp": 0.4}
PEAK = {
    "flops_per_second": 4.5e10,
    "product": "float32 1024 × 1024 × 1024",
    "device": "cpu",
    "ranks": 1,
    "flops_per_token": 8_400_000,
    "counted": "products of the active parameters",
}


def curves(steps: int) -> list[dict[str, Any]]:
    rows = []
    for step in range(steps):
        loss = 3 + 4 * math.exp(-step / 20)
        row = {"step": step, "main_loss": loss, "loss": 1.3 * loss, "grad_norm": 1.0, "learning_rate": 1e-3}
        row |= {"load_violation": 0.3, "load_violation_max": 0.5, "load_entropy": 0.97}
        row |= {f"grad_norm.{name}": size * (1 + 5 * math.exp(-step / 10)) for name, size in GROUPS.items()}
        if step % 10 == 9:
            row |= {"held_out_bpb": loss / 3, "held_out_bpb.code": loss / 4, "held_out_bpb.prose": loss / 2.5}
        rows.append(row)
    return rows


def timing(step: int, **more: Any) -> dict[str, Any]:
    spent = {"seconds": 0.2, "data_seconds": 0.003, "evaluating_seconds": 0.0, "saving_seconds": 0.0}
    spent |= {"copying_seconds": 0.0, "stalled_seconds": 0.0}
    return {
        "step": step, **spent, "tokens": 4096, "tokens_per_second": 20480.0, "mfu": 0.31, "memory_bytes": 9 * 10**8, **more,
    }  # fmt: skip


def write(file: Path, rows: list[dict[str, Any]], torn: str = "") -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn, encoding="utf-8")


@pytest.fixture
def running(tmp_path: Path) -> Path:
    """A stage that has done 40 steps, the lines of the next on their way."""
    log = tmp_path / "log"
    log.mkdir()
    write(log / "curves.jsonl", curves(40), torn='{"step": 40, "main_lo')
    write(log / "timings.jsonl", [timing(step) for step in range(40)], torn="{")
    loads = [
        {"step": s, "layer": i, "load": [0.4, 0.3, 0.2, 0.1]} for s in range(0, 40, 10) for i in range(2)
    ]  # fmt: skip
    write(log / "expert_load.jsonl", loads)
    samples = [{"step": s, "prompt": p, "text": f"said \0| after {s}"} for s in (9, 39) for p in ("", "def f")]
    write(log / "samples.jsonl", samples)
    (log / "peak.json").write_text(json.dumps(PEAK), encoding="utf-8")
    return tmp_path


def test_a_running_stage_has_a_card(running: Path) -> None:
    card = live_card("pretrain", "Pretraining", RunLog(running))
    assert card is not None
    assert "40 steps are done" in card
    assert "20,480 tokens a second" in card
    assert "31.0% of the peak" in card
    assert card.count("data:image/png;base64,") == 5  # curves, speed, held-out, gradient, experts
    assert "after 39" in card
    assert "after 9" not in card
    assert "said �\\| after" in card


def test_what_a_stage_has_to_say_of_how_it_runs_is_on_its_card(running: Path) -> None:
    (running / "log" / "notes.json").write_text(json.dumps(["no text is sampled: for a reason"]), encoding="utf-8")
    card = live_card("pretrain", "Pretraining", RunLog(running))
    assert card is not None
    assert "\nno text is sampled: for a reason\n" in card


def test_a_stage_that_told_nothing_yet_has_none(tmp_path: Path) -> None:
    assert live_card("ingest", "Ingest", RunLog(tmp_path)) is None
    (tmp_path / "log").mkdir()
    write(tmp_path / "log" / "curves.jsonl", [], torn='{"step": 0')
    assert live_card("pretrain", "Pretraining", RunLog(tmp_path)) is None


def test_what_an_older_or_other_run_wrote_does_not_break_it(running: Path) -> None:
    """Timings without utilisation, and no curve but the loss."""
    write(running / "log" / "curves.jsonl", [{"step": 0, "loss": 2.0, "spike": "gradient"}])
    write(running / "log" / "timings.jsonl", [{"step": 0, "seconds": 0.2, "saving_seconds": 0.0}, {"seconds": 1}])
    card = live_card("rl", "RL", RunLog(running))
    assert card is not None
    assert "tokens a second" not in card


def test_a_step_that_was_taken_twice_counts_once(running: Path) -> None:
    write(running / "log" / "timings.jsonl", [timing(0), timing(1), timing(1, mfu=0.5), timing(2)])
    assert [(row["step"], row["mfu"]) for row in RunLog(running).timings()] == [(0, 0.31), (1, 0.5), (2, 0.31)]


def test_a_look_reads_what_was_appended_since_the_last(tmp_path: Path) -> None:
    """Also the end of a line that was on its way, and not what one of a killed writer has become."""
    file = tmp_path / "curves.jsonl"
    rows = GrowingRows(file)
    assert rows.look() == []
    write(file, [{"step": 0}, {"step": 1}], torn='{"st')
    assert [row["step"] for row in rows.look()] == [0, 1]
    with file.open("r+", encoding="utf-8") as other:
        other.write('{"step": 7}')  # in the place of the first, which nobody reads again
        other.seek(0, 2)
        other.write('ep": 2}\n{"torn{"step": 3}\n{"step": 4}\n')
    assert [row["step"] for row in rows.look()] == [0, 1, 2, 4]
    assert [row["step"] for row in rows.look()] == [0, 1, 2, 4]


@pytest.mark.parametrize("steps", [1, 3, 30])
def test_a_file_that_begins_anew_is_read_from_its_start(steps: int, tmp_path: Path) -> None:
    """A run that goes on from its checkpoint writes its curves again, and may be past where it was at the next look."""
    file = tmp_path / "curves.jsonl"
    rows = GrowingRows(file)
    write(file, [{"step": step, "try": 1} for step in range(3)])
    rows.look()
    again = [{"step": step, "try": 2} for step in range(steps)]
    write(file, again)
    assert rows.look() == again
    file.unlink()
    assert rows.look() == []


def test_one_source_has_no_figure_of_its_own() -> None:
    rows = [{name: value for name, value in row.items() if name != "held_out_bpb.prose"} for row in curves(20)]
    assert training_figures.held_out_by_source(rows) is None
    assert training_figures.held_out_by_source(curves(20)) is not None


def test_the_finished_card_shows_speed_and_groups(running: Path) -> None:
    write(running / "curves.jsonl", curves(40))
    card = card_markdown({"stage": "pretrain"}, running)
    for title in ("## Speed", "## Held-out text", "## Gradient"):
        assert title in card
    assert "main_lo" not in card


class Shown:
    """Stands where the Prefect server would."""

    def __init__(self, fails: bool = False) -> None:
        self.cards: list[str] = []
        self.fails = fails

    def __call__(self, stage: str, title: str, card: str) -> str:
        if self.fails:
            raise OSError("no server")
        self.cards.append(card)
        return "an artifact"


def test_it_is_refreshed_only_so_often(running: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown()
    monkeypatch.setattr(module, "show_card", shown)
    live = LiveCard("pretrain", "Pretraining", running, every=0.2)
    live.refresh()
    assert shown.cards == []
    time.sleep(0.25)
    live.refresh()
    live.refresh()
    assert len(shown.cards) == 1


def test_a_server_that_does_not_answer_ends_the_showing_and_not_the_run(
    running: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through what a stage calls: the first trouble is said, and the stage's own watcher hears on."""
    from gristmill.flows import orchestrated

    told: list[Any] = []

    class Inner:
        def progress(self, name: str, done: int, total: int, **values: float) -> None:
            told.append(done)

        def say(self, line: str) -> None:
            told.append(line)

    def away(*_: object, **__: object) -> None:
        raise OSError("no server")

    monkeypatch.setattr(orchestrated, "_inside_flow", lambda: True)
    monkeypatch.setattr("prefect.artifacts.create_progress_artifact", away)
    reporting = orchestrated._Reporting(Inner())  # type: ignore[arg-type]
    monkeypatch.setattr(reporting, "_log", lambda *_: None)
    for done in range(3):
        reporting.progress("pretrain", done, 3)
    assert told == [0, "pretrain is not shown in the UI while it runs: no server", 1, 2]
