"""Token shards: streams of token ids with document boundaries, document ids and an index (docs/token-shards.md).

    tokens/index.json                          format, dtype, vocabulary, and each stream's shards with sizes and hashes
    tokens/<split>/<source>/00000.tokens       token ids, little-endian uint16 or uint32
    tokens/<split>/<source>/00000.starts       start of each document in this shard, in tokens, little-endian uint64
    tokens/<split>/<source>/00000.ids          hash of each document's id, little-endian uint64

numpy and the standard library alone: the model's room reads shards through this file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gristmill.data.ranges import open_files

FORMAT = 2
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
START = np.dtype("<u8")
ID = np.dtype("<u8")
ENDINGS = ("tokens", "starts", "ids")
CHUNK = 1 << 22


class ShardError(ValueError):
    """A shard folder that cannot be read, with the file and what to do."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard as the index lists it."""

    tokens: int
    documents: int
    tokens_sha256: str
    starts_sha256: str
    ids_sha256: str


@dataclass(frozen=True)
class Found:
    """Where a document's tokens lie: document `document` of shard `shard`, from its token `start` on."""

    split: str
    source: str
    shard: int
    document: int
    start: int
    tokens: int


def dtype_for(vocab_size: int) -> str:
    """The narrowest type that holds every token id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def file_name(split: str, source: str, number: int, ending: str) -> str:
    """A shard's file, below the folder of the index."""
    return f"{split}/{source}/{number:05d}.{ending}"


def write_shard(
    folder: Path, split: str, source: str, number: int, documents: Sequence[np.ndarray], ids: Sequence[int], dtype: str
) -> ShardEntry:
    """Write one shard of whole documents (token ids, bos and eos included) with the hashes of their ids, atomically."""
    lengths = np.array([len(d) for d in documents], dtype=START)
    starts = np.zeros(len(documents), dtype=START)
    np.cumsum(lengths[:-1], out=starts[1:])
    tokens = np.concatenate(documents) if documents else np.zeros(0)
    return write_arrays(
        folder, split, source, number, tokens.astype(DTYPES[dtype], copy=False), starts, np.array(ids, ID)
    )


