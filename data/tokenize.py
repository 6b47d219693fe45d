"""The `tokenize` stage: a tokenizer trained on a sample, and token shards by split and source.

Which documents are held out, and the order of the rest, are hashes of (seed, document id): pure functions, whoever
computes them. Encoding is shard by shard on Dask; a stream is then gathered in its order and written in shards.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from gristmill.data import tokenizer as bpe
from gristmill.data.config import Config
from gristmill.data.documents import read_rows, shards, write_json_lines
from gristmill.data.executor import Task, run_tasks
from gristmill.data.shards import DTYPES, ShardEntry, dtype_for, write_index, write_shard
from gristmill.data.stage_types import Metrics, Progress

BOS_ID, EOS_ID = 0, 1
BATCH = 256


class TokenizeConfig(Config):
    """Size of the vocabulary, the sample it is learned on, and how tokens are laid out."""

    vocab_size: int = Field(
        default=1024, ge=263, le=129_280, title="Vocabulary", description="Rows, special tokens included."
    )
    sample_bytes: int = Field(
        default=4_000_000,
        ge=1,
        title="Sample",
        description="Bytes of text the tokenizer is trained on, all sources alike.",
    )
    held_out: float = Field(
        default=0.02, gt=0, lt=1, title="Held out", description="Share of documents kept from training."
    )
    shard_tokens: int = Field(
        default=4_000_000, ge=1, title="Shard", description="Tokens after which a new shard begins."
    )


def tokenize(
    config: TokenizeConfig, documents: Path, out: Path, seed: int, *, workers: int, progress: Progress
) -> Metrics:
    """Write tokenizer/ and tokens/ (see docs/token-shards.md); every document begins with bos and ends with eos.

    Raises:
        ValueError: a shard of `documents` is damaged, or there is no document.
    """
    work, sources = out / "work", shards(documents)
    work.mkdir(exist_ok=True)
    total = len(sources) + 2
    if not (out / "tokenizer" / "tokenizer_config.json").exists():
        bpe.save(bpe.train(_sample(sources, config.sample_bytes), config.vocab_size), out / "tokenizer")
    progress(1, total)
    tasks = [Task(_encode, (s, out, seed, config.held_out), work / f"{s.name}.npz") for s in sources]
    run_tasks(tasks, workers, progress, 1, total)
    tokenizer = bpe.load(out / "tokenizer")
    vocab_size = tokenizer.get_vocab_size()
    streams = _write_streams([t.result for t in tasks], out / "tokens", dtype_for(vocab_size), config.shard_tokens)
    if not streams:
        raise ValueError("no document is left to tokenize: loosen the filter or give more sources")
    digest = hashlib.sha256((out / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    write_index(out / "tokens", vocab_size, digest, streams)
    write_json_lines(out / "samples.jsonl", _samples(sources, tokenizer))
    progress(total, total)
    metrics = _metrics(streams, vocab_size)
    shutil.rmtree(work)
    return metrics


def _sample(sources: list[Path], most_bytes: int) -> list[str]:
    """Texts for the tokenizer's training: each source gives an equal share of bytes, its documents by their hash."""
    names: dict[str, list[tuple[bytes, Path, int, int]]] = {}
    for shard in sources:
        for place, row in enumerate(read_rows(shard)):
            order = hashlib.sha256(row["id"].encode()).digest()[:8]
            names.setdefault(row["metadata"]["source"], []).append((order, shard, place, len(row["text"].encode())))
    chosen: set[tuple[Path, int]] = set()
    for entries in names.values():
        left = most_bytes // max(1, len(names))
        for _, shard, place, size in sorted(entries):
            if left <= 0:
                break
            chosen.add((shard, place))
            left -= size
    return [row["text"] for shard in sources for place, row in enumerate(read_rows(shard)) if (shard, place) in chosen]


