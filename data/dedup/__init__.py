"""The `dedup` stage: exact duplicates, equal URLs, and near ones by MinHash-LSH with every candidate verified.

    sign.py     a task a shard: read the documents once; the keys by which they meet go to index/
    group.py    a task a kind of key and range of its values: who meets whom
    decide.py   a task a shard: what becomes of each document, near candidates verified by their n-grams
    remove.py   a task a shard: the documents are sieved by the decisions

No step holds more than a bounded piece of the corpus. The decision is a function of the set of documents and their
order, so that days compared one after another (`against`, see index.py) end as if all had been compared at once.
"""

from __future__ import annotations

from pathlib import Path

from gristmill.data.dedup.config import DedupConfig
from gristmill.data.dedup.decide import write_decisions
from gristmill.data.dedup.group import ranges_of, write_group
from gristmill.data.dedup.index import (
    check_indexes,
    checksums,
    index_fingerprints,
    stem_of,
    taken_in,
    write_manifest,
)
from gristmill.data.dedup.parts import Parts
from gristmill.data.dedup.remove import (
    changed_fates,
    clusters,
    least_alike,
    pair_rows,
    remove_duplicates,
    shown_places,
)
from gristmill.data.dedup.sign import write_index
from gristmill.data.documents import shards, write_json_lines
from gristmill.data.executor import Task, remove_work, run_tasks
from gristmill.data.sieve import conclude
from gristmill.data.stage_types import Metrics, Progress


def deduplicate(config: DedupConfig, documents: Path, out: Path, *, workers: int, progress: Progress) -> Metrics:
    """Keep the best-ranked of duplicates: documents/, removed/ and the tables of sieve.py; pairs.jsonl and index/.

    With `against`, retracted.jsonl lists documents of earlier indexes that lose against one of this run (with the
    policy first there are none), and restored.jsonl those that were removed for one which is now too far down its
    bucket.

    Raises:
        ValueError: a shard of `documents` is damaged, or an index of `against` is missing, damaged, or of another
            format or other parameters.
    """
    check_indexes(config)
    sources = shards(documents)
    work, index = out / "work", out / "index"
    checks, earlier = taken_in(config, work)
    stems = [index / stem_of(shard) for shard in sources]
    signed = [
        Task(write_index, (shard, index, config), stem.with_name(f"{stem.name}.keys"))
        for shard, stem in zip(sources, stems, strict=True)
    ]
    steps = _Steps(workers, progress, len(checks) + 4 * len(sources))
    steps.run([*checks, *signed])

    parts = Parts.listed(earlier, stems)
    parts_file = work / "parts.jsonl"
    parts.save(parts_file)
    groups = _groups(config, parts, parts_file, work)
    steps.run(groups)
    decided = _decisions(config, parts, parts_file, work)
    steps.run(decided)
    own = [task.result for task, part in zip(decided, parts.all[-len(decided) :], strict=True) if part.own]

    pairs = least_alike(own, parts)
    own_parts = [part for part in parts.all if part.own]
    texts = [work / f"{shard.name}.texts" for shard in sources]
    sieved = [
        Task(_sieve, (shard, path, out, shown_places(part, pairs), text, stem), text)
        for shard, path, part, text, stem in zip(sources, own, own_parts, texts, stems, strict=True)
    ]
    steps.run(sieved)

    write_json_lines(out / "pairs.jsonl", pair_rows(pairs, parts, texts))
    again = _earlier_fates(config, parts, decided, out)
    counts = [part.documents for part in own_parts]
    write_manifest(index, config, [stem.name for stem in stems], counts, [_sums(work, stem) for stem in stems])
    metrics = conclude(out, sources)
    by_reason = metrics["removed_by_reason"]
    numbers = {reason: by_reason.get(reason, 0) for reason in ("exact", "url", "near")}
    metrics |= {**numbers, "clusters": clusters(own, parts), **again}
    remove_work(work)
    return metrics


class _Steps:
    """Runs lists of tasks one after another, with one progress over all."""

    def __init__(self, workers: int, progress: Progress, total: int) -> None:
        self._workers, self._progress, self._total, self._done = workers, progress, total, 0

    def run(self, tasks: list[Task]) -> None:
        self._total = max(self._total, self._done + len(tasks))
        run_tasks(tasks, self._workers, self._progress, self._done, self._total)
        self._done += len(tasks)


def _groups(config: DedupConfig, parts: Parts, parts_file: Path, work: Path) -> list[Task]:
    ranges = ranges_of(parts)
    made = []
    for kind in config.kinds() if parts.documents else []:
        for number in range(ranges):
            result = work / "groups" / f"{kind}-{number:06d}.rows"
            made.append(Task(write_group, (kind, number, ranges, parts_file, config, result), result))
    return made


def _decisions(config: DedupConfig, parts: Parts, parts_file: Path, work: Path) -> list[Task]:
    """With the policy first, what came before has its fate; with any other it may lose now."""
    made = []
    for number, part in enumerate(parts.all):
        if part.own or config.policy != "first":
            result = work / "decided" / f"{number:06d}.decided"
            made.append(Task(write_decisions, (number, parts_file, work / "groups", config, result), result))
    return made


def _sieve(shard: Path, decided: Path, out: Path, shown: list[int], texts: Path, stem: Path) -> None:
    checksums(stem, _sums(out / "work", stem))
    remove_duplicates(shard, decided, out, shown, texts)


def _sums(work: Path, stem: Path) -> Path:
    return work / f"{stem.name}.sums"


def _earlier_fates(config: DedupConfig, parts: Parts, decided: list[Task], out: Path) -> dict[str, int]:
    """Write what changes for documents of earlier indexes; the numbers of both kinds."""
    if not config.against:
        return {}
    retracted, restored = [], []
    for task, part in zip(decided, parts.all[-len(decided) :], strict=True):
        if not part.own:
            lose, stay = changed_fates(part, task.result)
            retracted += lose
            restored += stay
    write_json_lines(out / "retracted.jsonl", retracted)
    write_json_lines(out / "restored.jsonl", restored)
    return {"retracted": len(retracted), "restored": len(restored)}


__all__ = ["DedupConfig", "check_indexes", "deduplicate", "index_fingerprints"]
