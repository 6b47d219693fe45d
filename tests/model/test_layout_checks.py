"""Layouts of ranks: what they refuse before a process starts, and who holds what."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gristmill.model.config import ModelConfig
from gristmill.model.training.layout import Layout

SMALL = ModelConfig(num_hidden_layers=2, num_attention_heads=4, n_routed_experts=4)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ((0,), "ranks 0 is less than one"),
        ((8, 3), "expert_parallel 3 does not divide ranks 8: choose 2 or 4"),
        ((8, 16), "expert_parallel 16 does not divide ranks 8: choose 8"),
        ((8, 1, 0), "sequence_parallel 0 does not divide ranks 8: choose 1"),
    ],
)
def test_impossible_layouts_are_refused(layout: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}$|{message}:"):
        Layout(*layout)


@pytest.mark.parametrize(
    ("layout", "model", "batch", "message"),
    [
        (Layout(16, 8), {}, 16, "expert_parallel 8 does not divide n_routed_experts 4: choose 4"),
        (Layout(6, 6), {"n_routed_experts": 9}, 6, "expert_parallel 6 does not divide n_routed_experts 9: choose 3"),
        (Layout(2, 2), {"first_k_dense_replace": 2}, 4, "no experts to share, set it to 1"),
        (Layout(8, 1, 8), {}, 4, "sequence_parallel 8 does not divide num_attention_heads 4: choose 4"),
        (Layout(4, 1, 4), {"max_position_embeddings": 64}, 4, "sequence_parallel 4 does not divide sequence_length 18: choose 2"),
        (Layout(8, 1, 2), {}, 6, "batch_sequences 6 does not divide among 4 data-parallel ranks .*: choose 4 or 8"),
    ],
)  # fmt: skip
def test_what_a_layout_cannot_share_out_is_refused(layout: Layout, model: dict, batch: int, message: str) -> None:
    config = ModelConfig.model_validate({**SMALL.model_dump(), **model})
    with pytest.raises(ValueError, match=message):
        layout.check(config, 18 if "18" in message else 16, batch)


def test_ranks_of_a_layout() -> None:
    layout = Layout(8, 4, 2)
    layout.check(SMALL, 16, 8)
    assert layout.data_parallel == 4
    assert [(layout.data_rank(r), layout.sequence_rank(r)) for r in range(4)] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_layout_is_checked_without_torch() -> None:
    code = "import sys, gristmill.model.training.layout as l; l.Layout(4, 2, 2); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
