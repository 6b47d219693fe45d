"""Token shards: packed streams of token ids with document boundaries and an index (docs/token-shards.md).

    tokens/index.json                          format, dtype, vocabulary, and each stream's shards with sizes and hashes
    tokens/<split>/<source>/00000.tokens       token ids, little-endian uint16 or uint32
    tokens/<split>/<source>/00000.starts       start of each document in this shard, in tokens, little-endian uint64

numpy and the standard library alone: the model's room reads shards through this file.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
START = np.dtype("<u8")
CHUNK = 1 << 20


class ShardError(ValueError):
    """A shard folder that cannot be read, with the file and what to do."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard as the index lists it."""

    tokens: int
    documents: int
    tokens_sha256: str
    starts_sha256: str


def dtype_for(vocab_size: int) -> str:
    """The narrowest type that holds every token id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def shard_path(folder: Path, split: str, source: str, number: int, ending: str) -> Path:
    return folder / split / source / f"{number:05d}.{ending}"


def write_shard(
    folder: Path, split: str, source: str, number: int, documents: list[np.ndarray], dtype: str
) -> ShardEntry:
    """Write one shard of whole documents (token ids, bos and eos included), atomically."""
    lengths = np.array([len(d) for d in documents], dtype=START)
    starts = np.zeros(len(documents), dtype=START)
    np.cumsum(lengths[:-1], out=starts[1:])
    tokens = np.concatenate(documents).astype(DTYPES[dtype]) if documents else np.zeros(0, DTYPES[dtype])
    hashes = []
    for ending, array in (("tokens", tokens), ("starts", starts)):
        path = shard_path(folder, split, source, number, ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = array.tobytes()
        part = path.with_name(f"{path.name}.tmp")
        part.write_bytes(data)
        os.replace(part, path)
        hashes.append(hashlib.sha256(data).hexdigest())
    return ShardEntry(len(tokens), len(documents), *hashes)


def write_index(
    folder: Path,
    vocab_size: int,
    tokenizer_sha256: str,
    streams: dict[tuple[str, str], tuple[list[ShardEntry], int]],
) -> None:
    """Write index.json, last: `streams` maps (split, source) to its shards and the bytes of text they hold."""
    listed = [
        {
            "split": split,
            "source": source,
            "bytes": text_bytes,
            "shards": [vars(entry) for entry in entries],
        }
        for (split, source), (entries, text_bytes) in sorted(streams.items())
    ]
    index = {
        "format": FORMAT,
        "dtype": dtype_for(vocab_size),
        "vocab_size": vocab_size,
        "tokenizer_sha256": tokenizer_sha256,
        "streams": listed,
    }
    part = folder / "index.json.tmp"
    part.write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, folder / "index.json")


class TokenShards:
    """A folder of token shards, opened for reading.

    Raises:
        ShardError: no index, another format version, a shard missing or of another size than the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        at = folder / "index.json"
        if not at.exists():
            raise ShardError(
                f"{folder} has no index.json: it is no folder of token shards, or its writing was cut short"
            )
        self.index: dict[str, Any] = json.loads(at.read_text(encoding="utf-8"))
        if self.index.get("format") != FORMAT:
            raise ShardError(
                f"{at} has format {self.index.get('format')!r} and this code reads {FORMAT}: tokenize again"
            )
        self.vocab_size: int = self.index["vocab_size"]
        self.dtype = DTYPES[self.index["dtype"]]
        for stream in self.index["streams"]:
            self._check_sizes(stream)

    def _check_sizes(self, stream: dict[str, Any]) -> None:
        for number, shard in enumerate(stream["shards"]):
            sizes = {
                "tokens": shard["tokens"] * self.dtype.itemsize,
                "starts": shard["documents"] * START.itemsize,
            }
            for ending, size in sizes.items():
                path = shard_path(self.folder, stream["split"], stream["source"], number, ending)
                if not path.exists():
                    raise ShardError(f"{path} is missing, and index.json lists it: fetch it again or tokenize again")
                if path.stat().st_size != size:
                    raise ShardError(
                        f"{path} has {path.stat().st_size} bytes, not the {size} of index.json: truncated?"
                    )

    def streams(self, split: str) -> list[str]:
        """Sources that have tokens in a split, sorted."""
        return [s["source"] for s in self.index["streams"] if s["split"] == split]

    def stream(self, split: str, source: str) -> TokenStream:
        """One source's stream.

        Raises:
            ShardError: there is no such stream.
        """
        for described in self.index["streams"]:
            if (described["split"], described["source"]) == (split, source):
                return TokenStream(self, described)
        raise ShardError(f"{self.folder} has no stream {source!r} in split {split!r}: it has {self.streams(split)}")

    def verify(self) -> list[str]:
        """Files whose bytes do not hash to what the index says."""
        wrong = []
        for stream in self.index["streams"]:
            for number, shard in enumerate(stream["shards"]):
                for ending in ("tokens", "starts"):
                    path = shard_path(self.folder, stream["split"], stream["source"], number, ending)
                    if hashlib.sha256(path.read_bytes()).hexdigest() != shard[f"{ending}_sha256"]:
                        wrong.append(str(path))
        return wrong


class TokenStream:
    """One source's tokens end to end, memory-mapped shard by shard; a read costs the same anywhere."""

    def __init__(self, shards: TokenShards, described: dict[str, Any]) -> None:
        self.bytes: int = described["bytes"]
        self.name = f"{described['split']}/{described['source']}"
        self.tokens, self.starts = [], []
        for number, shard in enumerate(described["shards"]):
            if not shard["tokens"]:
                continue
            where = (shards.folder, described["split"], described["source"], number)
            self.tokens.append(np.memmap(shard_path(*where, "tokens"), shards.dtype, "r"))
            self.starts.append(np.fromfile(shard_path(*where, "starts"), START).astype(np.int64))
        self.ends = np.cumsum([len(t) for t in self.tokens], dtype=np.int64)
        self.first_documents = np.cumsum([0, *(len(s) for s in self.starts)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, start + count) and the document each belongs to, both int64.

        Raises:
            ShardError: the range reaches past the stream's end.
        """
        if start < 0 or count < 0 or start + count > len(self):
            raise ShardError(
                f"tokens {start} to {start + count} of stream {self.name} were asked for; it has {len(self)}"
            )
        tokens, documents = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        shard = int(np.searchsorted(self.ends, start, side="right"))
        while done < count:
            begin = start + done - (int(self.ends[shard - 1]) if shard else 0)
            part = self.tokens[shard][begin : begin + count - done]
            tokens[done : done + len(part)] = part
            place = np.arange(begin, begin + len(part))
            own = np.searchsorted(self.starts[shard], place, side="right") - 1
            documents[done : done + len(part)] = own + self.first_documents[shard]
            done += len(part)
            shard += 1
        return tokens, documents
