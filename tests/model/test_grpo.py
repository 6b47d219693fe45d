"""The trainer of GRPO: the tokens it scores are those that were sampled, and a resumed run is the undisturbed one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gristmill.data.arithmetic import lesson
from gristmill.data.stage_types import silent
from gristmill.data.tokenize import TokenizeConfig, tokenize
from gristmill.model.chat import Chat
from gristmill.model.config import ModelConfig
from gristmill.model.rl import training
from gristmill.model.rl.config import GRPOConfig
from gristmill.model.rl.rewards import Judged
from gristmill.model.rl.training import Policy
from gristmill.model.transformer import Transformer

SMALL = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=16, intermediate_size=64, n_routed_experts=4, moe_intermediate_size=16,
    num_nextn_predict_layers=0,
)  # fmt: skip
CONFIG = GRPOConfig(
    steps=6, questions_per_step=4, samples_per_question=4, minibatches=2, max_new_tokens=12, temperature=0.8,
    kl_weight=0.05, reference_every=2, checkpoint_every=3,
)  # fmt: skip
PROBLEMS = [{"question": f"{a}+{b}=?", "answer": f"#### {a + b}"} for a in range(2, 9) for b in (3, 14, 25)]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory, laid_out: Any) -> Chat:
    folder = tmp_path_factory.mktemp("words")
    metadata = {"source": "lessons", "kind": "lessons"}
    rows = [{"text": lesson(0, i), "id": f"l/{i}", "metadata": metadata} for i in range(60)]
    out = folder / "out"
    out.mkdir()
    config = TokenizeConfig(vocab_size=320, sample_bytes=20_000, held_out=0.1)
    tokenize(config, laid_out(folder / "in", rows), out, 0, workers=0, progress=silent)
    return Chat(out / "tokenizer")


@pytest.fixture(autouse=True)
def rewards_of_any_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without training earns nothing by the rules: here the length of a response decides."""

    def judged(text: str, *_: object) -> Judged:
        return Judged(float(len(text) % 3 == 0), 1.0, 1.0, float(len(text) % 3), "")

    monkeypatch.setattr(training, "judge", judged)


def policy(chat: Chat, out: Path) -> Policy:
    (out / "log").mkdir(parents=True, exist_ok=True)
    model = Transformer(SMALL, 320)
    model.initialise(0)
    return Policy(CONFIG, model, chat, PROBLEMS, 0, out)


def test_what_is_scored_is_what_was_sampled(chat: Chat, tmp_path: Path) -> None:
    """Before any step the new log-probabilities are the old ones, token by token."""
    ours = policy(chat, tmp_path)
    rollout = ours.roll_out(0)
    assert len(rollout.samples) == 16
    for chunk in ours._chunks(rollout, list(range(16))):
        token_BS, place_N, target_N, row_N = ours._laid_out(rollout, chunk)
        got = ours._log_probs(ours.model, token_BS, place_N, target_N)
        wanted = torch.tensor([p for i in chunk for p in rollout.samples[i].log_probs])
        assert row_N.bincount().tolist() == [len(rollout.samples[i].tokens) for i in chunk]
        # float32: the sampler decodes token by token with a cache, the trainer sees the whole at once.
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)


def test_resumed_in_the_same_bytes_with_its_reference(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = policy(chat, tmp_path / "whole")
    whole.train(silent)
    assert any(row["kl"] > 0 for row in whole.curves)
    broken = policy(chat, tmp_path / "broken")
    asked = broken.roll_out

    def until_four(step: int) -> Any:
        if step == 4:
            raise KeyboardInterrupt
        return asked(step)

    monkeypatch.setattr(broken, "roll_out", until_four)
    with pytest.raises(KeyboardInterrupt):
        broken.train(silent)
    again = policy(chat, tmp_path / "broken")
    again.train(silent)
    assert '"from_step": 3' in (tmp_path / "broken" / "log" / "starts.jsonl").read_text().splitlines()[-1]
    assert again.curves == whole.curves
    for name, tensor in whole.model.state_dict().items():
        assert again.model.state_dict()[name].equal(tensor), name
    assert again.reference is not None
    assert whole.reference is not None
    for name, tensor in whole.reference.state_dict().items():
        assert again.reference.state_dict()[name].equal(tensor), name


def test_the_reference_is_renewed(chat: Chat, tmp_path: Path) -> None:
    ours = policy(chat, tmp_path)
    ours.train(silent)
    assert ours.reference is not None
    last = {name: t.clone() for name, t in ours.reference.state_dict().items()}
    assert all(t.equal(ours.model.state_dict()[name]) for name, t in last.items())  # six steps, renewed every two
