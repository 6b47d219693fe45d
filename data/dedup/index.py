"""The index that a run leaves behind, and those of earlier runs that it takes in.

    index/<shard>.keys, .shingles, .fate   what the shard's documents meet others by, and what became of them
    index/index.json                       format, parameters, and of every file its size and SHA-256; written last

An index is of use only to a run with the very same parameters. It is checked, file by file, before it is used.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from gristmill.data.dedup.config import DedupConfig
from gristmill.data.documents import atomic, write_json_lines
from gristmill.data.executor import Task

FORMAT = 1
MANIFEST = "index.json"
SUFFIXES = ("keys", "shingles", "fate")
BLOCK = 1 << 20


def stem_of(shard: Path) -> str:
    """A shard's name without its ending."""
    return shard.name.removesuffix(".jsonl.zst")


def checksums(stem: Path, result: Path) -> None:
    """Size and SHA-256 of a part's files, as one row in `result`."""
    row = {}
    for suffix in SUFFIXES:
        path = stem.with_name(f"{stem.name}.{suffix}")
        if path.exists():
            with path.open("rb") as file:
                row[path.name] = {
                    "bytes": path.stat().st_size,
                    "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                }
    write_json_lines(result, [row])


def write_manifest(folder: Path, config: DedupConfig, stems: list[str], counts: list[int], sums: list[Path]) -> None:
    """Write index.json, from what `checksums` wrote of each part."""
    parts = [
        {"name": stem, "documents": count, "files": json.loads(path.read_text(encoding="utf-8"))}
        for stem, count, path in zip(stems, counts, sums, strict=True)
    ]
    made = {"format": FORMAT, "parameters": config.parameters(), "documents": sum(counts), "parts": parts}
    with atomic(folder / MANIFEST) as part:
        part.write_text(json.dumps(made, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def index_fingerprints(config: DedupConfig) -> dict[str, str]:
    """Of each earlier index the SHA-256 of its index.json, which names the content of all its files.

    Raises:
        ValueError: there is no index at one of the places.
    """
    return {place: hashlib.sha256(_manifest_text(place)).hexdigest() for place in config.against}


def check_indexes(config: DedupConfig) -> None:
    """Refuse indexes that this run cannot take in, by their index.json alone.

    Raises:
        ValueError: an index is missing, of another format, or was made with other parameters.
    """
    for place in config.against:
        read_manifest(place, config)


def read_manifest(place: str, config: DedupConfig) -> dict[str, Any]:
    """An earlier index's index.json.

    Raises:
        ValueError: it is missing, not JSON, of another format, or of other parameters.
    """
    try:
        manifest = json.loads(_manifest_text(place))
        version, parameters, _ = manifest["format"], manifest["parameters"], manifest["parts"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{place}/{MANIFEST} is damaged ({error!r}): make that dedup stage again") from error
    if version != FORMAT:
        raise ValueError(
            f"the index {place} has format {version}, and this version reads {FORMAT}: make its dedup stage again"
        )
    own = config.parameters()
    differing = [
        f"{name} {parameters.get(name)!r} there, {own.get(name)!r} here"
        for name in sorted(own.keys() | parameters.keys())
        if parameters.get(name) != own.get(name)
    ]
    if differing:
        raise ValueError(
            f"the index {place} was made with other parameters ({'; '.join(differing)}): "
            f"use the same ones, or make its dedup stage again with these"
        )
    return manifest


def _manifest_text(place: str) -> bytes:
    filesystem, path = _place(place)
    try:
        return filesystem.cat_file(f"{path.rstrip('/')}/{MANIFEST}")
    except FileNotFoundError as error:
        raise ValueError(
            f"there is no dedup index at {place}: `against` takes the folder `index` of a finished dedup stage"
        ) from error


def _place(place: str) -> tuple[Any, str]:
    """The filesystem of a path or URL, and the path there."""
    import fsspec  # here, since a run without earlier indexes does not need it, and it takes long

    return fsspec.core.url_to_fs(place)


def taken_in(config: DedupConfig, work: Path) -> tuple[list[Task], list[Path]]:
    """The tasks that check every file of the earlier indexes, and the stems of their parts.

    Files of this machine are read where they lie; others are copied into `work` first.
    """
    tasks, stems = [], []
    for number, place in enumerate(config.against):
        filesystem, path = _place(place)
        local = "file" in filesystem.protocol
        folder = work / "against" / f"{number:05d}"
        for part in read_manifest(place, config)["parts"]:
            stems.append((Path(path) if local else folder) / part["name"])
            for name, facts in part["files"].items():
                result = folder / (f"{name}.checked" if local else name)
                tasks.append(Task(take_in, (place, name, facts["bytes"], facts["sha256"], local, result), result))
    return tasks, stems


def take_in(place: str, name: str, size: int, sha256: str, local: bool, result: Path) -> None:
    """Check one file of an index; copy it to `result`, or leave a mark there where it lies on this machine.

    Raises:
        ValueError: the file is missing, or holds something else than its index.json says.
    """
    filesystem, path = _place(place)
    digest, count = hashlib.sha256(), 0
    with atomic(result) as part:
        try:
            with filesystem.open(f"{path.rstrip('/')}/{name}", "rb") as source, part.open("wb") as copy:
                while block := source.read(BLOCK):
                    digest.update(block)
                    count += len(block)
                    if not local:
                        copy.write(block)
        except FileNotFoundError as error:
            raise ValueError(f"the index {place} lacks its file {name}: make that dedup stage again") from error
        if (count, digest.hexdigest()) != (size, sha256):
            raise ValueError(
                f"the index {place} is damaged: {name} has {count} bytes with SHA-256 {digest.hexdigest()[:12]}…, "
                f"and its {MANIFEST} says {size} bytes with {sha256[:12]}…: make that dedup stage again, or leave it "
                f"out of `against`"
            )
