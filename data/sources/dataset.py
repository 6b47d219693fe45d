"""A Hugging Face dataset: a name on the hub, or a local folder in any format that `datasets` loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from gristmill.data.sources.base import BadRecord, Row, SourceBase, hash_of


class DatasetSource(SourceBase):
    """A dataset by hub name and revision, or by local folder."""

    type: Literal["dataset"] = "dataset"
    dataset: str = Field(title="Dataset", description="Hub name (owner/name) or a local folder.")
    subset: str | None = Field(default=None, title="Subset", description="Configuration of the dataset.")
    split: str = Field(default="train", title="Split", description="Split to read.")
    text_field: str = Field(default="text", title="Text field", description="Column with the text.")
    revision: str | None = Field(
        default=None,
        title="Revision",
        description="Commit of the hub's repository; needed there, since it enters the key.",
    )

    def check(self) -> None:
        """Refuse a local folder that is not there and a hub name without its revision.

        Raises:
            ValueError: with the name and what to do.
        """
        local = Path(self.dataset)
        if local.exists():
            if not any(p.is_file() and p.stat().st_size for p in local.rglob("*")):
                raise ValueError(f"source {self.name!r}: the folder {self.dataset!r} holds no data: correct dataset")
        elif self.dataset.count("/") != 1 or self.dataset.startswith((".", "/")):
            raise ValueError(
                f"source {self.name!r}: {self.dataset!r} is no folder and no hub name owner/name: correct it"
            )
        elif not self.revision:
            raise ValueError(
                f"source {self.name!r}: the hub dataset {self.dataset!r} has no revision: name a commit, so that "
                f"the same recipe always reads the same data"
            )

    def fingerprint(self) -> str:
        local = Path(self.dataset)
        if not local.exists():
            return hash_of(self.dataset, self.revision or "")
        files = sorted(p for p in local.rglob("*") if p.is_file())
        return hash_of(*(part for f in files for part in (f.relative_to(local).as_posix(), f.read_bytes())))

    def parts(self, seed: int) -> list[str]:
        return [self.split]

    def read(self, part: str, seed: int) -> Iterator[Row | BadRecord]:
        for number, row in enumerate(self._rows(part)):
            if self.max_documents and number >= self.max_documents:
                return
            text = row.get(self.text_field)
            if isinstance(text, str) and text.strip():
                yield self.row(text, str(number))
            else:
                yield BadRecord(self.dataset, number + 1, f"field {self.text_field!r} holds no text")

    def _rows(self, split: str) -> Iterator[dict[str, Any]]:
        from datasets import load_dataset, load_from_disk

        local = Path(self.dataset)
        if (local / "dataset_info.json").exists() or (local / "dataset_dict.json").exists():
            loaded: Any = load_from_disk(self.dataset)
            yield from loaded[split] if isinstance(loaded, dict) else loaded
            return
        yield from load_dataset(self.dataset, self.subset, split=split, revision=self.revision, streaming=True)
