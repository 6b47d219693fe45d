"""Muon and AdamW against plain computations."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from gristmill.model.training.config import OptimizerConfig, ScheduleConfig
from gristmill.model.training.optimizers import MuonAdamW, orthogonalised
from gristmill.model.training.schedules import factor


def test_newton_schulz_brings_singular_values_near_one() -> None:
    stack = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(stack))
    # The quintic's fixed band: Keller Jordan gives 0.68 to 1.13 for its coefficients; five steps reach it for
    # singular values above about 0.03 of the norm.
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_a_stack_is_orthogonalised_matrix_by_matrix() -> None:
    stack = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(1))
    together = orthogonalised(stack)
    for one, matrix in zip(together, stack, strict=True):
        torch.testing.assert_close(one, orthogonalised(matrix), rtol=1e-4, atol=1e-5)  # float32, another batch shape


def test_adam_part_equals_torch() -> None:
    ours = nn.Parameter(torch.randn(5, 7, generator=torch.Generator().manual_seed(2)))
    theirs = nn.Parameter(ours.detach().clone())
    config = OptimizerConfig(muon_learning_rate=0.0, adam_learning_rate=1e-2, weight_decay=0.1)
    mine = MuonAdamW([("w", ours)], config)
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(5):
        gradient = torch.randn(5, 7, generator=torch.Generator().manual_seed(10 + step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.begin_step(1.0)
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)  # float32, five steps of elementwise arithmetic


def test_state_comes_back_by_name() -> None:
    def build() -> tuple[dict[str, nn.Parameter], MuonAdamW]:
        generator = torch.Generator().manual_seed(3)
        named = {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in {"a": (4, 6), "b": (6,)}.items()}
        return named, MuonAdamW(named.items(), OptimizerConfig())

    def advance(named: dict[str, nn.Parameter], optimizer: MuonAdamW, steps: range) -> None:
        for step in steps:
            for p in named.values():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.begin_step(1.0)
            optimizer.step()

    straight, first = build()
    advance(straight, first, range(6))
    half, second = build()
    advance(half, second, range(3))
    resumed, third = build()
    for name, p in resumed.items():
        p.data.copy_(half[name])
    kept = {(kind, piece.name): numbers.clone() for kind, piece, numbers in second.moments()}
    third.load_moments(lambda kind, piece: kept.get((kind, piece.name)), second.steps_done)
    advance(resumed, third, range(3, 6))
    for name in straight:
        assert torch.equal(straight[name], resumed[name])


def test_schedule_warms_up_holds_and_decays() -> None:
    config = ScheduleConfig(warmup_steps=4, decay_fraction=0.5, final_ratio=0.1)
    factors = [factor(config, step, 20) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(f == 1.0 for f in factors[4:10])
    assert all(a > b for a, b in itertools.pairwise(factors[9:]))
    assert abs(factors[-1] - 0.1) < 1e-12
