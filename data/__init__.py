"""Text to tokens: sources, deduplication, filters, decontamination, tokenizer, packed token shards, on Dask.

Every stage is a plain function of a frozen configuration, input folders and an output folder:

    from gristmill.data import DedupConfig, deduplicate, silent
    deduplicate(DedupConfig(threshold=0.8), Path("documents"), Path("unique"), workers=4, progress=silent)

The names below are the room's public ones. They are imported when they are first asked for, so that a plan, or a worker
of one stage, does not load the libraries of all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gristmill.data.dask_pipeline import DaskPipelineExecutor
    from gristmill.data.decontaminate import DecontaminateConfig
    from gristmill.data.decontaminate import decontaminate as remove_evaluation_sets
    from gristmill.data.dedup import DedupConfig, deduplicate
    from gristmill.data.documents import open_rows, read_rows, write_rows
    from gristmill.data.documents import shards as document_shards
    from gristmill.data.executor import Task, run_tasks
    from gristmill.data.filters import FilterConfig, filter_documents
    from gristmill.data.filters.classifier import QualityConfig
    from gristmill.data.filters.classifier_training import train_classifier
    from gristmill.data.ingest import IngestConfig
    from gristmill.data.ingest import ingest as ingest_documents
    from gristmill.data.mix import MixConfig
    from gristmill.data.mix import mix as mix_streams
    from gristmill.data.mixture import Mixture
    from gristmill.data.shards import TokenShards
    from gristmill.data.sieve import KEEP, Edit, Verdict, conclude, remove, sieve_shard
    from gristmill.data.spans import SpansConfig, remove_spans
    from gristmill.data.stage_types import silent
    from gristmill.data.tokenize import TokenizeConfig
    from gristmill.data.tokenize import tokenize as tokenize_documents

PUBLIC = {  # name → module, and the name there where it is another (a function called like its module)
    "ingest_documents": ("ingest", "ingest"),
    "IngestConfig": ("ingest", "IngestConfig"),
    "deduplicate": ("dedup", "deduplicate"),
    "DedupConfig": ("dedup", "DedupConfig"),
    "remove_spans": ("spans", "remove_spans"),
    "SpansConfig": ("spans", "SpansConfig"),
    "filter_documents": ("filters", "filter_documents"),
    "FilterConfig": ("filters", "FilterConfig"),
    "train_classifier": ("filters.classifier_training", "train_classifier"),
    "QualityConfig": ("filters.classifier", "QualityConfig"),
    "remove_evaluation_sets": ("decontaminate", "decontaminate"),
    "DecontaminateConfig": ("decontaminate", "DecontaminateConfig"),
    "tokenize_documents": ("tokenize", "tokenize"),
    "TokenizeConfig": ("tokenize", "TokenizeConfig"),
    "mix_streams": ("mix", "mix"),
    "MixConfig": ("mix", "MixConfig"),
    "TokenShards": ("shards", "TokenShards"),
    "Mixture": ("mixture", "Mixture"),
    "DaskPipelineExecutor": ("dask_pipeline", "DaskPipelineExecutor"),
    "Task": ("executor", "Task"),
    "run_tasks": ("executor", "run_tasks"),
    "read_rows": ("documents", "read_rows"),
    "write_rows": ("documents", "write_rows"),
    "open_rows": ("documents", "open_rows"),
    "document_shards": ("documents", "shards"),
    "sieve_shard": ("sieve", "sieve_shard"),
    "conclude": ("sieve", "conclude"),
    "Verdict": ("sieve", "Verdict"),
    "Edit": ("sieve", "Edit"),
    "KEEP": ("sieve", "KEEP"),
    "remove": ("sieve", "remove"),
    "silent": ("stage_types", "silent"),
}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"gristmill.data has no {name!r}; its public names are {', '.join(sorted(PUBLIC))}")
    module, there = PUBLIC[name]
    return getattr(import_module(f"{__name__}.{module}"), there)


def __dir__() -> list[str]:
    return sorted(PUBLIC)


__all__ = [
    "KEEP",
    "DaskPipelineExecutor",
    "DecontaminateConfig",
    "DedupConfig",
    "Edit",
    "FilterConfig",
    "IngestConfig",
    "MixConfig",
    "Mixture",
    "QualityConfig",
    "SpansConfig",
    "Task",
    "TokenShards",
    "TokenizeConfig",
    "Verdict",
    "conclude",
    "deduplicate",
    "document_shards",
    "filter_documents",
    "ingest_documents",
    "mix_streams",
    "open_rows",
    "read_rows",
    "remove",
    "remove_evaluation_sets",
    "remove_spans",
    "run_tasks",
    "sieve_shard",
    "silent",
    "tokenize_documents",
    "train_classifier",
    "write_rows",
]
