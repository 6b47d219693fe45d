"""Scaling laws recover the curves that made their points, with and without noise, and refuse too few of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.model.scaling import (
    ComputeLaw,
    LossSurface,
    TooFewRuns,
    bootstrap_interval,
    fit_compute_law,
    fit_loss_surface,
)

COMPUTE = np.geomspace(1e12, 1e14, 5)
HOFFMANN = LossSurface(1.69, 406.4, 0.34, 410.7, 0.28)  # arXiv 2203.15556, section D.2
BESIROGLU = LossSurface(1.8172, 482.01, 0.3478, 2085.43, 0.3658)  # arXiv 2404.10102


def points(surface: LossSurface, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Six sizes on three budgets."""
    parameters = np.repeat(np.geomspace(1e6, 1e9, 6), 3)
    tokens = parameters * np.tile([5.0, 20.0, 80.0], 6)
    loss = np.array([surface.loss(n, d) for n, d in zip(parameters, tokens, strict=True)])
    return parameters, tokens, loss * np.exp(noise * np.random.default_rng(7).normal(size=len(loss)))


@settings(max_examples=15, deadline=None)
@given(
    floor=st.floats(0.2, 2.5),
    exponent=st.floats(0.05, 0.5),
    above=st.floats(0.5, 4.0),
    span=st.floats(10.0, 1000.0),
)
def test_a_law_without_noise_is_recovered(floor: float, exponent: float, above: float, span: float) -> None:
    compute = np.geomspace(1e12, 1e12 * span, 5)
    scale = above * 1e12**exponent
    law = fit_compute_law(list(compute), list(floor + scale * compute**-exponent))
    # Float64 losses: the objective is flat to rounding within about the root of its precision, 1e-8, which an
    # extrapolation of ten times and an ill-conditioned E (a short span, a small exponent) enlarge.
    assert law.loss(compute[-1] * 10) == pytest.approx(floor + scale * (compute[-1] * 10) ** -exponent, rel=1e-5)
    assert law.floor == pytest.approx(floor, abs=1e-2)
    assert law.exponent == pytest.approx(exponent, rel=1e-2)
    assert law.fitted_floor
    assert law.agreeing >= 1


def test_a_pure_power_law_has_no_floor() -> None:
    law = fit_compute_law(list(COMPUTE), list(50 * COMPUTE**-0.08))
    # E runs to zero along a valley: what is left of it moves the forecast by less than a millionth.
    assert law.floor < 1e-3
    assert law.loss(1e15) == pytest.approx(50 * 1e15**-0.08, rel=1e-6)
    assert law.floor_interval is not None
    assert law.floor_interval[0] == 0.0


def test_noise_widens_what_is_said_of_the_floor() -> None:
    true = 1.7 + 400 * COMPUTE**-0.15
    inside = []
    for seed in range(12):
        noise = np.exp(0.003 * np.random.default_rng(seed).normal(size=5))
        law = fit_compute_law(list(COMPUTE), list(true * noise))
        low, high = law.floor_interval or (0.0, 0.0)
        # Ten times the compute and 0.3 % of noise: the forecasts of 200 such draws differ by 1.5 % (two deviations).
        assert law.loss(1e15) == pytest.approx(1.7 + 400 * 1e15**-0.15, rel=0.04)
        assert law.interval(1e15) is not None
        inside.append(low <= 1.7 <= high)
    assert sum(inside) >= 10  # 95 % of draws: fewer than 10 of 12 in one suite of fifty


def test_an_outlier_weighs_less_than_in_least_squares() -> None:
    compute = np.geomspace(1e12, 1e15, 9)
    loss = 1.7 + 400 * compute**-0.15
    loss[4] *= 1.2
    far = 1.7 + 400 * 1e16**-0.15
    robust = fit_compute_law(list(compute), list(loss), delta=0.001).loss(1e16)
    square = fit_compute_law(list(compute), list(loss), delta=10.0).loss(1e16)
    assert abs(robust - far) < 0.25 * abs(square - far)


