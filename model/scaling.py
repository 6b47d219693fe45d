"""Scaling laws: loss against compute, and against parameters and tokens, fitted to the runs of a ladder of models.

    L(C) = E + A · C^-α                  Kaplan et al. 2020 (arXiv 2001.08361), with the E of Henighan et al. 2020
    L(N, D) = E + A · N^-α + B · D^-β    Hoffmann et al. 2022 (arXiv 2203.15556), section 3.3, "approach 3"

Both minimise a Huber loss of log-residuals from a grid of starts. What Besiroglu et al. 2024 (arXiv 2404.10102) found
amiss in the original is heeded: the sum of the losses and not a mean is minimised, until steps are at rounding, and
coefficients are never rounded before they predict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ITERATIONS = 400
EXPONENTS = (0.05, 0.1, 0.2, 0.35, 0.6, 1.0, 1.6)
SHARES = (1e-3, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)  # E over the least loss, at the starts
LEAST_SHARE = 1e-6  # an E below this share of the least loss is none
STEEPEST = 12.0
PROFILE = 400
AGREE = 1e-3  # relative: starts that end so close to the best objective have found the same minimum
# 97.5 % quantiles of Student's t by degrees of freedom, from one on.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class TooFewRuns(ValueError):
    """The runs cannot decide the coefficients that are asked for."""


@dataclass(frozen=True)
class ComputeLaw:
    """L(C) = E + A · C^-α, C in floating-point operations, L in the unit of the losses it was fitted to.

    Attributes:
        fitted_floor: whether E was fitted; otherwise it is 0 by assumption.
        floor_interval: the E that the runs allow at 95 % (profile of the objective, F of 1 and n - 3 degrees of
            freedom); none where E is not fitted or no degree of freedom is left.
        allowed: laws along that interval.
        starts, agreeing: starts of the minimisation, and those that ended in the minimum taken.
    """

    floor: float
    scale: float
    exponent: float
    fitted_floor: bool
    floor_interval: tuple[float, float] | None = None
    allowed: tuple[tuple[float, float, float], ...] = ()
    starts: int = 0
    agreeing: int = 0

    def loss(self, compute: float) -> float:
        """The forecast at `compute` floating-point operations."""
        return self.floor + self.scale * compute**-self.exponent

    def interval(self, compute: float) -> tuple[float, float] | None:
        """Least and largest forecast among the laws that the runs allow; none where they are not known."""
        found = [floor + scale * compute**-exponent for floor, scale, exponent in self.allowed]
        return (min(found), max(found)) if found else None


@dataclass(frozen=True)
class LossSurface:
    """L(N, D) = E + A · N^-α + B · D^-β for N parameters and D tokens."""

    floor: float
    parameter_scale: float
    parameter_exponent: float
    token_scale: float
    token_exponent: float
    starts: int = 0
    agreeing: int = 0

    def loss(self, parameters: float, tokens: float) -> float:
        """The forecast of a model of `parameters` trained on `tokens`."""
        return (
            self.floor
            + self.parameter_scale * parameters**-self.parameter_exponent
            + self.token_scale * tokens**-self.token_exponent
        )

    def optimal_split(self, compute: float, flops_per_parameter_token: float) -> tuple[float, float]:
        """(parameters, tokens) of least loss at `compute` = `flops_per_parameter_token` · N · D (Hoffmann, eq. 4)."""
        total = self.parameter_exponent + self.token_exponent
        ratio = (self.parameter_exponent * self.parameter_scale) / (self.token_exponent * self.token_scale)
        pairs = compute / flops_per_parameter_token
        parameters = ratio ** (1 / total) * pairs ** (self.token_exponent / total)
        return parameters, pairs / parameters


def fit_compute_law(compute: Sequence[float], loss: Sequence[float], delta: float = 0.01) -> ComputeLaw:
    """The law through runs of `compute` floating-point operations each and their losses.

    With four sizes of compute or more E is fitted; with two or three it is taken as 0, a pure power law, since three
    coefficients through three points would leave nothing that could disagree.

    Args:
        delta: where the Huber loss of log-residuals turns from square to linear. Hoffmann et al. take 0.001 for
            hundreds of runs; of a handful, it would let some be outliers whose residual is a per cent of noise.

    Raises:
        TooFewRuns: all runs have one compute.
        ValueError: lengths differ, or a number is not positive and finite.
    """
    c, y = _checked(compute, loss)
    distinct = len(np.unique(c))
    if distinct < 2:
        raise TooFewRuns(
            f"a law of loss against compute needs two sizes of compute, and the {len(c)} runs have {distinct}"
        )
    term, centre, best = _fit(c, y, delta)
    scale, exponent = _uncentred(best.theta[1:], centre)
    if best.floor_stays:
        return ComputeLaw(0.0, scale, exponent, False, starts=best.starts, agreeing=best.agreeing)
    law = ComputeLaw(_floor(best.theta[0], y), scale, exponent, True, starts=best.starts, agreeing=best.agreeing)
    return _with_profile(law, best, term, y, delta, centre)


def fit_loss_surface(
    parameters: Sequence[float], tokens: Sequence[float], loss: Sequence[float], delta: float = 0.01
) -> LossSurface:
    """The surface through runs of `parameters` and `tokens` each and their losses; `delta` as in `fit_compute_law`.

    Raises:
        TooFewRuns: fewer than six different runs, fewer than three sizes, or three budgets of tokens; or tokens are
            in proportion to parameters, so that the two terms cannot be told apart.
        ValueError: lengths differ, or a number is not positive and finite.
    """
    n, y = _checked(parameters, loss)
    d, _ = _checked(tokens, loss)
    different, sizes, budgets = len(set(zip(n, d, strict=True))), len(np.unique(n)), len(np.unique(d))
    if different < 6 or sizes < 3 or budgets < 3:
        raise TooFewRuns(
            f"a law of loss against parameters and tokens needs six different runs, of three sizes and three numbers "
            f"of tokens, and there are {different}, {sizes} and {budgets}"
        )
    if np.linalg.matrix_rank(np.stack([np.ones_like(n), np.log(n), np.log(d)]), tol=1e-6) < 3:
        raise TooFewRuns(
            "tokens grow with parameters along one line in all runs, so that the two cannot be told apart: train each "
            "size on two budgets of tokens"
        )
    centres = _centre(n), _centre(d)
    term = np.stack([-np.log(n / centres[0]), -np.log(d / centres[1])])
    best = _minimise(term, y, delta, *_starts(term, y))
    first, second = _uncentred(best.theta[1:3], centres[0]), _uncentred(best.theta[3:5], centres[1])
    return LossSurface(_floor(best.theta[0], y), *first, *second, best.starts, best.agreeing)


def bootstrap_interval(
    compute: Sequence[float],
    loss: Sequence[float],
    groups: Sequence[object],
    at: float,
    *,
    delta: float = 0.01,
    resamples: int = 200,
    seed: int = 0,
) -> tuple[float, float]:
    """The middle 95 % of forecasts at `at` when the runs of each group (the seeds of one rung) are drawn again.

    Every refit begins at the law of all runs, and fits E where that law does.

    Raises:
        TooFewRuns: a group has fewer than three runs, from which nothing can be drawn.
    """
    members = [[i for i, g in enumerate(groups) if g == group] for group in dict.fromkeys(groups)]
    least = min(len(m) for m in members)
    if least < 3:
        raise TooFewRuns(f"a bootstrap over seeds needs three seeds a rung, and there are {least}")
    c, y = _checked(compute, loss)
    term, centre, best = _fit(c, y, delta)
    draw = np.random.default_rng([seed, 0x5CA1E])
    count_SR = np.zeros((resamples, len(y)))
    for row in count_SR:
        for m in members:
            np.add.at(row, draw.choice(m, len(m)), 1.0)
    begin = np.tile(best.theta, (resamples, 1))
    theta, _ = _descend(term, y, delta, begin, best.floor_stays, count_SR)
    found = np.exp(theta[:, 0]) + np.exp(theta[:, 1] - theta[:, 2] * math.log(at / centre))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


# --- the minimisation: Levenberg-Marquardt on reweighted squares, all starts at once
#
# S starts, R runs, T terms (1 or 2), P = 1 + 2·T coefficients: log E, then log scale and exponent of each term.
# `term_TR` holds -log(x / centre), so that a term's logarithm is log scale + exponent · term_TR.


@dataclass(frozen=True)
class _Minimum:
    theta: Array
    objective: float
    starts: int
    agreeing: int
    floor_stays: bool


def _fit(compute_R: Array, loss_R: Array, delta: float) -> tuple[Array, float, _Minimum]:
    """The term of a law of compute, what it is centred on, and the minimum; E is fitted with four sizes or more."""
    centre = _centre(compute_R)
    term_TR = -np.log(compute_R / centre)[None]
    fixed = None if len(np.unique(compute_R)) >= 4 else np.zeros(1)
    return term_TR, centre, _minimise(term_TR, loss_R, delta, *_starts(term_TR, loss_R, fixed))


def _centre(x_R: Array) -> float:
    """The geometric mean, around which scales and exponents are far less correlated."""
    return math.exp(float(np.log(x_R).mean()))


def _checked(x: Sequence[float], loss: Sequence[float]) -> tuple[Array, Array]:
    first, second = np.asarray(x, np.float64), np.asarray(loss, np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"{len(first)} numbers and {len(second)} losses: give one loss a run")
    for values in (first, second):
        if bad := [float(v) for v in values if not (math.isfinite(v) and v > 0)]:
            raise ValueError(f"{bad[0]} is no loss or amount that a run can have: it must be positive and finite")
    return first, second


def _starts(term_TR: Array, loss_R: Array, fixed: Array | None = None) -> tuple[Array, bool]:
    """Coefficients to begin with (S, P), and whether E stays as it is; `fixed` holds those E."""
    least = float(loss_R.min())
    floors = np.asarray(SHARES) * least if fixed is None else fixed
    rows = []
    for floor, *exponents in product(floors, *[EXPONENTS] * len(term_TR)):
        power_TR = np.exp(np.asarray(exponents)[:, None] * term_TR)
        above = np.maximum(loss_R - floor, 1e-9 * least)
        scale_T = np.linalg.lstsq((power_TR / loss_R).T, above / loss_R, rcond=None)[0]
        scale_T = np.maximum(scale_T, 1e-6 * above.mean())
        pairs = [v for scale, exponent in zip(np.log(scale_T), exponents, strict=True) for v in (scale, exponent)]
        rows.append([math.log(max(floor, LEAST_SHARE * least * 1e-6)), *pairs])
    return np.asarray(rows), fixed is not None


def _minimise(term_TR: Array, loss_R: Array, delta: float, theta_SP: Array, floor_stays: bool) -> _Minimum:
    theta_SP, value_S = _descend(term_TR, loss_R, delta, theta_SP, floor_stays)
    best = int(np.argmin(value_S))
    close = AGREE * value_S[best] + 1e-14
    agreeing = int((value_S <= value_S[best] + close).sum())
    return _Minimum(theta_SP[best], float(value_S[best]), len(value_S), agreeing, floor_stays)


def _descend(
    term_TR: Array,
    loss_R: Array,
    delta: float,
    theta_SP: Array,
    floor_stays: bool,
    count_SR: Array | float = 1.0,
) -> tuple[Array, Array]:
    """Where each start ends, and the objective there: the Huber loss of log-residuals, summed over the runs.

    `count_SR` says how often a start counts each run.
    """
    least = float(np.log(loss_R.min()))
    low = np.array([least + math.log(LEAST_SHARE) - 15.0, *[-60.0, 1e-4] * len(term_TR)])
    high = np.array([least, *[60.0, STEEPEST] * len(term_TR)])
    damping_S = np.full(len(theta_SP), 1e-2)
    residual_SR, slope_SRP = _residuals(term_TR, loss_R, theta_SP)
    value_S = _objective(residual_SR, delta, count_SR)
    for _ in range(ITERATIONS):
        if floor_stays:
            slope_SRP[:, :, 0] = 0.0
        weight_SR = count_SR * np.minimum(1.0, delta / np.maximum(np.abs(residual_SR), 1e-300))
        weighted = slope_SRP * weight_SR[:, :, None]
        hessian = np.einsum("srp,srq->spq", weighted, slope_SRP)
        gradient = np.einsum("srp,sr->sp", weighted, residual_SR)
        diagonal = np.einsum("spp->sp", hessian)
        shift = damping_S[:, None] * (diagonal + 1e-12) + 1e-15
        system = hessian + shift[:, :, None] * np.eye(theta_SP.shape[1])
        step_SP = np.linalg.solve(system, gradient[:, :, None])[:, :, 0]
        tried = np.clip(theta_SP - np.clip(step_SP, -2.0, 2.0), low, high)
        if floor_stays:
            tried[:, 0] = theta_SP[:, 0]
        new_residual, new_slope = _residuals(term_TR, loss_R, tried)
        new_value = _objective(new_residual, delta, count_SR)
        better = new_value < value_S
        moved = np.abs(tried - theta_SP)[better]
        theta_SP = np.where(better[:, None], tried, theta_SP)
        residual_SR = np.where(better[:, None], new_residual, residual_SR)
        slope_SRP = np.where(better[:, None, None], new_slope, slope_SRP)
        value_S = np.where(better, new_value, value_S)
        damping_S = np.clip(np.where(better, damping_S * 0.3, damping_S * 4.0), 1e-12, 1e12)
        if not better.any() and damping_S.min() > 1e6:
            break
        if better.any() and moved.size and moved.max() < 1e-13:
            break
    return theta_SP, value_S


def _residuals(term_TR: Array, loss_R: Array, theta_SP: Array) -> tuple[Array, Array]:
    """Log of forecast over loss (S, R), and its slope by each coefficient (S, R, P)."""
    parts = [np.broadcast_to(theta_SP[:, :1], (len(theta_SP), len(loss_R)))]
    for t, row_R in enumerate(term_TR):
        parts.append(theta_SP[:, 1 + 2 * t, None] + theta_SP[:, 2 + 2 * t, None] * row_R)
    log_parts = np.stack(parts)
    total_SR = np.logaddexp.reduce(log_parts, axis=0)
    share = np.exp(log_parts - total_SR)
    slopes = [share[0]]
    for t, row_R in enumerate(term_TR):
        slopes += [share[1 + t], share[1 + t] * row_R]
    return total_SR - np.log(loss_R), np.stack(slopes, axis=2)


def _objective(residual_SR: Array, delta: float, count_SR: Array | float) -> Array:
    size = np.abs(residual_SR)
    return (count_SR * np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))).sum(axis=1)


def _floor(log_floor: float, loss_R: Array) -> float:
    floor = math.exp(log_floor)
    return floor if floor > LEAST_SHARE * loss_R.min() else 0.0


def _uncentred(pair: Array, centre: float) -> tuple[float, float]:
    """(scale, exponent) for the quantity itself, of (log scale, exponent) around `centre`."""
    exponent = float(pair[1])
    return math.exp(float(pair[0]) + exponent * math.log(centre)), exponent


def _with_profile(
    law: ComputeLaw, best: _Minimum, term_TR: Array, loss_R: Array, delta: float, centre: float
) -> ComputeLaw:
    """The law with the E that the runs allow: where the objective, minimised over A and α, is not too much larger."""
    spare = len(loss_R) - 3
    if spare < 1:
        return law
    student = STUDENT[spare - 1] if spare <= len(STUDENT) else 1.96 + 2.5 / spare
    floors = np.append(np.linspace(0.0, 0.999 * float(loss_R.min()), PROFILE), law.floor)
    begin = np.tile(best.theta, (len(floors), 1))
    begin[:, 0] = np.log(np.maximum(floors, 1e-12 * loss_R.min()))
    above = np.maximum(loss_R.mean() - floors, 1e-9)
    begin[:, 1] = np.log(above)
    begin[:, 2] *= (loss_R.mean() - law.floor) / above  # the slope at the centre stays
    begin[:, 2] = np.clip(begin[:, 2], 1e-3, STEEPEST)
    theta, value = _descend(term_TR, loss_R, delta, begin, True)
    # Runs without any noise have an objective of nothing: rounding is then the yardstick.
    inside = value <= (best.objective + 1e-18 * len(loss_R)) * (1 + student**2 / spare)
    inside[-1] = True
    allowed = tuple((float(f), *_uncentred(t[1:], centre)) for f, t in zip(floors[inside], theta[inside], strict=True))
    interval = float(floors[inside].min()), float(floors[inside].max())
    return ComputeLaw(
        law.floor, law.scale, law.exponent, True, interval, allowed, starts=law.starts, agreeing=law.agreeing
    )
