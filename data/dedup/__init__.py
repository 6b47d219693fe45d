"""The `dedup` stage: exact duplicates, then near ones by MinHash-LSH, every candidate pair verified.

Signatures are made shard by shard on Dask (`signatures.py`); buckets, verification and clusters are one pass over them
(`clusters.py`); the removal is shard by shard again. Which document of a cluster is kept, the first, and every byte
written is a function of the documents alone.
"""

from __future__ import annotations

import difflib
import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import Field

from gristmill.data.config import Config
from gristmill.data.dedup.clusters import Removal, find_duplicates
from gristmill.data.dedup.signatures import MinHash, write_signatures
from gristmill.data.documents import excerpt, read_rows, shards, write_json_lines, write_rows
from gristmill.data.executor import Task, run_tasks
from gristmill.data.stage_types import Metrics, Progress

EXAMPLES = 20


class DedupConfig(Config):
    """MinHash-LSH over word 5-grams, as FineWeb does it (arXiv 2406.17557, section 3.4), with more, shorter buckets.

    A pair of similarity J becomes a candidate with probability 1 − (1 − J^rows)^buckets. FineWeb's 14 × 8 finds 77 %
    of the pairs at 0.75; since every candidate is verified here, 24 × 6 can afford to find 99 %.
    """

    ngram: int = Field(default=5, ge=1, le=50, title="Words a shingle", description="n of the word n-grams compared.")
    buckets: int = Field(default=24, ge=1, le=256, title="Buckets", description="Bands of the signature.")
    rows: int = Field(
        default=6, ge=1, le=64, title="Rows", description="Minima a bucket; all must agree to make a candidate."
    )
    threshold: float = Field(
        default=0.75,
        gt=0,
        le=1,
        title="Threshold",
        description="Least Jaccard similarity of shingles of a near duplicate.",
    )


def deduplicate(config: DedupConfig, documents: Path, out: Path, *, workers: int, progress: Progress) -> Metrics:
    """Keep one document of each cluster of duplicates; write documents/, removed/ and samples.jsonl.

    Raises:
        ValueError: a shard of `documents` is damaged.
    """
    work, sources = out / "work", shards(documents)
    minhash = MinHash(config.ngram, config.buckets, config.rows)
    total = 2 * len(sources)
    signed = [Task(write_signatures, (s, work / f"{s.name}.npz", minhash), work / f"{s.name}.npz") for s in sources]
    run_tasks(signed, workers, progress, 0, total)
    decided = work / "removals.json"
    if not decided.exists():
        removals = find_duplicates([t.result for t in signed], config)
        write_json_lines(decided, [{f"{r.shard}/{r.place}": vars(r) for r in removals}])
    write_ids(sources, work / "ids.json")
    tasks = [Task(_remove, (number, s, out), work / f"{number:05d}.done") for number, s in enumerate(sources)]
    run_tasks(tasks, workers, progress, len(sources), total)
    counts = [json.loads(t.result.read_text(encoding="utf-8")) for t in tasks]
    write_json_lines(out / "samples.jsonl", _examples(documents, decided, sources))
    metrics = _metrics(counts, decided)
    shutil.rmtree(work)
    return metrics


def write_ids(sources: list[Path], path: Path) -> None:
    """The id of every document, shard by shard, so that a removed one can name the one that was kept."""
    if not path.exists():
        write_json_lines(path, [{str(n): [row["id"] for row in read_rows(s)] for n, s in enumerate(sources)}])


def _remove(number: int, shard: Path, out: Path) -> None:
    removals = json.loads((out / "work" / "removals.json").read_text(encoding="utf-8"))
    ids = json.loads((out / "work" / "ids.json").read_text(encoding="utf-8"))
    kept, removed = [], []
    count = {"in": 0, "bytes_in": 0, "bytes_out": 0}
    sources: dict[str, dict[str, int]] = {}
    for place, row in enumerate(read_rows(shard)):
        size = len(row["text"].encode())
        tally = sources.setdefault(row["metadata"]["source"], {"kept": 0, "removed": 0})
        count["in"] += 1
        count["bytes_in"] += size
        removal = removals.get(f"{number}/{place}")
        if removal is None:
            kept.append(row)
            count["bytes_out"] += size
            tally["kept"] += 1
            continue
        tally["removed"] += 1
        removed.append(
            {
                "id": row["id"],
                "source": row["metadata"]["source"],
                "duplicate_of": ids[str(removal["kept_shard"])][removal["kept_place"]],
                "reason": removal["reason"],
                "similarity": removal["similarity"],
                "text": excerpt(row["text"]),
            }
        )
    write_rows(out / "documents" / shard.name, kept)
    if removed:
        write_rows(out / "removed" / shard.name, removed)
    write_json_lines(out / "work" / f"{number:05d}.done", [{**count, "out": len(kept), "sources": sources}])


def _metrics(counts: list[dict[str, Any]], decided: Path) -> Metrics:
    removals = list(json.loads(decided.read_text(encoding="utf-8")).values())
    removed: dict[str, int] = {}
    for count in counts:
        for source, tally in count["sources"].items():
            removed[source] = removed.get(source, 0) + tally["removed"]
    return {
        "documents_in": sum(c["in"] for c in counts),
        "documents_out": sum(c["out"] for c in counts),
        "bytes_in": sum(c["bytes_in"] for c in counts),
        "bytes_out": sum(c["bytes_out"] for c in counts),
        "exact": sum(r["reason"] == "exact" for r in removals),
        "near": sum(r["reason"] == "near" for r in removals),
        "clusters": len({(r["kept_shard"], r["kept_place"]) for r in removals}),
        "removed_by_source": dict(sorted(removed.items())),
    }


def _examples(documents: Path, decided: Path, sources: list[Path]) -> list[dict[str, Any]]:
    """Pairs for people to look at: near ones first, the least alike first, with the words that differ."""
    removals = [Removal(**r) for r in json.loads(decided.read_text(encoding="utf-8")).values()]
    removals.sort(key=lambda r: (r.reason != "near", r.similarity, r.shard, r.place))
    chosen = removals[:EXAMPLES]
    wanted: dict[int, set[int]] = {}
    for r in chosen:
        wanted.setdefault(r.shard, set()).add(r.place)
        wanted.setdefault(r.kept_shard, set()).add(r.kept_place)
    rows = {
        (number, place): row
        for number, places in sorted(wanted.items())
        for place, row in enumerate(read_rows(sources[number]))
        if place in places
    }
    return [
        {
            "removed": rows[r.shard, r.place]["id"],
            "kept": rows[r.kept_shard, r.kept_place]["id"],
            "reason": r.reason,
            "similarity": r.similarity,
            "differs": _differing(rows[r.kept_shard, r.kept_place]["text"], rows[r.shard, r.place]["text"]),
            "text": excerpt(rows[r.shard, r.place]["text"]),
        }
        for r in chosen
    ]


def _differing(kept: str, removed: str, words: int = 400, most: int = 6) -> str:
    """The first runs of words in which two texts differ: −of the kept one, +of the removed one."""
    a, b = kept.split()[:words], removed.split()[:words]
    runs = []
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind != "equal":
            runs.append(f"−{' '.join(a[a0:a1][:8])} +{' '.join(b[b0:b1][:8])}")
    return " … ".join(runs[:most])


__all__ = ["DedupConfig", "deduplicate"]
