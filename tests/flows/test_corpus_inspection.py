"""`gristmill data show`, `stats` and `diff` tell what the files of a store say, and hold no more than a shard."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gristmill.data.documents import read_rows
from gristmill.flows.corpus_diff import difference
from gristmill.flows.corpus_results import Result, chain_of_run, corpus_of
from gristmill.flows.corpus_rows import Asked, as_lines, coloured, found_rows, visible
from gristmill.flows.data_cli import data_app, histogram_lines
from gristmill.flows.errors import UsageError
from gristmill.flows.store import Store
from tests.flows import corpus_toys as toys

LOOSE = toys.Filter(least_words=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two runs over the same sources, of which the second filters less."""
    folder = tmp_path_factory.mktemp("corpus")
    files = toys.planted(folder)
    toys.go(Store(folder / "store"), toys.recipe_of(files))
    toys.go(Store(folder / "store"), toys.recipe_of(files, name="loose", filter=LOOSE))
    return folder


@pytest.fixture
def store(place: Path) -> Store:
    return Store(place / "store")


def said(place: Path, *arguments: str) -> str:
    result = CliRunner().invoke(data_app, [*arguments, "--store", str(place / "store")], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def rows_of(result: Result, kind: str) -> list[dict[str, Any]]:
    """What a result's shards hold, read by themselves."""
    folder = result.store.folder(result.stage, result.key)
    return [row for shard in sorted((folder / kind).glob("*.zst")) for row in read_rows(shard)]


@pytest.mark.parametrize(("outcome", "kind"), [("kept", "documents"), ("removed", "removed")])
@pytest.mark.parametrize("stage", ["ingest", "dedup", "filter"])
def test_show_gives_every_row_of_the_shards(store: Store, stage: str, outcome: str, kind: str) -> None:
    result = corpus_of(store, stage)[-1]
    shown = [row["id"] for row in found_rows(result, Asked(outcome))]
    assert shown == [row["id"] for row in rows_of(result, kind)]


def test_show_by_source_reason_and_id(store: Store, place: Path) -> None:
    result = corpus_of(store, "dedup")[-1]
    assert {row["source"] for row in found_rows(result, Asked("kept", source="notes"))} == {"notes"}
    assert [r["id"] for r in found_rows(result, Asked("removed", reason="EXACT"))] == ["web/17", "web/28"]
    assert not list(found_rows(result, Asked("removed", reason="near")))
    assert "duplicate_of: web/3" in said(place, "show", "dedup", "--id", "web/17")
    assert "has no such documents" in said(place, "show", "dedup", "--id", "web/999")


def test_what_decided_is_marked(store: Store, place: Path) -> None:
    strict = store.runs()[0]
    filtered = next(e["key"] for e in strict["stages"] if e["stage"] == "filter")
    assert "⟦tiny⟧" in said(place, "show", filtered, "--reason", "few")
    assert "Write to ⟦miller@example.org⟧ or to ⟦baker@example.org⟧" in said(place, "show", "filter", "--changed")
    (row,) = [json.loads(line) for line in said(place, "show", "filter", "--id", "web/9", "--json").splitlines()]
    assert row["outcome"] == "changed"
    assert [row["text"][a:b] for a, b in row["spans"]] == ["miller@example.org", "baker@example.org"]


def test_a_changed_document_is_shown_without_its_input_too(store: Store, tmp_path: Path) -> None:
    files = toys.planted(tmp_path)
    own = Store(tmp_path / "store")
    toys.go(own, toys.recipe_of(files))
    (before,) = own.manifests("dedup")
    own.discard("dedup", before["key"])
    (manifest,) = own.manifests("filter")
    (row,) = found_rows(Result(own, manifest), Asked("changed"))
    assert row["text"] == "Write to <email> or to <email> about the flour."
    assert row["spans"] == []


def test_a_document_does_not_steer_the_terminal() -> None:
    assert visible("a\x1b[2J\x9bb\n") == "a�[2J�b�"
    assert coloured("⟦x⟧") == "\x1b[1;31mx\x1b[0m"
    unclosed = {"outcome": "kept", "id": "a/1", "source": "a", "reason": "", "text": "a ⟦ of its own", "spans": []}
    assert as_lines(unclosed, 80, colour=True)[-1].endswith(" of its own\x1b[0m")


def test_stats_add_up(place: Path) -> None:
    found = json.loads(said(place, "stats", "filter", "--json"))
    whole = found["by_source"][-1]
    assert whole["source"] == "all"
    assert whole["documents in"] == 45
    assert whole["kept"] + whole["changed"] + whole["removed"] == 45
    assert sum(n for bins in found["histograms"]["characters"].values() for n in bins.values()) == 45
    assert found["by_reason"] == [
        {"outcome": "changed", "reason": "e-mail", "documents": 1, "bytes in": 68, "bytes out": 47}
    ]
    lines = said(place, "stats", "dedup")
    assert "exact duplicate" in lines
    assert "characters: share" in lines


def test_stats_of_a_stage_without_a_funnel_are_its_metrics(place: Path) -> None:
    shown = said(place, "stats", "ingest")
    assert "documents_out" in shown
    assert "web" in shown
    assert json.loads(said(place, "stats", "tokenize", "--json"))["metrics"]["documents"] == 45


def test_stats_of_a_run_are_its_stages(place: Path) -> None:
    rows = json.loads(said(place, "stats", "--json"))
    assert [(r["stage"], r["documents in"], r["documents out"]) for r in rows] == [
        ("ingest", 47, 47),
        ("dedup", 47, 45),
        ("filter", 45, 45),
    ]


def test_a_histogram_is_of_shares_of_each_outcome() -> None:
    lines = histogram_lines({"kept": {32.0: 3, 64.0: 1}, "removed": {64.0: 2}})
    assert len(lines) == 2
    assert "75.0%" in lines[0]
    assert lines[1].count("█") == 28 // 4 + 28
    assert "100.0%" in lines[1]


def kept_ids(chain: list[Result]) -> set[str]:
    return {row["id"] for row in rows_of(chain[-1], "documents")}


def test_diff_names_the_rule_that_decided(store: Store, place: Path) -> None:
    runs = store.runs()
    first, second = (chain_of_run(store, run) for run in runs)
    one, other = difference(first, second)
    assert one.counts == {}
    assert other.counts == {("filter", "too few words"): 1}
    assert [row["id"] for row in other.examples] == ["web/5"]
    assert kept_ids(second) - kept_ids(first) == {"web/5"}
    shown = said(place, "diff", runs[0]["run"], runs[1]["run"])
    assert "kept 1 document that" in shown
    assert "⟦tiny⟧" in shown
    parts = json.loads(said(place, "diff", first[-1].key, second[-1].key, "--json"))
    assert [p["documents"] for p in parts] == [0, 1]


def test_diff_of_other_sources_agrees_with_sets_of_ids(store: Store, place: Path, tmp_path: Path) -> None:
    files = toys.planted(tmp_path)
    lines = files["web"].read_text().splitlines()
    files["web"].write_text("\n".join(line for i, line in enumerate(lines) if i not in (2, 3, 30)) + "\n")
    more = toys.written_source(tmp_path / "more.jsonl", [{"name": "0", "text": "One more document of words."}])
    toys.go(store, toys.recipe_of({**files, "more": more}, name="other"))
    first, second = chain_of_run(store, store.runs()[0]), chain_of_run(store, store.runs()[-1])
    one, other = difference(first, second)
    assert one.documents == len(kept_ids(first) - kept_ids(second))
    assert other.documents == len(kept_ids(second) - kept_ids(first))
    assert one.counts == {("ingest", "not ingested"): 3}
    # web/17 was web/3's duplicate, and is the first of its text where that is gone
    assert other.counts == {("ingest", "not ingested"): 1, ("dedup", "exact duplicate"): 1}
    assert {row["id"] for row in other.examples} == {"more/0", "web/17"}


def test_diff_counts_what_only_one_edited(place: Path, store: Store) -> None:
    files = {name: place / f"{name}.jsonl" for name in ("web", "notes")}
    plain = toys.go(store, toys.recipe_of(files, name="plain", filter=toys.Filter(redact=False)), until="filter")
    one, other = difference(chain_of_run(store, store.runs()[0]), chain_of_run(store, plain))
    assert one.edited == {("filter", "e-mail"): 1}
    assert (one.counts, other.counts, other.edited) == ({}, {}, {})
    assert "alone edited" in said(place, "diff", store.runs()[0]["run"], plain["run"])


def test_diff_in_many_parts_is_the_same(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (chain_of_run(store, run) for run in store.runs()[:2])
    whole = difference(first, second)
    monkeypatch.setattr("gristmill.flows.corpus_diff.PART_ENTRIES", 10)
    assert difference(first, second) == whole


def test_diff_holds_no_more_than_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """900 removed rows of 9 KB, 8 MB in all: what is held is a few rows and the entries of a shard."""
    monkeypatch.setattr(toys, "A_SHARD", 100)
    rows = [{"name": str(i), "text": f"{i} " * 40 + "7" * 9000} for i in range(900)]
    files = {"web": toys.written_source(tmp_path / "web.jsonl", rows)}
    store = Store(tmp_path / "store")
    first = toys.go(store, toys.recipe_of(files), until="filter")
    second = toys.go(store, toys.recipe_of(files, filter=toys.Filter(least_words=99)), until="filter")
    chains = [chain_of_run(store, run) for run in (first, second)]
    tracemalloc.start()
    one, _ = difference(*chains)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert one.counts == {("filter", "too few words"): 900}
    assert peak < 2 << 20


def test_names_that_are_not_there_are_refused(store: Store, place: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'filter'"):
        corpus_of(store, "filte")
    with pytest.raises(UsageError, match="holds no documents"):
        said(place, "show", "pretrain")
    with pytest.raises(UsageError, match="has no run"):
        corpus_of(Store(place / "nowhere"), None)
