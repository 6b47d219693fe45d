"""Training on a GPU: ZeRO's stages, what lies in the host's memory and recomputing change a run by rounding at most."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gristmill.model.config import ModelConfig
from gristmill.model.training.batches import TrainingBatch, packed_inputs
from gristmill.model.training.config import LayoutConfig, OptimizerConfig
from gristmill.model.training.engine import Engine, start_distributed
from gristmill.model.training.precision import apply_precision
from gristmill.model.transformer import Transformer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
MODEL = ModelConfig(
    hidden_size=256, num_hidden_layers=3, first_k_dense_replace=1, num_attention_heads=4, kv_lora_rank=64,
    qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, intermediate_size=512, n_routed_experts=16,
    num_experts_per_tok=4, moe_intermediate_size=128, n_shared_experts=1, max_position_embeddings=128,
)  # fmt: skip
VOCAB, SEQUENCES, LENGTH, STEPS = 512, 8, 128, 6
LAYOUTS = {
    "zero 0": LayoutConfig(),
    "zero 1": LayoutConfig(zero_stage=1),
    "zero 2": LayoutConfig(zero_stage=2),
    "zero 3": LayoutConfig(zero_stage=3),
    "zero 2, state in the host": LayoutConfig(zero_stage=2, offload="optimizer"),
    "zero 3, parameters in the host": LayoutConfig(zero_stage=3, offload="parameters"),
    "recomputed": LayoutConfig(recompute="selective"),
}


class Drawn:
    """One batch of random tokens in documents of 48, which six steps learn by heart."""

    def step(self, step: int, rank: int, ranks: int) -> TrainingBatch:
        token = torch.randint(0, VOCAB, (SEQUENCES, LENGTH + 2), generator=torch.Generator().manual_seed(0)).cuda()
        place = torch.arange(LENGTH, device="cuda")
        inputs = packed_inputs(token[:, :-2], (place // 48).expand(SEQUENCES, -1))
        weight = torch.ones(SEQUENCES, LENGTH, device="cuda")
        return TrainingBatch(inputs, token[:, 1:-1], token[:, 2:], weight)

    def documents(self, step: int) -> list[str]:
        return []


def losses(layout: str, precision: str) -> list[float]:
    start_distributed(torch.device("cuda", 0))
    model = Transformer(MODEL, VOCAB)
    model.initialise(0)
    model.cuda()
    apply_precision(model, precision)  # type: ignore[arg-type]
    engine = Engine(
        model, OptimizerConfig(), mtp_loss_weight=0.3, batch_sequences=SEQUENCES, layout=LAYOUTS[layout],
    )  # fmt: skip
    found = []
    for step in range(STEPS):
        found.append(float(engine.accumulate(Drawn(), step)["main_loss"]))
        assert engine.step(1.0, admitted=True)
    return found


def in_a_process(layout: str, precision: str) -> list[float]:
    """DeepSpeed keeps what an engine was made of for as long as the process lives."""
    told = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('layouts', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['layouts'] = module\n"
        "spec.loader.exec_module(module)\n"
        f"print('losses', *module.losses({layout!r}, {precision!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env={**os.environ, **told}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("losses"))
    return [float(word) for word in line.split()[1:]]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_layouts_give_the_losses_of_none(precision: str) -> None:
    with ThreadPoolExecutor() as side_by_side:
        plain, *others = side_by_side.map(in_a_process, LAYOUTS, [precision] * len(LAYOUTS))
    assert plain[-1] < 0.9 * plain[0]
    # Sums in another order: 1.2e-7 in float32; in bfloat16 an operand near the middle of two values falls the other way,
    # by 2⁻⁸ of itself, in a few of hundreds of thousands.
    allowed = 1e-5 if precision == "float32" else 2e-3
    for layout, found in zip(list(LAYOUTS)[1:], others, strict=True):
        assert found == pytest.approx(plain, rel=allowed), layout
