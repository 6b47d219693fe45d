"""The average of the weights: its formula, its state, and that it leaves the model alone."""

from __future__ import annotations

import pytest
import torch

from gristmill.model.config import ModelConfig
from gristmill.model.training.checkpoints import own_tensors
from gristmill.model.training.ema import WeightAverage
from gristmill.model.transformer import Transformer

SMALL = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=16, intermediate_size=64, n_routed_experts=4, moe_intermediate_size=16,
)  # fmt: skip


def walked(model: Transformer, step: int) -> None:
    """Weights and expert biases of a step."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for tensor in own_tensors(model).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))


def made(tie: bool = False) -> Transformer:
    model = Transformer(SMALL.model_copy(update={"tie_word_embeddings": tie}), 64)
    model.initialise(0)
    return model


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_it_is_the_corrected_exponential_average(decay: float) -> None:
    """Against Adam's way: from zero, divided by the sum of the weights; in float64."""
    model = made()
    average = WeightAverage(model, decay)
    sums = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in own_tensors(model).items()}
    for step in range(1, 30):
        walked(model, step)
        average.update(model)
        for name, tensor in own_tensors(model).items():
            sums[name] = decay * sums[name] + (1 - decay) * tensor.double()
        for name, tensor in average.named_state().items():
            # float32, 29 interpolations of numbers of order one.
            torch.testing.assert_close(tensor.double(), sums[name] / (1 - decay**step), rtol=1e-4, atol=1e-5)


def test_the_first_weights_are_the_average_and_the_initial_ones_have_no_part() -> None:
    model = made()
    average = WeightAverage(model, 0.999)
    walked(model, 1)
    average.update(model)
    for name, tensor in own_tensors(model).items():
        torch.testing.assert_close(average.named_state()[name], tensor, rtol=1e-6, atol=1e-6)  # one interpolation
    assert not any(p.requires_grad for p in average.model.parameters())


def test_it_goes_on_from_its_state_in_the_same_bytes() -> None:
    model = made()
    straight, first = WeightAverage(model, 0.9), WeightAverage(model, 0.9)
    for step in range(6):
        walked(model, step)
        straight.update(model)
        if step < 3:
            first.update(model)
    resumed = WeightAverage(made(), 0.9)
    resumed.load_named_state({n: t.clone() for n, t in first.named_state().items()}, updates=3)
    for step in range(3, 6):
        walked(model, step)
        resumed.update(model)
    for name, tensor in straight.named_state().items():
        assert torch.equal(tensor, resumed.named_state()[name])


def test_a_tied_head_stays_tied_and_lower_precision_is_averaged_in_float32() -> None:
    model = made(tie=True).bfloat16()
    average = WeightAverage(model, 0.999)
    walked(model, 1)
    average.update(model)
    with torch.no_grad():
        for tensor in own_tensors(model).values():
            tensor.add_(0.05)
    average.update(model)
    assert average.model.lm_head.weight is average.model.embed_tokens.weight
    assert all(t.dtype == torch.float32 for t in average.named_state().values())
    name = "norm.weight"
    assert not torch.equal(average.named_state()[name].bfloat16().float(), average.named_state()[name])


def test_another_models_state_is_refused() -> None:
    average = WeightAverage(made(), 0.9)
    state = average.named_state()
    state.pop("norm.weight")
    with pytest.raises(ValueError, match=r"of another model: missing \['norm.weight'\], unexpected \[\]"):
        average.load_named_state(state, updates=1)
