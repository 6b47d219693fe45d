"""What a training is said to hold in memory: counted as the model counts, moved by each setting, and held against runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gristmill.data.mix import MixConfig, mix
from gristmill.data.stage_types import silent as quiet
from gristmill.model.config import ModelConfig
from gristmill.model.pretrain import pretrain
from gristmill.model.stage_types import silent
from gristmill.model.training.config import LayoutConfig, OptimizerConfig, PretrainConfig, ScheduleConfig
from gristmill.model.training.layout import Layout
from gristmill.model.training.memory import RankMemory, parameters_of, training_memory
from gristmill.model.training.optimizers import is_hidden_matrix
from gristmill.model.transformer import Batch, Routing, Transformer

VOCABULARY = 1024
SHAPES = {
    "tiny": ModelConfig(),
    "query latent, two MTP modules": ModelConfig(q_lora_rank=48, num_nextn_predict_layers=2, n_shared_experts=2),
    "no shared experts, no MTP": ModelConfig(n_shared_experts=0, num_nextn_predict_layers=0, first_k_dense_replace=0),
    "grouped queries": ModelConfig(
        attention="gqa", num_key_value_heads=2, qkv_bias=True, qk_norm=True, first_k_dense_replace=4
    ),
    "tied head": ModelConfig(attention="gqa", tie_word_embeddings=True, num_nextn_predict_layers=0),
}


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_counted_as_the_model_has_them(name: str) -> None:
    config = SHAPES[name]
    found = parameters_of(config, VOCABULARY, config.num_nextn_predict_layers)
    with torch.device("meta"):
        named = dict(Transformer(config, VOCABULARY).named_parameters())
    assert found.total == sum(p.numel() for p in named.values())
    experts = sum(p.numel() for n, p in named.items() if ".experts." in n)
    hidden = sum(p.numel() for n, p in named.items() if is_hidden_matrix(n, p))
    assert found.experts.total() == experts
    assert found.matrices.total() == hidden - experts
    assert found.vectors == sum(p.numel() for p in named.values() if p.ndim == 1)
    shapes = {tuple(p.shape[-2:]) for n, p in named.items() if is_hidden_matrix(n, p)}
    assert {shape for shape, numbers in (found.experts + found.matrices).items() if numbers} == shapes


def memory(
    ranks: int = 1,
    optimizer: OptimizerConfig | None = None,
    model: ModelConfig = SHAPES["tiny"],
    tokens: int = 2048,
    averaged: bool = False,
    precision: Any = "float32",
    mtp_modules: int = 1,
    device: str = "cuda",
    **layout: Any,
) -> RankMemory:
    asked = LayoutConfig(**layout)
    return training_memory(
        model, VOCABULARY, optimizer or OptimizerConfig(), Layout.of(ranks, asked), asked, tokens=tokens,
        precision=precision, device=device, mtp_modules=mtp_modules, averaged=averaged,
    )  # fmt: skip


PARAMETERS = parameters_of(SHAPES["tiny"], VOCABULARY, 1)
ALL = 4 * PARAMETERS.total


def test_one_rank_holds_weights_gradients_and_moments_whole() -> None:
    found = memory()
    assert (found.weights, found.gradients) == (ALL, ALL)
    hidden = PARAMETERS.experts.total() + PARAMETERS.matrices.total()
    assert found.moments == 4 * (hidden + 2 * (PARAMETERS.total - hidden))  # Muon keeps one, AdamW two
    assert (found.average, found.offloaded) == (0, 0)
    assert found.saving == found.weights + found.moments


def test_zero_divides_what_its_stage_shares_out() -> None:
    ranks = 4
    alone, stages = memory(ranks), [memory(ranks, zero_stage=stage) for stage in (1, 2, 3)]
    assert [s.moments for s in stages] == [alone.moments // ranks] * 3
    # Stages 1 and 2 update a copy of a rank's part; stage 3 that part itself, and gathers what it computes with.
    assert [s.weights for s in stages] == [ALL + ALL // ranks, ALL + ALL // ranks, ALL // ranks + ALL]
    bucket = ALL  # of a model of fewer than 500 million parameters
    assert [s.gradients for s in (alone, *stages)] == [ALL + bucket, ALL + bucket, *[ALL // ranks + bucket] * 2]


def test_zero_3_divides_the_weights_of_a_model_that_is_never_whole() -> None:
    large = ModelConfig(hidden_size=4096, num_hidden_layers=32, n_routed_experts=64, moe_intermediate_size=1024)
    whole = 4 * parameters_of(large, VOCABULARY, 1).total
    one, many = (memory(ranks, model=large, zero_stage=3) for ranks in (64, 128))
    assert one.weights - many.weights == pytest.approx(whole / 64 - whole / 128, abs=8)
    assert one.weights < whole / 3


def test_moments_in_bfloat16_take_half() -> None:
    for layout in ({}, {"zero_stage": 1}, {"expert_parallel": 2}):
        full = memory(2, **layout)
        half = memory(2, OptimizerConfig(moments="bfloat16"), **layout)
        assert half.moments == full.moments / 2
        assert (half.weights, half.gradients) == (full.weights, full.gradients)


def test_adamw_throughout_keeps_two_moments_and_no_stacks() -> None:
    found = memory(optimizer=OptimizerConfig(muon_learning_rate=0.0))
    assert found.moments == 2 * ALL
    assert found.step == 0 < memory().step


def test_shared_experts_are_divided_and_the_rest_is_not() -> None:
    experts, rest = 4 * PARAMETERS.experts.total(), ALL - 4 * PARAMETERS.experts.total()
    found = memory(4, expert_parallel=4)
    assert found.weights == rest + experts // 4
    # ZeRO does not know them: their moments are whole where they are.
    shared = memory(4, expert_parallel=4, zero_stage=1)
    assert memory(4, expert_parallel=4).moments - shared.moments == pytest.approx(
        (found.moments - experts // 4) * 3 / 4, abs=4
    )


def test_an_average_takes_four_bytes_of_what_a_rank_updates() -> None:
    assert memory(averaged=True).average == ALL
    assert memory(4, averaged=True, zero_stage=2).average == ALL // 4
    assert memory(averaged=True).most("cuda") - memory().most("cuda") == ALL


def test_offload_moves_state_to_the_host() -> None:
    here, optimizer = memory(4, zero_stage=1), memory(4, zero_stage=1, offload="optimizer")
    assert (optimizer.moments, optimizer.weights) == (0, here.weights - ALL // 4)
    assert optimizer.offloaded >= here.moments + 2 * ALL // 4
    assert optimizer.most("cuda") < here.most("cuda")
    here, parameters = memory(4, zero_stage=3), memory(4, zero_stage=3, offload="parameters")
    assert parameters.weights == here.weights - ALL // 4
    assert parameters.offloaded > memory(4, zero_stage=3, offload="optimizer").offloaded > here.offloaded == 0


def test_activations_follow_tokens_recomputation_precision_and_mtp() -> None:
    kept, selective, full = (memory(recompute=how).activations for how in ("none", "selective", "full"))
    assert kept > selective > full
    assert memory(tokens=4096).activations == pytest.approx(2 * kept, rel=0.2)  # the head's gradient is the rest
    assert memory(precision="bfloat16").activations < 0.8 * kept
    assert memory(precision="bfloat16", device="cpu").activations > 0.8 * kept  # what is kept is float32
    assert kept - memory(mtp_modules=0).activations > kept / 6  # one block of five and a loss of two


@pytest.mark.parametrize("name", SHAPES)
def test_activations_are_what_autograd_keeps(name: str) -> None:
    """Within twice: which of the cheap numbers an operation keeps is its own affair, compiled or not."""
    config, rows, length = SHAPES[name], 4, 128
    model = Transformer(config, VOCABULARY)
    model.initialise(0)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    token_BS = torch.randint(VOCABULARY, (rows, length + 2), generator=torch.Generator().manual_seed(0))
    batch = Batch(token_BS[:, :length], torch.arange(length).expand(rows, -1))
    weight_BS = torch.full((rows, length), 1 / (rows * length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model.losses(batch, token_BS[:, 1:-1], token_BS[:, 2:], weight_BS, Routing())
    real = sum(t.untyped_storage().nbytes() for t in kept.values())
    assert losses
    said = memory(
        model=config, tokens=rows * length, device="cpu", mtp_modules=config.num_nextn_predict_layers
    ).activations
    assert real / 2 < said < 2 * real


@pytest.mark.slow
def test_a_training_holds_what_is_said(lesson_tokens: Path, tmp_path: Path) -> None:
    """The difference of two trainings' peaks, so that torch and the process do not count.

    Within 1.6 times: how much of what is freed the C library keeps depends on the order of it, and what a training
    holds beside its model (batches, held-out checks, samples of text) is not counted.
    """
    peaks, said, layout = [], [], LayoutConfig(hang_seconds=600.0)
    for width in (64, 448):
        model = ModelConfig(
            hidden_size=width, intermediate_size=2 * width, moe_intermediate_size=width // 2, kv_lora_rank=width // 2
        )
        config = PretrainConfig(
            model=model, steps=3, sequence_length=128, batch_sequences=8, held_out_sequences=4,
            schedule=ScheduleConfig(warmup_steps=1),
        )  # fmt: skip
        out, mixture = tmp_path / str(width), tmp_path / f"mixture-{width}"
        out.mkdir()
        mixture.mkdir()
        asked = MixConfig(sequence_length=config.sequence_length, sequences=config.sequences)
        mix(asked, lesson_tokens, mixture, 0, workers=0, progress=quiet)
        pretrain(
            config, lesson_tokens, mixture, out, 0, threads=1, ranks=1, device="cpu", layout=layout, progress=silent
        )  # fmt: skip
        told = [json.loads(line) for line in (out / "log" / "timings.jsonl").read_text().splitlines()]
        vocabulary = json.loads((out / "model" / "config.json").read_text())["vocab_size"]
        peaks.append(max(row["memory_bytes"] for row in told))
        found = training_memory(
            model, vocabulary, config.optimizer, Layout(1), layout, tokens=1024, precision="float32",
            device="cpu", mtp_modules=1, averaged=False,
        )  # fmt: skip
        said.append(found.most("cpu"))
    real = peaks[1] - peaks[0]
    assert real / 1.6 < said[1] - said[0] < 1.6 * real
