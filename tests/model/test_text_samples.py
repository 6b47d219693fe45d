"""Where no text is sampled as training goes on: said once in the log and for the manifest, with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gristmill.model.training.config import LayoutConfig
from gristmill.model.training.text_samples import Prompts, TextSamples
from gristmill.model.transformer import Transformer
from tests.model.windows import MODEL, VOCAB

PROMPTS = Prompts([[1, 2]], ["a"], 4, 0, 0, str)


def made(layout: LayoutConfig, folder: Path, prompts: Prompts = PROMPTS) -> TextSamples:
    model = Transformer(MODEL, VOCAB)
    model.initialise(0)
    return TextSamples(model, prompts, layout, 0, folder)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("split", [{"zero_stage": 3}, {"expert_parallel": 2}, {"sequence_parallel": 2}])
def test_where_no_rank_holds_the_model_the_log_and_a_note_say_that_there_is_none(
    split: dict[str, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = made(LayoutConfig.model_validate(split), tmp_path)
    assert [texts.rows(step) for step in range(3)] == [[], [], []]
    (said,) = [record.message for record in caplog.records if record.name == "gristmill.text_samples"]
    ((name, size),) = split.items()
    assert f"no rank holds the whole model ({name} {size})" in said
    assert json.loads((tmp_path / "notes.json").read_text()) == [said]
    assert texts.rows_of(texts.model, 3)[0]["prompt"] == "a"  # of the finished model there is


@pytest.mark.usefixtures("one_rank")
def test_a_later_start_that_samples_takes_the_note_back(tmp_path: Path) -> None:
    made(LayoutConfig(zero_stage=3), tmp_path)
    assert made(LayoutConfig(zero_stage=2), tmp_path).rows(0)
    assert not (tmp_path / "notes.json").exists()


@pytest.mark.usefixtures("one_rank")
def test_where_nothing_would_be_asked_nothing_is_missed(tmp_path: Path) -> None:
    made(LayoutConfig(zero_stage=3), tmp_path, Prompts([], [], 4, 0, 0, str))
    assert not (tmp_path / "notes.json").exists()
