"""A model and batches that are made in a moment, for training within the test's own process."""

from __future__ import annotations

import math

import torch

from gristmill.model.config import ModelConfig
from gristmill.model.training.batches import TrainingBatch
from gristmill.model.transformer import Batch

MODEL = ModelConfig(
    hidden_size=16, num_hidden_layers=1, first_k_dense_replace=0, num_attention_heads=2, kv_lora_rank=8,
    qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=16, n_routed_experts=2,
    num_experts_per_tok=1, moe_intermediate_size=8, num_nextn_predict_layers=0, max_position_embeddings=16,
)  # fmt: skip
VOCAB, LENGTH = 32, 16


class Windows:
    """The same few sequences again and again; at some steps their weights make the loss jump, or no number of it."""

    def __init__(self, spoilt: dict[int, float]) -> None:
        self.spoilt = spoilt

    def step(self, step: int, rank: int, ranks: int) -> TrainingBatch:
        generator = torch.Generator().manual_seed(step % 4)
        token = torch.randint(0, VOCAB // 4, (4, LENGTH + 1), generator=generator)
        share = self.spoilt.get(step, 1.0)
        if step in self.spoilt and math.isfinite(share):  # tokens that it has not seen
            token, share = token + VOCAB // 2, 1.0
        position = torch.arange(LENGTH).expand(4, -1)
        return TrainingBatch(Batch(token[:, :-1], position), token[:, 1:], None, torch.ones(4, LENGTH), share)

    def documents(self, step: int) -> list[str]:
        return [f"document {step}"]
