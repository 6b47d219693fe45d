"""Trace and takedown over the real stages: a recipe of JSON lines and text files, from ingest to token shards."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
import zstandard

from gristmill.data.dedup.index import read_manifest
from gristmill.data.dedup.parts import Part, Parts
from gristmill.data.documents import id_hash
from gristmill.flows import takedown, tombstones
from gristmill.flows.cards import card_markdown
from gristmill.flows.corpus_results import Result, chain_of_run, results_of
from gristmill.flows.corpus_trace import trace
from gristmill.flows.inspection import verify_store
from gristmill.flows.lock import StoreLock
from gristmill.flows.r1 import r1
from gristmill.flows.recipe import load_recipe
from gristmill.flows.runners import Plain
from gristmill.flows.store import Store

CORPUS = ("ingest", "dedup", "spans", "filter", "decontaminate", "tokenize")
WORDS = ["mill", "stone", "grain", "sieve", "flour", "sack", "wheel", "water", "miller", "baker"]
WORDS += ["the", "and", "of", "to", "in", "that", "is", "on", "with", "for"]
SHARED = " ".join(f"shared{i:03d} words{i % 7}" for i in range(60))  # a paragraph that two documents have


def prose(seed: int, sentences: int = 12) -> str:
    """Sentences of words in a random order, about 800 characters; every document has a word of its own."""
    rng = random.Random(seed)
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(9, 16))).capitalize() + "." for _ in range(sentences)]
    lines[1] = f"Only here stands the quern{seed:05d} of the old house by the river."
    return " ".join(lines)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store after a run of the corpus stages, and the sources and recipe beside it."""
    place = tmp_path_factory.mktemp("real")
    rows = [{"name": f"page{i}", "url": f"http://example.org/p/{i}?utm_source=x", "text": prose(i)} for i in range(60)]
    rows[20]["text"] = rows[3]["text"]
    words = rows[5]["text"].split()
    rows[40]["text"] = " ".join([*words[:-3], "quite", "another", "end."])
    rows[7]["text"] = "Too short."
    rows[9]["text"] += f"\n\n{SHARED}"
    rows[50]["text"] += f"\n\n{SHARED}"
    (place / "web").mkdir()
    for number in range(2):
        lines = [json.dumps(row) + "\n" for row in rows[30 * number : 30 * number + 30]]
        (place / "web" / f"part{number}.jsonl").write_text("".join(lines))
    (place / "books").mkdir()
    for number in range(6):
        (place / "books" / f"book{number}.txt").write_text(prose(1000 + number, 40))
    recipe = {
        "extends": "smoke",
        "name": "small",
        "ingest": {
            "documents_per_shard": 15,
            "sources": [
                {"type": "files", "name": "web", "paths": [str(place / "web" / "*.jsonl")], "id_field": "name"},
                {"type": "files", "name": "books", "paths": [str(place / "books" / "*.txt")]},
            ],
        },
        "spans": {},
        "mix": {"weights": {}},
        "filter": {"profiles": {"prose": {"length": {"least_characters": 40}}}},
        "tokenize": {"vocab_size": 512, "sample_bytes": 100_000, "held_out": 0.1, "shard_tokens": 4000},
        "execution": {"workers": 0, "threads": 1},
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    go(Store(place / "store"), place)
    return place


def go(store: Store, place: Path, until: str = "mix") -> dict[str, Any]:
    asked = load_recipe(str(place / "recipe.yaml"))
    return Plain(store, asked.execution).run(r1, asked, until)


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Store:
    """A copy of that store."""
    shutil.copytree(made / "store", tmp_path / "store")
    return Store(tmp_path / "store")


def take_out(store: Store, *identifiers: str, url: str | None = None) -> takedown.Settled:
    with StoreLock(store):
        targets = takedown.find_targets(store, identifiers, url)
        tombstones.record(store, takedown.graves(targets, url, "asked for"))
        return takedown.settle(store, say=lambda _: None)


def result(store: Store, stage: str) -> Result:
    record = store.runs()[-1]
    return next(r for r in results_of(store, record) if r.stage == stage)


def holding(store: Store, text: str) -> list[str]:
    found = []
    for path in sorted(p for p in store.local.rglob("*") if p.is_file()):
        data = path.read_bytes()
        data = zstandard.ZstdDecompressor().stream_reader(data).read() if path.suffix == ".zst" else data
        if text.encode() in data or text.lower().encode() in data:
            found.append(path.relative_to(store.local).as_posix())
    return found


def file_hashes(store: Store, stage: str) -> dict[str, str]:
    only = result(store, stage)
    folder = store.folder(stage, only.key)
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in only.files}


