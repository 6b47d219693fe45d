"""First step, a task a shard: read the documents once and leave the keys by which they meet in `index/`.

`<shard>.keys` holds, for each kind of key (exact, url, each bucket), arrays sorted by key:

    <kind>/keys     uint64, ascending
    <kind>/checks   exact and url: the other half of a 128-bit hash (uint64); buckets: 32 bits of the exact hash
    <kind>/places   uint32, the document's place in the shard
    <kind>/ranks    uint64, the policy's value, less is better (absent where the policy is first)
    <kind>/fences   uint64 (257): where keys with each highest byte begin, so that a range is read alone

and of the documents, by place: `ranks`, `ids` (UTF-8) with `id_ends`, `shingle_ends`, `exact/best` and `url/best`
(uint32: the best-ranked document of this shard that is equal). Only these best ones have entries: a page that is in a
shard a million times is one entry. `<shard>.shingles` holds the n-gram hashes, uint32, one document after another.
"""

from __future__ import annotations

import struct
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np
import xxhash

from gristmill.data.dedup.arrays import write_arrays
from gristmill.data.dedup.config import DedupConfig
from gristmill.data.dedup.minhash import Signer
from gristmill.data.documents import Row, atomic, read_rows
from gristmill.data.urls import normalised_url

FENCES = 256
COLUMNS_AT_ONCE = 1 << 26  # bytes of bucket keys brought from rows to columns at a time
WORST = 2**64 - 1
BUFFER = 1 << 20
TOGETHER = 1 << 16  # characters of short documents that are signed together: all that is made of them fits a cache


def write_index(shard: Path, folder: Path, config: DedupConfig) -> None:
    """Write <shard>.shingles and then <shard>.keys into `folder`.

    Raises:
        ValueError: the shard is damaged.
    """
    name = shard.name.removesuffix(".jsonl.zst")
    columns = _Columns()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if config.near:
            shingles = stack.enter_context(stack.enter_context(atomic(folder / f"{name}.shingles")).open("wb", BUFFER))
            spilled = stack.enter_context(tempfile.TemporaryFile(buffering=BUFFER, dir=folder))
            _read_near(shard, config, columns, shingles, spilled)
        else:
            spilled = None
            _read_exact(shard, config, columns)
        arrays = columns.arrays(config, spilled)
    write_arrays(folder / f"{name}.keys", arrays)


class _Columns:
    """What is held of a shard's documents while it is read: some 60 bytes and the id of each."""

    def __init__(self) -> None:
        self.exact = array("Q")
        self.url = array("Q")
        self.url_places = array("I")
        self.ranks = array("Q")
        self.ids = bytearray()
        self.id_ends = array("Q")
        self.shingle_ends = array("Q")

    def add(self, row: Row, config: DedupConfig) -> None:
        if config.url and row["metadata"].get("url"):
            digest = xxhash.xxh3_128_intdigest(normalised_url(row["metadata"]["url"]).encode("utf-8", "surrogatepass"))
            self.url.extend((digest >> 64, digest & WORST))
            self.url_places.append(len(self.ranks))
        self.ranks.append(rank_of(row, config))
        self.ids += row["id"].encode("utf-8", "surrogatepass")
        self.id_ends.append(len(self.ids))

    def arrays(self, config: DedupConfig, spilled: IO[bytes] | None) -> dict[str, np.ndarray]:
        """Everything that goes into the file of keys."""
        ranks, count = _numbers(self.ranks), len(self.ranks)
        exact = _numbers(self.exact).reshape(-1, 2)
        made = {
            "ranks": ranks,
            "ids": np.frombuffer(self.ids, np.uint8),
            "id_ends": _numbers(self.id_ends),
            "shingle_ends": _numbers(self.shingle_ends),
        }
        alone = np.arange(count, dtype=np.uint32)
        if config.exact:
            made["exact/best"] = _best(exact, ranks, alone, count)
            alone = np.flatnonzero(made["exact/best"] == alone).astype(np.uint32)
            made |= _entries("exact", exact[alone, 0], exact[alone, 1], alone, ranks, config)
        if config.url:
            url, places = _numbers(self.url).reshape(-1, 2), np.frombuffer(self.url_places, np.uint32)
            made["url/best"] = _best(url, ranks, places, count)
            first = made["url/best"][places] == places
            made |= _entries("url", url[first, 0], url[first, 1], places[first], ranks, config)
        if spilled is not None:
            checks = (exact[alone, 1] & np.uint64(0xFFFFFFFF)).astype(np.uint32)
            for number, keys in _by_bucket(spilled, count, config.buckets):
                made |= _entries(f"{number:03d}", keys[alone], checks, alone, ranks, config)
        return made


