"""The engine's steps against torch's own clipping and AdamW."""

from __future__ import annotations

import copy

import pytest
import torch

from gristmill.model.config import ModelConfig
from gristmill.model.training.batches import TrainingBatch
from gristmill.model.training.config import LayoutConfig, OptimizerConfig
from gristmill.model.training.engine import Engine, backend_of
from gristmill.model.training.objective import Objective
from gristmill.model.transformer import Batch, Transformer

SMALL = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=16, intermediate_size=64, n_routed_experts=4, moe_intermediate_size=16,
)  # fmt: skip
VOCAB, SEQUENCES, LENGTH, STEPS, RATE, DECAY, MTP = 64, 4, 16, 4, 3e-3, 0.1, 0.3


class Drawn:
    """Random tokens."""

    def step(self, step: int, rank: int, ranks: int) -> TrainingBatch:
        token = torch.randint(0, VOCAB, (SEQUENCES, LENGTH + 2), generator=torch.Generator().manual_seed(step))
        inputs = Batch(token[:, :-2], torch.arange(LENGTH).expand(SEQUENCES, -1))
        return TrainingBatch(inputs, token[:, 1:-1], token[:, 2:], torch.ones(SEQUENCES, LENGTH))

    def documents(self, step: int) -> list[str]:
        return []


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("zero_stage", [0, 2])
@pytest.mark.parametrize("clip", [0.05, 1e3])
def test_steps_are_those_of_torch_clipped_by_torch(clip: float, zero_stage: int) -> None:
    model = Transformer(SMALL, VOCAB)
    model.initialise(0)
    theirs = copy.deepcopy(model)
    config = OptimizerConfig(muon_learning_rate=0.0, adam_learning_rate=RATE, weight_decay=DECAY, gradient_clip=clip)
    engine = Engine(
        model, config, mtp_loss_weight=MTP, batch_sequences=SEQUENCES,
        layout=LayoutConfig(zero_stage=zero_stage),  # type: ignore[arg-type]
    )  # fmt: skip
    objective, parameters = Objective(theirs, MTP), list(theirs.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8)
    batches = Drawn()
    for step in range(STEPS):
        engine.accumulate(batches, step)
        assert engine.step(1.0, admitted=True)
        reference.zero_grad()
        objective(batches.step(step, 0, 1))[0].backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        reference.step()
        assert engine.norm == pytest.approx(float(norm), rel=1e-5)  # float32: 3e4 squares of one sign
        assert (norm > clip) == (clip == 0.05)
    for (name, ours), wanted in zip(model.named_parameters(), parameters, strict=True):
        # A moved weight has moved by up to RATE a step. Where a gradient is near zero its rounding decides by how much:
        # of that, a hundredth.
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=STEPS * RATE / 100, msg=name)
        # and of all of them together, a few ten thousandths
        assert (ours - wanted).norm() < 3e-4 * STEPS * RATE * wanted.numel() ** 0.5, name


def test_ranks_talk_over_what_their_device_has() -> None:
    assert backend_of(torch.device("cuda", 3)) == "nccl"
    assert backend_of(torch.device("cpu")) == "gloo"
