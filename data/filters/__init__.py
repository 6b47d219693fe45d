"""The `filter` stage: rules on documents, by kind; what is removed is kept with the rule that removed it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import Field

from gristmill.data.config import Config
from gristmill.data.documents import excerpt, read_rows, shards, write_json_lines, write_rows
from gristmill.data.executor import Task, run_tasks
from gristmill.data.filters.rules import Profile, build
from gristmill.data.stage_types import Metrics, Progress

EXAMPLES = 20


class FilterConfig(Config):
    """A profile of rules for each kind of document; a kind without a profile passes whole."""

    profiles: dict[str, Profile] = Field(
        default_factory=lambda: {
            "prose": Profile(gopher_quality=True, gopher_repetition=True, languages=["en"]),
            "code": Profile(least_characters=200, most_duplicate_lines=0.5, longest_line=1000),
            "lessons": Profile(least_characters=20),
        },
        title="Profiles",
        description="Rules by kind of document: prose, code, lessons.",
    )


def filter_documents(config: FilterConfig, documents: Path, out: Path, *, workers: int, progress: Progress) -> Metrics:
    """Write documents/ (what passed, unchanged), removed/ (with the first rule that failed) and samples.jsonl.

    Raises:
        ValueError: a shard of `documents` is damaged.
    """
    work, sources = out / "work", shards(documents)
    tasks = [Task(_filter_shard, (config, s, out), work / f"{s.name}.json") for s in sources]
    run_tasks(tasks, workers, progress)
    counts = [json.loads(t.result.read_text(encoding="utf-8")) for t in tasks]
    reasons: dict[str, int] = {}
    removed: dict[str, int] = {}
    for count in counts:
        for reason, number in count["reasons"].items():
            reasons[reason] = reasons.get(reason, 0) + number
        for source, number in count["removed"].items():
            removed[source] = removed.get(source, 0) + number
    write_json_lines(out / "samples.jsonl", _examples(out))
    shutil.rmtree(work)
    return {
        **{name: sum(c[name] for c in counts) for name in ("documents_in", "documents_out", "bytes_in", "bytes_out")},
        "removed_by_reason": dict(sorted(reasons.items())),
        "removed_by_source": dict(sorted(removed.items())),
    }


def _filter_shard(config: FilterConfig, shard: Path, out: Path) -> None:
    """One shard; the filters are built once a worker call and see one document after the other."""
    from datatrove.data import Document

    rules = {kind: build(profile) for kind, profile in config.profiles.items()}
    kept, removed = [], []
    count: dict[str, Any] = {"documents_in": 0, "bytes_in": 0, "bytes_out": 0, "reasons": {}, "removed": {}}
    for row in read_rows(shard):
        size = len(row["text"].encode())
        count["documents_in"] += 1
        count["bytes_in"] += size
        document = Document(text=row["text"], id=row["id"], metadata=dict(row["metadata"]))
        reason = first_failure(rules.get(row["metadata"]["kind"], []), document)
        source = row["metadata"]["source"]
        count["removed"].setdefault(source, 0)
        if reason is None:
            kept.append(row)
            count["bytes_out"] += size
        else:
            removed.append({**row, "reason": reason})
            count["reasons"][reason] = count["reasons"].get(reason, 0) + 1
            count["removed"][source] += 1
    write_rows(out / "documents" / shard.name, kept)
    if removed:
        write_rows(out / "removed" / shard.name, removed)
    (out / "work").mkdir(exist_ok=True)
    write_json_lines(out / "work" / f"{shard.name}.json", [{**count, "documents_out": len(kept)}])


def first_failure(rules: list[tuple[str, Any]], document: Any) -> str | None:
    """`rule: detail` of the first rule that a document fails, or none."""
    for name, rule in rules:
        verdict = rule.filter(document)
        passed, detail = verdict if isinstance(verdict, tuple) else (verdict, "")
        if not passed:
            return f"{name}: {detail}" if detail else name
    return None


def _examples(out: Path) -> list[dict[str, Any]]:
    """Removed documents, in turn by reason, with the reason."""
    found: dict[str, list[dict[str, Any]]] = {}
    for shard in sorted((out / "removed").glob("*.jsonl.zst")):
        for row in read_rows(shard):
            own = found.setdefault(row["reason"], [])
            if len(own) < 4:
                own.append({"reason": row["reason"], "id": row["id"], "text": excerpt(row["text"])})
    return [row for rows in zip_longest(found) for row in rows][:EXAMPLES]


def zip_longest(found: dict[str, list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """First rows of each reason, then second rows, and so on."""
    most = max((len(rows) for rows in found.values()), default=0)
    return [[rows[i] for _, rows in sorted(found.items()) if i < len(rows)] for i in range(most)]
