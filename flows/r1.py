"""The recipe of DeepSeek-R1 as a pipeline: raw text to an evaluated, exported reasoning model."""

from __future__ import annotations

from gristmill.flows import stages
from gristmill.flows.corpus import corpus
from gristmill.flows.recipe import Recipe
from gristmill.flows.stage import Artifact


def r1(recipe: Recipe) -> Artifact:
    """The whole way. Calling it under `Plan` says what would run; under `Plain` or `Orchestrated` it runs."""
    seed = recipe.seed
    text = corpus(recipe)
    problems = stages.problems(recipe.problems, seed=seed)
    # What is wrong with a student is found before the work that it is to learn from.
    student = None if recipe.distill is None else stages.student(recipe.distill.student)

    pretrained = stages.pretrain(recipe.pretrain, tokens=text.tokens, mixture=text.mixture, seed=seed)
    phases = extension(recipe, text.tokens, pretrained)
    base = [pretrained, *phases.values()][-1]
    zero = stages.rl_zero(recipe.rl_zero, model=base, problems=problems, tokenizer=text.tokens, seed=seed)
    cold = stages.cold_start(recipe.cold_start, model=base, problems=problems, tokenizer=text.tokens, seed=seed)
    reasoner = stages.rl(recipe.rl, model=cold, problems=problems, tokenizer=text.tokens, seed=seed)

    results = stages.evaluate(
        recipe.evaluate,
        problems=problems,
        tokenizer=text.tokens,
        documents=text.clean,
        base=base,
        cold_start=cold,
        zero=zero,
        rl=reasoner,
        seed=seed,
    )
    if recipe.distill is not None and student is not None:
        chains = problems
        if recipe.distill.traces is not None:
            asked = recipe.distill.traces
            chains = stages.traces(asked, model=reasoner, problems=problems, tokenizer=text.tokens, seed=seed)
        stages.distill(recipe.distill.training, model=student, problems=chains, tokenizer=student, seed=seed)
    exported = stages.export(recipe.export, model=reasoner, tokenizer=text.tokens)
    return stages.report(
        recipe.report,
        ingest=text.ingested,
        problems=problems,
        dedup=text.unique,
        trimmed=text.trimmed,
        filter=text.filtered,
        exam=text.exam,
        decontaminate=text.clean,
        tokenize=text.tokens,
        mix=text.mixture,
        pretrain=pretrained,
        cold_start=cold,
        rl_zero=zero,
        rl=reasoner,
        evaluate=results,
        export=exported,
        seed=None,
        **phases,
    )


def extension(recipe: Recipe, tokens: Artifact, base: Artifact) -> dict[str, Artifact]:
    """The phases of context extension by the names of their stages, each from the one before; none by default."""
    phases, model = {}, base
    for config, mix, extend in zip(recipe.phases, stages.mix_longer, stages.extend, strict=False):
        mixture = mix(recipe.mixing_of(config), tokens=tokens, seed=recipe.seed)
        model = extend(config, model=model, tokens=tokens, mixture=mixture, seed=recipe.seed)
        phases[extend.name] = model
    return phases
