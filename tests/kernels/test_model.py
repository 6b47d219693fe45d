"""The whole model on kernels against itself on their references: on the GPU where there is one, else on the CPU."""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
import torch

from gristmill import kernels
from gristmill.kernels.compiled import compiled
from gristmill.model.config import ModelConfig
from gristmill.model.transformer import Batch, Routing, Transformer

INTERPRETED = os.environ.get("GRISTMILL_KERNELS") == "gpu"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
STEPS, VOCAB, ROWS, LENGTH = 20, 300, 4, 32
CONFIG = ModelConfig(
    hidden_size=64, num_hidden_layers=3, first_k_dense_replace=1, num_attention_heads=4, kv_lora_rank=16,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, intermediate_size=128, moe_intermediate_size=32,
    n_routed_experts=8, num_experts_per_tok=2, num_nextn_predict_layers=1, max_position_embeddings=LENGTH,
)  # fmt: skip


def losses(reference: bool) -> tuple[list[float], set[str]]:
    """Losses of so many steps, and which implementations ran."""
    torch.manual_seed(0)
    model = Transformer(CONFIG, VOCAB)
    model.initialise(0)
    model.to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH + 2), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    position = torch.arange(LENGTH, device=DEVICE).expand(ROWS, -1)
    batch, weight = Batch(tokens[:, :LENGTH], position), torch.ones(ROWS, LENGTH, device=DEVICE)
    before, found = kernels.report(), []
    with kernels.use_reference() if reference else nullcontext():
        for _ in range(STEPS):
            main, ahead = model.losses(batch, tokens[:, 1 : LENGTH + 1], tokens[:, 2:], weight, Routing())
            (main + 0.3 * ahead[0]).backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(main.detach()))
    after = kernels.report()
    ran = {how for op, counts in after.items() for how, n in counts.items() if n > before.get(op, {}).get(how, 0)}
    return found, ran


def test_the_model_learns_the_same_on_kernels_and_on_references() -> None:
    ours, ran = losses(reference=False)
    wanted, referred = losses(reference=True)
    assert ran == (
        {"gpu", "torch"} if DEVICE == "cuda" or INTERPRETED else {"compiled" if compiled("linear/cpu.cpp") else "cpu"}
    )
    assert referred == {"reference"}
    assert ours[-1] < 0.7 * ours[0]
    # float32: sums in another order are apart by a few of its 1.2e-7, and each of twenty steps carries that on
    assert ours == pytest.approx(wanted, rel=20 * 4 * 1.2e-7)
