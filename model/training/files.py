"""Small files that are there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

PART_BYTES = 4 << 20  # of a file at once: what hashes a checkpoint must not make a run's peak of memory


def write_json(path: Path, value: Any) -> None:
    """Keys sorted; written aside, flushed to the disk and renamed."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sync_and_rename(part, path)


def sync_and_rename(part: Path, path: Path) -> None:
    """Give a written file its name once its bytes are on the disk."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def sync_folder(folder: Path) -> None:
    """Bring the names of a folder's files onto the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def copy(source: Path, path: Path, alive: Callable[[], None]) -> None:
    """Copy a file onto the disk; `alive` is called at each part of it."""
    with source.open("rb", buffering=0) as read, path.open("wb", buffering=0) as written:
        while part := read.read(PART_BYTES):
            written.write(part)
            os.fsync(written.fileno())
            alive()


def sha256(path: Path, alive: Callable[[], None] | None = None) -> str:
    """Of a file's bytes, hexadecimal; `alive` is called at each part of it."""
    digest, room = hashlib.sha256(), memoryview(bytearray(PART_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(room):
            digest.update(room[:count])
            if alive is not None:
                alive()
    return digest.hexdigest()
