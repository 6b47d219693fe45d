"""The `ingest` stage: documents from sources into shards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from gristmill.data.config import Config
from gristmill.data.documents import excerpt, read_rows, write_json_lines, write_rows
from gristmill.data.executor import Task, run_tasks
from gristmill.data.sources import (
    BadRecord,
    Contents,
    DatasetSource,
    FilesSource,
    Held,
    LessonsSource,
    Reader,
    StdlibSource,
)
from gristmill.data.stage_types import Metrics, Progress

Source = Annotated[StdlibSource | LessonsSource | FilesSource | DatasetSource, Field(discriminator="type")]
Row = dict[str, Any]


class IngestConfig(Config):
    """Where documents come from and what is done with a record that cannot be read."""

    sources: list[Source] = Field(min_length=1, title="Sources", description="Read in this order.")
    on_bad: Literal["refuse", "quarantine"] = Field(
        default="refuse",
        title="Bad records",
        description="Refuse the run at the first, or set them aside and count them.",
    )
    documents_per_shard: int = Field(
        default=2500,
        ge=1,
        title="Documents a shard",
        description="After so many documents a new shard begins; later stages work on shards side by side.",
    )


def check_sources(config: IngestConfig) -> None:
    """Refuse a source that cannot be read, before anything runs.

    Raises:
        ValueError: a source does not exist, matches nothing, holds no text or cannot be reached; two share a name.
    """
    names = [s.name for s in config.sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"ingest.sources has two sources named {name!r}: rename one")
    for source in config.sources:
        source.check()


def fingerprint_sources(config: IngestConfig, cache: Path | None = None) -> dict[str, str]:
    """What each source holds, as a hash: it enters the stage's key.

    Args:
        cache: a file in which hashes of local files are remembered by size and time of change.

    Raises:
        ValueError: as `check_sources`.
    """
    check_sources(config)
    contents = Contents(cache)
    found = {source.name: source.held(contents).fingerprint for source in config.sources}
    contents.save()
    return found


def ingest(config: IngestConfig, out: Path, seed: int, *, workers: int, progress: Progress) -> Metrics:
    """Write documents/*.jsonl.zst, and quarantine/*.jsonl where records were bad.

    A task reads a part of a source into shards below work/; when all are there they get their numbers. A source of
    which only the beginning is taken is one part, since where that ends is known only by reading it.

    Raises:
        ValueError: a bad record (file, line, reason) where `on_bad` refuses; a file changed while it was read.
    """
    work = out / "work"
    parts = [(s, group) for s in config.sources for group in _groups(s, seed)]
    _refuse_changed(config.sources, work / "held.json", out)
    tasks = [
        Task(_read_part, (source, group, work, number, config, seed), work / f"{number:05d}.json")
        for number, (source, group) in enumerate(parts)
    ]
    run_tasks(tasks, workers, progress)
    counts = [json.loads(task.result.read_text(encoding="utf-8")) for task in tasks]
    metrics = _metrics([s.name for s in config.sources], [s.name for s, _ in parts], counts)
    _number_shards(work, out, counts)
    write_json_lines(out / "samples.jsonl", _samples(out, [s.name for s in config.sources]))
    shutil.rmtree(work)
    return metrics


def _groups(source: Reader, seed: int) -> list[list[Any]]:
    parts = source.parts(seed)
    return [parts] if source.limited else [[part] for part in parts]


def _refuse_changed(sources: list[Any], path: Path, out: Path) -> None:
    """Hold what the sources hold against what they held when this work was begun."""
    contents = Contents()
    now = {source.name: source.held(contents) for source in sources}
    if not path.exists():
        write_json_lines(path, [{name: held.files for name, held in now.items()}])
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    for name, held in now.items():
        changed = Held(begun.get(name, {})).first_change(held)
        if changed is not None:
            raise ValueError(
                f"source {name!r}: {changed} changed since this work was begun: remove {out} and run again"
            )


def _read_part(source: Any, group: list[Any], work: Path, number: int, config: IngestConfig, seed: int) -> None:
    """Read a part into shards work/<part>-<shard>, set bad records aside, and count all in work/<part>.json."""
    bad: list[Row] = []
    count = {"documents": 0, "bytes": 0, "shards": 0}

    def good() -> Iterator[Row]:
        for item in chain.from_iterable(source.read(part, seed) for part in group):
            if isinstance(item, BadRecord):
                bad.append(_refused_or_kept(item, source.name, config.on_bad))
                continue
            size = len(item["text"].encode())
            if source.max_bytes is not None and count["bytes"] + size > source.max_bytes:
                return
            count["documents"] += 1
            count["bytes"] += size
            yield item
            if count["documents"] == source.max_documents:
                return

    rows = good()
    for first in rows:
        shard = chain([first], islice(rows, config.documents_per_shard - 1))
        write_rows(work / f"{number:05d}-{count['shards']:05d}.jsonl.zst", shard)
        count["shards"] += 1
    if bad:
        write_json_lines(work / f"{number:05d}.quarantine", bad)
    write_json_lines(work / f"{number:05d}.json", [{**count, "quarantined": len(bad)}])


def _refused_or_kept(record: BadRecord, source: str, on_bad: str) -> Row:
    if on_bad == "refuse":
        raise ValueError(
            f"source {source!r}: {record.address}, line {record.line}: {record.reason}; mend it, or set "
            f"ingest.on_bad to quarantine"
        )
    return {"source": source, "file": record.file, "line": record.line, "reason": record.reason}


def _number_shards(work: Path, out: Path, counts: list[dict[str, int]]) -> None:
    """Move the shards to documents/, numbered through, and bad records to quarantine/; goes on where it was ended."""
    (out / "documents").mkdir(exist_ok=True)
    moves = []
    for part, count in enumerate(counts):
        for shard in range(count["shards"]):
            moves.append((work / f"{part:05d}-{shard:05d}.jsonl.zst", f"documents/{len(moves):05d}.jsonl.zst"))
    bad = [part for part, count in enumerate(counts) if count["quarantined"]]
    if bad:
        (out / "quarantine").mkdir(exist_ok=True)
        moves += [(work / f"{part:05d}.quarantine", f"quarantine/{part:05d}.jsonl") for part in bad]
    for made, name in moves:
        if made.exists() or not (out / name).exists():
            os.replace(made, out / name)


def _metrics(names: list[str], part_names: list[str], counts: list[dict[str, int]]) -> Metrics:
    def by_source(what: str) -> dict[str, int]:
        table = dict.fromkeys(names, 0)
        for name, count in zip(part_names, counts, strict=True):
            table[name] += count[what]
        return table

    documents, quarantined = by_source("documents"), by_source("quarantined")
    for name, number in documents.items():
        if not number:
            raise ValueError(f"source {name!r} gave no documents: correct or remove it from ingest.sources")
    metrics: Metrics = {
        "documents_out": sum(documents.values()),
        "bytes_out": sum(c["bytes"] for c in counts),
        "quarantined": sum(quarantined.values()),
        "documents_by_source": documents,
        "bytes_by_source": by_source("bytes"),
    }
    if metrics["quarantined"]:
        metrics["quarantined_by_source"] = quarantined
    return metrics


def _samples(out: Path, names: list[str], each: int = 5) -> list[Row]:
    """The first documents of each source, shortened."""
    found: dict[str, list[Row]] = {name: [] for name in names}
    for shard in sorted((out / "documents").glob("*.jsonl.zst")):
        for row in read_rows(shard):  # all of one source, since a part is
            shown = found[row["metadata"]["source"]]
            if len(shown) >= each:
                break
            shown.append({"source": row["metadata"]["source"], "id": row["id"], "text": excerpt(row["text"])})
    return [row for rows in found.values() for row in rows]
