"""Taking documents out of finished shards: the rows of one shard, its index of ids, one shard of tokens, small tables.

A shard without the document is written anew by the code that wrote it first; nothing else of a result is touched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gristmill.data.documents import Row, atomic, id_hash, open_rows, read_rows, write_json_lines
from gristmill.data.shards import ID, ShardEntry, TokenShards, write_arrays, write_index

LEAST_SHARED = 24  # letters and digits that two texts must have in common to be taken for one
PROBES, PROBE = 5, 48  # pieces of a text by which it is looked for in files, and characters of each
NO_LETTER = re.compile(r"[\W_]+")


def rows_without(shard: Path, out: Path, ids: Collection[str], *, keep_empty: bool) -> list[Row]:
    """Write a shard of rows without those of some ids; the rows that are gone.

    Args:
        keep_empty: write the shard even where no row is left, as stages do with documents/ and not with removed/.

    Raises:
        ValueError: the shard is damaged.
    """
    gone: list[Row] = []
    kept = keep_empty
    with open_rows(out) as writer:
        for row in read_rows(shard):
            if row["id"] in ids:
                gone.append(row)
            else:
                writer.write(row)
                kept = True
    if not kept:
        out.unlink()
    return gone


def ids_without(index: Path, out: Path, ids: Collection[str]) -> None:
    """Write an index of id hashes without some ids; none where no other is in it."""
    held = np.fromfile(index, dtype=ID)
    left = held[~np.isin(held, np.array([id_hash(i) for i in ids], dtype=ID))]
    if len(left):
        with atomic(out) as part:
            left.tofile(part)


def tokens_without(folder: Path | str, out: Path, text_bytes: dict[str, int]) -> dict[str, Any]:
    """Write the token shards that hold some documents without them, and the index; the other shards are not looked at.

    Args:
        folder, out: the folders of index.json, before (a path or an address) and after.
        text_bytes: UTF-8 bytes of the text of each document that goes, by its id: the index counts them.

    Returns:
        `touched`, paths of the files written (the index last); `tokens`, {split: {source: tokens that are gone}};
        `documents`, the ids of those that were there.
    """
    shards = TokenShards(folder)
    places: dict[tuple[str, str, int], list[int]] = {}
    fewer: dict[tuple[str, str], int] = {}
    there: list[str] = []
    for identifier, size in text_bytes.items():
        found = shards.find(id_hash(identifier))
        there += [identifier] * bool(found)
        for at in found:
            places.setdefault((at.split, at.source, at.shard), []).append(at.document)
            stream = (at.split, at.source)
            fewer[stream] = fewer.get(stream, 0) + size
    gone: dict[str, dict[str, int]] = {}
    made: dict[tuple[str, str, int], ShardEntry] = {}
    for (split, source, number), documents in places.items():
        before = shards.entries(split, source)[number]
        made[split, source, number] = _shard_without(shards, out, (split, source, number), documents)
        own = gone.setdefault(split, {})
        own[source] = own.get(source, 0) + before.tokens - made[split, source, number].tokens
    streams = {}
    for stream in shards.index["streams"]:
        split, source = stream["split"], stream["source"]
        entries = [made.get((split, source, n), e) for n, e in enumerate(shards.entries(split, source))]
        streams[split, source] = (entries, stream["bytes"] - fewer.get((split, source), 0))
    if made:
        out.mkdir(parents=True, exist_ok=True)
        write_index(out, shards.vocab_size, shards.index["tokenizer_sha256"], streams)
    touched = [f"{s}/{o}/{n:05d}.{ending}" for s, o, n in made for ending in ("tokens", "starts", "ids")]
    return {
        "touched": [*touched, "index.json"] if made else [],
        "tokens": gone,
        "documents": there,
    }


def _shard_without(shards: TokenShards, out: Path, at: tuple[str, str, int], documents: list[int]) -> ShardEntry:
    shard = shards.shard(*at)
    starts = np.asarray(shard.starts[0 : shard.entry.documents]).astype(np.int64)
    lengths = np.diff(np.append(starts, shard.entry.tokens))
    stays = np.ones(len(starts), dtype=bool)
    stays[documents] = False
    tokens = np.asarray(shard.tokens[0 : shard.entry.tokens])[np.repeat(stays, lengths)]
    begins = np.concatenate([[0], np.cumsum(lengths[stays])])[:-1].astype(np.int64)
    return write_arrays(out, *at, tokens, begins, np.asarray(shard.ids[0 : shard.entry.documents])[stays])


def table_without(table: Path, out: Path, ids: Collection[str], texts: Iterable[str]) -> int:
    """Write a small table of JSON lines without the rows that name one of the ids or show one of the texts.

    The rows' texts may be excerpts, with marks between their pieces: letters and digits alone are compared.

    Returns:
        How many rows are gone. Where it is 0 nothing is written.
    """
    rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
    known = [bare(text) for text in texts]
    kept = [row for row in rows if not _shows(row, ids, known)]
    if len(kept) < len(rows):
        write_json_lines(out, kept)
    return len(rows) - len(kept)


def _shows(value: Any, ids: Collection[str], texts: list[str]) -> bool:
    """Whether a JSON value has one of the ids, or shares text, anywhere in it."""
    if isinstance(value, dict):
        return any(_shows(inner, ids, texts) for inner in value.values())
    if isinstance(value, list):
        return any(_shows(inner, ids, texts) for inner in value)
    if not isinstance(value, str):
        return False
    return value in ids or any(_shared(bare(line), text) for line in (value, *value.splitlines()) for text in texts)


def _shared(excerpt: str, text: str) -> bool:
    if len(excerpt) < LEAST_SHARED:
        return bool(excerpt) and excerpt == text
    return excerpt in text or (len(text) >= LEAST_SHARED and text in excerpt)


def bare(text: str) -> str:
    """A text's letters and digits alone, in lower case."""
    return NO_LETTER.sub("", text).lower()


def probes(text: str) -> list[bytes]:
    """A few pieces of a text, as UTF-8, as JSON writes them and as HTML does, by which it is found in a file.

    They are cut from its longest lines; a text of short lines alone is looked for by those.
    """
    lines = sorted({line.strip() for line in text.splitlines() if line.strip()}, key=lambda line: (-len(line), line))
    found: dict[bytes, None] = {}
    for line in lines[:PROBES]:
        piece = line[:PROBE]
        html = piece.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        for form in (piece, json.dumps(piece, ensure_ascii=False)[1:-1], json.dumps(piece)[1:-1], html):
            found[form.encode()] = None
    return list(found)


def lowered(metrics: dict[str, Any], changes: dict[str, int | dict[str, int]], drop: Callable[[str], bool]) -> None:
    """Lower the counts of a stage's metrics by what was taken out; those that a stage does not have stay away.

    Args:
        changes: by how much, by the metric's name; of a table, by the entry's name.
        drop: whether a table, by its name, loses an entry that comes to 0.
    """
    for name, change in changes.items():
        held = metrics.get(name)
        if isinstance(held, dict) and isinstance(change, dict):
            for entry, number in change.items():
                if entry in held:
                    held[entry] -= number
                    if not held[entry] and drop(name):
                        del held[entry]
        elif isinstance(held, int) and isinstance(change, int):
            metrics[name] = held - change
