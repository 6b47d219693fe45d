"""Precisions applied to a model: what they change and what they leave as it is."""

from __future__ import annotations

import json
import logging
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gristmill import kernels
from gristmill.model.config import ModelConfig
from gristmill.model.training.config import PretrainConfig, SFTConfig
from gristmill.model.training.precision import apply_precision
from gristmill.model.transformer import Batch, Block, Experts, Linear, Routing, Transformer

LENGTH, VOCAB = 32, 100
CONFIG = ModelConfig(
    hidden_size=128, num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=2, q_lora_rank=128,
    kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64, intermediate_size=128,
    moe_intermediate_size=128, n_routed_experts=4, num_experts_per_tok=2, num_nextn_predict_layers=1,
    initializer_range=0.05, max_position_embeddings=LENGTH,
)  # fmt: skip
ALL_CHOSEN = CONFIG.model_copy(update={"n_routed_experts": 2})  # so that no token chooses otherwise
GROUPED = ModelConfig(
    attention="gqa", hidden_size=64, num_hidden_layers=1, first_k_dense_replace=1, num_attention_heads=4,
    num_key_value_heads=2, qkv_bias=True, qk_norm=True, intermediate_size=96, num_nextn_predict_layers=0,
    initializer_range=0.05, max_position_embeddings=LENGTH,
)  # fmt: skip


def build(config: ModelConfig, precision: str) -> Transformer:
    model = Transformer(config, VOCAB)
    model.initialise(0)
    apply_precision(model, precision)  # type: ignore[arg-type]
    return model


def step(model: Transformer) -> tuple[float, dict[str, torch.Tensor], Routing]:
    """The loss of one batch, its gradients, and what the gates decided."""
    tokens = torch.randint(0, VOCAB, (4, LENGTH + 2), generator=torch.Generator().manual_seed(1))
    batch, routing = Batch(tokens[:, :LENGTH], torch.arange(LENGTH).expand(4, -1)), Routing()
    ahead_BS = tokens[:, 2:] if len(model.mtp) else None
    main, ahead = model.losses(batch, tokens[:, 1:-1], ahead_BS, torch.ones(4, LENGTH), routing)
    loss = main + sum(ahead)
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, routing


@pytest.mark.parametrize("config", [ALL_CHOSEN, GROUPED], ids=["mla", "gqa"])
@pytest.mark.parametrize(("precision", "rounding", "many"), [("bfloat16", 2.0**-9, 12), ("fp8", 2.0**-4, 5)])
def test_gradients_are_float32_and_near_those_of_float32(
    config: ModelConfig, precision: str, rounding: float, many: int
) -> None:
    """A gradient has passed through some ten products forward and as many backward, each of two operands that are off
    by `rounding` of themselves at most: forty errors of random sign, six times one of them, and in bfloat16 the results'
    and attention's beside them. What is wrong (a scale, a transposition) is off by the whole gradient."""
    wanted_loss, wanted, _ = step(build(config, "float32"))
    loss, got, _ = step(build(config, precision))
    assert loss != wanted_loss
    assert loss == pytest.approx(wanted_loss, rel=rounding / 10)  # a mean over 128 tokens, whose errors cancel
    assert got.keys() == wanted.keys()
    for name, gradient in got.items():
        assert gradient.dtype == torch.float32, name
        apart = float((gradient - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-30))
        assert apart <= many * rounding, (name, apart)


def test_float32_changes_nothing() -> None:
    plain = Transformer(CONFIG, VOCAB)
    plain.initialise(0)
    loss, got, _ = step(build(CONFIG, "float32"))
    wanted_loss, wanted, _ = step(plain)
    assert loss == wanted_loss
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in got.items())


def test_fp8_takes_the_blocks_products_and_no_other() -> None:
    before = kernels.report()
    model = build(CONFIG, "fp8")
    step(model)
    taken = {op: sum(kernels.report()[op].values()) - sum(before.get(op, {}).values()) for op in kernels.report()}
    linear = sum(isinstance(m, Linear) for m in model.modules()) - 1  # without the head
    experts = sum(isinstance(m, Experts) for m in model.modules())
    # Each product is taken once forward and once for each gradient.
    assert taken["fp8_grouped_gemm"] == 2 * (linear + 2 * experts)
    assert taken["fp8_weight_gradient"] == linear + 2 * experts
    assert taken["swiglu_quantise"] == experts
    assert taken.get("grouped_gemm", 0) == 0
    assert taken["linear_cross_entropy_mean"] == 2  # the head's, of the model and of its MTP module


