"""The report of a run: one page for people (`view/report.html`) and its numbers (`report.json`)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from gristmill.flows.cards.folder import StageFolder

Metrics = dict[str, Any]

__all__ = ["ReportConfig", "make_report"]


class Progress(Protocol):
    """Called with how much of the report is done."""

    def __call__(self, done: int, total: int, **values: float) -> None: ...


class ReportConfig(BaseModel):
    """What the report is called and how much it shows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = Field(
        default="From raw text to a reasoning model", min_length=1, title="Title", description="Heading of the page."
    )
    examples: int = Field(
        default=5, ge=1, le=50, title="Examples", description="Thoughts, and removed documents, shown of each kind."
    )


def make_report(
    config: ReportConfig,
    ingest: Path,
    problems: Path,
    dedup: Path,
    trimmed: Path,
    filter: Path,
    exam: Path,
    decontaminate: Path,
    tokenize: Path,
    mix: Path,
    pretrain: Path,
    cold_start: Path,
    rl_zero: Path,
    rl: Path,
    evaluate: Path,
    export: Path,
    out: Path,
    extend_1: Path | None = None,
    extend_2: Path | None = None,
    extend_3: Path | None = None,
    extend_4: Path | None = None,
    *,
    progress: Progress,
) -> Metrics:
    """Write `out/report.json` (numbers that depend on the inputs' content alone) and `out/view/report.html`.

    `trimmed` is what the filter read: the result of spans, or that of dedup again where the recipe has no spans;
    `extend_…` are the phases of context extension that there are. Each input is the folder of a finished stage with its
    manifest.json; what one of them lacks is named on the page and in `report.json` under `absent`. The page shows
    times, so it lies in view/ and is no content.
    """
    from gristmill.flows.report.findings import gather, headline
    from gristmill.flows.report.page import render

    given = {
        "ingest": ingest,
        "dedup": dedup,
        "filter": filter,
        "exam": exam,
        "decontaminate": decontaminate,
        "tokenize": tokenize,
        "mix": mix,
        "problems": problems,
        "pretrain": pretrain,
        **{f"extend_{n}": path for n, path in enumerate((extend_1, extend_2, extend_3, extend_4), 1) if path},
        "cold_start": cold_start,
        "rl_zero": rl_zero,
        "rl": rl,
        "evaluate": evaluate,
        "export": export,
    }
    if trimmed != dedup:
        given["spans"] = trimmed
    folders = {name: StageFolder.open(name, path) for name, path in given.items()}
    found = gather(folders)
    numbers = headline(found)
    progress(1, 2)
    text = json.dumps({"headline": numbers, **found}, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    _write(out / "report.json", text)
    _write(out / "view" / "report.html", render(found, folders, config.title, config.examples))
    progress(2, 2)
    return numbers


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