@pytest.mark.parametrize(
    ("identifier", "last", "reason"),
    [
        ("web/page0", "decontaminate", ""),
        ("books/book2.txt", "decontaminate", ""),
        ("web/page20", "dedup", "exact"),
        ("web/page40", "dedup", "near"),
        ("web/page7", "filter", "length"),
    ],
)
def test_a_trace_over_the_real_stages(made: Path, identifier: str, last: str, reason: str) -> None:
    store = Store(made / "store")
    found = trace(store, store.runs()[-1], identifier)
    step = found["stages"][-1]
    assert step["stage"] == last
    assert step.get("reason", "").startswith(reason)
    if step["outcome"] == "removed":
        assert not found["tokens"]
        assert step["because"].get("duplicate_of") == {"web/page20": "web/page3", "web/page40": "web/page5"}.get(
            identifier
        )
        return
    from tokenizers import Tokenizer

    (at,) = found["tokens"]
    folder = store.folder(at["stage"], at["key"])
    stream = np.fromfile(folder / "tokens" / at["split"] / at["source"] / f"{at['shard']:05d}.tokens", "<u2")
    own = stream[at["start"] : at["start"] + at["tokens"]].tolist()
    text = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json")).decode(own)
    assert f"quern{0 if identifier.startswith('web') else 1002:05d}" in text


def test_every_stage_has_a_card_of_its_files(made: Path) -> None:
    store = Store(made / "store")
    shown = {}
    for stage in (*CORPUS, "mix"):
        only = result(store, stage)
        shown[stage] = card_markdown(only.manifest, store.folder(stage, only.key))
        assert len(shown[stage]) < 500_000
    for stage in CORPUS[:-1]:
        assert "## Funnel" in shown[stage]
        assert "### Kept as they are" in shown[stage]
    assert "## Duplicates, as diffs" in shown["dedup"]
    assert "+ quite another end." in shown["dedup"]
    assert "## Compression" in shown["tokenize"]
    assert "## Tokens by source, before and after" in shown["mix"]
    assert "## What each packing does" in shown["mix"]


def test_the_text_goes_and_no_other_shard_changes(store: Store) -> None:
    before = {stage: file_hashes(store, stage) for stage in CORPUS}
    shard = trace(store, store.runs()[-1], "web/page12")["shard"]
    assert holding(store, "quern00012")
    take_out(store, "web/page12")
    assert holding(store, "quern00012") == []
    assert verify_store(store)["bad"] == []
    for stage in CORPUS:
        after = file_hashes(store, stage)
        changed = {name for name in before[stage].keys() | after.keys() if before[stage].get(name) != after.get(name)}
        own = {n for n in changed if n.startswith(("documents/", "removed/", "changed/", "ids/", "index/"))}
        assert all(name.split("/")[1].startswith(shard) for name in own - {"index/index.json"})
        shards = {
            tuple(n.split(".")[0].rsplit("/", 3)[1:]) for n in changed if n.startswith("tokens/") and "index" not in n
        }
        assert len(shards) == (stage == "tokenize")
        rest = {n for n in changed - own if not n.startswith("tokens/")}
        assert rest <= {"funnel.jsonl", "histograms.jsonl", "samples.jsonl", "pairs.jsonl", "tombstones.json"}


def test_the_same_recipe_takes_the_amended_results(store: Store, made: Path) -> None:
    take_out(store, "web/page12", url="https://example.org/p/33")
    states = {entry["stage"]: entry["state"] for entry in go(store, made)["stages"]}
    assert states == {**dict.fromkeys(CORPUS, "cached"), "exam": "cached", "mix": "completed"}