@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_the_gate_sees_float32(precision: str) -> None:
    model = build(CONFIG, precision)
    seen = []
    for mixture in model.mixtures():
        mixture.gate.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    _, _, routing = step(model)
    assert len(seen) == len(routing.load_LE) == 2
    for x_TD in seen:
        assert x_TD.dtype == torch.float32
        assert not x_TD.equal(x_TD.bfloat16().float())  # and numbers that are more than bfloat16's


@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_the_residual_stream_is_float32(precision: str) -> None:
    """That of an MTP module too, which begins with what a product gave."""
    model = build(CONFIG, precision)
    seen: list[torch.dtype] = []
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0].dtype, output.dtype)))
    step(model)
    assert len(seen) == 2 * (CONFIG.num_hidden_layers + CONFIG.num_nextn_predict_layers)
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
def test_two_runs_give_equal_bits(precision: str) -> None:
    (loss, got, _), (again, same, _) = (step(build(CONFIG, precision)) for _ in range(2))
    assert loss == again
    assert all(torch.equal(gradient, same[name]) for name, gradient in got.items())


def test_widths_that_are_filled_up_are_said(caplog: pytest.LogCaptureFixture) -> None:
    assert apply_precision(Transformer(CONFIG, VOCAB), "bfloat16") == {}
    with caplog.at_level(logging.WARNING, "gristmill.precision"):
        recorded = apply_precision(Transformer(GROUPED, VOCAB), "fp8")
    assert recorded == {"fp8_products": 6, "fp8_products_filled_up": 6}
    assert "6 of 6 products" in caplog.text
    assert "layers.0.self_attn.q_proj" in caplog.text


def test_the_precision_is_part_of_what_is_made() -> None:
    for config in (PretrainConfig, SFTConfig):
        assert config().precision == "float32"
        assert config.model_validate({"precision": "fp8"}).model_dump()["precision"] == "fp8"
        with pytest.raises(ValueError, match="precision"):
            config.model_validate({"precision": "float16"})


@pytest.mark.slow
def test_500_steps_in_fp8_end_within_a_quarter_of_a_percent_of_bfloat16() -> None:
    """V3 section 3.3: "the relative loss error remains consistently below 0.25 %".

    Of a model this small the loss after 500 steps moves by 0.1 % at any rounding: two runs in bfloat16 that differ by a
    millionth of their weights end that far apart at some seeds, and so does float32. Four seeds are therefore asked
    together, by the mean of the sizes, in which errors either way add up. The bench prints all, with their signs.
    """
    script = Path(__file__).parents[2] / "bench" / "precision.py"
    command = [sys.executable, "-P", str(script), "--precisions", "bfloat16", "fp8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["steps"], found["seeds"]) == (500, [1, 2, 3, 4])
    assert max(found["loss"]["bfloat16"]) < 0.6 * 5.545  # of 256 bytes drawn evenly, in nats: they have learnt
    assert found["fp8_apart_mean"] <= 0.0025, found


def test_losses_either_way_of_bfloat16s_add_up() -> None:
    script = Path(__file__).parents[2] / "bench" / "precision.py"
    bench = runpy.run_path(str(script))
    found = bench["compared"]({"bfloat16": [2.0, 2.0], "fp8": [1.99, 2.004]}, [1.978, 2.0008])
    assert found["noise"] == [-0.011, 0.0004]
    assert found["loss"]["bfloat16"] == [1.989, 2.0004]
    assert found["fp8_apart"] == [pytest.approx(0.000503, abs=1e-6), pytest.approx(0.0018, abs=1e-6)]
    found = bench["compared"]({"bfloat16": [2.0, 2.0], "fp8": [1.99, 2.01]}, [2.0, 2.0])
    assert found["fp8_apart"] == [-0.005, 0.005]
    assert found["fp8_apart_mean"] == 0.005
