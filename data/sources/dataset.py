"""A Hugging Face dataset: a name on the hub, or a local folder in any format that `datasets` loads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from gristmill.data.documents import utf8_size
from gristmill.data.sources.base import BadRecord, Contents, Cursor, Found, Held, Item
from gristmill.data.sources.fields import RowFields, Unreadable
from gristmill.data.sources.records import too_large

COMMIT = re.compile(r"[0-9a-f]{40}")
SAVED = ("dataset_info.json", "dataset_dict.json")  # what Dataset.save_to_disk and DatasetDict.save_to_disk leave


class DatasetSource(RowFields):
    """A dataset by hub name and revision, or by local folder."""

    type: Literal["dataset"] = "dataset"
    dataset: str = Field(title="Dataset", description="Hub name (owner/name) or a local folder.")
    subset: str | None = Field(default=None, title="Subset", description="Configuration of the dataset.")
    split: str = Field(default="train", title="Split", description="Split to read.")
    streaming: bool = Field(
        default=True, title="Streaming", description="Read rows as they arrive, or fetch the whole dataset first."
    )
    revision: str | None = Field(
        default=None,
        title="Revision",
        description="Commit of the hub's repository; needed there, since it enters the key.",
    )

    @property
    def local(self) -> bool:
        """Whether it is a folder here."""
        return Path(self.dataset).exists()

    @property
    def saved(self) -> bool:
        """Whether it is a folder that `save_to_disk` wrote."""
        return any((Path(self.dataset) / name).exists() for name in SAVED)

    def check(self) -> None:
        """Refuse a local folder that is not there, a split that it lacks, and a hub name without its revision.

        Raises:
            ValueError: with the name and what to do.
        """
        if self.local:
            self._check_local(Path(self.dataset))
        elif self.dataset.count("/") != 1 or self.dataset.startswith((".", "/")):
            raise ValueError(
                f"source {self.name!r}: {self.dataset!r} is no folder and no hub name owner/name: correct it"
            )
        elif not self.revision:
            raise ValueError(
                f"source {self.name!r}: the hub dataset {self.dataset!r} has no revision: name a commit, so that "
                f"the same recipe always reads the same data"
            )
        elif not COMMIT.fullmatch(self.revision):
            raise ValueError(
                f"source {self.name!r}: revision {self.revision!r} can move: name a commit of {self.dataset!r}, 40 "
                f"hexadecimal digits"
            )

    def _check_local(self, folder: Path) -> None:
        if not any(p.is_file() and p.stat().st_size for p in folder.rglob("*")):
            raise ValueError(f"source {self.name!r}: the folder {self.dataset!r} holds no data: correct dataset")
        splits = folder / "dataset_dict.json"
        if splits.exists() and self.split not in (known := json.loads(splits.read_text())["splits"]):
            raise ValueError(f"source {self.name!r}: {self.dataset!r} has no split {self.split!r}, but {known}")

    def held(self, contents: Contents) -> Held:
        """Hashes of a local folder's files; the revision of a hub's dataset."""
        if not self.local:
            return Held({self.dataset: self.revision or ""})
        folder = Path(self.dataset)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        return Held({f.relative_to(folder).as_posix(): contents.sha256(f) for f in files})

    def expected_bytes(self) -> int | None:
        """The size of a local folder's files; none of a hub's dataset, unless the source is bounded."""
        if not self.local:
            return self.max_bytes
        return self.bounded(sum(f.stat().st_size for f in Path(self.dataset).rglob("*") if f.is_file()))

    def parts(self, seed: int) -> list[str]:
        return [self.split]

    def read(self, part: str, seed: int, cursor: Cursor, most: int) -> Iterator[Item]:
        """The documents of a split. After a stop, a stream goes on at its state, a table at its row."""
        for row in self._rows(part, cursor):
            cursor.record += 1
            found = self._found(row, most)
            if isinstance(found, Unreadable):
                yield BadRecord(self.dataset, self.split, cursor.record, found.reason, found.detail)
                continue
            yield self.row(found, found.identifier or str(cursor.record - 1), dict(found.extra))

    def _found(self, row: dict[str, Any], most: int) -> Found | Unreadable:
        text = row.get(self.text_field)
        if isinstance(text, str) and (size := utf8_size(text)) > most:
            return too_large(most, size)
        return self.found(row)

    def _rows(self, split: str, cursor: Cursor) -> Iterator[dict[str, Any]]:
        """The rows of a split after the cursor's.

        Raises:
            ValueError: `datasets` cannot load it.
        """
        try:
            yield from self._after(self._loaded(split), cursor)
        except (GeneratorExit, MemoryError):
            raise
        except Exception as error:  # each format, and the hub, has kinds of its own
            raise ValueError(
                f"source {self.name!r}: row {cursor.record + 1} of {self.dataset!r}, split {split!r}, cannot be loaded "
                f"({type(error).__name__}: {error}): correct ingest.sources"
            ) from error

    def _loaded(self, split: str) -> Any:
        from datasets import Dataset, load_dataset, load_from_disk

        if self.saved:
            loaded: Any = load_from_disk(self.dataset)
            return loaded if isinstance(loaded, Dataset) else loaded[split]
        revision = None if self.local else self.revision
        return load_dataset(self.dataset, self.subset, split=split, revision=revision, streaming=self.streaming)

    def _after(self, rows: Any, cursor: Cursor) -> Iterator[dict[str, Any]]:
        from datasets import IterableDataset

        if not isinstance(rows, IterableDataset):
            yield from rows.select(range(cursor.record, len(rows))) if cursor.record else rows
            return
        if cursor.state is not None:
            rows.load_state_dict(cursor.state)
        elif cursor.record:
            rows = rows.skip(cursor.record)

        def look(cursor: Cursor) -> None:
            cursor.state = rows.state_dict()

        cursor.look = look
        yield from rows
