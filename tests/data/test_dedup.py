"""Deduplication against brute force; the same bytes whoever works and whatever happens to them."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from gristmill.data.dedup import DedupConfig, decide, deduplicate, group, sign
from gristmill.data.dedup.arrays import Arrays, write_arrays
from gristmill.data.dedup.decide import jaccards
from gristmill.data.documents import read_rows, shards
from gristmill.data.executor import close_cluster, cluster_client
from gristmill.data.stage_types import silent

WORDS = [f"w{i}" for i in range(3000)]


def row(text: str, identifier: str, **metadata) -> dict:
    known = {"source": "planted", "kind": "prose", "url": None, "date": None, "licence": None}
    return {"text": text, "id": identifier, "metadata": {**known, **metadata}}


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
    return [row(" ".join(t), f"d{i}") for i, t in enumerate(texts)]


def run(documents: Path, out: Path, workers: int = 0, **config) -> dict:
    out.mkdir(exist_ok=True)
    return deduplicate(DedupConfig(**config), documents, out, workers=workers, progress=silent)


def removed_rows(out: Path) -> dict[str, dict]:
    return {r["id"]: r for s in shards(out, "removed") for r in read_rows(s)}


def test_against_brute_force_jaccard(tmp_path: Path, laid_out) -> None:
    rows = planted(2000)
    run(laid_out(tmp_path / "in", rows), tmp_path / "out", threshold=0.75)
    removed = removed_rows(tmp_path / "out")
    grams = [{tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (r["text"].split() for r in rows)]
    holders: dict[tuple, list[int]] = {}
    for i, own in enumerate(grams):
        for gram in own:
            holders.setdefault(gram, []).append(i)
    shared = {pair for members in holders.values() for pair in itertools.combinations(members, 2)}
    alike = {(a, b): len(grams[a] & grams[b]) / len(grams[a] | grams[b]) for a, b in shared}
    true = {pair: j for pair, j in alike.items() if j >= 0.75}
    assert len(true) > 200
    expected = {f"d{b}" for _, b in true}  # a document goes if one before it is near enough
    found = set(removed)
    recall, precision = len(found & expected) / len(expected), len(found & expected) / len(found)
    assert recall >= 0.97, recall
    assert precision == 1, precision
    for identifier, r in removed.items():
        pair = (int(r["because"]["duplicate_of"][1:]), int(identifier[1:]))
        assert pair in true
        assert r["because"]["similarity"] == pytest.approx(true[pair], abs=1e-4)  # rounded to four digits
        best = min(a for a, b in true if b == pair[1])  # at worst LSH missed a better one
        assert pair[0] >= best


def test_exact_url_and_near_are_told_apart_and_the_first_is_kept(tmp_path: Path, laid_out) -> None:
    text = " ".join(WORDS[:200])
    rows = [
        row(text, "one", url="http://www.example.com/a/?utm_source=x"),
        row(text.upper(), "shouted"),
        row(text.replace("w100 ", "changed "), "near"),
        row(" ".join(WORDS[500:700]), "other"),
        row("two words", "short"),
        row("Two  words", "short again"),
        row("wholly different", "same page", url="https://example.com/a"),
        row("🙂", "face"),
        row("🙃", "another face"),
    ]
    metrics = run(laid_out(tmp_path / "in", rows, 4), tmp_path / "out", url=True)
    assert [r["id"] for s in shards(tmp_path / "out") for r in read_rows(s)] == [
        "one", "other", "short", "face", "another face",
    ]  # fmt: skip
    removed = removed_rows(tmp_path / "out")
    assert {i: (r["reason"], r["because"]["duplicate_of"]) for i, r in removed.items()} == {
        "shouted": ("exact", "one"),
        "near": ("near", "one"),
        "short again": ("exact", "short"),
        "same page": ("url", "one"),
    }
    assert [metrics[k] for k in ("exact", "url", "near", "clusters")] == [2, 1, 1, 2]
    (pair,) = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert (pair["removed"], pair["kept"]) == ("near", "one")
    assert pair["differs"] == "−w100 +changed"
    assert pair["similarity"] == round(191 / 201, 4)  # 196 shingles each, 5 of them of the changed word


def test_each_kind_can_be_off(tmp_path: Path, laid_out) -> None:
    text = " ".join(WORDS[:200])
    documents = laid_out(tmp_path / "in", [row(text, "a"), row(text, "b"), row(text + " more", "c")])
    assert run(documents, tmp_path / "exact", near=False)["removed_by_reason"] == {"exact": 1}
    assert run(documents, tmp_path / "near", exact=False)["removed_by_reason"] == {"near": 2}
    assert not list((tmp_path / "exact" / "index").glob("*.shingles"))


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"policy": "first"}, "short"),
        ({"policy": "longest"}, "long"),
        ({"policy": "quality"}, "good"),
        ({"policy": "source", "preferred_sources": ["wiki", "web"]}, "wiki"),
    ],
)
def test_policies(config: dict, kept: str, tmp_path: Path, laid_out) -> None:
    text = " ".join(WORDS[:200])
    rows = [
        row(text, "short", source="other", quality=-3),
        row(text + " tail", "good", source="web", quality=0.5),
        row(text + " a tail that is long", "long", source="other", quality=-0.5),
        row(text + " wiki", "wiki", source="wiki"),
    ]
    run(laid_out(tmp_path / "in", rows, 2), tmp_path / "out", **config)
    assert [r["id"] for s in shards(tmp_path / "out") for r in read_rows(s)] == [kept]
    assert {r["because"]["duplicate_of"] for r in removed_rows(tmp_path / "out").values()} == {kept}


def test_ties_of_a_policy_go_by_order_and_exact_duplicates_to_the_best(tmp_path: Path, laid_out) -> None:
    rows = [row("Some  words", "a", quality=1), row("some words", "b", quality=2), row("SOME WORDS", "c", quality=2)]
    run(laid_out(tmp_path / "in", rows, 1), tmp_path / "out", policy="quality")
    assert {i: r["because"]["duplicate_of"] for i, r in removed_rows(tmp_path / "out").items()} == {"a": "b", "c": "b"}


def test_a_quality_that_is_no_number_is_refused(tmp_path: Path, laid_out) -> None:
    documents = laid_out(tmp_path / "in", [row("text", "a", quality="high")])
    with pytest.raises(ValueError, match="'a' has the quality 'high', which is not a number"):
        run(documents, tmp_path / "out", policy="quality")


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="needs preferred_sources"):
        DedupConfig(policy="source")
    with pytest.raises(ValueError, match="all off"):
        DedupConfig(exact=False, near=False)


def test_nothing_and_empty_shards(tmp_path: Path, laid_out) -> None:
    (tmp_path / "none" / "documents").mkdir(parents=True)
    assert run(tmp_path / "none", tmp_path / "none-out")["documents_in"] == 0
    documents = laid_out(tmp_path / "in", planted(20), 10)
    laid_out(tmp_path / "empty", [], 1)
    from gristmill.data.documents import write_rows

    write_rows(documents / "documents" / "00005.jsonl.zst", [])
    assert run(documents, tmp_path / "out")["documents_in"] == 20


def test_a_shard_cut_short_is_refused(tmp_path: Path, laid_out) -> None:
    documents = laid_out(tmp_path / "in", planted(50))
    (shard,) = shards(documents)
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(ValueError, match="not a whole document shard"):
        run(documents, tmp_path / "out")


def test_the_pieces_in_which_the_work_is_cut_are_no_part_of_the_result(tmp_path: Path, monkeypatch, laid_out) -> None:
    documents = laid_out(tmp_path / "in", planted(200), 100)
    run(documents, tmp_path / "whole", buckets=4)
    for module in (sign, group):
        monkeypatch.setattr(module, "FENCES", 4)
    monkeypatch.setattr(sign, "COLUMNS_AT_ONCE", 8 * 2 * 100)  # two buckets' keys of a shard
    monkeypatch.setattr(group, "ENTRIES", 16)  # 16 ranges, more than there are fences
    monkeypatch.setattr(decide, "COMPARISONS", 7)
    monkeypatch.setattr(decide, "SHINGLES", 500)
    run(documents, tmp_path / "pieces", buckets=4)
    assert len(removed_rows(tmp_path / "whole")) > 10
    assert removed_rows(tmp_path / "pieces") == removed_rows(tmp_path / "whole")


def test_a_bucket_of_any_size_is_compared_with_its_leaders_alone(tmp_path: Path, laid_out) -> None:
    """Many documents with one core and ends of their own meet; the pairs held are linear in them."""
    rng = np.random.default_rng(1)
    core = WORDS[:60]
    rows = [row(" ".join(core + [WORDS[int(w)] for w in rng.integers(0, 3000, 30)]), f"d{i}") for i in range(400)]
    seen: list[int] = []
    original = decide.verified

    def counting(documents, candidates, parts, threshold):
        seen.append(max(len(c) for c in candidates))
        return original(documents, candidates, parts, threshold)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decide, "verified", counting)
        run(laid_out(tmp_path / "in", rows), tmp_path / "out", leaders=4, threshold=0.9)
    assert 4 <= max(seen) <= 4 * 24


def test_workers_change_no_byte(tmp_path: Path, bytes_of, laid_out) -> None:
    documents = laid_out(tmp_path / "in", planted(600), 100)
    made = []
    for workers in (0, 1, 2):
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
        while not any((tmp_path / "out" / "index").glob("*.keys")):
            time.sleep(0.005)
        os.kill(pids[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    run(documents, tmp_path / "out", 2)
    killer.join()
    close_cluster()
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "undisturbed")


@pytest.mark.parametrize("left", ["index/*.keys", "work/groups/*.rows", "work/decided/*.decided", "work/*.texts"])
def test_taken_up_from_any_part(left: str, tmp_path: Path, bytes_of, laid_out) -> None:
    """A run that stops after each kind of intermediate file goes on from it."""
    documents = laid_out(tmp_path / "in", planted(300), 100)
    run(documents, tmp_path / "undisturbed")

    class Stop(Exception):
        pass

    def stopped(done: int, total: int, **_: float) -> None:
        assert done <= total
        if any((tmp_path / "out").glob(left)):
            raise Stop

    (tmp_path / "out").mkdir()
    with pytest.raises(Stop):
        deduplicate(DedupConfig(), documents, tmp_path / "out", workers=0, progress=stopped)
    run(documents, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "undisturbed")


@pytest.mark.parametrize("function", ["write_arrays", "write_decisions", "remove_duplicates", "write_manifest"])
def test_a_task_that_fails_midway(function: str, tmp_path: Path, monkeypatch, bytes_of, laid_out) -> None:
    """Whatever a failing task left half made, the run after it ends in the same bytes."""
    import gristmill.data.dedup as module

    documents = laid_out(tmp_path / "in", planted(300), 100)
    run(documents, tmp_path / "undisturbed")
    holder = sign if function == "write_arrays" else module
    original = getattr(holder, function)
    calls = itertools.count()

    def failing(*arguments, **named) -> None:
        if next(calls) == (0 if function == "write_manifest" else 1):
            raise OSError("No space left on device")
        original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(holder, function, failing)
        if function == "write_decisions":
            failing.__module__, failing.__qualname__ = "gristmill.data.dedup", function
        with pytest.raises(OSError, match="No space left"):
            run(documents, tmp_path / "out")
    run(documents, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "undisturbed")


def test_jaccards_against_sets() -> None:
    rng = np.random.default_rng(3)
    sets = [np.sort(rng.integers(0, 50, int(n), dtype=np.uint32)) for n in rng.integers(0, 40, 30)]
    bounds = np.append(0, np.cumsum([len(s) for s in sets]))
    a, b = (np.array(x) for x in zip(*itertools.product(range(30), repeat=2), strict=True))
    made = jaccards(np.concatenate(sets), bounds, a, b)
    plain = [set(s.tolist()) for s in sets]
    expected = [
        len(plain[i] & plain[j]) / len(plain[i] | plain[j]) if plain[i] | plain[j] else 1.0
        for i, j in zip(a, b, strict=True)
    ]
    assert made.tolist() == expected


def test_arrays_are_read_by_ranges_and_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "some.keys"
    write_arrays(
        path, {"a": np.arange(10, dtype=np.uint64), "empty": np.empty(0, np.uint32), "b": np.arange(5, dtype=np.uint8)}
    )
    with Arrays(path) as arrays:
        assert arrays.read("a", 3, 6).tolist() == [3, 4, 5]
        assert arrays.read("empty").tolist() == arrays.mapped("empty").tolist() == []
        assert arrays.mapped("b").tolist() == arrays.read("b").tolist() == [0, 1, 2, 3, 4]
    path.write_bytes(path.read_bytes()[:-3])
    with Arrays(path) as arrays, pytest.raises(ValueError, match="before its arrays do"):
        arrays.read("b")
    path.write_bytes(b"something else that is long enough")
    with pytest.raises(ValueError, match="not a file of arrays"):
        Arrays(path)


MEMORY = """
import json, sys
from pathlib import Path
from gristmill.data.dedup import DedupConfig, deduplicate
from gristmill.data.documents import open_rows
from gristmill.data.stage_types import silent
folder, count, long = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
with open_rows(folder / "documents" / "00000.jsonl.zst") as shard:
    for i in range(count):
        text = " ".join(f"w{(i * 7919 + j * j) % 100003}" for j in range(100)) if i else "word " * long
        shard.write({"text": text, "id": f"d{i}", "metadata": {"source": "s"}})
(folder / "out").mkdir()
deduplicate(DedupConfig(), folder, folder / "out", workers=0, progress=silent)
# not ru_maxrss, which begins with what the process that started this one held
print(int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) // 1024)
"""


def peak_mib(folder: Path, count: int, long: int) -> int:
    command = [sys.executable, "-P", "-c", MEMORY, str(folder), str(count), str(long)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_memory_does_not_grow_with_a_shard(tmp_path: Path) -> None:
    """One shard of 2,000 and of 20,000 documents (12 MB), and one with a document of one line of 30 MB."""
    few, many = peak_mib(tmp_path / "few", 2000, 10), peak_mib(tmp_path / "many", 20000, 10)
    assert many - few < 60, (few, many)  # MiB: 1 KB a document, for the sort of a group, ids and the allocator's slack
    assert peak_mib(tmp_path / "long", 10, 6_000_000) < 700