def write_arrays(
    folder: Path, split: str, source: str, number: int, tokens: np.ndarray, starts: np.ndarray, ids: np.ndarray
) -> ShardEntry:
    """Write the three files of a shard, each under a temporary name first; the entry for the index."""
    hashes = []
    for ending, array in zip(ENDINGS, (tokens, starts.astype(START), ids.astype(ID)), strict=True):
        path = folder / file_name(split, source, number, ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = np.ascontiguousarray(array).data.cast("B") if len(array) else b""
        part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        part.write_bytes(data)
        os.replace(part, path)
        hashes.append(hashlib.sha256(data).hexdigest())
    return ShardEntry(len(tokens), len(starts), *hashes)


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


@dataclass(frozen=True)
class Shard:
    """One shard opened: `tokens[a:b]`, `starts[a:b]` and `ids[a:b]` are arrays, whether it lies here or elsewhere."""

    entry: ShardEntry
    tokens: Any
    starts: Any
    ids: Any


class TokenShards:
    """A folder of token shards, opened for reading: a path, or an address such as `s3://bucket/run/tokens`.

    Args:
        hashes_on_touch: hash each shard's files when the shard is first opened, and refuse it where they differ.

    Raises:
        ShardError: no index, another format version, a shard missing or of another size than the index says.
    """

    def __init__(self, folder: Path | str, *, hashes_on_touch: bool = False) -> None:
        self.files, self.hashes_on_touch = open_files(folder), hashes_on_touch
        try:
            data = self.files.read("index.json")
        except (FileNotFoundError, NotADirectoryError):
            raise ShardError(
                f"{folder} has no index.json: it is no folder of token shards, or its writing was cut short"
            ) from None
        self.index: dict[str, Any] = json.loads(data)
        self.index_sha256 = hashlib.sha256(data).hexdigest()
        if self.index.get("format") != FORMAT:
            at = self.files.name("index.json")
            raise ShardError(
                f"{at} has format {self.index.get('format')!r} and this code reads {FORMAT}: tokenize again"
            )
        self.vocab_size: int = self.index["vocab_size"]
        self.dtype = DTYPES[self.index["dtype"]]
        self._opened: dict[tuple[str, str, int], Shard] = {}
        for stream in self.index["streams"]:
            self._check_sizes(stream)

    def _check_sizes(self, stream: dict[str, Any]) -> None:
        for number, shard in enumerate(stream["shards"]):
            sizes = {
                "tokens": shard["tokens"] * self.dtype.itemsize,
                "starts": shard["documents"] * START.itemsize,
                "ids": shard["documents"] * ID.itemsize,
            }
            for ending, size in sizes.items():
                path = file_name(stream["split"], stream["source"], number, ending)
                there = self.files.size(path)
                if there is None:
                    raise ShardError(
                        f"{self.files.name(path)} is missing, and index.json lists it: fetch it again or tokenize again"
                    )
                if there != size:
                    raise ShardError(
                        f"{self.files.name(path)} has {there} bytes, not the {size} of index.json: truncated?"
                    )

    def streams(self, split: str) -> list[str]:
        """Sources that have tokens in a split, sorted."""
        return [s["source"] for s in self.index["streams"] if s["split"] == split]

    def entries(self, split: str, source: str) -> list[ShardEntry]:
        """A stream's shards as the index lists them.

        Raises:
            ShardError: there is no such stream.
        """
        return [ShardEntry(**shard) for shard in self._described(split, source)["shards"]]

    def text_bytes(self, split: str, source: str) -> int:
        """UTF-8 bytes of the text that a stream stands for."""
        return int(self._described(split, source)["bytes"])

    def _described(self, split: str, source: str) -> dict[str, Any]:
        for described in self.index["streams"]:
            if (described["split"], described["source"]) == (split, source):
                return described
        raise ShardError(f"{self.files} has no stream {source!r} in split {split!r}: it has {self.streams(split)}")

    def shard(self, split: str, source: str, number: int) -> Shard:
        """One shard, opened once.

        Raises:
            ShardError: there is none, or its hashes were to be checked and differ.
        """
        key = (split, source, number)
        if key not in self._opened:
            entries = self.entries(split, source)
            if not 0 <= number < len(entries):
                raise ShardError(f"stream {split}/{source} of {self.files} has {len(entries)} shards, no {number}")
            if self.hashes_on_touch:
                self.check_hashes(split, source, number)
            arrays = (
                self.files.array(file_name(*key, ending), dtype)
                for ending, dtype in zip(ENDINGS, (self.dtype, START, ID), strict=True)
            )
            self._opened[key] = Shard(entries[number], *arrays)
        return self._opened[key]

    def check_hashes(self, split: str, source: str, number: int) -> None:
        """Hash a shard's files.

        Raises:
            ShardError: the bytes of one do not hash to what the index says.
        """
        wrong = self._damaged(split, source, number)
        if wrong:
            raise ShardError(f"{wrong[0]} does not hash to what index.json says: fetch it again or tokenize again")

    def _damaged(self, split: str, source: str, number: int) -> list[str]:
        listed = vars(self.entries(split, source)[number])
        paths = {ending: file_name(split, source, number, ending) for ending in ENDINGS}
        return [
            self.files.name(path) for ending, path in paths.items() if self._hash(path) != listed[f"{ending}_sha256"]
        ]

    def _hash(self, path: str) -> str:
        digest, data = hashlib.sha256(), self.files.array(path, np.dtype("u1"))
        for start in range(0, len(data), CHUNK):
            digest.update(np.ascontiguousarray(data[start : start + CHUNK]).data)
        return digest.hexdigest()

    def verify(self) -> list[str]:
        """Files whose bytes do not hash to what the index says."""
        return [
            name
            for stream in self.index["streams"]
            for number in range(len(stream["shards"]))
            for name in self._damaged(stream["split"], stream["source"], number)
        ]

    def stream(self, split: str, source: str) -> TokenStream:
        """One source's tokens end to end.

        Raises:
            ShardError: there is no such stream.
        """
        return TokenStream(self, split, source)

    def find(self, id_hash: int) -> list[Found]:
        """Where the document of this id hash (`gristmill.data.documents.id_hash`) lies; one pass over `.ids` files."""
        found = []
        for stream in self.index["streams"]:
            split, source = stream["split"], stream["source"]
            for number, entry in enumerate(self.entries(split, source)):
                shard = self.shard(split, source, number)
                for begin in range(0, entry.documents, CHUNK):
                    for place in np.flatnonzero(shard.ids[begin : begin + CHUNK] == np.uint64(id_hash)):
                        document = begin + int(place)
                        edges = [*(int(v) for v in shard.starts[document : document + 2]), entry.tokens]
                        found.append(Found(split, source, number, document, edges[0], edges[1] - edges[0]))
        return found


class TokenStream:
    """One source's tokens end to end, shard by shard; a read costs the same anywhere."""

    def __init__(self, shards: TokenShards, split: str, source: str) -> None:
        self.bytes = shards.text_bytes(split, source)
        self.name = f"{split}/{source}"
        entries = shards.entries(split, source)
        self.shards = [shards.shard(split, source, n) for n in range(len(entries))]
        self.ends = np.cumsum([e.tokens for e in entries], dtype=np.int64)
        self.first_documents = np.cumsum([0, *(e.documents for e in entries)], dtype=np.int64)

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
        number = int(np.searchsorted(self.ends, start, side="right"))
        while done < count:
            shard = self.shards[number]
            begin = start + done - (int(self.ends[number - 1]) if number else 0)
            part = shard.tokens[begin : begin + count - done]
            tokens[done : done + len(part)] = part
            starts = np.asarray(shard.starts[0 : shard.entry.documents]).astype(np.int64)
            own = np.searchsorted(starts, np.arange(begin, begin + len(part)), side="right") - 1
            documents[done : done + len(part)] = own + self.first_documents[number]
            done += len(part)
            number += 1
        return tokens, documents
