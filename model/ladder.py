"""A ladder of models for scaling laws: what is asked of it, and the rules by which each rung follows from one run.

A rung is an ordinary pretraining run. Its shape is the recipe's model at another width; its tokens are in proportion
to its parameters; its rates follow its compute. Left as they are, all three bend a fitted law: a schedule that is not
the run's own (Hoffmann et al. 2022, appendix B), warm-up and rates that suit one size alone (Porian et al. 2024,
arXiv 2406.19146), parameters without their embeddings (Pearce & Song 2024, arXiv 2406.12907).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from pydantic import Field, model_validator

from gristmill.model.config import Config, ModelConfig
from gristmill.model.training.config import PretrainConfig

MULTIPLE = 8  # of every width that is scaled
WHOLE_SHARES = 100  # sequences: a mixture's whole percents come out exact in a multiple of these

Costs = Callable[[ModelConfig, int], tuple[int, int]]
"""(active parameters with embeddings, training FLOPs a token) of a model in sequences of so many tokens."""


class ScalingConfig(Config):
    """How the law is fitted to the rungs."""

    huber_delta: float = Field(
        default=0.01,
        gt=0,
        title="Huber δ",
        description="Log-residual from which a run counts linearly and not by its square (Hoffmann et al.: 0.001).",
    )
    resamples: int = Field(
        default=200, ge=20, title="Resamples", description="Of the bootstrap over seeds, where there are three or more."
    )


class SweepConfig(Config):
    """A ladder of small models, and a larger one whose loss is forecast before it is looked at."""

    sizes: tuple[int, ...] = Field(
        default=(32, 48, 64, 96), min_length=2, title="Widths", description="Of the rungs, in rising order."
    )
    hold_out: int = Field(
        default=128, title="Held-out width", description="Trained too, and left out of the fit; above all rungs."
    )
    tokens_per_parameter: tuple[float, ...] = Field(
        default=(4.0,),
        min_length=1,
        title="Tokens a parameter",
        description="Training tokens over active parameters, embeddings included. The first is that of the law of "
        "compute and of the held-out model; more of them train each size again, for the law of parameters and tokens.",
    )
    steps: tuple[int, ...] = Field(
        default=(), title="Steps", description="Optimizer steps in place of tokens a parameter, the same for each size."
    )
    seeds: int = Field(
        default=1, ge=1, le=32, title="Seeds", description="Runs of each rung, which differ in their initial weights."
    )
    depth_exponent: float = Field(
        default=1.0, ge=0, le=2, title="Depth", description="x of layers ∝ width^x; 0: all have the recipe's layers."
    )
    rate_exponent: float = Field(
        default=0.125,
        ge=0,
        le=1,
        title="Rate",
        description="x of learning rates ∝ compute^-x, equal to the recipe's at its compute (DeepSeek LLM: 0.125).",
    )
    batch_exponent: float = Field(
        default=0.0,
        ge=0,
        le=1,
        title="Batch",
        description="x of batch ∝ compute^x, equal to the recipe's at its compute (DeepSeek LLM: 0.3271).",
    )
    fit: ScalingConfig = Field(default_factory=ScalingConfig, title="Fit", description="Of the law to the rungs.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for width in (*self.sizes, self.hold_out):
            if width < MULTIPLE or width % MULTIPLE:
                raise ValueError(f"no model is {width} wide here: choose widths that are multiples of {MULTIPLE}")
        if any(second <= first for first, second in pairwise(self.sizes)):
            raise ValueError(f"sizes {list(self.sizes)} do not rise: give each width once, the smallest first")
        if self.hold_out <= self.sizes[-1]:
            raise ValueError(
                f"hold_out {self.hold_out} is not larger than the largest rung {self.sizes[-1]}: a forecast is tried "
                f"on a larger size, so raise it or take smaller rungs"
            )
        for name in ("tokens_per_parameter", "steps"):
            values = getattr(self, name)
            if any(not math.isfinite(v) or v <= 0 for v in values) or len(set(values)) < len(values):
                raise ValueError(f"{name} {list(values)} will not do: give positive numbers, each once")
        return self


@dataclass(frozen=True)
class Ladder:
    """The runs of a sweep, one for each model and budget of tokens.

    Attributes:
        rungs: the sizes on the first budget; a law of compute is fitted along them.
        further: the sizes on the other budgets; none where there is one budget.
        held_out: the larger model on the first budget.
    """

    rungs: list[PretrainConfig]
    further: list[PretrainConfig]
    held_out: PretrainConfig


def ladder(recipe: PretrainConfig, sweep: SweepConfig, costs: Costs) -> Ladder:
    """The runs that `sweep` asks for, derived from the run `recipe`."""
    first, *others = sweep.steps or sweep.tokens_per_parameter
    return Ladder(
        [rung(recipe, sweep, width, first, costs) for width in sweep.sizes],
        [rung(recipe, sweep, width, budget, costs) for budget in others for width in sweep.sizes],
        rung(recipe, sweep, sweep.hold_out, first, costs),
    )


def rung(recipe: PretrainConfig, sweep: SweepConfig, width: int, budget: float, costs: Costs) -> PretrainConfig:
    """The run of one size; `budget` is tokens a parameter, or steps where the sweep gives steps.

    The schedule keeps its shape: warm-up and decay take the same shares of the run as in the recipe.
    """
    model = scaled_model(recipe.model, width, sweep.depth_exponent)
    active, flops = costs(model, recipe.sequence_length)
    _, recipe_flops = costs(recipe.model, recipe.sequence_length)
    in_steps = bool(sweep.steps)
    tokens = budget * (recipe.batch_sequences * recipe.sequence_length if in_steps else active)
    recipe_tokens = recipe.steps * recipe.batch_sequences * recipe.sequence_length
    compute = flops * tokens / (recipe_flops * recipe_tokens)  # in that of the recipe's own run
    batch = max(1, round(recipe.batch_sequences * compute**sweep.batch_exponent))
    steps = round(budget) if in_steps else _whole_steps(tokens / (batch * recipe.sequence_length), batch)
    rate = compute**-sweep.rate_exponent
    optimizer, schedule = recipe.optimizer, recipe.schedule
    made = recipe.model_copy(
        update={
            "model": model,
            "steps": steps,
            "batch_sequences": batch,
            "optimizer": optimizer.model_copy(
                update={
                    "muon_learning_rate": _short(optimizer.muon_learning_rate * rate),
                    "adam_learning_rate": _short(optimizer.adam_learning_rate * rate),
                }
            ),
            "schedule": schedule.model_copy(
                update={"warmup_steps": math.ceil(schedule.warmup_steps * steps / recipe.steps)}
            ),
        }
    )
    return PretrainConfig.model_validate(made.model_dump())


def scaled_model(model: ModelConfig, width: int, depth_exponent: float = 1.0) -> ModelConfig:
    """The same kind of model at another width: heads, latents and FFNs grow with it, a head and the experts do not.

    Widths are rounded to multiples of 8; at least one block of each kind stays (dense, MoE) that the model has.
    """
    share = width / model.hidden_size
    changes: dict[str, int | None] = {
        "hidden_size": width,
        "kv_lora_rank": _multiple(model.kv_lora_rank * share),
        "q_lora_rank": None if model.q_lora_rank is None else _multiple(model.q_lora_rank * share),
        "intermediate_size": _multiple(model.intermediate_size * share),
        "moe_intermediate_size": _multiple(model.moe_intermediate_size * share),
    }
    changes |= _heads(model, share)
    deep = share**depth_exponent
    dense, sparse = model.first_k_dense_replace, model.num_hidden_layers - model.first_k_dense_replace
    kept = max(min(1, dense), round(dense * deep))
    changes["first_k_dense_replace"] = kept
    changes["num_hidden_layers"] = kept + max(min(1, sparse), round(model.num_hidden_layers * deep) - kept)
    if not sparse:
        changes["num_hidden_layers"] = kept
    return ModelConfig.model_validate(model.model_dump() | changes)


def _heads(model: ModelConfig, share: float) -> dict[str, int | None]:
    """Heads of the model's own width; grouped queries keep their group."""
    if model.attention == "mla":
        return {"num_attention_heads": max(1, round(model.num_attention_heads * share))}
    group = model.num_attention_heads // (model.num_key_value_heads or model.num_attention_heads)
    shared = max(1, round(model.num_attention_heads * share / group))
    return {"num_attention_heads": shared * group, "num_key_value_heads": shared, "head_dim": model.head_width}


def _multiple(width: float) -> int:
    return max(MULTIPLE, MULTIPLE * round(width / MULTIPLE))


def _whole_steps(steps: float, batch: int) -> int:
    """Rounded so that a mixture's whole percents are exact: all rungs are then checked on the same held-out text."""
    together = WHOLE_SHARES // math.gcd(WHOLE_SHARES, batch)
    return max(1, round(steps / together)) * together


def _short(rate: float) -> float:
    """Four digits: a rate is read by people, and hashed."""
    return float(f"{rate:.4g}")
