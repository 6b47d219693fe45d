"""The `scaling` stage: the law of a sweep's rungs, and how far off it was at the size that it did not see."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

from gristmill.flows.cards.charts import png
from gristmill.flows.cards.folder import Row, StageFolder
from gristmill.flows.cards.scaling import loss_against_compute
from gristmill.flows.manifest import write_json
from gristmill.model.ladder import ScalingConfig
from gristmill.model.scaling import (
    ComputeLaw,
    LossSurface,
    TooFewRuns,
    bootstrap_interval,
    fit_compute_law,
    fit_loss_surface,
)
from gristmill.model.stage_types import Metrics

SAME_TEXT = 1e-4  # relative: what rounding of the two losses leaves in their ratio


def fit_ladder(
    config: ScalingConfig, rungs: list[Path], further: list[Path], held_out: list[Path], out: Path
) -> Metrics:
    """Fit the losses of `rungs` and try the law on `held_out`; all three are folders of finished `pretrain` stages.

    `rungs` and `held_out` were trained on one budget of tokens a size, `further` on others. Writes `rungs.jsonl` (a
    row a run), `fit.json` (unrounded) and `view/scaling.png`.

    Raises:
        ValueError: the rungs cannot be fitted, or the held-out runs took no more compute than they.
    """
    rows = [_row(folder, role) for role, folders in _roles(rungs, further, held_out) for folder in folders]
    line, ahead = _of(rows, "rung"), _of(rows, "held_out")
    at = ahead[0]["flops"]
    largest = max(line, key=lambda row: row["flops"])
    if at <= largest["flops"]:
        raise ValueError(
            f"the held-out run took {at:.3g} FLOPs, no more than the largest rung's {largest['flops']:.3g}"
        )
    law = fit_compute_law([r["flops"] for r in line], [r["loss"] for r in line], config.huber_delta)
    for row in rows:
        row["forecast"] = law.loss(row["flops"]) if row["role"] != "further" else None
        row["error_percent"] = None if row["forecast"] is None else 100 * (row["forecast"] / row["loss"] - 1)
    notes = _notes(law, rows)
    forecast = _forecast(law, line, ahead, config, notes)
    surface = _surface(rows, config, notes) if further else None
    fit = {"law": _law(law), "forecast": forecast, "surface": surface, "notes": notes}
    _write(out, fit, rows)
    return {
        "runs": len(rows),
        "rungs": len({r["width"] for r in line}),
        "exponent": round(law.exponent, 5),
        "irreducible_loss": round(law.floor, 5),
        "forecast_loss": round(forecast["loss"], 5),
        "held_out_loss": round(forecast["actual"], 5),
        "forecast_error_percent": round(forecast["error_percent"], 4),
        "unchanged_error_percent": round(forecast["unchanged_error_percent"], 4),
    }


def _roles(rungs: list[Path], further: list[Path], held_out: list[Path]) -> list[tuple[str, list[Path]]]:
    return [("rung", rungs), ("further", further), ("held_out", held_out)]


def _of(rows: list[Row], role: str) -> list[Row]:
    return [row for row in rows if row["role"] == role]


def _row(folder: Path, role: str) -> Row:
    """What the law is fitted to, of one run."""
    stage = StageFolder.open("pretrain", folder)
    metrics, config = stage.metrics, stage.config
    return {
        "role": role,
        "width": config["model"]["hidden_size"],
        "layers": config["model"]["num_hidden_layers"],
        "seed": stage.manifest["seed"],
        "steps": config["steps"],
        "parameters": metrics["parameters"],
        "active_parameters": metrics["active_parameters"],
        "tokens": metrics["tokens"],
        "flops": metrics["flops"],
        "loss": metrics["held_out_loss"],
        "bits_per_byte": metrics["held_out_bpb"],
        "key": stage.manifest["key"],
    }


def _law(law: ComputeLaw) -> Row:
    found = asdict(law)
    del found["allowed"]
    return found


def _forecast(law: ComputeLaw, line: list[Row], ahead: list[Row], config: ScalingConfig, notes: list[str]) -> Row:
    """The forecast at the held-out compute in nats a token, against the mean over its seeds, and what brackets it."""
    at, actual = ahead[0]["flops"], fmean(r["loss"] for r in ahead)
    most = max(r["flops"] for r in line)
    unchanged = fmean(r["loss"] for r in line if r["flops"] == most)
    loss, interval = law.loss(at), law.interval(at)
    bits = fmean(r["bits_per_byte"] for r in ahead)
    found: dict[str, Any] = {
        "width": ahead[0]["width"],
        "flops": at,
        "times_largest_rung": at / most,
        "loss": loss,
        "actual": actual,
        "error_percent": 100 * (loss / actual - 1),
        "interval_by_irreducible_loss": interval,
        "unchanged_error_percent": 100 * (unchanged / actual - 1),
        "bits_per_byte": loss * bits / actual,
        "actual_bits_per_byte": bits,
    }
    try:
        found["interval_by_seeds"] = bootstrap_interval(
            [r["flops"] for r in line],
            [r["loss"] for r in line],
            [r["width"] for r in line],
            at,
            delta=config.huber_delta,
            resamples=config.resamples,
        )
    except TooFewRuns as reason:
        found["interval_by_seeds"] = None
        notes.append(f"No interval over seeds: {reason}.")
    return found


def _notes(law: ComputeLaw, rows: list[Row]) -> list[str]:
    """What a reader must know before believing the law, in sentences."""
    notes = []
    interval = law.floor_interval
    if not law.fitted_floor:
        notes.append(
            "With fewer than four sizes of compute the irreducible loss E cannot be fitted; it is taken as 0, a pure "
            "power law, which forecasts too low a loss far ahead."
        )
    elif interval is not None and interval[0] == 0.0:
        notes.append(
            f"The rungs do not identify the irreducible loss E: they allow all from 0 to {interval[1]:.2f} nats at "
            f"95 %, so that the exponent is known no better. Believe forecasts near the ladder alone."
        )
    per_token = [r["loss"] / math.log(2) / r["bits_per_byte"] for r in rows]
    if max(per_token) > min(per_token) * (1 + SAME_TEXT):
        notes.append(
            f"The runs were checked on not quite the same held-out text: it has {min(per_token):.4f} to "
            f"{max(per_token):.4f} bytes a token. Their losses compare no better than that."
        )
    return notes


def _surface(rows: list[Row], config: ScalingConfig, notes: list[str]) -> Row | None:
    """L(N, D) of all rungs, tried on the held-out runs, and the split of their compute that it calls best."""
    fitted, ahead = [r for r in rows if r["role"] != "held_out"], _of(rows, "held_out")
    sizes, tokens = [r["active_parameters"] for r in fitted], [r["tokens"] for r in fitted]
    try:
        surface = fit_loss_surface(sizes, tokens, [r["loss"] for r in fitted], config.huber_delta)
    except TooFewRuns as reason:
        notes.append(f"No law of parameters and tokens: {reason}.")
        return None
    forecast = surface.loss(ahead[0]["active_parameters"], ahead[0]["tokens"])
    actual = fmean(r["loss"] for r in ahead)
    return asdict(surface) | {
        "residual_percent": [
            100 * (surface.loss(n, d) / r["loss"] - 1) for n, d, r in zip(sizes, tokens, fitted, strict=True)
        ],
        "forecast": forecast,
        "error_percent": 100 * (forecast / actual - 1),
        "optimal": _optimum(surface, rows, ahead[0]["flops"], notes),
    }


def _optimum(surface: LossSurface, rows: list[Row], compute: float, notes: list[str]) -> Row:
    each = median(r["flops"] / (r["active_parameters"] * r["tokens"]) for r in rows)
    parameters, tokens = surface.optimal_split(compute, each)
    sizes = [r["active_parameters"] for r in rows]
    if not min(sizes) <= parameters <= max(sizes):
        notes.append(
            f"The compute-optimal size {parameters:.3g} lies outside the sizes that were trained ({min(sizes):.3g} to "
            f"{max(sizes):.3g}): it is an extrapolation of the fit, and nothing tried it."
        )
    return {
        "flops": compute,
        "flops_per_parameter_token": each,
        "active_parameters": parameters,
        "tokens": tokens,
        "tokens_per_parameter": tokens / parameters,
        "loss": surface.loss(parameters, tokens),
    }


def _write(out: Path, fit: Row, rows: list[Row]) -> None:
    write_json(out / "fit.json", fit)
    (out / "rungs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (out / "view").mkdir(exist_ok=True)
    (out / "view" / "scaling.png").write_bytes(png(loss_against_compute(fit, rows), 150))
