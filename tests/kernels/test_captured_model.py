"""The whole model in one graph of torch.compile, forward and backward, against itself without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gristmill.model.config import ModelConfig
from gristmill.model.transformer import Batch, Routing, Transformer

VOCAB, ROWS, LENGTH = 100, 4, 32
SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": LENGTH,
}  # fmt: skip
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MODELS = {
    "DeepSeek-V3": {**LATENT, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 1},
    "DeepSeek-V2": {
        **LATENT,
        "q_lora_rank": 12,
        "scoring_func": "softmax",
        "balance_loss_alpha": 1e-2,
        "bias_update_speed": 0,
    },
    "Qwen3": {"attention": "gqa", "first_k_dense_replace": 2, "num_key_value_heads": 1, "head_dim": 8, "qk_norm": True},
}


@pytest.mark.parametrize("how", MODELS.values(), ids=MODELS.keys())
def test_the_whole_model_goes_into_one_graph(how: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model = Transformer(ModelConfig(**{"num_nextn_predict_layers": 0, **SMALL, **how}), VOCAB)
    model.initialise(0)
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH + 2), generator=torch.Generator().manual_seed(1))
    first = torch.tensor([0, 5, 9, 0])[:, None] * (torch.arange(LENGTH) >= 12)
    batch = Batch(tokens[:, :LENGTH], torch.arange(LENGTH).expand(ROWS, -1), first)

    def loss() -> tuple[Tensor, list[Tensor]]:
        routing = Routing()
        targets = tokens[:, 1 : LENGTH + 1], tokens[:, 2:]
        main, ahead = model.losses(batch, *targets, torch.ones(ROWS, LENGTH), routing)
        return main + sum(ahead) + sum(routing.balance_loss), routing.load_LE

    def both_ways(function: Any) -> list[Tensor]:
        model.zero_grad()
        total, loads = function()
        total.backward()
        return [total.detach(), *loads, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    ours, theirs = (both_ways(f) for f in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.equal(other)
    with torch.no_grad():
        assert torch.compile(model, fullgraph=True, backend="aot_eager")(batch).equal(model(batch))
