"""Days deduplicated one after another end as if all had been compared at once; indexes that do not fit are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

from gristmill.data.dedup import DedupConfig, check_indexes, deduplicate, index_fingerprints
from gristmill.data.documents import read_rows, shards
from gristmill.data.stage_types import silent

POLICIES: list[dict] = [
    {"policy": "first"},
    {"policy": "longest", "leaders": 2},
    {"policy": "quality", "url": True, "leaders": 1},
    {"policy": "source", "preferred_sources": ["b", "c"], "exact": False},
    {"policy": "quality", "near": False, "url": True},
]


def corpus(count: int, seed: int) -> list[dict]:
    """Families of alike documents: copies, small and larger changes, shared URLs, ranks in no order."""
    rng = np.random.default_rng(seed)
    bases = [[f"w{int(w)}" for w in rng.integers(0, 2000, 40)] for _ in range(count // 6)]
    rows = []
    for i in range(count):
        text = list(bases[int(rng.integers(len(bases)))])
        for _ in range(int(rng.choice([0, 0, 1, 2, 3]))):
            text[int(rng.integers(40))] = f"w{int(rng.integers(2000))}"
        text += [f"tail{int(rng.integers(3))}"] * int(rng.integers(0, 3))
        metadata = {
            "source": "abcd"[int(rng.integers(4))],
            "url": f"http://example.com/{int(rng.integers(count))}/" if rng.random() < 0.5 else None,
            "quality": round(float(rng.normal()), 1) if rng.random() < 0.9 else None,
        }
        rows.append({"text": " ".join(text), "id": f"d{i}", "metadata": metadata})
    return rows


def run(documents: Path, out: Path, **config) -> dict:
    out.mkdir()
    return deduplicate(DedupConfig(buckets=6, rows=3, **config), documents, out, workers=0, progress=silent)


def kept(out: Path) -> set[str]:
    return {r["id"] for s in shards(out) for r in read_rows(s)}


def reasons(out: Path) -> dict[str, tuple]:
    return {r["id"]: (r["reason"], r["because"]) for s in shards(out, "removed") for r in read_rows(s)}


def listed(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("split", range(10))
def test_day_by_day_is_all_at_once(split: int, tmp_path: Path, laid_out) -> None:
    rng = np.random.default_rng(split)
    rows = corpus(160, split)
    config = POLICIES[split % len(POLICIES)]
    run(laid_out(tmp_path / "in", rows, 64), tmp_path / "whole", **config)
    expected_kept, expected = kept(tmp_path / "whole"), reasons(tmp_path / "whole")
    assert 20 < len(expected) < 150

    cuts = [0, *sorted(rng.choice(np.arange(1, 160), 2, replace=False).tolist()), 160]
    outs: list[Path] = []
    for day in range(3):
        documents = laid_out(tmp_path / f"in{day}", rows[cuts[day] : cuts[day + 1]], int(rng.integers(10, 80)))
        outs.append(tmp_path / f"day{day}")
        run(documents, outs[-1], **config, against=[str(o / "index") for o in outs[:-1]])
    last = outs[-1]
    retracted = {r["id"]: r for r in listed(last / "retracted.jsonl")}
    restored = {r["id"] for r in listed(last / "restored.jsonl")}
    together = set().union(*(kept(o) for o in outs))
    assert retracted.keys() <= together
    assert (together - retracted.keys()) | restored == expected_kept
    made = reasons(last)
    assert made == {i: r for i, r in expected.items() if int(i[1:]) >= cuts[2]}
    for identifier, row in retracted.items():
        reason, because = expected[identifier]
        assert (row["reason"], row["duplicate_of"], row["similarity"]) == (reason, *because.values())
    if config["policy"] == "first":
        assert not retracted
        assert not restored
        assert {i: r for o in outs for i, r in reasons(o).items()} == expected


def test_an_earlier_document_loses_to_a_better_one(tmp_path: Path, laid_out) -> None:
    text = " ".join(f"w{i}" for i in range(100))
    one = laid_out(tmp_path / "in1", [{"text": text, "id": "old", "metadata": {"source": "s"}}])
    two = laid_out(tmp_path / "in2", [{"text": text + " more", "id": "new", "metadata": {"source": "s"}}])
    run(one, tmp_path / "one", policy="longest")
    metrics = run(two, tmp_path / "two", policy="longest", against=[str(tmp_path / "one" / "index")])
    assert kept(tmp_path / "two") == {"new"}
    assert (metrics["retracted"], metrics["restored"], metrics["documents_out"]) == (1, 0, 1)
    assert listed(tmp_path / "two" / "retracted.jsonl") == [
        {"id": "old", "duplicate_of": "new", "reason": "near", "similarity": round(96 / 97, 4)}
    ]


@pytest.fixture
def indexed(tmp_path: Path, laid_out) -> Path:
    run(laid_out(tmp_path / "in", corpus(60, 0), 20), tmp_path / "one")
    return tmp_path / "one" / "index"


def refused(tmp_path: Path, index: Path | str, match: str, **config) -> None:
    (tmp_path / "out").mkdir(exist_ok=True)
    asked = DedupConfig(buckets=6, rows=3, against=(str(index),), **config)
    with pytest.raises(ValueError, match=match):
        deduplicate(asked, tmp_path / "in", tmp_path / "out", workers=0, progress=silent)


def test_an_index_of_other_parameters_or_another_format_is_refused(tmp_path: Path, indexed: Path) -> None:
    refused(tmp_path, indexed, "other parameters .ngram 5 there, 4 here", ngram=4)
    manifest = json.loads((indexed / "index.json").read_text())
    (indexed / "index.json").write_text(json.dumps({**manifest, "format": 99}))
    refused(tmp_path, indexed, "has format 99, and this version reads 1")
    (indexed / "index.json").write_text('{"format": 1')
    refused(tmp_path, indexed, "index.json is damaged")
    refused(tmp_path, tmp_path / "nowhere", "there is no dedup index at .*nowhere")


@pytest.mark.parametrize("suffix", ["keys", "shingles", "fate"])
def test_a_damaged_index_is_refused(suffix: str, tmp_path: Path, indexed: Path) -> None:
    path = sorted(indexed.glob(f"*.{suffix}"))[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(tmp_path, indexed, f"is damaged: {path.name}")
    path.write_bytes(whole[:-1])
    refused(tmp_path, indexed, f"is damaged: {path.name} has {len(whole) - 1} bytes")
    path.unlink()
    refused(tmp_path, indexed, f"lacks its file {path.name}")


def test_fingerprints_follow_the_content(tmp_path: Path, indexed: Path, laid_out) -> None:
    config = DedupConfig(buckets=6, rows=3, against=(str(indexed),))
    check_indexes(config)
    before = index_fingerprints(config)
    assert list(before) == [str(indexed)]
    shutil.rmtree(tmp_path / "one")
    run(laid_out(tmp_path / "again", corpus(60, 0), 20), tmp_path / "one")
    assert index_fingerprints(config) == before
    shutil.rmtree(tmp_path / "one")
    run(laid_out(tmp_path / "other", corpus(60, 1), 20), tmp_path / "one")
    assert index_fingerprints(config) != before


def test_an_index_on_s3(tmp_path: Path, indexed: Path, s3: str, laid_out, bytes_of) -> None:
    fsspec.filesystem("s3").put(f"{indexed}/", f"{s3}/one/index/", recursive=True)
    documents = laid_out(tmp_path / "in2", corpus(60, 0)[30:] + corpus(20, 5), 40)
    run(documents, tmp_path / "local", against=[str(indexed)])
    run(documents, tmp_path / "remote", against=[f"{s3}/one/index"])
    assert len(kept(tmp_path / "local")) < 20
    assert bytes_of(tmp_path / "remote") == bytes_of(tmp_path / "local")
