"""Fine-tuning: what is held out of it, its check and the answers to it, and that a resumed run ends in the same bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from gristmill.data.problems import ProblemsConfig, make_problems
from gristmill.data.stage_types import silent as quiet
from gristmill.flows.cards.run_log import RunLog
from gristmill.flows.cards.text import cell
from gristmill.flows.cards.training import live_card
from gristmill.model.chat import Chat
from gristmill.model.config import ModelConfig
from gristmill.model.sft import fine_tune
from gristmill.model.stage_types import Progress, silent
from gristmill.model.training.batches import Conversation, PackedConversations
from gristmill.model.training.config import LayoutConfig, ScheduleConfig, SFTConfig
from gristmill.model.training.fine_tuning import held_apart, questions_of, with_conversations
from gristmill.model.training.held_out import HeldOutConversations
from gristmill.model.training.layout import Layout
from gristmill.model.training.models import load_model, save_model
from gristmill.model.transformer import Batch, Transformer
from tests.model.in_process import jobs_here
from tests.model.several_runs import Stopped, stopping_at
from tests.model.test_held_out import Rank

SMALL = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=16, intermediate_size=64, n_routed_experts=4, moe_intermediate_size=16,
)  # fmt: skip
CONFIG = SFTConfig(
    steps=7, sequence_length=96, batch_sequences=4, checkpoint_every=2, evaluate_every=3, held_out_share=0.1,
    schedule=ScheduleConfig(warmup_steps=1),
)  # fmt: skip
CHECKED = [2, 5, 6]  # the last step is always


@pytest.fixture(scope="module")
def given(lesson_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the stage is given: an untrained base, its tokenizer, and 60 chains."""
    folder = tmp_path_factory.mktemp("given")
    base = Transformer(SMALL, 320)
    base.initialise(3)
    save_model(folder / "base" / "model", base)
    (folder / "problems").mkdir()
    make_problems(ProblemsConfig(cold_start=60, train=10, test=5), folder / "problems", 0, progress=quiet)
    return {"model": folder / "base", "problems": folder / "problems", "tokenizer": lesson_tokens}


def tuned(given: dict[str, Path], out: Path, config: SFTConfig = CONFIG, progress: Progress = silent) -> dict[str, Any]:
    """The stage's metrics, its job run here."""
    out.mkdir(exist_ok=True)
    with jobs_here():
        return fine_tune(
            config, **given, out=out, seed=0, threads=1, ranks=1, device="cpu", layout=LayoutConfig(), progress=progress
        )