def test_with_three_sizes_the_floor_is_assumed() -> None:
    law = fit_compute_law(list(COMPUTE[:3]), list(50 * COMPUTE[:3] ** -0.08))
    assert (law.floor, law.fitted_floor, law.floor_interval, law.interval(1e15)) == (0.0, False, None, None)
    assert law.exponent == pytest.approx(0.08, rel=1e-6)


@pytest.mark.parametrize("truth", [HOFFMANN, BESIROGLU])
def test_the_surface_of_hoffmann_is_recovered(truth: LossSurface) -> None:
    parameters, tokens, loss = points(truth)
    fitted = fit_loss_surface(list(parameters), list(tokens), list(loss))
    for name in ("floor", "parameter_scale", "parameter_exponent", "token_scale", "token_exponent"):
        # As above: losses are exact to 1e-16, the minimum to its root, and scales are exponents of exponents.
        assert getattr(fitted, name) == pytest.approx(getattr(truth, name), rel=1e-4)
    assert fitted.agreeing > fitted.starts / 2


def test_the_surface_with_noise_forecasts_a_larger_model() -> None:
    parameters, tokens, loss = points(HOFFMANN, noise=0.002)
    fitted = fit_loss_surface(list(parameters), list(tokens), list(loss))
    assert fitted.loss(1e10, 2e11) == pytest.approx(HOFFMANN.loss(1e10, 2e11), rel=0.02)  # ten standard deviations


def test_the_optimal_split_is_the_least_loss_at_its_compute() -> None:
    compute = 5.76e23  # of Gopher and Chinchilla
    parameters, tokens = BESIROGLU.optimal_split(compute, 6)
    assert 6 * parameters * tokens == pytest.approx(compute)
    assert 15 < tokens / parameters < 30  # Besiroglu et al., figure 5: near the rule of 20 tokens a parameter
    best = BESIROGLU.loss(parameters, tokens)
    assert best < min(BESIROGLU.loss(parameters * f, tokens / f) for f in (0.8, 0.95, 1.05, 1.25))


def test_seeds_are_drawn_again() -> None:
    compute, groups = list(np.repeat(COMPUTE, 4)), list(np.repeat(np.arange(5), 4))

    def width(noise: float) -> float:
        drawn = np.exp(noise * np.random.default_rng(3).normal(size=20))
        loss = list((1.7 + 400 * np.repeat(COMPUTE, 4) ** -0.15) * drawn)
        low, high = bootstrap_interval(compute, loss, groups, 1e15, resamples=200)
        assert (low, high) == bootstrap_interval(compute, loss, groups, 1e15, resamples=200)
        assert low < fit_compute_law(compute, loss).loss(1e15) < high
        return high - low

    assert width(0.004) > 2 * width(0.001)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (lambda: fit_compute_law([1e12], [3.0]), "needs two sizes of compute, and the 1 runs have 1"),
        (lambda: fit_compute_law([1e12, 1e12], [3.0, 3.1]), "the 2 runs have 1"),
        (lambda: fit_loss_surface([1, 2, 3], [1, 2, 3], [3, 2, 1]), "needs six different runs"),
        (
            lambda: fit_loss_surface([1, 2, 3, 4, 5, 6], [2, 4, 6, 8, 10, 12], [6, 5, 4, 3, 2, 1]),
            "tokens grow with parameters along one line",
        ),
        (lambda: bootstrap_interval([1, 2], [2, 1], [0, 1], 3), "three seeds a rung, and there are 1"),
    ],
)
def test_too_few_runs_are_refused(asked, said: str) -> None:
    with pytest.raises(TooFewRuns, match=said):
        asked()


@pytest.mark.parametrize("loss", [[3.0, float("nan")], [3.0, -1.0], [3.0]])
def test_losses_that_no_run_has_are_refused(loss: list[float]) -> None:
    with pytest.raises(ValueError, match=r"finite|one loss a run"):
        fit_compute_law([1e12, 1e13], loss)


def test_a_law_forecasts_by_its_formula() -> None:
    assert ComputeLaw(1.0, 100.0, 0.5, True).loss(1e4) == pytest.approx(2.0)
