"""Packing of documents into sequences of one length, and the rows of a batch from packed sequences.

What is packed are *predictions*: a document of n tokens gives n − 1 pairs (token, the next one), and a sequence has
room for `length` of them. A document with more is cut into pieces of `length` and a rest; consecutive pieces share the
token at the cut as target and input, so each token but a document's first is predicted once. Two ways:

- `best_fit`: pieces in order of decreasing size, each into the sequence with the least room that still takes it
  (best-fit decreasing; Ding et al. 2024, "Fewer truncations improve language modeling"). No document is cut that fits
  a sequence. Finding the sequence is a search in a tree over the room left, O(log length) a piece.
- `concatenate`: documents end to end, a new sequence after every `length` tokens, as most trainers do.

A piece is two numbers, little-endian uint32: its first token in its shard, and its predictions; bit 31 of the latter
says that the document ends with it (in `best_fit`). The loops are numba's: packing looks at every document, and a
batch is put together in one pass over its tokens. numba's compilations are kept on disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numba import njit

PIECE = np.dtype("<u4")
FIRST = np.dtype("<u4")
ENDS = 1 << 31
IGNORED = -100


@dataclass(frozen=True)
class Counts:
    """What packing did to the documents of a shard."""

    documents: int
    documents_cut: int
    needlessly_cut: int  # documents that a sequence would have held whole
    cuts: int
    sequences: int
    padding: int  # positions of the sequences without a prediction
    predictions: int


@dataclass(frozen=True)
class Packed:
    """Sequences of a shard: sequence i is `pieces[firsts[i]:firsts[i + 1]]`."""

    pieces: np.ndarray  # (pieces, 2) of PIECE
    firsts: np.ndarray  # (sequences + 1,) of FIRST
    counts: Counts


def best_fit(edges: np.ndarray, length: int, window: int = 0) -> Packed:
    """Best-fit decreasing; see the module.

    With a `window`, documents are packed with those of the same so many tokens of the shard alone, so that a sequence
    is read from one place; the end of each window pads a little more.
    """
    if not window or edges[-1] <= window:
        return _best_fit(edges, length)
    borders = np.unique(np.searchsorted(edges, np.arange(0, edges[-1] + window, window)).clip(max=len(edges) - 1))
    parts = [_best_fit(edges[a : b + 1], length) for a, b in pairwise(borders.tolist())]
    firsts = np.cumsum([0, *(n for p in parts for n in np.diff(p.firsts.astype(np.int64)))])
    totals = [sum(values) for values in zip(*(vars(p.counts).values() for p in parts), strict=True)]
    return Packed(np.concatenate([p.pieces for p in parts]), firsts.astype(FIRST), Counts(*totals))


def _best_fit(edges: np.ndarray, length: int) -> Packed:
    """`edges`: where each document begins in the shard, and the end of the last."""
    sizes = np.maximum(np.diff(edges) - 1, 0)
    starts = edges[:-1]
    pieces_of = -(-sizes // length)
    owner = np.repeat(np.arange(len(sizes)), pieces_of)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(pieces_of) - pieces_of, pieces_of)
    size = np.minimum(sizes[owner] - within * length, length)
    last = within == pieces_of[owner] - 1
    order = np.argsort(-size, kind="stable")
    bin_of, bins = _best_fit_bins(size[order], length)
    by_bin = np.argsort(bin_of, kind="stable")
    chosen = order[by_bin]
    pieces = np.empty((len(chosen), 2), PIECE)
    pieces[:, 0] = (starts[owner] + within * length)[chosen]
    pieces[:, 1] = size[chosen] + np.where(last[chosen], ENDS, 0)
    firsts = np.zeros(bins + 1, FIRST)
    np.cumsum(np.bincount(bin_of, minlength=bins), out=firsts[1:])
    cut = pieces_of > 1
    total = int(sizes.sum())
    counts = Counts(len(sizes), int(cut.sum()), 0, int((pieces_of[cut] - 1).sum()), bins, bins * length - total, total)
    return Packed(pieces, firsts, counts)


@njit(cache=True, nogil=True)
def _best_fit_bins(sizes, length):
    """The bin of each size, taken in the given (decreasing) order, and the number of bins.

    `head[r]` is the newest bin with room r, `below` links it to the next; `tree` counts the bins at or below each node.
    """
    leaves = 1
    while leaves < length + 1:
        leaves *= 2
    tree = np.zeros(2 * leaves, np.int64)
    head = np.full(length + 1, -1, np.int64)
    below = np.empty(len(sizes), np.int64)
    bin_of = np.empty(len(sizes), np.int64)
    bins = 0
    for i in range(len(sizes)):
        size = sizes[i]
        node = leaves + size  # the smallest room that is at least the size and has a bin: up, then down to the left
        if tree[node] == 0:
            while node > 1 and (node % 2 == 1 or tree[node + 1] == 0):
                node //= 2
            if node > 1:
                node += 1
                while node < leaves:
                    node *= 2
                    if tree[node] == 0:
                        node += 1
        if node > 1:
            room = node - leaves
            chosen = head[room]
            head[room] = below[chosen]
            while node >= 1:
                tree[node] -= 1
                node //= 2
        else:
            room, chosen = length, bins
            bins += 1
        bin_of[i] = chosen
        room -= size
        if room > 0:
            below[chosen] = head[room]
            head[room] = chosen
            node = leaves + room
            while node >= 1:
                tree[node] += 1
                node //= 2
    return bin_of, bins


def concatenate(edges: np.ndarray, length: int) -> Packed:
    """Plain concatenation within the shard; the last sequence is what is left."""
    tokens, documents = int(edges[-1]), len(edges) - 1
    predictions = max(0, tokens - 1)
    sequences = -(-predictions // length)
    begins = np.arange(sequences, dtype=np.int64) * length
    pieces = np.empty((sequences, 2), PIECE)
    pieces[:, 0] = begins
    pieces[:, 1] = np.minimum(predictions - begins, length)
    # A document is cut by each border strictly inside it: both sides then hold predictions of it.
    sizes = np.diff(edges)
    inside = np.maximum((edges[1:] - 2) // length - edges[:-1] // length, 0)
    cut = inside > 0
    counts = Counts(
        documents, int(cut.sum()), int((cut & (sizes - 1 <= length)).sum()), int(inside.sum()), sequences,
        sequences * length - predictions, predictions,
    )  # fmt: skip
    return Packed(pieces, np.arange(sequences + 1, dtype=FIRST), counts)


@njit(cache=True, nogil=True)
def fill_pieces(tokens, pieces, pad, token_S, target_S, next_S, document_S):
    """One row from pieces that each lie in one document; what is left of the row is padding, a document of its own."""
    at = 0
    for p in range(len(pieces)):
        start, size = np.int64(pieces[p, 0]), np.int64(pieces[p, 1] & np.uint32(0x7FFFFFFF))
        ends = pieces[p, 1] >> 31
        for i in range(size):
            token_S[at + i] = tokens[start + i]
            target_S[at + i] = tokens[start + i + 1]
            document_S[at + i] = p
        known = size - 1 if ends else size
        for i in range(known):
            next_S[at + i] = tokens[start + i + 2]
        if ends:
            next_S[at + known] = -100
        at += size
    for i in range(at, len(token_S)):
        token_S[i] = pad
        target_S[i] = -100
        next_S[i] = -100
        document_S[i] = len(pieces)


@njit(cache=True, nogil=True)
def fill_stream(tokens, starts, start, size, across, pad, token_S, target_S, next_S, document_S):
    """One row from a stretch of a shard; where not `across`, no document's end predicts the next one's beginning."""
    document = np.searchsorted(starts, start, side="right") - 1
    count = len(starts)
    for i in range(size):
        at = start + i
        while document + 1 < count and starts[document + 1] <= at:
            document += 1
        until = len(tokens) if across or document + 1 == count else np.int64(starts[document + 1])
        token_S[i] = tokens[at]
        target_S[i] = tokens[at + 1] if at + 1 < until else -100
        next_S[i] = tokens[at + 2] if at + 2 < until else -100
        document_S[i] = document
    for i in range(size, len(token_S)):
        token_S[i] = pad
        target_S[i] = -100
        next_S[i] = -100
        document_S[i] = count


@njit(cache=True, nogil=True)
def count_pieces(pieces):
    """Targets one and two tokens ahead in a row that `fill_pieces` makes."""
    one = two = 0
    for p in range(len(pieces)):
        size = np.int64(pieces[p, 1] & np.uint32(0x7FFFFFFF))
        one += size
        two += size - np.int64(pieces[p, 1] >> 31)
    return one, two


@njit(cache=True, nogil=True)
def count_stream(tokens, starts, start, size, across):
    """Targets one and two tokens ahead in a row that `fill_stream` makes of a shard of `tokens` tokens."""
    document = np.searchsorted(starts, start, side="right") - 1
    count = len(starts)
    one = two = 0
    for i in range(size):
        at = start + i
        while document + 1 < count and starts[document + 1] <= at:
            document += 1
        until = tokens if across or document + 1 == count else np.int64(starts[document + 1])
        one += at + 1 < until
        two += at + 2 < until
    return one, two
