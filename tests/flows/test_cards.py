"""Every stage has a card from its manifest and the conventions alone, and no content can break it."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from gristmill.flows.cards import card_markdown, charts, text


def _fixture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_fixture", Path(__file__).with_name("report_fixture.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fixture = _fixture()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return fixture.make_run(tmp_path_factory.mktemp("run"), steps=20, problems=12)


def card(folder: Path) -> str:
    return card_markdown(json.loads((folder / "manifest.json").read_text(encoding="utf-8")), folder)


def pictures(card: str) -> list[bytes]:
    return [base64.b64decode(p) for p in re.findall(r"\(data:image/png;base64,([A-Za-z0-9+/=]+)\)", card)]


@pytest.mark.parametrize("name", fixture.STAGES)
def test_every_stage_has_a_card_with_metrics_lineage_files_and_settings(folders, name: str) -> None:
    shown = card(folders[name])
    assert shown.startswith("# ")
    assert "## Metrics" in shown or "### " in shown
    assert "## Configuration" in shown
    assert "## Environment" in shown
    for given, source in fixture.INPUTS[name].items():
        assert f"| {text.cell(given)} | {text.cell(source)} |" in shown
    assert all(p.startswith(b"\x89PNG") for p in pictures(shown))
    assert len(shown) < 400_000


def test_pictures_are_where_there_is_something_to_draw(folders) -> None:
    assert len(pictures(card(folders["pretrain"]))) == 2  # load of the experts, curves
    assert len(pictures(card(folders["rl"]))) == 2  # reward and length, curves
    assert len(pictures(card(folders["evaluate"]))) == 1
    assert len(pictures(card(folders["filter"]))) == 3  # by source, by reason, histograms
    assert len(pictures(card(folders["ingest"]))) == 1  # by source
    assert pictures(card(folders["problems"])) == []


def test_a_new_stage_has_a_card_without_a_line_of_code(tmp_path: Path) -> None:
    fixture.write_rows(tmp_path / "curves.jsonl", [{"step": 0, "heat": 1.5}])
    fixture.write_rows(tmp_path / "samples.jsonl", [{"word": "oat", "kept": True}])
    manifest = {"stage": "mill_wheel", "metrics": {"turns": 3, "by_grain": {"oat": 2, "rye": 1}}}
    shown = card_markdown(manifest, tmp_path)
    assert "# Mill wheel" in shown
    assert "| turns | 3 |" in shown
    assert "### By grain" in shown
    assert "| oat | yes |" in shown
    assert len(pictures(shown)) == 1


def test_an_empty_manifest_and_an_empty_folder_have_a_card(tmp_path: Path) -> None:
    assert card_markdown({"stage": "rl"}, tmp_path) == "# RL\n"


def test_same_folder_same_bytes(folders) -> None:
    assert card(folders["pretrain"]) == card(folders["pretrain"])


def test_no_content_breaks_a_table_or_a_block(tmp_path: Path) -> None:
    nasty = "a | b\nc `d` <think>*e*</think> \\ ![x](http://evil/)"
    fixture.write_rows(tmp_path / "samples.jsonl", [{"text": nasty}])
    shown = card_markdown({"stage": "x", "config": {"note": "```\n# not a title"}}, tmp_path)
    row = next(line for line in shown.splitlines() if line.startswith("| a "))
    assert row.count("|") - row.count("\\|") == 2
    assert "<think>" not in row
    assert not re.search(r"(?<!\\)[\[\]`*]", row)
    assert "a \\| b ⏎ c" in row
    block = shown[shown.index("## Configuration") :]
    assert block.count("\n````") + block.count("\n```json") >= 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (True, "yes"),
        (1234567, "1,234,567"),
        (0.00001234, "1.23e-05"),
        (0.5, "0.5"),
        (12345.6, "12,346"),
        ([1], "[1]"),
    ],
)
def test_numbers_are_short_and_readable(value: object, said: str) -> None:
    assert text.number(value) == said


def test_units() -> None:
    assert text.size(13_400_000) == "13.4 MB"
    assert text.short(9.38e12) == "9.38 T"
    assert [text.duration(s) for s in (0.61, 84.2, 176, 7500)] == ["0.6 s", "84 s", "2 min 56 s", "2 h 5 min"]
    assert text.money(0.0087) == "0.87 ¢"
    assert text.times(133e9) == "133 billion"


def test_running_mean_is_centred_and_shorter_at_the_ends() -> None:
    values = [0.0, 3.0, 6.0, 9.0, 30.0]
    assert charts.running_mean(values, 3) == [1.5, 3.0, 6.0, 15.0, 19.5]
    assert charts.running_mean(values, 1) == values


def test_colours_are_used_for_one_thing_each() -> None:
    assert len(set(charts.PALETTE.values())) == len(charts.PALETTE)
