"""A corpus small enough to reason about, by stages that keep the conventions of the real ones and take milliseconds."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from gristmill.data.documents import Row, id_hash, read_rows, shards, write_rows
from gristmill.data.mix import MixConfig, mix
from gristmill.data.shards import write_index, write_shard
from gristmill.data.sieve import KEEP, Edit, Verdict, conclude, remove, sieve_shard
from gristmill.data.stage_types import silent
from gristmill.data.urls import normalised_url
from gristmill.flows.execution import Execution
from gristmill.flows.runners import Plain
from gristmill.flows.stage import Artifact, stage
from gristmill.flows.store import Store

A_SHARD = 10
A_TOKEN_SHARD = 400
EMAIL = re.compile(r"[a-z]+@[a-z]+\.[a-z]+")


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ToySource(Frozen):
    name: str
    path: str


class Ingest(Frozen):
    sources: list[ToySource]


class Dedup(Frozen):
    pass


class Filter(Frozen):
    least_words: int = 3
    redact: bool = True


class Tokenize(Frozen):
    pass


class Train(Frozen):
    sequence_length: int = 32
    batch_sequences: int = 4
    steps: int = 6


class Recipe(Frozen):
    name: str = "toy"
    ingest: Ingest
    dedup: Dedup = Dedup()
    filter: Filter = Filter()
    tokenize: Tokenize = Tokenize()
    mix: MixConfig = MixConfig(sequence_length=32, sequences=24)
    train: Train = Train()


def ingest_rows(config: Ingest, out: Path) -> dict[str, Any]:
    """Rows of JSON lines by source, ten a shard; what a tombstone names keeps its place in the count, and no more."""
    asked = {"ids": [], "urls": []}
    if (out / "tombstones.json").exists():
        asked = json.loads((out / "tombstones.json").read_text())
    number, counts = -1, {}
    for source in config.sources:
        rows = [json.loads(line) for line in Path(source.path).read_text().splitlines()]
        for start in range(0, len(rows), A_SHARD):
            kept = [_row(source.name, r) for r in rows[start : start + A_SHARD]]
            kept = [r for r in kept if r["id"] not in asked["ids"] and not _from(r, asked["urls"])]
            number += 1
            if not kept:
                continue
            write_rows(out / "documents" / f"{number:05d}.jsonl.zst", kept)
            index = out / "ids" / f"{number:05d}.ids"
            index.parent.mkdir(exist_ok=True)
            np.array([id_hash(r["id"]) for r in kept], "<u8").tofile(index)
            counts[source.name] = counts.get(source.name, 0) + len(kept)
    return {"documents_out": sum(counts.values()), "documents_by_source": counts}


def _from(row: Row, urls: list[str]) -> bool:
    return bool(row["metadata"]["url"]) and normalised_url(row["metadata"]["url"]) in urls


def _row(source: str, row: dict[str, Any]) -> Row:
    metadata = {"source": source, "kind": "prose", "url": row.get("url"), "date": None, "licence": None}
    return {"text": row["text"], "id": f"{source}/{row['name']}", "metadata": metadata}


def deduplicate(config: Dedup, documents: Path, out: Path) -> dict[str, Any]:
    first: dict[str, str] = {}

    def judge(row: Row, place: int) -> Verdict:
        kept = first.setdefault(row["text"], row["id"])
        return KEEP if kept == row["id"] else remove("exact duplicate", duplicate_of=kept, similarity=1.0)

    return _sieved(documents, out, judge)


def filter_rows(config: Filter, documents: Path, out: Path) -> dict[str, Any]:
    def judge(row: Row, place: int) -> Verdict:
        words = row["text"].split()
        if len(words) < config.least_words:
            return remove("too few words", detail=f"{len(words)} words", spans=[[0, len(row["text"])]])
        found = EMAIL.finditer(row["text"]) if config.redact else ()
        edits = [Edit(m.start(), m.end(), "e-mail", "<email>") for m in found]
        return Verdict(edits=edits, values={"digits": sum(c.isdigit() for c in row["text"]) / len(row["text"])})

    return _sieved(documents, out, judge)


def _sieved(documents: Path, out: Path, judge: Any) -> dict[str, Any]:
    names = shards(documents)
    for shard in names:
        sieve_shard(shard, out, judge)
    metrics = conclude(out, names)
    shutil.rmtree(out / "work")
    return metrics


def tokenize_rows(config: Tokenize, documents: Path, out: Path) -> dict[str, Any]:
    """Bytes are tokens, three above; each tenth document is held out."""
    streams: dict[tuple[str, str], list[tuple[int, np.ndarray, int]]] = {}
    for shard in shards(documents):
        for row in read_rows(shard):
            split = "held_out" if id_hash(row["id"]) % 10 == 0 else "train"
            data = row["text"].encode()
            tokens = np.array([0, *(b + 3 for b in data), 1], "<u2")
            streams.setdefault((split, row["metadata"]["source"]), []).append((id_hash(row["id"]), tokens, len(data)))
    written = {}
    for (split, source), documents_ in sorted(streams.items()):
        entries, held = [], []
        for entry in sorted(documents_, key=lambda d: d[0]):
            held.append(entry)
            if sum(len(t) for _, t, _ in held) >= A_TOKEN_SHARD:
                entries.append(_token_shard(out, split, source, len(entries), held))
                held = []
        if held:
            entries.append(_token_shard(out, split, source, len(entries), held))
        written[split, source] = (entries, sum(size for _, _, size in documents_))
    write_index(out / "tokens", 259, "0" * 64, written)
    tokens = {s: sum(e.tokens for e in entries) for (split, s), (entries, _) in written.items() if split == "train"}
    return {"tokens": sum(tokens.values()), "tokens_by_source": tokens, "documents": sum(map(len, streams.values()))}


def _token_shard(out: Path, split: str, source: str, number: int, held: list[tuple[int, np.ndarray, int]]) -> Any:
    return write_shard(
        out / "tokens", split, source, number, [t for _, t, _ in held], [i for i, _, _ in held], "uint16"
    )


def mix_rows(config: MixConfig, tokens: Path, out: Path) -> dict[str, Any]:
    return mix(config, tokens, out, 0, workers=0, progress=silent)


def train_model(config: Train, tokens: Path, mixture: Path, out: Path) -> dict[str, Any]:
    (out / "model").mkdir()
    (out / "model" / "weights.txt").write_text((mixture / "mixture.json").read_text())
    return {"steps": config.steps}


def make_page(config: Frozen, documents: Path, model: Path, out: Path) -> dict[str, Any]:
    """A page that shows the first document of each shard, as a report might."""
    shown = [next(read_rows(shard), {"text": ""})["text"] for shard in shards(documents)]
    (out / "view").mkdir()
    (out / "view" / "page.html").write_text("\n".join(shown))
    return {"shown": len(shown)}


ingest = stage("ingest", version=1, sources=lambda config: {s.name: _hash(s.path) for s in config.sources})(ingest_rows)
dedup = stage("dedup", version=1)(deduplicate)
filter_ = stage("filter", version=1)(filter_rows)
tokenize = stage("tokenize", version=1)(tokenize_rows)
mix_ = stage("mix", version=1)(mix_rows)
pretrain = stage("pretrain", version=1)(train_model)
page = stage("page", version=1)(make_page)


def _hash(path: str) -> str:
    import hashlib

    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def pipeline(recipe: Recipe) -> Artifact:
    documents = ingest(recipe.ingest)
    filtered = filter_(recipe.filter, documents=dedup(recipe.dedup, documents=documents))
    tokens = tokenize(recipe.tokenize, documents=filtered)
    model = pretrain(recipe.train, tokens=tokens, mixture=mix_(recipe.mix, tokens=tokens))
    return page(Frozen(), documents=filtered, model=model)


def written_source(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def planted(tmp: Path) -> dict[str, Path]:
    """Two sources: web/0 … web/34 with known duplicates, short texts and addresses; and notes/0 … notes/11."""
    web = [
        {"name": str(i), "url": f"https://example.org/{i}", "text": f"Page {i}: the mill grinds {i * 7} sacks a day."}
        for i in range(35)
    ]
    web[3]["text"] = "The miller's secret recipe: rye, oats | and a *pinch* of salt.\nSecond line of it, to be found."
    web[17]["text"] = web[28]["text"] = web[3]["text"]
    web[5]["text"] = "tiny"
    web[9]["text"] = "Write to miller@example.org or to baker@example.org about the flour."
    notes = [{"name": str(i), "text": f"Note {i} on stones, sieves and sacks, {i * i} of them."} for i in range(12)]
    return {
        "web": written_source(tmp / "web.jsonl", web),
        "notes": written_source(tmp / "notes.jsonl", notes),
    }


def recipe_of(files: dict[str, Path], name: str = "toy", **sections: Any) -> Recipe:
    sources = [ToySource(name=source, path=str(path)) for source, path in files.items()]
    return Recipe(name=name, ingest=Ingest(sources=sources), **sections)


def go(store: Store, recipe: Recipe, **asked: Any) -> dict[str, Any]:
    until = asked.pop("until", None)
    return Plain(store, Execution(workers=0, threads=1), **asked).run(pipeline, recipe, until)
