"""Deduplication against brute force; the same bytes whoever works and whatever happens to them."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.data.dedup import DedupConfig, deduplicate
from gristmill.data.dedup.clusters import UnionFind, jaccard
from gristmill.data.dedup.signatures import MinHash, normalised
from gristmill.data.documents import read_rows, shards
from gristmill.data.executor import close_cluster, cluster_client
from gristmill.data.stage_types import silent

WORDS = [f"w{i}" for i in range(3000)]


def planted(count: int, seed: int = 0) -> list[dict]:
    """Documents of random words; every fourth is an earlier one with a few words changed, so that Jaccards spread."""
    rng = np.random.default_rng(seed)
    texts: list[list[str]] = []
    for i in range(count):
        if i % 4 == 3:
            text = list(texts[int(rng.integers(len(texts)))])
            for _ in range(int(rng.integers(0, 12))):
                text[int(rng.integers(len(text)))] = WORDS[int(rng.integers(3000))]
        else:
            text = [WORDS[int(w)] for w in rng.integers(0, 3000, int(rng.integers(60, 240)))]
        texts.append(text)
    return [
        {"text": " ".join(t), "id": f"d{i}", "metadata": {"source": "planted", "kind": "prose"}}
        for i, t in enumerate(texts)
    ]


def run(documents: Path, out: Path, workers: int = 0, **config) -> dict:
    out.mkdir(exist_ok=True)
    return deduplicate(DedupConfig(**config), documents, out, workers=workers, progress=silent)


def test_against_brute_force_jaccard(tmp_path: Path, laid_out) -> None:
    rows = planted(2000)
    config = DedupConfig(threshold=0.75)
    run(laid_out(tmp_path / "in", rows), tmp_path / "out", threshold=0.75)
    removed = {r["id"]: r for s in sorted((tmp_path / "out" / "removed").glob("*")) for r in read_rows(s)}
    grams = [{tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (r["text"].split() for r in rows)]
    holders: dict[tuple, list[int]] = {}
    for i, own in enumerate(grams):
        for gram in own:
            holders.setdefault(gram, []).append(i)
    shared = {pair for members in holders.values() for pair in itertools.combinations(members, 2)}
    true = {(a, b) for a, b in shared if len(grams[a] & grams[b]) / len(grams[a] | grams[b]) >= config.threshold}
    assert len(true) > 200
    sets = UnionFind(len(rows))
    for a, b in true:
        sets.join(a, b)
    expected = {f"d{i}" for i in range(len(rows)) if sets.find(i) != i}
    found = set(removed)
    recall, precision = len(found & expected) / len(expected), len(found & expected) / len(found)
    assert recall >= 0.97, recall
    assert precision >= 0.99, precision
    for r in removed.values():  # a removed document is removed for one that stays
        assert r["duplicate_of"] not in removed


def test_exact_and_near_are_told_apart_and_the_first_is_kept(tmp_path: Path, laid_out) -> None:
    text = " ".join(WORDS[:200])
    rows = [
        {"text": t, "id": i, "metadata": {"source": "s", "kind": "prose"}}
        for i, t in {
            "one": text,
            "shouted": text.upper(),
            "near": text.replace("w100 ", "changed "),
            "other": " ".join(WORDS[500:700]),
            "short": "two words",
            "short again": "Two  words",
        }.items()
    ]
    metrics = run(laid_out(tmp_path / "in", rows), tmp_path / "out")
    kept = [r["id"] for s in shards(tmp_path / "out") for r in read_rows(s)]
    assert kept == ["one", "other", "short"]
    assert (metrics["exact"], metrics["near"], metrics["clusters"]) == (2, 1, 2)
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert samples[0]["removed"] == "near"
    assert "−w100" in samples[0]["differs"]
    assert "+changed" in samples[0]["differs"]


def test_workers_change_no_byte(tmp_path: Path, bytes_of, laid_out) -> None:
    documents = laid_out(tmp_path / "in", planted(600), 100)
    made = []
    for workers in (0, 1, 2, 4):
        run(documents, tmp_path / f"out{workers}", workers)
        made.append(bytes_of(tmp_path / f"out{workers}"))
    close_cluster()
    assert len(set(made)) == 1


def test_a_killed_worker_changes_no_byte(tmp_path: Path, bytes_of, laid_out) -> None:
    documents = laid_out(tmp_path / "in", planted(1200), 50)
    run(documents, tmp_path / "undisturbed")
    client = cluster_client(2)
    pids = list(client.run(os.getpid).values())

    def kill() -> None:
        while not any((tmp_path / "out" / "work").glob("*.npz")):
            time.sleep(0.005)
        os.kill(pids[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    run(documents, tmp_path / "out", 2)
    killer.join()
    close_cluster()
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "undisturbed")


@pytest.mark.parametrize("left", ["*.npz", "removals.json", "0000?.done"])
def test_taken_up_from_any_part(left: str, tmp_path: Path, monkeypatch, bytes_of, laid_out) -> None:
    """A run that stops after each kind of intermediate file goes on from it."""
    import gristmill.data.dedup as module

    documents = laid_out(tmp_path / "in", planted(300), 100)
    run(documents, tmp_path / "undisturbed")

    class Stop(Exception):
        pass

    def stopped(done: int, total: int, **_: float) -> None:
        if any((tmp_path / "out" / "work").glob(left)):
            raise Stop

    (tmp_path / "out").mkdir()
    with pytest.raises(Stop):
        module.deduplicate(DedupConfig(), documents, tmp_path / "out", workers=0, progress=stopped)
    run(documents, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "undisturbed")


@given(st.integers(2, 40), st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=60))
@settings(max_examples=50, deadline=None)
def test_union_find(count: int, joins: list[tuple[int, int]]) -> None:
    joins = [(a % count, b % count) for a, b in joins]
    sets = UnionFind(count)
    plain = [{i} for i in range(count)]
    for a, b in joins:
        sets.join(a, b)
        merged = plain[a] | plain[b]
        for member in merged:
            plain[member] = merged
    assert [sets.find(i) for i in range(count)] == [min(plain[i]) for i in range(count)]


def test_signatures_estimate_jaccard() -> None:
    minhash = MinHash(5, 64, 8)
    a, b = " ".join(WORDS[:400]), " ".join(WORDS[100:500])
    known: dict[str, int] = {}
    one, other = minhash.shingles(a, known), minhash.shingles(b, known)
    estimate = float((minhash.minima(one) == minhash.minima(other)).mean())
    true = jaccard(one, other)
    # 512 minima: a standard error of sqrt(J(1-J)/512) ≈ 0.022, and four of them.
    assert abs(estimate - true) < 4 * (true * (1 - true) / 512) ** 0.5
    assert abs(true - 296 / 496) < 1e-9


def test_normalising_folds_case_width_and_space() -> None:
    assert normalised("Ｆｕｌｌ  WIDTH\n\ttext") == "full width text"
