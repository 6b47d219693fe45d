"""The mixture of a run, opened for reading: what `mix` wrote (data/mix.py), over the token shards it was made from.

    mixture/mixture.json                        format, packing, the order of each split, sizes and hashes of the files
    mixture/<split>/<source>/00000.pieces       pieces of each sequence of a shard (data/packing.py)
    mixture/<split>/<source>/00000.firsts       first piece of each sequence, and the number of pieces; uint32
    mixture/<split>/<source>/counts             how often each token id occurs in the stream, uint64

A position of the run is one sequence. What it holds is computed from its number alone (data/order.py): a run that
resumes, on another number of ranks as well, asks for the positions that are left. The model's room reads through this
file; it needs numpy and numba, and of this room the shards, the packing and the order.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gristmill.data.order import Order, Phase
from gristmill.data.packing import (
    FIRST,
    PIECE,
    count_pieces,
    count_stream,
    fill_pieces,
    fill_stream,
)
from gristmill.data.ranges import RemoteFiles, open_files
from gristmill.data.shards import PAD_ID, Shard, TokenShards

FORMAT = 1
COUNT = np.dtype("<u8")
SPLITS = ("train", "held_out")


class MixtureError(ValueError):
    """A mixture that cannot be read, or does not belong to the shards, with what to do."""


@dataclass(frozen=True)
class Sequences:
    """Rows of a batch, all (B, S) int64 but the last; a target of -100 stands for none."""

    tokens: np.ndarray
    targets: np.ndarray
    next_targets: np.ndarray  # two tokens ahead
    documents: np.ndarray  # a number for each document of a row; padding is one of its own
    sources: np.ndarray  # (B,), index into the split's sources


@dataclass(frozen=True)
class _Part:
    """One shard of a stream with its packing."""

    shard: Shard
    pieces: Any  # flat: two numbers a piece
    firsts: Any
    documents: np.ndarray | None  # starts of its documents, where rows are stretches of the shard


class Mixture:
    """A finished mixture over its token shards.

    Args:
        folder: the folder of the mix stage, a path or an address such as `s3://bucket/run/mixture`.
        shards: the token shards it was made from.

    Raises:
        MixtureError: it is missing, of another format, of other shards, or a file is not as long as it should be.
    """

    def __init__(self, folder: Path | str, shards: TokenShards) -> None:
        self.files, self.shards = open_files(folder), shards
        try:
            described = json.loads(self.files.read("mixture.json"))
        except (FileNotFoundError, NotADirectoryError):
            raise MixtureError(f"{folder} has no mixture.json: it is no mixture, or its making was cut short") from None
        if described.get("format") != FORMAT:
            raise MixtureError(
                f"{self.files.name('mixture.json')} has format {described.get('format')!r}, this code reads {FORMAT}: "
                f"mix again"
            )
        if described["tokens_index_sha256"] != shards.index_sha256:
            raise MixtureError(f"{self.files} was made from other token shards than {shards.files}: mix again")
        self.described: dict[str, Any] = described
        self.sequence_length: int = described["sequence_length"]
        self.packing: str = described["packing"]
        self.sequences: int = described["sequences"]
        self._streams = {(s["split"], s["source"]): s["shards"] for s in described["streams"]}
        self._ends = {key: np.cumsum([e["sequences"] for e in parts]) for key, parts in self._streams.items()}
        self.orders = {split: self._order(split) for split in SPLITS}
        self._parts: dict[tuple[str, str, int], _Part] = {}
        self._check_sizes()

    def _order(self, split: str) -> Order:
        given = self.described["orders"][split]
        sizes = [int(self._ends[split, name][-1]) for name in given["sources"]]
        phases = [Phase(p["first"], p["end"], tuple(p["quotas"])) for p in given["phases"]]
        return Order(self.described["seed"], given["sources"], sizes, given["pools"], phases)

    def _named(self) -> dict[str, tuple[int, str]]:
        """Bytes and hash of each file."""
        found = {}
        for (split, source), parts in self._streams.items():
            for number, entry in enumerate(parts):
                name = f"{split}/{source}/{number:05d}"
                found[f"{name}.pieces"] = (entry["pieces"] * 2 * PIECE.itemsize, entry["pieces_sha256"])
                found[f"{name}.firsts"] = ((entry["sequences"] + 1) * FIRST.itemsize, entry["firsts_sha256"])
        return found

    def _check_sizes(self) -> None:
        for path, (size, _) in self._named().items():
            there = self.files.size(path)
            if there != size:
                raise MixtureError(
                    f"{self.files.name(path)} has {'no' if there is None else there} bytes, not the {size} of "
                    f"mixture.json: fetch it again or mix again"
                )

    def verify(self) -> list[str]:
        """Files whose bytes do not hash to what mixture.json says."""
        files = self.files
        hashes = {path: hashlib.sha256(files.read(path)).hexdigest() for path in self._named()}
        return [files.name(path) for path, (_, listed) in self._named().items() if hashes[path] != listed]

    def sources(self, split: str = "train") -> list[str]:
        """Sources of the split's order; rows name them by their place here."""
        return self.orders[split].sources

    def shares(self, split: str = "train") -> list[float]:
        """The part of the run's sequences that comes from each source."""
        order = self.orders[split]
        return [n / order.total for n in order.used]

    def token_counts(self, source: str, split: str = "train") -> np.ndarray:
        """How often each token id occurs in a stream, (V,) uint64.

        Raises:
            MixtureError: the file does not count the tokens of these shards.
        """
        path = f"{split}/{source}/counts"
        read = self.files.read(path)
        counts = np.frombuffer(read[: len(read) // COUNT.itemsize * COUNT.itemsize], COUNT)
        tokens = sum(entry.tokens for entry in self.shards.entries(split, source))
        if len(read) != self.shards.vocab_size * COUNT.itemsize or int(counts.sum()) != tokens:
            raise MixtureError(
                f"{self.files.name(path)} does not count the {tokens:,} tokens of {self.shards.files}: fetch it again "
                f"or mix again"
            )
        return counts

    def _part(self, split: str, source: str, number: int) -> _Part:
        key = (split, source, number)
        if key not in self._parts:
            shard = self.shards.shard(*key)
            name = f"{split}/{source}/{number:05d}"
            starts = None
            if self.packing == "concatenate":
                starts = np.asarray(shard.starts[0 : shard.entry.documents])
            self._parts[key] = _Part(
                shard, self.files.array(f"{name}.pieces", PIECE), self.files.array(f"{name}.firsts", FIRST), starts
            )
        return self._parts[key]

    def _places(self, positions: np.ndarray, split: str) -> tuple[np.ndarray, list[tuple[_Part, int]]]:
        """The source of each position, and the shard and the sequence in it."""
        order = self.orders[split]
        sources, sequences = order.locate(positions)
        places = []
        for source, sequence in zip(sources.tolist(), sequences.tolist(), strict=True):
            name = order.sources[source]
            ends = self._ends[split, name]
            number = int(np.searchsorted(ends, sequence, side="right"))
            before = int(ends[number - 1]) if number else 0
            places.append((self._part(split, name, number), sequence - before))
        return sources, places

    def _pieces(self, places: list[tuple[_Part, int]]) -> list[np.ndarray]:
        """The pieces of each place, (pieces, 2)."""
        if self.files.remote:
            self.files.load([(part.firsts, at, at + 2) for part, at in places])
        edges = [tuple(int(v) for v in part.firsts[at : at + 2]) for part, at in places]
        if self.files.remote:
            self.files.load([(part.pieces, 2 * a, 2 * b) for (part, _), (a, b) in zip(places, edges, strict=True)])
        return [part.pieces[2 * a : 2 * b].reshape(-1, 2) for (part, _), (a, b) in zip(places, edges, strict=True)]

    def _stretches(self, pieces: np.ndarray) -> list[tuple[int, int]]:
        """First and end of the tokens that each piece needs: two more than its size, if the shard has them."""
        return [(int(start), int(start) + (int(size) & 0x7FFFFFFF) + 2) for start, size in pieces]

    def batch(
        self, positions: np.ndarray, split: str = "train", *, across: bool = False, pad: int = PAD_ID
    ) -> Sequences:
        """The sequences at these positions of the run.

        Args:
            across: where documents are concatenated, let the end of one predict the beginning of the next.

        Raises:
            ValueError: a position outside the run.
        """
        sources, places = self._places(np.asarray(positions), split)
        chosen = self._pieces(places)
        if self.shards.files.remote:
            self._load_tokens(places, chosen)
        rows = np.empty((4, len(places), self.sequence_length), np.int64)
        for row, ((part, _), pieces) in enumerate(zip(places, chosen, strict=True)):
            self._fill(part, pieces, across, pad, rows[:, row])
        return Sequences(rows[0], rows[1], rows[2], rows[3], sources)

    def _load_tokens(self, places: list[tuple[_Part, int]], chosen: list[np.ndarray]) -> None:
        self.shards.files.load(
            [
                (part.shard.tokens, start, end)
                for (part, _), pieces in zip(places, chosen, strict=True)
                for start, end in self._stretches(pieces)
            ]
        )

    def _fill(self, part: _Part, pieces: np.ndarray, across: bool, pad: int, row_4S: np.ndarray) -> None:
        tokens, out = part.shard.tokens, (row_4S[0], row_4S[1], row_4S[2], row_4S[3])
        if part.documents is None:
            if not isinstance(tokens, np.ndarray):
                tokens, pieces = _fetched(tokens, pieces, self._stretches(pieces))
            fill_pieces(tokens, pieces, pad, *out)
            return
        start, size = int(pieces[0, 0]), int(pieces[0, 1])
        if isinstance(tokens, np.ndarray):
            fill_stream(tokens, part.documents, start, size, across, pad, *out)
            return
        window, starts = tokens[start : start + size + 2], part.documents
        first = int(np.searchsorted(starts, start, side="right")) - 1
        near = starts[first : int(np.searchsorted(starts, start + size + 2)) + 1].astype(np.int64) - start
        near[0] = 0
        fill_stream(window, near, 0, size, across, pad, *out)
        row_4S[3, :size] += first
        row_4S[3, size:] = len(starts)

    def predictions(self, positions: np.ndarray, split: str = "train", *, across: bool = False) -> np.ndarray:
        """Targets one and two tokens ahead in the sequence at each position, (B, 2), without reading its tokens."""
        _, places = self._places(np.asarray(positions), split)
        counts = np.empty((len(places), 2), np.int64)
        for row, ((part, _), pieces) in enumerate(zip(places, self._pieces(places), strict=True)):
            if part.documents is None:
                counts[row] = count_pieces(pieces)
            else:
                start, size = int(pieces[0, 0]), int(pieces[0, 1])
                counts[row] = count_stream(part.shard.entry.tokens, part.documents, start, size, across)
        return counts

    def documents(self, positions: np.ndarray, split: str = "train") -> list[str]:
        """`source/id hash` of every document that the sequences at these positions read, each once, in their order."""
        sources, places = self._places(np.asarray(positions), split)
        names: dict[str, None] = {}
        for source, (part, _), pieces in zip(sources.tolist(), places, self._pieces(places), strict=True):
            starts = np.asarray(part.shard.starts[0 : part.shard.entry.documents]).astype(np.int64)
            for start, size in pieces.astype(np.int64):
                last = start + (size & 0x7FFFFFFF) - 1
                first, end = (int(np.searchsorted(starts, at, side="right")) for at in (start, last))
                ids = np.asarray(part.shard.ids[first - 1 : end])
                names |= dict.fromkeys(f"{self.sources(split)[source]}/{int(one):016x}" for one in ids)
        return list(names)

    def prefetch(self, positions: np.ndarray, split: str = "train") -> None:
        """Load what these positions need in a background thread, where the shards are remote; returns at once."""
        if isinstance(self.shards.files, RemoteFiles):
            self.shards.files.ahead(self._load, np.asarray(positions), split)

    def _load(self, positions: np.ndarray, split: str) -> None:
        _, places = self._places(positions, split)
        self._load_tokens(places, self._pieces(places))

    def positions(self, source: str, sequence: int, split: str = "train") -> list[int]:
        """The positions of the run that read a source's sequence."""
        order = self.orders[split]
        return order.positions(order.sources.index(source), sequence) if source in order.sources else []

    def where(self, split: str, source: str, shard: int, first: int, last: int) -> list[int]:
        """Positions of the run whose sequences read any of a shard's tokens [first, last], ascending; as targets too.

        A position p was read in optimizer step p // batch_sequences.

        Raises:
            MixtureError: the mixture knows no such shard.
        """
        parts = self._streams.get((split, source), [])
        if not 0 <= shard < len(parts):
            raise MixtureError(f"{self.files} has no shard {shard} of {split}/{source}")
        before = sum(entry["sequences"] for entry in parts[:shard])
        part = self._part(split, source, shard)
        pieces = part.pieces[0 : 2 * parts[shard]["pieces"]].reshape(-1, 2)
        start = pieces[:, 0].astype(np.int64)
        # The last token read: the target of the last input, or, where the document goes on, the one two ahead of it.
        end = start + (pieces[:, 1] & np.uint32(0x7FFFFFFF)) + (1 - (pieces[:, 1] >> 31).astype(np.int64))
        hits = np.flatnonzero((start <= last) & (end >= first))
        firsts = part.firsts[0 : parts[shard]["sequences"] + 1]
        sequences = np.unique(np.searchsorted(firsts, hits, side="right") - 1)
        return sorted(p for s in sequences for p in self.positions(source, before + int(s), split))


def _fetched(tokens: Any, pieces: np.ndarray, stretches: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """The pieces' tokens one after the other in memory, and the pieces as they lie there."""
    parts = [tokens[start:end] for start, end in stretches]
    moved = pieces.copy()
    moved[:, 0] = np.cumsum([0, *(len(p) for p in parts[:-1])])
    return np.concatenate(parts), moved
