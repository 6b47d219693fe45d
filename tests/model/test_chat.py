"""What `gristmill chat` says: the model's response in pieces, drawn and ended as was asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from gristmill.flows.cli import app
from gristmill.model.config import ModelConfig
from gristmill.model.generate import Sampling, load_chat, stream_chat
from gristmill.model.training.models import save_model
from gristmill.model.transformer import Transformer

SMALL = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=16, intermediate_size=64, n_routed_experts=4, moe_intermediate_size=16,
    num_nextn_predict_layers=0, max_position_embeddings=64,
)  # fmt: skip
WIDE = Sampling(24, temperature=1.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "model"
    made = Transformer(SMALL, 320)
    made.initialise(0)
    save_model(folder, made)
    return folder


def said(model: Path, tokens: Path, sampling: Sampling, question: str = "2+3=?", **more: object) -> str:
    return "".join(stream_chat(*load_chat(model, tokens / "tokenizer"), question, sampling, **more))  # type: ignore[arg-type]


def test_a_response_ends_at_a_stop_string_and_is_cut_as_was_asked(model: Path, lesson_tokens: Path) -> None:
    whole = said(model, lesson_tokens, WIDE, seed=3)
    assert len(whole) > 8
    stop = whole[5:7]
    assert said(model, lesson_tokens, WIDE, seed=3, stop=("no such", stop)) == whole[: whole.index(stop)]
    assert said(model, lesson_tokens, WIDE, seed=4) != whole
    greedy = said(model, lesson_tokens, Sampling(24, temperature=0))
    assert said(model, lesson_tokens, Sampling(24, 1.5, top_k=1), seed=3) == greedy
    assert said(model, lesson_tokens, Sampling(24, 1.5, min_p=0.9999), seed=3) == greedy
    assert greedy != whole


def test_a_response_ends_at_the_position_limit(model: Path, lesson_tokens: Path) -> None:
    assert said(model, lesson_tokens, Sampling(10**6, temperature=0))
    with pytest.raises(ValueError, match=r"the question has \d+ tokens, past the position limit: ask a shorter one"):
        said(model, lesson_tokens, WIDE, "1+" * 200)


def test_the_command_draws_as_was_asked(model: Path, lesson_tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = model, lesson_tokens / "tokenizer"
    monkeypatch.setattr("gristmill.flows.inspection.chat_folders", lambda *_: found)
    asked = ["chat", "rl", "-q", "2+3=?", "--temperature", "1.5", "--max-new-tokens", "24", "--seed", "3"]
    asked += ["--top-p", "1"]
    whole = CliRunner().invoke(app, asked)
    assert whole.output == said(model, lesson_tokens, WIDE, seed=3) + "\n"
    top = CliRunner().invoke(app, [*asked, "--top-k", "1"])
    assert top.output == said(model, lesson_tokens, Sampling(24, temperature=0)) + "\n"
    stop = whole.output[5:7]
    assert CliRunner().invoke(app, [*asked, "--stop", stop]).output == whole.output[: whole.output.index(stop)] + "\n"


def test_a_conversation_loads_its_model_once(model: Path, lesson_tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []

    def noted(folder: Path, tokenizer: Path) -> object:
        loaded.append(folder)
        return load_chat(folder, tokenizer)

    monkeypatch.setattr("gristmill.flows.inspection.chat_folders", lambda *_: (model, lesson_tokens / "tokenizer"))
    monkeypatch.setattr("gristmill.model.generate.load_chat", noted)
    asked = ["chat", "rl", "--temperature", "1.5", "--max-new-tokens", "24", "--seed", "3", "--top-p", "1"]
    talk = CliRunner().invoke(app, asked, input="2+3=?\n4+5=?\n\n").output
    answers = [
        said(model, lesson_tokens, WIDE, question, seed=3 + turn) for turn, question in enumerate(("2+3=?", "4+5=?"))
    ]
    assert talk == f"Ask (an empty line ends):\n> {answers[0]}\n> {answers[1]}\n> "
    assert loaded == [model]