def _read_near(shard: Path, config: DedupConfig, columns: _Columns, shingles: IO[bytes], spilled: IO[bytes]) -> None:
    signer = Signer(config.ngram, config.buckets, config.rows)
    end = np.uint64(0)
    for rows in _batches(read_rows(shard)):
        made = signer.sign_all([row["text"] for row in rows])
        for row in rows:
            columns.add(row, config)
        columns.exact.frombytes(made.exact.tobytes())
        columns.shingle_ends.frombytes((end + made.ends).tobytes())
        end += made.ends[-1]
        shingles.write(made.shingles.data)
        spilled.write(made.keys.data)


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Rows in lists of at least TOGETHER characters, or so many rows."""
    held, size = [], 0
    for row in rows:
        held.append(row)
        size += len(row["text"])
        if size >= TOGETHER or len(held) >= TOGETHER // 64:
            yield held
            held, size = [], 0
    if held:
        yield held


def _read_exact(shard: Path, config: DedupConfig, columns: _Columns) -> None:
    signer = Signer(config.ngram, 1, 1)
    for row in read_rows(shard):
        columns.add(row, config)
        columns.exact.extend(signer.exact(row["text"]))


def rank_of(row: Row, config: DedupConfig) -> int:
    """The policy's value of a document as an unsigned 64-bit number, of which less is better.

    Raises:
        ValueError: the quality of a document is there and not a number.
    """
    if config.policy == "longest":
        return WORST - len(row["text"])
    if config.policy == "source":
        source = row["metadata"]["source"]
        listed = config.preferred_sources
        return listed.index(source) if source in listed else len(listed)
    if config.policy == "quality":
        value = row["metadata"].get(config.quality_field)
        if value is None:
            return WORST
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(
                f"the document {row['id']!r} has the {config.quality_field} {value!r}, which is not a number: "
                f"give `quality_field` a numeric field, or take another policy"
            )
        return _descending(float(value))
    return 0


def _descending(value: float) -> int:
    """Numbers that ascend as floats descend; NaN comes last but for documents without a value."""
    if value != value:
        return WORST - 1
    (bits,) = struct.unpack("<Q", struct.pack("<d", value + 0.0))  # −0.0 is 0.0
    ascending = bits ^ (WORST if bits >> 63 else 1 << 63)
    return WORST - ascending


def _numbers(column: array[int]) -> np.ndarray:
    return np.frombuffer(column, np.uint64) if len(column) else np.empty(0, np.uint64)


def _best(hashes: np.ndarray, ranks: np.ndarray, places: np.ndarray, count: int) -> np.ndarray:
    """Of each place the best-ranked one of equal hash (uint64 (n, 2)); of those without a hash, themselves."""
    best = np.arange(count, dtype=np.uint32)
    order = np.lexsort((places, ranks[places], hashes[:, 1], hashes[:, 0]))
    ordered = hashes[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(1)
    first = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    best[places[order]] = places[order[first]]
    return best


def _entries(
    kind: str, keys: np.ndarray, checks: np.ndarray, places: np.ndarray, ranks: np.ndarray, config: DedupConfig
) -> dict[str, np.ndarray]:
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.arange(FENCES, dtype=np.uint64) << np.uint64(65 - FENCES.bit_length())
    made = {
        f"{kind}/keys": ordered,
        f"{kind}/checks": checks[order],
        f"{kind}/places": places[order],
        f"{kind}/fences": np.append(np.searchsorted(ordered, starts), len(ordered)).astype(np.uint64),
    }
    return made if config.policy == "first" else {**made, f"{kind}/ranks": ranks[places[order]]}


def _by_bucket(spilled: IO[bytes], count: int, buckets: int) -> Iterator[tuple[int, np.ndarray]]:
    """The bucket keys, which were written a document at a time, a bucket at a time."""
    spilled.flush()
    together = max(1, min(buckets, COLUMNS_AT_ONCE // max(1, 8 * count)))
    rows_at_once = max(1, COLUMNS_AT_ONCE // (8 * buckets))
    for first in range(0, buckets, together):
        held = np.empty((min(together, buckets - first), count), np.uint64)
        spilled.seek(0)
        for start in range(0, count, rows_at_once):
            rows = min(rows_at_once, count - start)
            block = np.frombuffer(spilled.read(8 * buckets * rows), np.uint64).reshape(rows, buckets)
            held[:, start : start + rows] = block[:, first : first + len(held)].T
        yield from enumerate(held, first)
