"""The corpus stages' results in a store: their rows, and the chain of them from the sources to the last text.

A document keeps its id and the name of its shard from ingest on, so that every stage's decision on it lies in one file
of a known name. Files of a remote store are fetched one by one, as they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gristmill.data.documents import id_hash, read_rows
from gristmill.flows.errors import UsageError
from gristmill.flows.inspection import find, latest_run
from gristmill.flows.manifest import Manifest
from gristmill.flows.store import Store

Row = dict[str, Any]
ENDING = ".jsonl.zst"
KINDS = ("documents", "removed", "changed")


@dataclass(frozen=True)
class Result:
    """One finished result of a stage."""

    store: Store
    manifest: Manifest

    @property
    def stage(self) -> str:
        return self.manifest["stage"]

    @property
    def key(self) -> str:
        return self.manifest["key"]

    @property
    def name(self) -> str:
        return f"{self.stage} {self.key}"

    @cached_property
    def files(self) -> frozenset[str]:
        return frozenset(f["path"] for f in self.manifest["files"])

    @cached_property
    def shards(self) -> list[str]:
        """Names of the document shards, without their ending, in order."""
        return sorted(p.split("/")[1].removesuffix(ENDING) for p in self.files if p.startswith("documents/"))

    @property
    def has_documents(self) -> bool:
        return bool(self.shards)

    def path(self, file: str) -> Path | None:
        """The local path of a file; none where the result has no such file."""
        return self.store.file(self.manifest, file) if file in self.files else None

    def shard(self, kind: str, name: str) -> Path | None:
        """A shard of documents, removed or changed rows; none where no row is in it."""
        return self.path(f"{kind}/{name}{ENDING}")

    def rows(self, kind: str, name: str) -> Iterator[Row]:
        """The rows of one shard, streamed."""
        path = self.shard(kind, name)
        return read_rows(path) if path is not None else iter(())

    def hashes(self, name: str) -> Any:
        """`id_hash` of each document of a shard, in order (uint64): from ids/ where it is, else from the rows."""
        import numpy as np

        path = self.path(f"ids/{name}.ids")
        if path is not None:
            return np.fromfile(path, dtype="<u8")
        return np.fromiter((id_hash(row["id"]) for row in self.rows("documents", name)), dtype="<u8")

    def input(self, kind: str) -> Result | None:
        """The result that a named input was made of; none where there is none, or where it was removed."""
        entry = self.manifest["inputs"].get(kind)
        manifest = self.store.manifest(entry["stage"], entry["key"]) if entry else None
        return Result(self.store, manifest) if manifest else None

    def small_rows(self, file: str) -> list[Row]:
        """The rows of a small table such as funnel.jsonl; none where the result has none."""
        import json

        path = self.path(file)
        return [json.loads(line) for line in path.open(encoding="utf-8")] if path else []


def chain_of(result: Result) -> list[Result]:
    """The results with documents that one came through, from the sources on, itself last where it has documents.

    Raises:
        UsageError: one of them is no longer in the store.
    """
    found: list[Result] = []
    now: Result | None = result
    while now is not None:
        if now.has_documents:
            found.insert(0, now)
        before = now.input("documents")
        if before is None and (entry := now.manifest["inputs"].get("documents")):
            raise UsageError(
                f"{now.name} was made of {entry['stage']} {entry['key']}, which was removed from the store: name a "
                f"result whose inputs are there"
            )
        now = before
    return found


def results_of(store: Store, record: dict[str, Any]) -> list[Result]:
    """The finished results of a run, in the order of its stages."""
    manifests = (store.manifest(entry["stage"], entry["key"]) for entry in record["stages"])
    return [Result(store, m) for m in manifests if m is not None]


def chain_of_run(store: Store, record: dict[str, Any]) -> list[Result]:
    """The run's results with documents, from the sources to the last.

    Raises:
        UsageError: the run has none.
    """
    chains = [chain_of(result) for result in results_of(store, record) if result.has_documents]
    if not chains:
        raise UsageError(f"run {record['run']} has no result with documents in store {store.uri!r}: run ingest first")
    return max(chains, key=len)


def corpus_of(store: Store, what: str | None) -> list[Result]:
    """The chain of a run, of a result by its key, or of a stage of the latest run; none named: of the latest run.

    Raises:
        UsageError: there is nothing of that name, or it has no documents.
    """
    if what is None:
        return chain_of_run(store, run_with_documents(store))
    manifest = store.find(what)
    kind, found = ("stage", manifest) if manifest is not None else find(store, what)
    if kind == "run":
        return chain_of_run(store, found)
    chain = chain_of(Result(store, found))
    if not chain:
        raise UsageError(f"stage {found['stage']} {found['key']} holds no documents: name one of ingest to tokenize")
    return chain


def run_with_documents(store: Store) -> dict[str, Any]:
    """The record of the latest run of which a result with documents is there; else the latest."""
    for record in reversed(store.runs()):
        if any(result.has_documents for result in results_of(store, record)):
            return record
    return latest_run(store)