def _hash(seed: int, what: str, identifier: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{what}/{identifier}".encode()).digest()[:8], "little")


def _encode(shard: Path, out: Path, seed: int, held_out: float) -> None:
    """Token ids of a shard's documents, and of each its stream, its place in the order and its bytes."""
    tokenizer = bpe.load(out / "tokenizer")
    narrow = DTYPES[dtype_for(tokenizer.get_vocab_size())]
    pieces: list[np.ndarray] = []
    described: list[dict[str, Any]] = []
    for rows in _batches(read_rows(shard)):
        for row, encoded in zip(
            rows, tokenizer.encode_batch([r["text"] for r in rows], add_special_tokens=False), strict=True
        ):
            pieces.append(np.array([BOS_ID, *encoded.ids, EOS_ID], dtype=narrow))
            kept_back = _hash(seed, "held_out", row["id"]) < held_out * 2**64
            described.append(
                {
                    "split": "held_out" if kept_back else "train",
                    "source": row["metadata"]["source"],
                    "order": _hash(seed, "order", row["id"]),
                    "bytes": len(row["text"].encode()),
                    "tokens": len(pieces[-1]),
                }
            )
    part = out / "work" / f"{shard.name}.npz.tmp"
    with part.open("wb") as file:
        np.savez(
            file,
            tokens=np.concatenate(pieces) if pieces else np.zeros(0, narrow),
            described=np.frombuffer(json.dumps(described).encode(), dtype=np.uint8),
        )
    os.replace(part, out / "work" / f"{shard.name}.npz")


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _write_streams(
    encoded: list[Path], folder: Path, dtype: str, shard_tokens: int
) -> dict[tuple[str, str], tuple[list[ShardEntry], int]]:
    """Gather each (split, source) in the order of its documents' hashes and write it in shards."""
    streams: dict[tuple[str, str], list[tuple[int, int, int, int, int, int]]] = {}
    tokens: list[np.ndarray] = []
    for number, path in enumerate(encoded):
        with np.load(path) as loaded:
            tokens.append(loaded["tokens"])
            described = json.loads(loaded["described"].tobytes())
        start = 0
        for place, d in enumerate(described):
            entry = (d["order"], number, place, start, d["tokens"], d["bytes"])
            streams.setdefault((d["split"], d["source"]), []).append(entry)
            start += d["tokens"]
    _leave_none_empty(streams)
    shutil.rmtree(folder, ignore_errors=True)
    written: dict[tuple[str, str], tuple[list[ShardEntry], int]] = {}
    for (split, source), entries in sorted(streams.items()):
        made: list[ShardEntry] = []
        held: list[np.ndarray] = []
        filled = 0
        for _, number, _, start, count, _ in sorted(entries):
            held.append(tokens[number][start : start + count])
            filled += count
            if filled >= shard_tokens:
                made.append(write_shard(folder, split, source, len(made), held, dtype))
                held, filled = [], 0
        if held:
            made.append(write_shard(folder, split, source, len(made), held, dtype))
        written[split, source] = (made, sum(e[5] for e in entries))
    return written


def _leave_none_empty(streams: dict[tuple[str, str], list[tuple[int, int, int, int, int, int]]]) -> None:
    """A source of few documents may have them all on one side by chance: the first of its order goes to the other.

    Training comes first: a source with one document holds nothing out.
    """
    for source in {source for _, source in streams}:
        for empty, full in (("train", "held_out"), ("held_out", "train")):
            there = streams.get((full, source), [])
            if (empty, source) not in streams and len(there) > (empty == "held_out"):
                moved = min(there)
                there.remove(moved)
                streams[empty, source] = [moved]
                if not there:
                    del streams[full, source]


def _metrics(streams: dict[tuple[str, str], tuple[list[ShardEntry], int]], vocab_size: int) -> Metrics:
    def count(split: str) -> dict[str, int]:
        return {source: sum(e.tokens for e in entries) for (s, source), (entries, _) in streams.items() if s == split}

    text_bytes = {source: size for (split, source), (_, size) in streams.items() if split == "train"}
    train, held = count("train"), count("held_out")
    return {
        "vocab_size": vocab_size,
        "tokens": sum(train.values()),
        "held_out_tokens": sum(held.values()),
        "documents": sum(e.documents for entries, _ in streams.values() for e in entries),
        "bytes": sum(size for _, size in streams.values()),
        "bytes_per_token": round(sum(text_bytes.values()) / max(1, sum(train.values())), 4),
        "tokens_by_source": train,
        "held_out_tokens_by_source": held,
        "bytes_per_token_by_source": {s: round(text_bytes[s] / max(1, n), 4) for s, n in train.items()},
    }


def _samples(sources: list[Path], tokenizer: Any, each: int = 2) -> list[dict[str, Any]]:
    """Beginnings of a few documents of each source, cut into their tokens."""
    shown: dict[str, int] = {}
    samples = []
    for shard in sources:
        for row in read_rows(shard):
            source = row["metadata"]["source"]
            if shown.setdefault(source, 0) >= each:
                break
            shown[source] += 1
            ids = tokenizer.encode(row["text"][:160], add_special_tokens=False).ids
            samples.append({"source": source, "tokens": "·".join(tokenizer.decode([i]) for i in ids[:48])})
    return samples
