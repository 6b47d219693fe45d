"""Evaluation sets as decontamination reads them: a name, and the texts of each problem."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from gristmill.data.config import Config
from gristmill.data.row_files import files_of, read_objects

COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
PROBLEMS = "problems"  # the set that the recipe's own problems are


class EvaluationSet(Config):
    """A set of problems in local files, in a local folder that `datasets` loads, or on a hub."""

    name: str = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]*$", title="Name", description="Stands in the reasons.")
    path: str = Field(
        min_length=1,
        title="Path",
        description="A JSONL (.gz, .zst) or Parquet file or a pattern of such; a folder that `datasets` loads; or a "
        "hub's owner/name.",
    )
    fields: list[str] = Field(
        min_length=1,
        title="Fields",
        description="Columns whose texts are looked for, each by itself; of a list, its texts one after the other.",
    )
    id_field: str | None = Field(
        default=None, title="Id field", description="Column with a problem's name; none takes file and row."
    )
    subset: str | None = Field(default=None, title="Subset", description="Configuration of a dataset.")
    split: str = Field(default="test", title="Split", description="Of a dataset.")
    revision: str | None = Field(default=None, title="Revision", description="Commit of the hub's repository.")

    @property
    def hub(self) -> bool:
        """Whether it lies on a hub."""
        return self.revision is not None or (not Path(self.path).exists() and HUB_NAME.fullmatch(self.path) is not None)


@dataclass(frozen=True)
class Problem:
    """One text of a problem: a problem with several fields has several."""

    set: str
    id: str
    text: str


def check_set(wanted: EvaluationSet) -> None:
    """Refuse a set that cannot be read, before anything runs: its first row of each file is looked at.

    Raises:
        ValueError: no such file, a missing field, a hub name without a commit.
    """
    what = f"evaluation set {wanted.name!r}"
    if wanted.hub:
        if not HUB_NAME.fullmatch(wanted.path):
            raise ValueError(f"{what}: {wanted.path!r} has a revision and is no hub name owner/name: correct one")
        if not wanted.revision or not COMMIT.fullmatch(wanted.revision):
            raise ValueError(
                f"{what}: the hub dataset {wanted.path!r} has the revision {wanted.revision!r}: name a commit, 40 "
                f"hexadecimal digits, so that the same recipe always meets the same problems (or, for a local file, "
                f"correct the path)"
            )
    elif not Path(wanted.path).is_dir():
        for file in files_of([wanted.path], what):
            for number, row in read_objects(file, what):
                _texts(wanted, row, f"{file}, row {number}")
                break
            else:
                raise ValueError(f"{what}: {file} holds no rows: give it problems or correct the path")


def set_files(wanted: EvaluationSet) -> list[str]:
    """The local files that a set is read from; their contents belong to the stage's key."""
    return [] if wanted.hub else [str(p) for p in files_of([wanted.path], f"evaluation set {wanted.name!r}")]


def read_set(wanted: EvaluationSet) -> Iterator[Problem]:
    """The problems of a set.

    Raises:
        ValueError: a file is damaged, a row lacks a field, or a dataset cannot be loaded.
    """
    for place, row in _rows(wanted):
        named = row.get(wanted.id_field) if wanted.id_field else None
        own = place if named is None else str(named)
        for text in _texts(wanted, row, place):
            yield Problem(wanted.name, own, text)


def _rows(wanted: EvaluationSet) -> Iterator[tuple[str, dict[str, Any]]]:
    if wanted.hub or Path(wanted.path).is_dir():
        yield from ((f"{wanted.split}/{number}", row) for number, row in enumerate(_dataset(wanted)))
        return
    what = f"evaluation set {wanted.name!r}"
    for file in files_of([wanted.path], what):
        yield from ((f"{file.name}#{number}", row) for number, row in read_objects(file, what))


def _dataset(wanted: EvaluationSet) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    try:
        yield from load_dataset(  # type: ignore[misc]
            wanted.path, wanted.subset, split=wanted.split, revision=wanted.revision, streaming=True
        )
    except (ValueError, OSError, ConnectionError) as error:
        raise ValueError(
            f"evaluation set {wanted.name!r}: {wanted.path!r} could not be loaded ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}): correct path, subset, split or revision"
        ) from error


def _texts(wanted: EvaluationSet, row: dict[str, Any], place: str) -> list[str]:
    found = []
    for name in wanted.fields:
        if name not in row:
            raise ValueError(
                f"evaluation set {wanted.name!r}: {place} has no field {name!r}, but {', '.join(sorted(row))}: "
                f"correct fields"
            )
        value = row[name]
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(p, str) or p is None for p in parts):
            raise ValueError(f"evaluation set {wanted.name!r}: {place} has no text in {name!r}: correct fields")
        found.append("\n".join(p for p in parts if p))
    return [text for text in found if text]


def recipe_problems(folder: Path) -> Iterator[Problem]:
    """The questions of the problems stage's test.

    Raises:
        ValueError: there is no test.jsonl, or a row without `question`.
    """
    own = EvaluationSet(name=PROBLEMS, path=str(folder / "test.jsonl"), fields=["question"], id_field="id")
    return read_set(own)
