"""The corpus alone: sources to token shards, as the nightly refresh runs it and `r1` begins with it."""

from __future__ import annotations

from dataclasses import dataclass

from gristmill.flows import stages
from gristmill.flows.recipe import Recipe
from gristmill.flows.stage import Artifact


@dataclass(frozen=True)
class Corpus:
    """What the corpus stages made, one after the other."""

    ingested: Artifact
    unique: Artifact
    filtered: Artifact
    tokens: Artifact


def corpus(recipe: Recipe) -> Corpus:
    """Ingest, deduplicate, filter and tokenize."""
    ingested = stages.ingest(recipe.ingest, seed=recipe.seed)
    unique = stages.dedup(recipe.dedup, documents=ingested)
    filtered = stages.filter_(recipe.filter, documents=unique)
    tokens = stages.tokenize(recipe.tokenize, documents=filtered, seed=recipe.seed)
    return Corpus(ingested, unique, filtered, tokens)
