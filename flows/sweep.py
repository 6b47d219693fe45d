"""A sweep as a pipeline: the tokens of a recipe, a ladder of models pretrained on it, and the law of their losses."""

from __future__ import annotations

from pydantic import ValidationError

from gristmill.flows import stages
from gristmill.flows.corpus import tokenized
from gristmill.flows.errors import UsageError
from gristmill.flows.recipe import Recipe
from gristmill.flows.stage import Artifact
from gristmill.model.config import ModelConfig
from gristmill.model.ladder import Ladder, ladder
from gristmill.model.training.config import PretrainConfig
from gristmill.model.training.layout import Layout


def sweep(recipe: Recipe) -> Artifact:
    """Loss against compute, from runs that `recipe.sweep` derives from `recipe.pretrain`.

    Each run is a `pretrain` stage like any other, under its own key: what is there is not trained again. The order of
    the training text is that of the recipe's seed in all of them, so that all are checked on the same held-out text.
    """
    runs = sweep_ladder(recipe)
    tokens = tokenized(recipe).tokens
    mixtures: dict[int, Artifact] = {}

    def trained(config: PretrainConfig) -> list[Artifact]:
        asked = recipe.mixing_of(config)
        if asked.sequences not in mixtures:
            mixtures[asked.sequences] = stages.mix(asked, tokens=tokens, seed=recipe.seed)
        mixture = mixtures[asked.sequences]
        seeds = range(recipe.seed, recipe.seed + recipe.sweep.seeds)
        return [stages.pretrain(config, tokens=tokens, mixture=mixture, seed=seed) for seed in seeds]

    return stages.scaling(
        recipe.sweep.fit,
        rungs=[run for config in runs.rungs for run in trained(config)],
        further=[run for config in runs.further for run in trained(config)],
        held_out=trained(runs.held_out),
    )


def sweep_ladder(recipe: Recipe) -> Ladder:
    """The runs of the recipe's sweep.

    Raises:
        UsageError: a rung cannot be, or not be laid out over the ranks, or two rungs come to the same run.
    """
    from gristmill.model.costs import flops_per_token, parameter_counts

    vocabulary = recipe.tokenize.vocab_size

    def costs(model: ModelConfig, length: int) -> tuple[int, int]:
        flops = flops_per_token(model, vocabulary, length, mtp=model.num_nextn_predict_layers > 0)
        return parameter_counts(model, vocabulary)[1], flops

    if recipe.pretrain.batch_ramp is not None:
        raise UsageError("a sweep's runs are too short for pretrain.batch_ramp: set it to null")
    try:
        runs = ladder(recipe.pretrain, recipe.sweep, costs)
    except ValidationError as error:
        raise UsageError(f"a rung of the sweep cannot be: {error.errors()[0]['msg']}") from error
    everything = [*runs.rungs, *runs.further, runs.held_out]
    place = Layout.of(recipe.execution.ranks, recipe.execution.layout)
    for number, run in enumerate(everything):
        width = run.model.hidden_size
        try:
            place.check(run.model, run.sequence_length, run.batch_sequences)
        except ValueError as error:
            raise UsageError(f"the rung {width} wide: {error}") from error
        if (width, run.steps) in [(r.model.hidden_size, r.steps) for r in everything[:number]]:
            raise UsageError(
                f"two budgets of the rung {width} wide come to the same {run.steps} steps: choose budgets further apart"
            )
    return runs
