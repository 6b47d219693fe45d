"""What recomputation runs twice, and what it keeps."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gristmill.kernels.compiled import compiled
from gristmill.kernels.mla_attention.native import SOURCE
from gristmill.model.config import ModelConfig
from gristmill.model.training.recomputation import recompute_blocks
from gristmill.model.transformer import Batch, Transformer

LAYERS = 2


class Attending(TorchDispatchMode):
    """How often the compiled attention ran."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times += func is torch.ops.gristmill.attention_compiled.default
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(compiled(SOURCE) is None, reason="attention does not compile here")
@pytest.mark.parametrize(("how", "times"), [(None, LAYERS), ("selective", LAYERS), ("full", 2 * LAYERS)])
def test_selective_recomputation_keeps_what_attention_gave(
    how: Literal["selective", "full"] | None, times: int
) -> None:
    config = ModelConfig(hidden_size=32, kv_lora_rank=16, num_hidden_layers=LAYERS, num_nextn_predict_layers=0)
    model = Transformer(config, 64)
    model.initialise(0)
    if how is not None:
        recompute_blocks(model, how)
    token_BS = torch.arange(24).view(2, 12)
    with Attending() as attending:
        model(Batch(token_BS, torch.arange(12).expand(2, -1))).square().sum().backward()
    assert attending.times == times
