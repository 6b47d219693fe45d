"""The card of a stage: the Markdown that Prefect shows as the artifact of a finished stage.

Everything comes from the manifest and from the conventions on files (`curves.jsonl`, `samples.jsonl`, and those of the
corpus in `corpus.py`), so a new stage has a card without a line of code; what a stage shows beyond that stands in
`extras.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gristmill.flows.cards import charts, figures, text
from gristmill.flows.cards.corpus import corpus_parts, holds_decisions, shown_in_funnel
from gristmill.flows.cards.extras import EXTRAS
from gristmill.flows.cards.folder import Row, StageFolder

SAMPLES, FILES = 8, 24

__all__ = ["card_markdown"]


def card_markdown(manifest: dict[str, Any], folder: Path) -> str:
    """The card of a finished stage as Markdown; pictures are inside it as `data:` URIs.

    Args:
        manifest: the stage's manifest; fields that it lacks are left out of the card.
        folder: the local folder of its output.
    """
    stage = StageFolder(str(manifest.get("stage", folder.name)), folder, manifest)
    parts = [
        f"# {_escaped_title(stage)}",
        _summary(stage),
        *map(text.cell, manifest.get("notes") or []),
        *_metrics({k: v for k, v in stage.metrics.items() if not shown_in_funnel(stage, k)}),
        *[part for extra in EXTRAS.get(stage.name, ()) for part in extra(stage)],
        *corpus_parts(stage),
        *_curves(stage),
        *_samples(stage),
        *_lineage(stage),
        *_files(stage),
        *_settings("Configuration", stage.config),
        *_settings("Environment", stage.environment),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _escaped_title(stage: StageFolder) -> str:
    title = stage.manifest.get("title")
    return text.cell(title) if title else _title(stage.name)


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize().replace("Rl", "RL")


def _summary(stage: StageFolder) -> str:
    manifest, facts = stage.manifest, []
    if manifest.get("key"):
        facts.append(f"key `{str(manifest['key'])[:16]}`")
    for name in ("version", "seed", "attempts"):
        if manifest.get(name) is not None:
            facts.append(f"{name} {manifest[name]}")
    if stage.seconds is not None:
        facts.append(f"**{text.duration(stage.seconds)}**")
    if manifest.get("files"):
        facts.append(f"**{text.size(stage.content_bytes)}** of content")
    if stage.environment.get("device"):
        facts.append(f"on {text.cell(stage.environment['device'])}")
    return " · ".join(facts)


def _metrics(metrics: Row) -> list[str]:
    flat = {k: v for k, v in metrics.items() if not isinstance(v, dict)}
    parts = ["## Metrics", text.table(("metric", "value"), flat.items(), right=(1,))] if flat else []
    for name, nested in metrics.items():
        if isinstance(nested, dict) and nested:
            parts += [f"### {_title(name)}", text.table((name, "value"), nested.items(), right=(1,))]
    return parts


def _curves(stage: StageFolder) -> list[str]:
    figure = figures.small_multiples(stage.rows("curves.jsonl"))
    return [] if figure is None else ["## Curves", f"![Curves of {stage.name}]({charts.png_uri(figure, 80)})"]


def _samples(stage: StageFolder) -> list[str]:
    rows = stage.rows("samples.jsonl", SAMPLES)
    if not rows or holds_decisions(stage):
        return []
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return ["## Samples", text.table(columns, [[row.get(c) for c in columns] for row in rows])]


def _lineage(stage: StageFolder) -> list[str]:
    inputs: Row = stage.manifest.get("inputs") or {}
    sources: Row = stage.manifest.get("sources") or {}
    parts = []
    if inputs:
        rows = [(name, source.get("stage"), source.get("key")) for name, source in inputs.items()]
        parts += ["## Made from", text.table(("input", "stage", "key"), rows)]
    if sources:
        parts += ["### Sources outside the store", text.table(("source", "what it holds"), sources.items())]
    return parts


def _files(stage: StageFolder) -> list[str]:
    files: list[Row] = stage.manifest.get("files") or []
    if not files:
        return []
    largest = sorted(files, key=lambda f: (-f["bytes"], f["path"]))
    rows = [
        (f["path"], text.size(f["bytes"]), "content" if f.get("content", True) else "observation")
        for f in largest[:FILES]
    ]
    more = f"The {FILES} largest of {len(files)} files." if len(files) > FILES else ""
    return ["## Files", text.table(("file", "size", "kind"), rows, right=(1,)), more]


def _settings(title: str, settings: Row) -> list[str]:
    if not settings:
        return []
    return [
        f"## {title}",
        text.code(json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True), "json"),
    ]
