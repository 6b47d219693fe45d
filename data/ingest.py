"""The `ingest` stage: documents from sources into shards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from gristmill.data.config import Config
from gristmill.data.documents import excerpt, read_rows, write_json_lines, write_rows
from gristmill.data.executor import Task, run_tasks
from gristmill.data.sources import BadRecord, DatasetSource, FilesSource, LessonsSource, StdlibSource
from gristmill.data.stage_types import Metrics, Progress

Source = Annotated[StdlibSource | LessonsSource | FilesSource | DatasetSource, Field(discriminator="type")]


class IngestConfig(Config):
    """Where documents come from and what is done with a record that cannot be read."""

    sources: list[Source] = Field(min_length=1, title="Sources", description="Read in this order.")
    on_bad: Literal["refuse", "quarantine"] = Field(
        default="refuse",
        title="Bad records",
        description="Refuse the run at the first, or set them aside and count them.",
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


def fingerprint_sources(config: IngestConfig) -> dict[str, str]:
    """What each source holds, as a hash: it enters the stage's key."""
    check_sources(config)
    return {source.name: source.fingerprint() for source in config.sources}


def ingest(config: IngestConfig, out: Path, seed: int, *, workers: int, progress: Progress) -> Metrics:
    """Write documents/*.jsonl.zst, one shard a part of a source, and quarantine/*.jsonl where records were bad.

    Raises:
        ValueError: a bad record (file, line, reason) where `on_bad` refuses; a file changed while it was read.
    """
    work = out / "work"
    before = {source.name: source.fingerprint() for source in config.sources}
    parts = [(source, part) for source in config.sources for part in source.parts(seed)]
    tasks = [
        Task(_read_part, (source, part, out, number, config.on_bad, seed), work / f"{number:05d}.json")
        for number, (source, part) in enumerate(parts)
    ]
    run_tasks(tasks, workers, progress)
    for source in config.sources:
        if source.fingerprint() != before[source.name]:
            raise ValueError(f"source {source.name!r} changed while it was read: run again when it is at rest")
    counts = [json.loads(task.result.read_text(encoding="utf-8")) for task in tasks]
    table: dict[str, int] = {s.name: 0 for s in config.sources}
    for (source, _), count in zip(parts, counts, strict=True):
        table[source.name] += count["documents"]
    for name, documents in table.items():
        if not documents:
            raise ValueError(f"source {name!r} gave no documents: correct or remove it from ingest.sources")
    write_json_lines(out / "samples.jsonl", _samples(out, [s.name for s in config.sources]))
    shutil.rmtree(work)
    return {
        "documents_out": sum(c["documents"] for c in counts),
        "bytes_out": sum(c["bytes"] for c in counts),
        "quarantined": sum(c["quarantined"] for c in counts),
        "documents_by_source": table,
    }


def _read_part(source: Any, part: Any, out: Path, number: int, on_bad: str, seed: int) -> None:
    """One shard: read a part of a source, write its documents, and count them in work/."""
    bad: list[dict[str, Any]] = []
    size = 0

    def rows():
        nonlocal size
        for item in source.read(part, seed):
            if isinstance(item, BadRecord):
                if on_bad == "refuse":
                    raise ValueError(
                        f"{item.file}, record {item.line}: {item.reason}; mend it, or set ingest.on_bad to quarantine"
                    )
                bad.append(vars(item))
                continue
            size += len(item["text"].encode())
            yield item

    count = write_rows(out / "documents" / f"{number:05d}.jsonl.zst", rows())
    if bad:
        (out / "quarantine").mkdir(exist_ok=True)
        write_json_lines(out / "quarantine" / f"{number:05d}.jsonl", bad)
    (out / "work").mkdir(exist_ok=True)
    write_json_lines(
        out / "work" / f"{number:05d}.json", [{"documents": count, "bytes": size, "quarantined": len(bad)}]
    )


def _samples(out: Path, names: list[str], each: int = 5) -> list[dict[str, Any]]:
    """The first documents of each source, shortened."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for shard in sorted((out / "documents").glob("*.jsonl.zst")):
        for row in read_rows(shard):
            shown = found[row["metadata"]["source"]]
            if len(shown) >= each:
                break
            shown.append({"source": row["metadata"]["source"], "id": row["id"], "text": excerpt(row["text"])})
    return [row for rows in found.values() for row in rows]
