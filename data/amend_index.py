"""The index of dedup without some documents: the parts of the shards touched are made anew, the others stay.

A part is a function of its shard and the parameters, but for what became of each document, which is kept.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gristmill.data.dedup.arrays import Arrays, write_arrays
from gristmill.data.dedup.config import DedupConfig
from gristmill.data.dedup.index import MANIFEST, checksums
from gristmill.data.dedup.sign import write_index
from gristmill.data.documents import atomic


def part_without(
    config: Mapping[str, Any], fate: Path, shard: Path | None, out: Path, name: str, places: Collection[int]
) -> list[str]:
    """Write one part of an index anew; the names of its files.

    Args:
        config: the stage's configuration, as its manifest has it.
        fate: the part's file of fates, before.
        shard: the shard of documents without those that go; none where no document is left in it.
        out: the folder of the index, after.
        name: of the part.
        places: where in the shard before those lay that go.
    """
    if shard is None:
        return []
    write_index(shard, out, DedupConfig.model_validate(config))
    with Arrays(fate) as arrays:
        write_arrays(out / f"{name}.fate", {"removed": np.delete(arrays.read("removed"), sorted(places))})
    return sorted(path.name for path in out.glob(f"{name}.*"))


def manifest_without(manifest: Path, out: Path, changed: Mapping[str, int]) -> None:
    """Write index.json for parts that were made anew: `changed` has the documents each lost; parts of none are gone.

    Args:
        manifest: index.json before.
        out: the folder of the index, after, with the parts that were made anew.
    """
    made = json.loads(manifest.read_text(encoding="utf-8"))
    parts = []
    for part in made["parts"]:
        name = part["name"]
        if name in changed:
            part = _described(out, name, part["documents"] - changed[name])
        if part["documents"]:
            parts.append(part)
    made |= {"parts": parts, "documents": made["documents"] - sum(changed.values())}
    with atomic(out / MANIFEST) as temporary:
        temporary.write_text(json.dumps(made, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _described(out: Path, name: str, documents: int) -> dict[str, Any]:
    """A part's entry, by the files that are there now."""
    sums = out / f"{name}.sums.tmp"
    checksums(out / name, sums)
    files = json.loads(sums.read_text(encoding="utf-8"))
    sums.unlink()
    return {"name": name, "documents": documents, "files": files}
