"""A trace agrees with what the shards, the token streams and the batches hold, each read by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from gristmill.data.mixture import Mixture
from gristmill.data.shards import TokenShards
from gristmill.flows.corpus_trace import describe, trace
from gristmill.flows.data_cli import data_app
from gristmill.flows.errors import UsageError
from gristmill.flows.store import Store
from tests.flows import corpus_toys as toys


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("corpus")
    store = Store(folder / "store")
    toys.go(store, toys.recipe_of(toys.planted(folder)))
    return store


def traced(store: Store, identifier: str) -> dict[str, Any]:
    return trace(store, store.runs()[-1], identifier)


def folder(store: Store, stage: str) -> Path:
    (manifest,) = store.manifests(stage)
    return store.folder(stage, manifest["key"])


def tokens_of(text: str) -> list[int]:
    return [0, *(b + 3 for b in text.encode()), 1]


@pytest.mark.parametrize("identifier", [f"web/{i}" for i in range(35)] + [f"notes/{i}" for i in range(12)])
def test_every_document_is_found_where_it_lies(store: Store, identifier: str) -> None:
    found = traced(store, identifier)
    number = int(identifier.split("/")[1])
    first = 0 if identifier.startswith("web") else 4
    assert (found["shard"], found["place"]) == (f"{first + number // 10:05d}", number % 10)
    outcomes = {step["stage"]: step["outcome"] for step in found["stages"]}
    if identifier in ("web/17", "web/28"):
        assert outcomes == {"ingest": "kept", "dedup": "removed"}
        assert found["stages"][-1]["because"]["duplicate_of"] == "web/3"
        assert found["tokens"] == found["trained"] == []
        return
    filtered = {"web/9": "changed", "web/5": "removed"}.get(identifier, "kept")
    assert outcomes == {"ingest": "kept", "dedup": "kept", "filter": filtered}
    if filtered == "removed":
        assert found["stages"][-1]["because"]["detail"] == "1 words"
        return
    (at,) = found["tokens"]
    stream = np.fromfile(
        folder(store, "tokenize") / "tokens" / at["split"] / at["source"] / f"{at['shard']:05d}.tokens", "<u2"
    )
    assert stream[at["start"] : at["start"] + at["tokens"]].tolist() == tokens_of(found["stages"][-1]["text"])


def test_steps_are_those_whose_batches_hold_the_document(store: Store) -> None:
    """Against a search in every batch of the run: documents are told apart by the bytes of their numbers."""
    mixture = Mixture(folder(store, "mix"), TokenShards(folder(store, "tokenize") / "tokens"))
    rows = mixture.batch(np.arange(24)).tokens
    for i in (0, 1, 8, 16, 22, 31):
        found = traced(store, f"web/{i}")
        if found["tokens"][0]["split"] == "held_out":
            continue
        needle = f"Page {i}: the mill".encode()
        text = ["".join(chr(t - 3) if t >= 3 else "|" for t in row) for row in rows]
        positions = [p for p, row in enumerate(text) if needle.decode() in row]
        (trained,) = found["trained"]
        assert set(positions) <= set(trained["positions"])
        assert set(trained["steps"]) == {p // 4 for p in trained["positions"]}
        assert positions or not trained["positions"] or len(trained["positions"]) < 3


def test_checkpoints_and_what_was_made_of_them_are_named(store: Store) -> None:
    found = traced(store, "web/3")
    (trained,) = found["trained"]
    (model,) = store.manifests("pretrain")
    assert (trained["stage"], trained["key"]) == ("pretrain", model["key"])
    lines = describe(found)
    assert f"  {'pretrain':<14} {model['key']}" in lines[-1]
    assert "step" in lines[-1]


def test_edits_are_told(store: Store) -> None:
    lines = "\n".join(describe(traced(store, "web/9")))
    assert "characters [9, 27) → '<email>' (e-mail)" in lines


def test_no_corpus_file_is_read_but_the_documents_own_shard(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from gristmill.flows import corpus_results

    opened: list[str] = []
    real = corpus_results.read_rows

    def noting(path: Path) -> Any:
        opened.append(path.name)
        return real(path)

    monkeypatch.setattr(corpus_results, "read_rows", noting)
    traced(store, "web/22")
    assert set(opened) == {"00002.jsonl.zst"}


def test_an_unknown_id_is_refused_and_json_is_whole(store: Store) -> None:
    with pytest.raises(UsageError, match="no document of run"):
        traced(store, "web/999")
    result = CliRunner().invoke(data_app, ["trace", "web/3", "--json", "--store", store.uri], catch_exceptions=False)
    found = json.loads(result.output)
    assert found["url"] == "https://example.org/3"
    assert found["tombstone"] is None
