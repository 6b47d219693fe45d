"""A job whose second rank hangs in its first batch; its process imports this file alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from gristmill.model.config import ModelConfig
from gristmill.model.training.batches import TrainingBatch
from gristmill.model.training.config import OptimizerConfig, ScheduleConfig
from gristmill.model.training.engine import start_distributed
from gristmill.model.training.loop import Training, train
from gristmill.model.transformer import Batch, Transformer

MODEL = ModelConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4,
    v_head_dim=8, intermediate_size=16, num_nextn_predict_layers=0, max_position_embeddings=16,
)  # fmt: skip


class Unreadable:
    """Batches of which the second rank waits for its first one."""

    def step(self, step: int, rank: int, ranks: int) -> TrainingBatch:
        if rank == 1:
            time.sleep(600)
        token = torch.zeros(2, 9, dtype=torch.long)
        position = torch.arange(8).expand(2, -1)
        return TrainingBatch(Batch(token[:, :-1], position), token[:, 1:], None, torch.ones(2, 8))

    def documents(self, step: int) -> list[str]:
        return []


def run(job: dict[str, Any], out: Path, device: torch.device, progress: Any) -> dict[str, Any]:
    start_distributed(device)
    model = Transformer(MODEL, 32)
    model.initialise(0)
    training = Training(2, 4, OptimizerConfig(), ScheduleConfig(warmup_steps=1), checkpoint_every=2)
    train(model, Unreadable(), training, out, progress)
    return {}
