"""One finished result without some documents: its touched files written anew, the others taken over as they are."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gristmill.data import amend as files_without
from gristmill.data.amend_index import manifest_without, part_without
from gristmill.data.documents import write_json_lines
from gristmill.flows import tombstones
from gristmill.flows.corpus_results import ENDING, KINDS, Result, Row
from gristmill.flows.corpus_trace import below, decision, folder_of
from gristmill.flows.identity import key_of
from gristmill.flows.manifest import Manifest, content_hash, is_content, sha256, write_json

BLOCK = 1 << 20
COUNTED = ("funnel.jsonl", "histograms.jsonl")
ARRAYS = (".safetensors", ".pt", ".bin", ".npy", ".npz", ".tokens", ".starts", ".ids", ".pieces", ".firsts")


@dataclass(frozen=True)
class Document:
    """A document on its way through the stages: where it lies, its text before this stage, and as it came in."""

    identifier: str
    source: str
    shard: str
    text: str
    first_text: str


@dataclass
class Amended:
    """What came of it: the new result's manifest, paths written anew, and the documents that had gone on from here."""

    manifest: Manifest
    documents: dict[str, Document]
    written: list[str] = field(default_factory=list)


def amend(
    result: Result,
    identity: Row,
    inputs: Row,
    documents: Mapping[str, Document],
    *,
    asked: Mapping[str, list[str]] | None = None,
    write: bool = True,
) -> Amended:
    """Make the result of `identity` out of this one by taking documents out.

    Args:
        identity: what the new key is a hash of.
        inputs: the inputs of the new manifest, with content hashes.
        documents: what goes, by id, as it came into this stage.
        asked: the tombstones that concern the stage's sources, where it reads any.
        write: without it nothing is written, and only `documents` of what is returned counts.

    Raises:
        ValueError: a file of the old result is damaged.
    """
    steps = {i: decision(result, d.shard, i) for i, d in documents.items()} if result.has_documents else {}
    onwards = {
        i: replace(d, text=steps[i]["text"])
        for i, d in documents.items()
        if i in steps and steps[i]["outcome"] in ("kept", "changed")
    }
    if not write:
        return Amended(result.manifest, onwards)
    store, key = result.store, key_of(identity)
    if store.partial(result.stage, key):
        store.discard(result.stage, key)
    work = _Work(result, store.folder(result.stage, key), documents, steps)
    work.shards()
    work.index(inputs)
    work.tokens()
    work.tables()
    work.counts()
    work.observations()
    if asked is not None and tombstones.as_source(asked):
        write_json(work.out / tombstones.FILE, dict(asked))
        work.written.add(tombstones.FILE)
    manifest = work.finished(identity, key, inputs)
    return Amended(manifest, onwards, sorted(work.written))


