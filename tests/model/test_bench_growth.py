"""What bench/growth.py and bench/balance.py work out from what they measure."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from gristmill.model.training.layout import Layout, expert_bytes, sequence_bytes
from gristmill.model.transformer import Transformer
from tests.model.benches import bench


@pytest.fixture(scope="module")
def growth() -> ModuleType:
    return bench("growth")


@pytest.fixture(scope="module")
def balance() -> ModuleType:
    return bench("balance")


def test_a_ring_sends_what_the_books_say(growth: ModuleType) -> None:
    assert growth.ring(4, 100.0, 2) == (6, 150.0)  # an all-reduce: 2(n − 1) messages of a quarter each
    assert growth.ring(1, 100.0, 2) == (0, 0.0)


def test_seconds_are_latency_and_bytes_over_bandwidth(growth: ModuleType) -> None:
    sent = growth.total([growth.Traffic(4, 600_000.0), growth.Traffic(6, 400_000.0)])
    assert sent == (10, 1_000_000.0)
    assert sent.seconds(latency=0.001, bandwidth=8e6) == pytest.approx(0.01 + 1.0)


def test_zero_sends_all_numbers_twice_and_stage_3_three_times(growth: ModuleType) -> None:
    model = growth.shape(experts=8, length=256)
    size = 4 * sum(p.numel() for p in Transformer(model, growth.VOCAB).parameters())
    for stage, passes in {0: 2, 1: 2, 2: 2, 3: 3}.items():
        sent = growth.traffic(model, Layout(64), stage, tokens=2048)
        assert list(sent) == ["parameters"]
        assert sent["parameters"].bytes == pytest.approx(passes * 63 / 64 * size)


def test_shared_experts_send_rows_and_their_gradients_go_to_their_replicas_alone(growth: ModuleType) -> None:
    model, layout = growth.shape(experts=8, length=256), Layout(64, expert_parallel=8)
    ordinary, routed = growth.parameter_bytes(model)
    sent = growth.traffic(model, layout, 0, tokens=2048)
    assert sent["parameters"].bytes == pytest.approx(2 * 63 / 64 * ordinary)
    assert sent["expert gradients"].bytes == pytest.approx(2 * 7 / 8 * routed / 8)
    assert sent["rows"].bytes == expert_bytes(model, layout, 2048, 4)
    alone = growth.traffic(model, Layout(8, expert_parallel=8), 0, tokens=2048)
    assert alone["expert gradients"] == (0, 0.0)


def test_shared_sequences_send_what_the_layout_says(growth: ModuleType) -> None:
    model, layout = growth.shape(experts=8, length=256), Layout(64, sequence_parallel=2)
    sent = growth.traffic(model, layout, 0, tokens=2048)
    assert sent["sequence"] == (6 * 6, sequence_bytes(model, layout, 2048, 4))


def test_documents_of_a_step_are_packed_and_masked(growth: ModuleType) -> None:
    batch = growth.Packed(sequences=2, length=512).step(0, rank=0, ranks=1)
    position, first = batch.inputs.position_BS, batch.inputs.first_BS
    starts = (position == 0).sum()
    assert 2 < starts < 20  # about 512 / 300 more than one a sequence
    # Each sees those before it in its document, and itself.
    assert (np.arange(512) - first.numpy() == position.numpy()).all()
    assert (batch.inputs.token_BS[:, 1:] == batch.target_BS[:, :-1]).all()


def test_violation_of_loads_by_step_and_together(balance: ModuleType) -> None:
    swings = np.array([[[6, 2, 4, 4]], [[2, 6, 4, 4]]])  # (S, L, E): each step is uneven, both together are even
    (row,) = balance.judged(swings)
    assert row == {"by_step": 0.5, "worst_step": 0.5, "in_window": 0.0, "least": 1.0, "starved": 0}
    starves = np.array([[[10, 10, 10, 10], [20, 10, 9, 1]], [[10, 10, 10, 10], [18, 12, 10, 0]]])
    even, odd = balance.judged(starves)
    assert even["by_step"] == even["in_window"] == even["starved"] == 0
    assert (odd["by_step"], odd["worst_step"]) == pytest.approx((0.9, 1.0))
    assert odd["starved"] == 1
    assert odd["least"] == pytest.approx(0.05)


def test_noise_is_that_of_even_routing(balance: ModuleType) -> None:
    tokens, experts, chosen, steps = 512, 8, 2, 300
    order = np.random.default_rng(1).random((steps, tokens, experts)).argsort(-1)[..., :chosen]
    load = (order[..., None] == np.arange(experts)).sum((1, 2))
    # The violation of a step has a deviation of about 0.04 here: a mean of 300 is within 0.01 by four deviations.
    assert balance.noise(tokens, experts, chosen) == pytest.approx(float(balance.violation(load).mean()), abs=0.01)


def test_layers_are_named_with_those_of_mtp_last(balance: ModuleType, growth: ModuleType) -> None:
    model = growth.shape(experts=8, length=256).model_copy(update={"num_nextn_predict_layers": 1})
    names = balance.layer_names(model)
    assert names == [*(f"layer {i}" for i in range(1, 6)), "MTP 1"]
    assert len(names) == len(Transformer(model, 64).mixtures())
