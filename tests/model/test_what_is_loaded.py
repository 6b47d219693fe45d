"""What a job's process does without: torch.compile takes two seconds to load, and no job compiles a graph."""

from __future__ import annotations

import subprocess
import sys

STEPS = """
import sys
import torch
from gristmill.model import worker
from gristmill.model.config import ModelConfig
from gristmill.model.decoding import Decoder
from gristmill.model.rl import training
from gristmill.model.training.config import OptimizerConfig
from gristmill.model.training.optimizers import MuonAdamW
from gristmill.model.transformer import Batch, Routing, Transformer

worker.settle(1)
config = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=16, intermediate_size=64, n_routed_experts=4, moe_intermediate_size=16,
)
with torch.device("meta"):
    Transformer(config, 50)
model = Transformer(config, 50)
model.initialise(0)
optimizer = MuonAdamW(model.named_parameters(), OptimizerConfig())
token_BS = torch.arange(24).view(2, 12)
routing = Routing()
first_BS = torch.zeros_like(token_BS)
position_BS = torch.arange(12).expand(2, -1)
main, ahead = model.losses(
    Batch(token_BS, position_BS, first_BS), token_BS, token_BS, torch.ones(2, 12), routing
)
torch.stack([main, *ahead, *routing.balance_loss]).sum().backward()
optimizer.begin_step(1.0)
optimizer.step()
optimizer.zero_grad(set_to_none=True)
with torch.no_grad():
    decoder = Decoder(model.eval())
    decoder.advance(token_BS[:, :4], torch.zeros(2, dtype=torch.int64), decoder.cache(2, 8))
loaded = sorted(name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules)
assert not loaded, loaded
"""


def test_steps_and_samples_do_without_what_compiles_graphs() -> None:
    subprocess.run([sys.executable, "-P", "-c", STEPS], check=True)
