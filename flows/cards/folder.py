"""Reading a finished stage's folder as a person would: its manifest, its rows, a few of its documents."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

Row = dict[str, Any]


@dataclass(frozen=True)
class StageFolder:
    """The folder of one finished stage and what its manifest says; without a manifest it says nothing."""

    name: str
    path: Path
    manifest: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str, path: Path) -> StageFolder:
        """The folder at `path`, which stands for stage `name` of the run."""
        file = path / "manifest.json"
        return cls(name, path, json.loads(file.read_text(encoding="utf-8")) if file.exists() else {})

    @property
    def metrics(self) -> Row:
        return self.manifest.get("metrics") or {}

    @property
    def config(self) -> Row:
        return self.manifest.get("config") or {}

    @property
    def environment(self) -> Row:
        return self.manifest.get("environment") or {}

    @property
    def seconds(self) -> float | None:
        """Wall time of the stage's work, where it is known."""
        return self.manifest.get("seconds")

    @property
    def content_bytes(self) -> int:
        """Bytes of the content files."""
        return sum(f["bytes"] for f in self.manifest.get("files", []) if f.get("content", True))

    def rows(self, name: str, limit: int | None = None) -> list[Row]:
        """The first `limit` rows of a JSON-lines file (compressed where it ends in .zst); none without it."""
        file = self.path / name
        return list(_first(_rows(file), limit)) if file.exists() else []

    def each(self, pattern: str) -> Iterator[Row]:
        """The rows of all JSON-lines files of that pattern, files in the order of their names."""
        for file in sorted(self.path.glob(pattern)):
            yield from _rows(file)


def _rows(file: Path) -> Iterator[Row]:
    with file.open("rb") as raw:
        if file.suffix == ".zst":
            import zstandard

            with zstandard.ZstdDecompressor().stream_reader(raw) as stream:
                yield from _parsed(io.TextIOWrapper(stream, encoding="utf-8"))
        else:
            yield from _parsed(io.TextIOWrapper(raw, encoding="utf-8"))


def _parsed(lines: io.TextIOWrapper) -> Iterator[Row]:
    for line in lines:
        if line.strip():
            yield json.loads(line)


def _first(rows: Iterator[Row], limit: int | None) -> Iterator[Row]:
    for number, row in enumerate(rows):
        if limit is not None and number >= limit:
            return
        yield row


def curve(rows: list[Row], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of one number of `curves.jsonl`, at the steps that have it; steps count from one."""
    points = [(row["step"] + 1, row[name]) for row in rows if is_number(row.get(name)) and "step" in row]
    return [float(p[0]) for p in points], [float(p[1]) for p in points]


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of a row or of the metrics is a number (a truth value is none)."""
    return isinstance(value, int | float) and not isinstance(value, bool)
