"""Learning rates over the steps: today's to the bit, V3's published numbers, and the shapes of the others."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gristmill.model.batch_sizes import BatchSizes
from gristmill.model.config import ModelConfig
from gristmill.model.training.config import BatchRampConfig, PretrainConfig, ScheduleConfig, TailConfig
from gristmill.model.training.schedules import factor, tail_factor

KINDS = [
    {"kind": "cosine"},
    {"kind": "linear"},
    *({"kind": "wsd", "wsd_decay": shape} for shape in ("1-sqrt", "linear", "cosine")),
]


def factors(config: ScheduleConfig, steps: int) -> list[float]:
    return [factor(config, step, steps) for step in range(steps)]


def written_out(config: ScheduleConfig, step: int, steps: int) -> float:
    """Warm-up, constant and cosine as one formula, which the default schedule has to equal to the last bit."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    decay_from = max(config.warmup_steps, steps - round(steps * config.decay_fraction))
    if step < decay_from or steps <= decay_from:
        return 1.0
    through = (step - decay_from + 1) / (steps - decay_from)
    return config.final_ratio + (1 - config.final_ratio) * 0.5 * (1 + math.cos(math.pi * through))


@given(
    steps=st.integers(1, 300),
    warmup=st.integers(0, 60),
    decay=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_the_default_kind_is_the_formula_to_the_bit(steps: int, warmup: int, decay: float, final: float) -> None:
    config = ScheduleConfig(warmup_steps=warmup, decay_fraction=decay, final_ratio=final)
    assert factors(config, steps) == [written_out(config, step, steps) for step in range(steps)]


def test_v3_has_its_published_rates_at_its_published_tokens() -> None:
    """V3 section 4.2: 14.8 T tokens, 4096 a sequence; 2.2e-4, from 10 T on a cosine over 4.3 T, and two tails."""
    sizes = BatchSizes(15360, 4096, BatchRampConfig(start_sequences=3072, increment=1536, tokens=469_000_000_000))
    a_step = 15360 * 4096
    steps = sizes.step_of(14_800_000_000_000 // 4096) + 1
    config = ScheduleConfig(
        warmup_steps=2000,
        decay_fraction=4.3e12 / a_step / steps,
        final_ratio=0.1,
        tails=(
            TailConfig(share=333e9 / a_step / steps, ratio=0.1),
            TailConfig(share=167e9 / a_step / steps, ratio=7.3e-6 / 2.2e-4),
        ),
    )

    def rate(tokens: float) -> float:
        return 2.2e-4 * factor(config, sizes.step_of(int(tokens) // 4096), steps)

    assert factor(config, 0, steps) == 1 / 2000
    assert factor(config, 1999, steps) == 1.0
    assert sizes.sequences(0) == 3072
    assert sizes.sequences(sizes.step_of(469_000_000_000 // 4096) + 1) == 15360
    assert rate(1e12) == rate(9.999e12) == 2.2e-4
    # Ends of phases are rounded to whole steps of 63 M tokens, each a 68,000th of the cosine.
    assert rate(12.15e12) == pytest.approx((2.2e-4 + 2.2e-5) / 2, rel=1e-4)
    assert rate(14.2999e12) == pytest.approx(2.2e-5, rel=1e-4)
    assert rate(14.301e12) == rate(14.632e12) == pytest.approx(2.2e-5)
    assert rate(14.634e12) == rate(14.7999e12) == pytest.approx(7.3e-6)


def test_v3_has_its_published_mtp_weight_and_bias_speed_at_its_published_tokens() -> None:
    """V3 section 4.2: λ 0.3 for the first 10 T tokens, then 0.1; γ 0.001 for the first 14.3 T, then 0 for 500 B."""
    a_step = 15360 * 4096
    sizes = BatchSizes(15360, 4096, BatchRampConfig(start_sequences=3072, increment=1536, tokens=469_000_000_000))
    steps = sizes.step_of(14_800_000_000_000 // 4096) + 1
    config = PretrainConfig(
        model=ModelConfig(mtp_loss_weight=0.3, bias_update_speed=0.001),
        mtp_weight_tails=(TailConfig(share=4.8e12 / a_step / steps, ratio=1 / 3),),
        bias_speed_tails=(TailConfig(share=500e9 / a_step / steps, ratio=0.0),),
    )

    def at(tokens: float) -> tuple[float, float]:
        step = sizes.step_of(int(tokens) // 4096)
        mtp, bias = (tail_factor(tails, step, steps) for tails in (config.mtp_weight_tails, config.bias_speed_tails))
        return config.model.mtp_loss_weight * mtp, config.model.bias_update_speed * bias

    # Ends of phases are rounded to whole steps of 63 M tokens.
    assert at(0) == at(9.9999e12) == (0.3, 0.001)
    assert at(10.0001e12) == at(14.2999e12) == (pytest.approx(0.1), 0.001)
    assert at(14.3001e12) == at(14.7999e12) == (pytest.approx(0.1), 0.0)


@given(steps=st.integers(1, 200), shares=st.lists(st.floats(0.01, 0.25), max_size=4))
def test_tails_follow_each_other_to_the_end(steps: int, shares: list[float]) -> None:
    tails = tuple(TailConfig(share=share, ratio=(i + 1) / 8) for i, share in enumerate(shares))
    lengths = [round(steps * share) for share in shares]
    wanted = [1.0] * (steps - sum(lengths))
    for tail, length in zip(tails, lengths, strict=True):
        wanted += [tail.ratio] * length
    # Where shares are rounded up to more than the run, the first tails are cut.
    assert [tail_factor(tails, step, steps) for step in range(steps)] == wanted[-steps:]


def test_wsd_is_stable_and_then_decays() -> None:
    for shape, remains in {"1-sqrt": 1 - 0.5**0.5, "linear": 0.5, "cosine": 0.5}.items():
        asked = {"kind": "wsd", "wsd_decay": shape, "warmup_steps": 10, "decay_fraction": 0.2, "final_ratio": 0.1}
        config = ScheduleConfig.model_validate(asked)
        found = factors(config, 100)
        assert found[9:80] == [1.0] * 71
        assert all(a > b for a, b in itertools.pairwise(found[79:]))
        assert found[89] == pytest.approx(0.1 + 0.9 * remains)  # half of the decay is done
        assert found[99] == pytest.approx(0.1)


def test_linear_falls_evenly_from_the_warm_up_on() -> None:
    found = factors(ScheduleConfig(kind="linear", warmup_steps=20, decay_fraction=0.9, final_ratio=0.0), 100)
    assert found[19] == 1.0
    assert [a - b for a, b in itertools.pairwise(found[19:])] == pytest.approx([1 / 80] * 80)
    assert found[-1] == 0.0


@given(
    kind=st.sampled_from(KINDS),
    steps=st.integers(1, 200),
    warmup=st.integers(0, 250),
    shares=st.lists(st.floats(0.01, 0.2), max_size=3),
    decay=st.floats(0, 0.4),
)
def test_every_step_of_every_kind_has_a_factor_between_zero_and_one(
    kind: dict[str, Any], steps: int, warmup: int, shares: list[float], decay: float
) -> None:
    tails = tuple(TailConfig(share=share, ratio=0.05) for share in shares)
    config = ScheduleConfig(**kind, warmup_steps=warmup, decay_fraction=decay, tails=tails)
    found = factors(config, steps)
    assert all(0 < f <= 1 for f in found)
    # Once warm, a rate never rises.
    assert all(a >= b for a, b in itertools.pairwise(found[max(0, warmup - 1) :]))
    tail_steps = sum(round(steps * share) for share in shares)
    assert found[max(warmup, steps - tail_steps) :] == [0.05] * max(0, min(tail_steps, steps - warmup))


def test_what_cannot_be_is_refused() -> None:
    tail = TailConfig(share=0.3, ratio=0.1)
    with pytest.raises(ValidationError, match=r"0\.5 of decay_fraction and 0\.6 of tails, are more than the whole run"):
        ScheduleConfig(tails=(tail, tail))
    assert ScheduleConfig(kind="linear", tails=(tail, tail)).tails[1] == tail
    with pytest.raises(ValidationError, match=r"warmup_steps 20 is longer than the run of 19 steps"):
        PretrainConfig(steps=19)
    assert PretrainConfig(steps=20).steps == 20
    for ask in (lambda: factor(ScheduleConfig(), 5, 5), lambda: tail_factor((), 5, 5)):
        with pytest.raises(ValueError, match="step 5 is not one of the 5 steps"):
            ask()
    for field in ("mtp_weight_tails", "bias_speed_tails"):
        with pytest.raises(ValidationError, match=r"shares of the tails, 1\.2, are more than the whole run"):
            PretrainConfig.model_validate({field: [{"share": 0.6, "ratio": 0.1}] * 2})