def test_ingest_from_the_beginning_gives_what_was_amended(store: Store, made: Path, tmp_path: Path) -> None:
    take_out(store, "web/page12", "books/book2.txt", url="https://example.org/p/33")
    fresh = Store(tmp_path / "fresh")
    fresh.local.mkdir()
    shutil.copy(store.local / tombstones.TOMBSTONES, fresh.local)
    go(fresh, made, until="dedup")
    amended, anew = result(store, "ingest"), result(fresh, "ingest")
    assert amended.key == anew.key
    assert amended.manifest["metrics"] == anew.manifest["metrics"]
    one, other = (file_hashes(s, "ingest") for s in (store, fresh))
    content = [n for n in one.keys() | other.keys() if not n.startswith("log/") and n != "samples.jsonl"]
    assert {n: one.get(n) for n in content} == {n: other.get(n) for n in content}
    # nothing was a duplicate of what went, so that dedup decides as before
    one, other = (file_hashes(s, "dedup") for s in (store, fresh))
    content = [n for n in one if n.startswith(("documents/", "removed/", "index/"))]
    assert {n: one[n] for n in content} == {n: other.get(n) for n in content}


def test_the_index_of_dedup_no_longer_knows_it(store: Store) -> None:
    take_out(store, "web/page3")
    dedup = result(store, "dedup")
    folder = store.folder("dedup", dedup.key) / "index"
    from gristmill.data.dedup import DedupConfig

    manifest = read_manifest(str(folder), DedupConfig.model_validate(dedup.manifest["config"]))
    assert manifest["documents"] == 65
    parts = Parts.listed([], [folder / part["name"] for part in manifest["parts"]])
    ids = parts.ids(np.arange(parts.documents, dtype=np.uint64))
    assert len(ids) == 65
    assert "web/page3" not in ids
    for part in manifest["parts"]:
        for name, facts in part["files"].items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == facts["sha256"]
    assert isinstance(parts.all[0], Part)
    assert trace(store, store.runs()[-1], "web/page20")["stages"][-1]["outcome"] == "removed"  # decisions stay


def test_token_shards_are_whole_and_count_right(store: Store, made: Path) -> None:
    from gristmill.data.shards import TokenShards

    before = result(store, "tokenize").manifest["metrics"]
    take_out(store, "web/page12", "books/book2.txt")
    tokens = result(store, "tokenize")
    shards = TokenShards(store.folder("tokenize", tokens.key) / "tokens")
    assert shards.verify() == []
    assert shards.find(id_hash("web/page12")) == []
    assert len(shards.find(id_hash("web/page13"))) == 1
    metrics = tokens.manifest["metrics"]
    last = chain_of_run(store, store.runs()[-1])[-1]
    kept = [row for shard in last.shards for row in last.rows("documents", shard)]
    assert metrics["documents"] == len(kept) == before["documents"] - 2
    assert metrics["bytes"] == sum(len(r["text"].encode()) for r in kept)
    assert sum(s["bytes"] for s in shards.index["streams"]) == metrics["bytes"]


@pytest.mark.slow
def test_a_whole_run_names_the_models_that_saw_it(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "store", tmp_path / "store")
    store = Store(tmp_path / "store")
    go(store, made, until="report")
    record = store.runs()[-1]
    last = chain_of_run(store, record)[-1]
    ids = [row["id"] for row in last.rows("documents", last.shards[0])]
    seen = next(i for i in ids if trace(store, record, i)["trained"] and trace(store, record, i)["trained"][0]["steps"])
    (trained,) = trace(store, record, seen)["trained"]
    models = {d["stage"] for d in trained["used_for"]}
    assert {"cold_start", "rl_zero", "rl", "export"} <= models
    take_out(store, seen)
    (grave,) = tombstones.read(store)
    assert {row["stage"] for row in grave["results"]} == models | {"pretrain"}
    assert store.manifest("pretrain", trained["key"]) is not None
    record = go(store, made, until="report")
    states = {entry["stage"]: entry["state"] for entry in record["stages"]}
    assert {s for s, state in states.items() if state == "cached"} == {*CORPUS, "exam", "problems"}