class _Work:
    """The files of one result: which are written anew, which are gone, and what the counts become."""

    def __init__(self, result: Result, out: Path, documents: Mapping[str, Document], steps: dict[str, Row]) -> None:
        self.result, self.out, self.documents, self.steps = result, out, documents, steps
        self.written: set[str] = set()
        self.gone: set[str] = set()
        self.metrics: Row = copy.deepcopy(result.manifest["metrics"])
        self.there = {i for i, step in steps.items() if step["outcome"] != "absent"}
        self.by_shard: dict[str, set[str]] = {}
        for identifier in sorted(self.there):
            self.by_shard.setdefault(documents[identifier].shard, set()).add(identifier)

    def shards(self) -> None:
        """documents/, removed/, changed/ and ids/ of the shards that held one of them."""
        for shard, ids in self.by_shard.items():
            others = any(row["id"] not in ids for row in self.result.rows("removed", shard))
            for kind in KINDS:
                path, name = self.result.shard(kind, shard), f"{kind}/{shard}{ENDING}"
                whole_shard_gone = kind == "documents" and not others
                if path is None or not (
                    whole_shard_gone or any(row["id"] in ids for row in self.result.rows(kind, shard))
                ):
                    continue
                keep_empty = kind == "documents" and others
                files_without.rows_without(path, self.out / name, ids, keep_empty=keep_empty)
                self._note(name)
            name = f"ids/{shard}.ids"
            if (path := self.result.path(name)) is not None:
                files_without.ids_without(path, self.out / name, ids)
                self._note(name)

    def index(self, inputs: Row) -> None:
        """The parts of a dedup index that knew one of them, and its list of parts."""
        if "index/index.json" not in self.result.files or not self.by_shard:
            return
        before, entry = self.result.input("documents"), inputs["documents"]
        after = self.result.store.manifest(entry["stage"], entry["key"])
        assert before is not None
        assert after is not None
        for shard, ids in self.by_shard.items():
            places = [n for n, row in enumerate(before.rows("documents", shard)) if row["id"] in ids]
            fate = self.result.path(f"index/{shard}.fate")
            assert fate is not None
            left = Result(self.result.store, after).shard("documents", shard)
            part_without(self.result.manifest["config"], fate, left, self.out / "index", shard, places)
            for name in [f for f in self.result.files if f.startswith(f"index/{shard}.")]:
                self._note(name)
        manifest = self.result.path("index/index.json")
        assert manifest is not None
        lost = {shard: len(ids) for shard, ids in self.by_shard.items()}
        manifest_without(manifest, self.out / "index", lost)
        self._note("index/index.json")

    def tokens(self) -> None:
        """Token shards that hold one of them, their index, and the counts of tokens."""
        if "tokens/index.json" not in self.result.files:
            return
        sizes = {i: len(d.text.encode()) for i, d in self.documents.items()}
        found = files_without.tokens_without(below(folder_of(self.result), "tokens"), self.out / "tokens", sizes)
        for name in found["touched"]:
            self._note(f"tokens/{name}")
        train, held_out = found["tokens"].get("train", {}), found["tokens"].get("held_out", {})
        changes = {
            "tokens": sum(train.values()),
            "held_out_tokens": sum(held_out.values()),
            "documents": len(found["documents"]),
            "bytes": sum(sizes[i] for i in found["documents"]),
            "tokens_by_source": train,
            "held_out_tokens_by_source": held_out,
        }
        files_without.lowered(self.metrics, changes, lambda _: False)

    def tables(self) -> None:
        """Small tables of JSON lines: samples, pairs, matches, quarantine."""
        if not self.documents:
            return
        texts = [d.first_text for d in self.documents.values()] + [d.text for d in self.documents.values()]
        for name in self.result.files:
            if not name.endswith(".jsonl") or name in COUNTED or not is_content(name):
                continue
            path = self.result.path(name)
            assert path is not None
            if files_without.table_without(path, self.out / name, set(self.documents), texts):
                self._note(name)

    def counts(self) -> None:
        """The funnel, the histogram of lengths, and the metrics that count documents and bytes.

        Histograms of other values stay: what a document's were is not recorded.
        """
        if not self.there:
            return
        funnel, bins = (self.result.small_rows(name) for name in COUNTED)
        for identifier in self.there:
            document, step = self.documents[identifier], self.steps[identifier]
            before = len(document.text.encode())
            after = 0 if step["outcome"] == "removed" else len(step["text"].encode())
            reasons = sorted({e["reason"] for e in step.get("edits", [])}) or [step.get("reason", "")]
            self._lower_metrics(document, step["outcome"], reasons[0], before, after)
            for row in funnel:
                if (row["source"], row["outcome"], row["reason"]) == (document.source, step["outcome"], reasons[0]):
                    row |= {
                        "documents": row["documents"] - 1,
                        "bytes_in": row["bytes_in"] - before,
                        "bytes_out": row["bytes_out"] - after,
                    }
            low = float(2 ** int(math.log2(max(1, len(document.text)))))
            for row in bins:
                if (row["name"], row["outcome"], row["low"]) == ("characters", step["outcome"], low):
                    row["documents"] -= 1
        for name, rows in zip(COUNTED, (funnel, bins), strict=True):
            if rows:
                write_json_lines(self.out / name, [row for row in rows if row["documents"]])
                self._note(name)

    def _lower_metrics(self, document: Document, outcome: str, reason: str, before: int, after: int) -> None:
        went_on = int(outcome != "removed")
        changes: dict[str, Any] = {
            "documents_in": 1,
            "documents_out": went_on,
            "bytes_in": before,
            "bytes_out": after,
            "changed": int(outcome == "changed"),
            "documents_by_source": {document.source: went_on},
            "bytes_by_source": {document.source: after},
            "taken_down": -1,
        }
        if outcome == "removed":
            changes |= {"removed_by_reason": {reason: 1}, "removed_by_source": {document.source: 1}, reason: 1}
        elif outcome == "changed":
            changes["changed_by_reason"] = {reason: 1}
        files_without.lowered(self.metrics, changes, lambda table: table.endswith("_by_reason"))

    def observations(self) -> None:
        """Logs and pages that show a text are left out of the new result."""
        pieces = [piece for d in self.documents.values() for piece in files_without.probes(d.first_text)]
        for name in self.result.files:
            if pieces and not is_content(name) and _holds(self.result, name, pieces):
                self.gone.add(name)

    def _note(self, name: str) -> None:
        (self.written if (self.out / name).exists() else self.gone).add(name)

    def finished(self, identity: Row, key: str, inputs: Row) -> Manifest:
        """Take over the other files and write the manifest."""
        old, store = self.result.manifest, self.result.store
        taken = [f for f in old["files"] if f["path"] not in self.written | self.gone]
        store.take_over(self.result.stage, self.result.key, key, [f["path"] for f in taken])
        files = [*taken, *(self._described(name) for name in sorted(self.written))]
        files.sort(key=lambda f: f["path"])
        record = {
            "from": self.result.key,
            "documents": sorted(self.there) if self.steps else sorted(self.documents),
            "written": sorted(self.written),
            "left_out": sorted(self.gone),
        }
        manifest = {
            **old,
            **identity,
            "key": key,
            "inputs": inputs,
            "files": files,
            "metrics": self.metrics,
            "content_hash": content_hash(files, self.metrics),
            "amended": record,
        }
        store.finish(manifest, there={f["path"] for f in taken})
        return manifest

    def _described(self, name: str) -> Row:
        path = self.out / name
        return {"path": name, "bytes": path.stat().st_size, "sha256": sha256(path), "content": is_content(name)}


def shows_text(result: Result, pieces: list[bytes]) -> str | None:
    """The first file of a result that shows one of the pieces of text; arrays of numbers are not looked at."""
    return next((name for name in sorted(result.files) if _holds(result, name, pieces)), None)


def _holds(result: Result, name: str, pieces: list[bytes]) -> bool:
    """Whether a file, unpacked, holds one of the pieces."""
    if name.endswith(ARRAYS):
        return False
    longest, end = max(map(len, pieces)), b""
    path = result.path(name)
    assert path is not None
    for block in _blocks(path):
        text = end + block
        if any(piece in text for piece in pieces):
            return True
        end = text[-longest:]
    return False


def _blocks(path: Path) -> Iterator[bytes]:
    from gristmill.data.documents import WholeZstd

    with path.open("rb") as raw:
        stream = WholeZstd(raw) if path.suffix == ".zst" else raw
        while block := stream.read(BLOCK):
            yield block
