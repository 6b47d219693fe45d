"""The `ingest` stage: documents from sources into shards."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from gristmill.data.config import Config
from gristmill.data.documents import Row, excerpt, read_rows, write_json_lines
from gristmill.data.executor import Task, run_tasks
from gristmill.data.intake import TOMBSTONES, Intake, read_part, shard_name
from gristmill.data.sources import (
    Contents,
    DatasetSource,
    DumpSource,
    FilesSource,
    Held,
    LessonsSource,
    Reader,
    StdlibSource,
    TreeSource,
    WarcSource,
)
from gristmill.data.stage_types import Metrics, Progress
from gristmill.data.unique_ids import REASON, find_repeats, unique, without_repeats

Source = Annotated[
    StdlibSource | LessonsSource | FilesSource | DatasetSource | WarcSource | DumpSource | TreeSource,
    Field(discriminator="type"),
]
SAMPLES_A_SOURCE = 5
MOST_KEPT, MOST_BAD = 40, 10  # samples of each outcome


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
    max_record_bytes: int = Field(
        default=64 << 20,
        ge=1024,
        le=1 << 30,
        title="Largest record",
        description="Bytes of a line, page or file that is still read; a larger one is bad. A worker holds it 8 times.",
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
    """Write documents/*.jsonl.zst with ids/*.ids beside them, and quarantine/*.jsonl where records were bad.

    A task reads a part of a source into shards below work/ (see `intake.py`); when all are there they get their
    numbers. A source of which only the beginning is taken is one part, since where that ends is known only by reading
    it. Documents that tombstones.json in `out` names are left out, and counted.

    Raises:
        ValueError: a bad record (file, record, reason) where `on_bad` refuses; a file changed while it was read.
    """
    work = out / "work"
    final = work / "final.json"
    if not final.exists():
        done = _read_sources(config, out, seed, workers, progress)
        _take_out_repeats(config, done, work, workers, progress)
        metrics = _metrics([s.name for s in config.sources], done)
        write_json_lines(final, [{"metrics": metrics, **_places(work, done)}])
    finished = json.loads(final.read_text(encoding="utf-8"))
    for name, place in finished["moves"]:
        if (work / name).exists():
            (out / place).parent.mkdir(exist_ok=True)
            os.replace(work / name, out / place)
    write_json_lines(
        out / "samples.jsonl", [*_kept_samples(out, finished["shards"]), *_bad_samples(out / "quarantine")]
    )
    for path in sorted(work.iterdir()):
        if path != final:  # the last to go: with it, a stop from here on repeats no reading
            path.unlink()
    shutil.rmtree(work)
    return finished["metrics"]


def _read_sources(config: IngestConfig, out: Path, seed: int, workers: int, progress: Progress) -> list[_Part]:
    work = out / "work"
    parts = [(s, group) for s in config.sources for group in _groups(s, seed)]
    _refuse_changed(config.sources, work / "held.json", out)
    settings = (config.on_bad, config.documents_per_shard, config.max_record_bytes)
    tasks = [
        Task(read_part, (source, group, work, number, settings, seed), work / f"{number:05d}.json")
        for number, (source, group) in enumerate(parts)
    ]
    run_tasks(tasks, workers, progress)
    return [
        _Part(number, source, Intake(**json.loads(task.result.read_text(encoding="utf-8"))))
        for number, ((source, _), task) in enumerate(zip(parts, tasks, strict=True))
    ]


@dataclass
class _Part:
    """A part that is read: its place in the order, its source, and what it gave."""

    number: int
    source: Any
    intake: Intake

    def names(self) -> list[tuple[int, str]]:
        """(number within the part, name) of its shards that hold documents."""
        free = {*self.intake.emptied, *self.intake.rowless}
        return [(n, shard_name(self.number, n)) for n in range(self.intake.shards) if n not in free]


def _groups(source: Reader, seed: int) -> list[list[Any]]:
    parts = source.parts(seed)
    return [parts] if source.limited else [[part] for part in parts]


def _refuse_changed(sources: list[Any], path: Path, out: Path) -> None:
    """Hold what the sources hold, and the tombstones, against what they held when this work was begun."""
    contents = Contents()
    now = {source.name: source.held(contents) for source in sources}
    stones = out / TOMBSTONES
    now["tombstones"] = Held({TOMBSTONES: contents.sha256(stones)} if stones.exists() else {})
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


def _take_out_repeats(config: IngestConfig, done: list[_Part], work: Path, workers: int, progress: Progress) -> None:
    """Of documents of a source that give themselves the same id, the first stays.

    Raises:
        ValueError: there are such, and bad records are refused; with both places.
    """
    for source in config.sources:
        if not source.ids_are_given:
            continue
        own = [part for part in done if part.source is source]
        listed = work / f"{source.name}.repeats.json"
        if not listed.exists():
            repeats = find_repeats([work / f"{name}.jsonl.zst" for part in own for _, name in part.names()])
            if repeats and config.on_bad == "refuse":
                first = repeats[0]
                raise ValueError(
                    f"source {source.name!r}: {first.file}, record {first.record}: {REASON} ({first.detail}); mend it, "
                    f"or set ingest.on_bad to quarantine"
                )
            by_shard: dict[str, list[Row]] = {}
            for repeat in repeats:
                by_shard.setdefault(repeat.shard, []).append(asdict(repeat))
            for name, rows in by_shard.items():
                (work / f"{name}.repeats").write_text(json.dumps(rows), encoding="utf-8")
            write_json_lines(listed, [{"shards": sorted(by_shard)}])
        names = json.loads(listed.read_text(encoding="utf-8"))["shards"]
        tasks = [
            Task(
                without_repeats, (work / n, work / f"{n}.repeats", work / f"{n}.unique.json"), work / f"{n}.unique.json"
            )
            for n in names
        ]
        run_tasks(tasks, workers, progress)
        for task, name in zip(tasks, names, strict=True):
            _lower(own, name, json.loads(task.result.read_text(encoding="utf-8")))


def _lower(own: list[_Part], shard: str, gone: dict[str, int]) -> None:
    """Count the documents that a shard lost as quarantined."""
    part, number = (int(digits) for digits in shard.removesuffix(".jsonl.zst").split("-"))
    intake = next(p.intake for p in own if p.number == part)
    intake.documents -= gone["documents"]
    intake.bytes -= gone["bytes"]
    intake.quarantined[REASON] = intake.quarantined.get(REASON, 0) + gone["documents"]
    if not gone["left"]:
        intake.emptied.append(number)


def _places(work: Path, done: list[_Part]) -> dict[str, Any]:
    """Where what lies in work/ goes: documents/ and ids/, numbered through, and quarantine/; and each source's shards.

    A shard of which every document is gone leaves its number free.
    """
    moves: list[tuple[str, str]] = []
    shards: dict[str, list[str]] = {}
    number = 0
    for part in done:
        held = {n for n, _ in part.names()}
        for own in range(part.intake.shards):
            name = shard_name(part.number, own)
            rewritten = unique(work / f"{name}.jsonl.zst").exists()
            if own in part.intake.set_aside:
                moves.append((f"{name}.quarantine", f"quarantine/{name}.jsonl"))
            if rewritten:
                moves.append((f"{name}.unique.quarantine", f"quarantine/{name}.ids.jsonl"))
            if own in held:
                made = f"{name}.unique" if rewritten else name
                moves.append((f"{made}.jsonl.zst", f"documents/{number:05d}.jsonl.zst"))
                moves.append((f"{made}.ids", f"ids/{number:05d}.ids"))
                shards.setdefault(part.source.name, []).append(f"documents/{number:05d}.jsonl.zst")
            number += own not in part.intake.rowless
    return {"moves": moves, "shards": shards}


def _metrics(names: list[str], done: list[_Part]) -> Metrics:
    def by_source(what: str) -> dict[str, int]:
        table = dict.fromkeys(names, 0)
        for part in done:
            held = getattr(part.intake, what)
            table[part.source.name] += sum(held.values()) if isinstance(held, dict) else held
        return table

    def by_reason(what: str) -> dict[str, int]:
        table: dict[str, int] = {}
        for part in done:
            for reason, number in getattr(part.intake, what).items():
                table[reason] = table.get(reason, 0) + number
        return dict(sorted(table.items()))

    documents, taken_down = by_source("documents"), by_source("taken_down")
    for name, number in documents.items():
        if not number and not taken_down[name]:
            raise ValueError(f"source {name!r} gave no documents: correct or remove it from ingest.sources")
    metrics: Metrics = {
        "documents_out": sum(documents.values()),
        "bytes_out": sum(p.intake.bytes for p in done),
        "quarantined": sum(by_source("quarantined").values()),
        "skipped": sum(by_source("skipped").values()),
        "taken_down": sum(taken_down.values()),
        "documents_by_source": documents,
        "bytes_by_source": by_source("bytes"),
    }
    for what in ("quarantined", "skipped"):
        if metrics[what]:
            metrics |= {f"{what}_by_source": by_source(what), f"{what}_by_reason": by_reason(what)}
    return metrics


def _kept_samples(out: Path, shards: dict[str, list[str]]) -> list[Row]:
    """The first documents of each source, shortened."""
    found: list[Row] = []
    for source, names in shards.items():
        rows = (row for name in names for row in read_rows(out / name))
        for row in islice(rows, SAMPLES_A_SOURCE):
            shown = {"source": source, "id": row["id"], "text": excerpt(row["text"])}
            found.append({"outcome": "kept", "reason": "", **shown})
    return found[:MOST_KEPT]


def _bad_samples(quarantine: Path) -> list[Row]:
    """The first record set aside for each reason."""
    found: dict[str, Row] = {}
    for path in sorted(quarantine.glob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                place = {"source": row["source"], "id": f"{row['file']}#{row['record']}", "text": row["detail"]}
                found.setdefault(row["reason"], {"outcome": "quarantined", "reason": row["reason"], **place})
        if len(found) >= MOST_BAD:
            break
    return list(found.values())[:MOST_BAD]
