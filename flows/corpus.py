"""The corpus alone: sources to packed token shards, as the nightly refresh runs it and `r1` begins with it."""

from __future__ import annotations

from dataclasses import dataclass

from gristmill.flows import stages
from gristmill.flows.recipe import Recipe
from gristmill.flows.stage import Artifact


@dataclass(frozen=True)
class Tokenized:
    """What made the tokens, one after the other; `trimmed` is `unique` where the recipe has no `spans`."""

    ingested: Artifact
    unique: Artifact
    trimmed: Artifact
    filtered: Artifact
    exam: Artifact
    clean: Artifact
    tokens: Artifact


@dataclass(frozen=True)
class Corpus(Tokenized):
    """What all corpus stages made."""

    mixture: Artifact


def corpus(recipe: Recipe) -> Corpus:
    """Sources to tokens, and the mixture of them that the recipe's pretraining reads."""
    text = tokenized(recipe)
    return Corpus(**vars(text), mixture=stages.mix(recipe.mixing, tokens=text.tokens, seed=recipe.seed))


def tokenized(recipe: Recipe) -> Tokenized:
    """Ingest, deduplicate, filter, take out what the evaluation asks, and tokenize."""
    seed = recipe.seed
    ingested = stages.ingest(recipe.ingest, seed=seed)
    unique = stages.dedup(recipe.dedup, documents=ingested)
    trimmed = unique if recipe.spans is None else stages.spans(recipe.spans, documents=unique)
    filtered = stages.filter_(recipe.filter, documents=trimmed)
    exam = stages.exam(recipe.problems.exam, seed=seed)
    clean = stages.decontaminate(recipe.decontaminate, documents=filtered, problems=exam)
    tokens = stages.tokenize(recipe.tokenize, documents=clean, seed=seed)
    return Tokenized(ingested, unique, trimmed, filtered, exam, clean, tokens)
