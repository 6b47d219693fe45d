"""The manifest: what a finished stage's folder holds, of what it was made, and on what machine.

It is JSON, written last and at once; a folder without one is unfinished work.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gristmill.flows.errors import StoreDamaged
from gristmill.flows.identity import canonical

FORMAT = 1
MANIFEST = "manifest.json"
OBSERVATIONS = ("log/", "view/")  # written about a run, not by its recipe: hashed against damage, not as content
IDENTITY = ("stage", "version", "config", "seed", "inputs", "sources")
REQUIRED = (*IDENTITY, "key", "files", "metrics", "content_hash", "fingerprint", "environment", "started", "seconds")
CHUNK = 1 << 20
HASHERS = min(8, os.cpu_count() or 1)

Manifest = dict[str, Any]
File = dict[str, Any]


def identity_of(manifest: Manifest) -> dict[str, Any]:
    """What the key of a finished result is a hash of."""
    identity = {name: manifest[name] for name in IDENTITY}
    inputs = {name: {"stage": i["stage"], "key": i["key"]} for name, i in manifest["inputs"].items()}
    return {**identity, "inputs": inputs}


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_all(paths: list[Path]) -> list[str]:
    """Hashes of several files; hashing leaves the interpreter's lock, so threads help."""
    with ThreadPoolExecutor(HASHERS) as pool:
        return list(pool.map(sha256, paths))


def content_hash(files: list[File], metrics: dict[str, Any]) -> str:
    """One hash of what a stage made: its content files and its metrics; no time, host or path is in it."""
    listed = sorted((f["path"], f["sha256"]) for f in files if f["content"])
    return hashlib.sha256(canonical([listed, metrics]).encode()).hexdigest()


def is_content(path: str) -> bool:
    """Whether a file of a stage's folder, by its relative path, is what the recipe asked for, not an observation."""
    return path != MANIFEST and not path.startswith(OBSERVATIONS)


def is_unfinished(path: str) -> bool:
    """Whether a file is still being written, or was when its writer was killed: by its name or a folder's."""
    return any(part.endswith((".tmp", ".part")) for part in path.split("/"))


def listed_files(folder: Path) -> list[str]:
    """Relative paths of all files of a stage's folder but its manifest, sorted.

    Raises:
        StoreDamaged: there is a symbolic link: what it points to is not in the store.
    """
    found = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise StoreDamaged(f"{name} in {folder} is a symbolic link: a stage writes the file itself")
        if path.is_file() and name != MANIFEST:
            found.append(name)
    return sorted(found)


def described_files(folder: Path) -> list[File]:
    """Path, size, hash and kind of every file of a finished stage; what a killed attempt left unfinished is removed."""
    names = []
    for name in listed_files(folder):
        if is_unfinished(name):
            (folder / name).unlink()
        else:
            names.append(name)
    hashes = sha256_of_all([folder / name for name in names])
    return [
        {"path": name, "bytes": (folder / name).stat().st_size, "sha256": digest, "content": is_content(name)}
        for name, digest in zip(names, hashes, strict=True)
    ]


def checked_metrics(metrics: Any, stage: str) -> dict[str, Any]:
    """A stage's metrics, if they are what they must be: names to numbers, words and truth values, or tables of them.

    Raises:
        ValueError: another kind of value, or a number that is not finite; the metric is named.
    """
    if not isinstance(metrics, dict):
        raise ValueError(f"stage {stage} returned {type(metrics).__name__}, not its metrics: return a dict")
    for name, value in metrics.items():
        inner = value if isinstance(value, dict) else {"": value}
        for part, leaf in inner.items():
            where = f"{name}.{part}" if part else name
            if leaf is not None and type(leaf) not in (int, float, bool, str):
                raise ValueError(
                    f"stage {stage} returned the metric {where} as {type(leaf).__name__}: return int, float, bool, str"
                )
            if isinstance(leaf, float) and not math.isfinite(leaf):
                raise ValueError(f"stage {stage} returned the metric {where} as {leaf}: a metric must be finite")
    return metrics


def parsed(text: str | bytes, where: str) -> Manifest:
    """A manifest from its text.

    Raises:
        StoreDamaged: it is no JSON, of another format, or lacks a field.
    """
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise StoreDamaged(f"{where} is not readable ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreDamaged(f"{where} is of no format that this version reads ({FORMAT})")
    if lacking := [name for name in REQUIRED if name not in manifest]:
        raise StoreDamaged(f"{where} lacks {', '.join(lacking)}")
    return manifest


def as_json(value: Any) -> str:
    """Indented JSON with sorted keys."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, written aside, flushed to the disk and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.tmp")
    with part.open("w", encoding="utf-8") as file:
        file.write(as_json(value))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
