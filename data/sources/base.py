"""What the sources share: their fields, their rows, and the record of a bad one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from gristmill.data.config import Config

Row = dict[str, Any]
Kind = Literal["prose", "code", "lessons"]


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be read: in which file, at which line (from 1), why."""

    file: str
    line: int
    reason: str


class SourceBase(Config):
    """Fields of every source."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", title="Name", description="Names the token stream.")
    kind: Kind = Field(default="prose", title="Kind", description="Which filter profile its documents pass.")
    max_documents: int | None = Field(
        default=None, ge=1, title="Most documents", description="The first so many are taken."
    )

    def row(self, text: str, identifier: str, **metadata: Any) -> Row:
        """A datatrove document as a row."""
        return {
            "text": text,
            "id": f"{self.name}/{identifier}",
            "metadata": {"source": self.name, "kind": self.kind, **metadata},
        }


def hash_of(*parts: bytes | str) -> str:
    """A hash of some parts, kept apart by their lengths."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