@pytest.fixture(scope="module")
def run(given: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("run") / "out"
    return tuned(given, out), out


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def content(out: Path) -> dict[str, str]:
    files = [p for p in sorted(out.rglob("*")) if p.is_file() and "log" not in p.relative_to(out).parts]
    return {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def chains(questions: int, each: int = 1) -> list[dict[str, Any]]:
    return [
        {"question": f"{q}+1=?", "thought": str(c), "final": str(q + 1)} for c in range(each) for q in range(questions)
    ]


def test_a_share_of_the_questions_is_held_out_with_all_their_chains() -> None:
    every = chains(40, each=3)
    taught, held = held_apart(every, 0.1, 0)
    assert len(questions_of(held)) == 4
    assert len(held) == 12
    assert not set(questions_of(taught)) & set(questions_of(held))
    assert sorted(map(str, taught + held)) == sorted(map(str, every))
    assert held_apart(every, 0.1, 0) == (taught, held)
    assert held_apart(every, 0.1, 1)[1] != held


@pytest.mark.parametrize(("questions", "share", "count"), [(40, 0.0, 0), (1, 0.1, 0), (2, 0.01, 1), (3, 0.5, 2)])
def test_at_least_one_question_is_held_out_of_two_or_more(questions: int, share: float, count: int) -> None:
    taught, held = held_apart(chains(questions), share, 0)
    assert (len(taught), len(held)) == (questions - count, count)


def test_chains_longer_than_a_sequence_are_left_out_and_counted(
    given: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One whose thought is long, among those that fit: the run is that of these alone."""
    chains, chat = rows(given["problems"] / "cold_start.jsonl"), Chat(given["tokenizer"] / "tokenizer")
    longer = {**chains[0], "question": "Too long?", "thought": chains[0]["thought"] * 40}
    limit = max(row["conversation"].positions for row in with_conversations(chains, chat))
    (tmp_path / "problems").mkdir()
    file = tmp_path / "problems" / "cold_start.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*chains[:9], longer, *chains[9:]]), encoding="utf-8")
    config = CONFIG.model_copy(update={"steps": 2, "sequence_length": limit})  # the longest of the others just fits
    told = tuned({**given, "problems": tmp_path / "problems"}, tmp_path / "some", config)
    assert [record.message for record in caplog.records if record.name == "gristmill.fine_tuning"] == [
        f"1 of 61 chains of thought are left out: longer than a sequence of {limit} tokens, the longest of "
        f"{with_conversations([longer], chat)[0]['conversation'].positions}"
    ]
    caplog.clear()
    assert told == tuned(given, tmp_path / "all", config) | {"left_out_too_long": 1}
    assert not [record for record in caplog.records if record.name == "gristmill.fine_tuning"]
    assert content(tmp_path / "some") == content(tmp_path / "all")


def test_where_no_chain_fits_the_length_that_one_needs_is_named(given: dict[str, Path], tmp_path: Path) -> None:
    chains = rows(given["problems"] / "cold_start.jsonl")
    shortest = min(
        row["conversation"].positions for row in with_conversations(chains, Chat(given["tokenizer"] / "tokenizer"))
    )
    short = CONFIG.model_copy(update={"sequence_length": shortest - 1})
    message = rf"none of 60 chains .* sequence_length {shortest - 1} tokens, .*: choose at least {shortest}$"
    with pytest.raises(ValueError, match=message):
        tuned(given, tmp_path / "out", short)
    (tmp_path / "cold_start.jsonl").touch()
    with pytest.raises(ValueError, match=r"no chain of thought to learn from: give a cold_start\.jsonl"):
        tuned({**given, "problems": tmp_path}, tmp_path / "other", CONFIG)


def test_the_checked_loss_is_that_of_the_held_out_responses(
    given: dict[str, Path], run: tuple[dict[str, Any], Path]
) -> None:
    """Against the finished model that reads each conversation alone: no packing, no padding."""
    metrics, out = run
    curves = rows(out / "curves.jsonl")
    assert [row["step"] for row in curves if "held_out_loss" in row] == CHECKED
    chat, model = Chat(given["tokenizer"] / "tokenizer"), load_model(out / "model", torch.device("cpu")).eval()
    taught, held = held_apart(rows(given["problems"] / "cold_start.jsonl"), CONFIG.held_out_share, 0)
    assert (metrics["conversations"], metrics["held_out_conversations"]) == (len(taught), len(held))
    assert len(held) == 6
    nats = tokens = 0.0
    for talk in (row["conversation"] for row in with_conversations(held, chat)):
        whole = torch.tensor([talk.prompt + talk.response])
        with torch.no_grad():
            logits_SV = model(Batch(whole[:, :-1], torch.arange(whole.shape[1] - 1)[None], None))[0]
        behind = len(talk.prompt) - 1
        nats += float(cross_entropy(logits_SV[behind:], whole[0, len(talk.prompt) :], reduction="sum"))
        tokens += len(talk.response)
    # Two hundred float32 losses of order one, by other kernels' sums; told with five digits.
    assert metrics["held_out_loss"] == pytest.approx(nats / tokens, rel=2e-5)
    assert curves[-1]["held_out_loss"] == pytest.approx(metrics["held_out_loss"], abs=1e-5)


def test_held_out_questions_are_answered_at_each_check(
    given: dict[str, Path], run: tuple[dict[str, Any], Path]
) -> None:
    _, out = run
    told = rows(out / "log" / "samples.jsonl")
    held = held_apart(rows(given["problems"] / "cold_start.jsonl"), CONFIG.held_out_share, 0)[1]
    assert [row["step"] for row in told] == [step for step in CHECKED for _ in range(4)]
    assert [row["prompt"] for row in told] == questions_of(held)[:4] * len(CHECKED)
    assert all(row["text"] for row in told)
    assert len({row["text"] for row in told[::4]}) > 1  # the same draws, of a model that goes on
    assert rows(out / "samples.jsonl") == told[-4:]  # of the finished model


def test_the_card_of_a_running_stage_shows_the_check_and_the_answers(
    given: dict[str, Path], run: tuple[dict[str, Any], Path]
) -> None:
    held = held_apart(rows(given["problems"] / "cold_start.jsonl"), CONFIG.held_out_share, 0)[1]
    card = live_card("cold_start", "Cold start", RunLog(run[1]))
    assert card is not None
    assert f"| {cell('held_out_loss')} |" in card
    assert "## What it writes after 7 steps" in card
    assert all(f"| {cell(question)} |" in card for question in questions_of(held)[:4])


@pytest.mark.slow
@pytest.mark.parametrize("layout", [LayoutConfig(micro_batches=2), LayoutConfig(zero_stage=3)], ids=["micro", "zero 3"])
def test_two_ranks_find_the_held_out_loss_of_one(
    given: dict[str, Path], run: tuple[dict[str, Any], Path], tmp_path: Path, layout: LayoutConfig
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    metrics = fine_tune(
        CONFIG, **given, out=out, seed=0, threads=1, ranks=2, device="cpu", layout=layout, progress=silent
    )
    # Seven steps of two halves of a gradient in float32, whose rounding Muon passes on.
    assert metrics["held_out_loss"] == pytest.approx(run[0]["held_out_loss"], rel=1e-4)
    assert [row["prompt"] for row in rows(out / "samples.jsonl")] == [
        row["prompt"] for row in rows(run[1] / "samples.jsonl")
    ]
    assert bool(rows(out / "log" / "samples.jsonl")) == (layout.zero_stage < 3)


def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    given: dict[str, Path], run: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        tuned(given, tmp_path / "out", progress=stopping_at(5))
    assert tuned(given, tmp_path / "out") == run[0]
    starts = [row["from_step"] for row in rows(tmp_path / "out" / "log" / "starts.jsonl")]
    assert starts[0] == 0
    assert starts[1] in (2, 4)  # between checks: the first of them is in the checkpoint, or taken again
    assert content(tmp_path / "out") == content(run[1])
    for name in ("curves", "samples"):
        assert rows(tmp_path / "out" / "log" / f"{name}.jsonl") == rows(run[1] / "log" / f"{name}.jsonl")


def test_checks_change_no_weight(given: dict[str, Path], run: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    tuned(given, tmp_path / "out", CONFIG.model_copy(update={"evaluate_every": 1}))
    of = ("model/model.safetensors", "samples.jsonl")
    assert {name: content(tmp_path / "out")[name] for name in of} == {name: content(run[1])[name] for name in of}


def test_nothing_is_checked_where_nothing_is_held_out(given: dict[str, Path], tmp_path: Path) -> None:
    metrics = tuned(given, tmp_path / "out", CONFIG.model_copy(update={"held_out_share": 0.0, "steps": 1}))
    assert (metrics["conversations"], metrics["held_out_conversations"]) == (60, 0)
    assert "held_out_loss" not in metrics
    assert "held_out_loss" not in rows(tmp_path / "out" / "curves.jsonl")[0]
    assert rows(tmp_path / "out" / "samples.jsonl") == []


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_ranks_share_the_held_out_conversations(ranks: int) -> None:
    """Seven sequences of unequally long responses."""
    talks = [Conversation([5, 6, 7], list(range(8, 8 + n))) for n in (2, 20, 3, 25, 4, 18, 2, 24, 26, 23)]
    packed = PackedConversations(talks, length=28, pad=0, device=torch.device("cpu"))
    assert len(packed.packs) == 7
    held_out = HeldOutConversations(packed, 2)

    def found(engine: Any) -> dict[str, float]:
        return held_out.loss(engine)

    members = [Rank(rank, Layout(ranks)) for rank in range(ranks)]
    for member in members:
        found(member)
    assert len({len(member.passes) for member in members}) == 1  # ranks meet in each of them
    whole = torch.stack([member.own for member in members]).sum(0)
    every = np.concatenate([talk.response for talk in talks])
    # `Rank` says of each target its own number; float64 means of small integers, weighed again.
    assert found(Rank(0, Layout(ranks), whole))["held_out_loss"] == pytest.approx(every.mean(), rel=1e-14)
