"""Rejection sampling: right answers in form are kept, each once, and a resumed run answers nothing again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gristmill.model.config import ModelConfig, TracesConfig
from gristmill.model.rl import rejection
from gristmill.model.rl.rejection import accepted
from gristmill.model.sft import fine_tune
from gristmill.model.stage_types import Progress, silent
from gristmill.model.traces import sample_traces
from gristmill.model.training.config import LayoutConfig, OptimizerConfig, SFTConfig
from gristmill.model.training.models import save_model
from gristmill.model.transformer import Transformer
from tests.model.in_process import jobs_here
from tests.model.several_runs import Stopped, stopping_at

SMALL = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=16, intermediate_size=64, n_routed_experts=4, moe_intermediate_size=16,
)  # fmt: skip
KNOWN = [("2+3=?", "2+3=5", "5"), ("4+4=?", "4+4=8", "8"), ("9-2=?", "9-2=7", "7")]
CONFIG = TracesConfig(problems=5, samples=4, max_new_tokens=24, batch_size=8, kept=2, temperature=0.3)


def problem(number: int, question: str, final: str) -> dict[str, Any]:
    return {"id": f"train/{number}", "question": question, "answer": f"so it is\n#### {final}"}


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def given(lesson_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A reasoner that knows three sums by heart, and problems that ask for two of them, and for others."""
    folder = tmp_path_factory.mktemp("given")
    base = Transformer(SMALL, 320)
    base.initialise(1)
    save_model(folder / "base" / "model", base)
    (folder / "problems").mkdir()
    write(folder / "problems" / "cold_start.jsonl", [{"question": q, "thought": t, "final": f} for q, t, f in KNOWN])
    wrong = problem(1, "4+4=?", "9")  # whose reference is not what the reasoner says
    write(folder / "problems" / "train.jsonl", [
        problem(0, "2+3=?", "5"), wrong, problem(2, "9-2=?", "7"), problem(3, "2+3=?", "6"), problem(4, "9-2=?", "7.0"),
        problem(5, "2+3=?", "5"),
    ])  # fmt: skip
    (folder / "model").mkdir()
    steps = SFTConfig(
        steps=60, sequence_length=64, batch_sequences=4, held_out_share=0.0,
        optimizer=OptimizerConfig(muon_learning_rate=0.02, adam_learning_rate=0.01),
    )  # fmt: skip
    with jobs_here():
        fine_tune(
            steps, folder / "base", folder / "problems", lesson_tokens, folder / "model", 0, threads=1, ranks=1,
            device="cpu", layout=LayoutConfig(), progress=silent,
        )  # fmt: skip
    return {"model": folder / "model", "problems": folder / "problems", "tokenizer": lesson_tokens}


def sampled(
    given: dict[str, Path], out: Path, config: TracesConfig = CONFIG, progress: Progress = silent
) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    with jobs_here():
        return sample_traces(config, **given, out=out, seed=0, threads=1, device="cpu", progress=progress)


def test_different_right_answers_in_form_are_kept() -> None:
    texts = ["a\n</think>\n5", "wrong\n</think>\n4", "a\n</think>\n5", "b\n</think>\n5", "c\n</think>\n5"]
    answered = {"responses": texts, "right": [1.0, 0.0, 1.0, 1.0, 1.0], "formed": [1.0] * 5}
    rows = list(accepted(problem(7, "2+3=?", "5"), answered, 2))
    assert [(row["id"], row["thought"], row["final"]) for row in rows] == [
        ("traces/train/7/0", "a", "5"), ("traces/train/7/1", "b", "5"),
    ]  # fmt: skip
    assert all(row["question"] == "2+3=?" for row in rows)
    assert list(accepted(problem(7, "2+3=?", "5"), {**answered, "formed": [0.0] * 5}, 2)) == []


def test_what_a_reasoner_knows_becomes_chains(given: dict[str, Path], tmp_path: Path) -> None:
    metrics = sampled(given, tmp_path / "out")
    rows = read(tmp_path / "out" / "cold_start.jsonl")
    assert {row["id"].rsplit("/", 1)[0] for row in rows} == {"traces/train/0", "traces/train/2", "traces/train/4"}
    known = {question: (thought, final) for question, thought, final in KNOWN}
    assert all((row["thought"], row["final"]) == known[row["question"]] for row in rows)
    assert (metrics["chains"], metrics["problems"], metrics["problems_answered"]) == (len(rows), 5, 2)
    assert 0 < metrics["right"] <= 0.6  # of three problems of five


def test_a_stopped_run_answers_nothing_again(
    given: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sampled(given, tmp_path / "whole")
    with pytest.raises(Stopped):
        sampled(given, tmp_path / "out", progress=stopping_at(4))
    asked: list[list[str]] = []
    answers_to = rejection.answers_to

    def noted(model: Any, chat: Any, problems: list[dict[str, Any]], *more: Any) -> list[dict[str, Any]]:
        asked.append([row["id"] for row in problems])
        return answers_to(model, chat, problems, *more)

    monkeypatch.setattr(rejection, "answers_to", noted)
    assert sampled(given, tmp_path / "out") == whole
    assert asked == [["train/4"]]  # the last part of three, of two problems each
    for name in ("cold_start.jsonl", "samples.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_reasoner_that_is_never_right_is_refused(given: dict[str, Path], tmp_path: Path) -> None:
    untaught = {**given, "model": given["problems"].parent / "base"}
    with pytest.raises(ValueError, match="none of 4 answers to each of 5 problems is right and in form: ask more"):
        sampled(untaught, tmp_path / "out")
