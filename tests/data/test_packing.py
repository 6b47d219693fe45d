"""Packing of documents into sequences."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.data.packing import Packed, best_fit, concatenate


def edges_of(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def rows_of(packed: Packed) -> list[list[tuple[int, int, bool]]]:
    """(first token, predictions, ends the document) of each piece of each sequence."""
    pieces = [(int(a), int(b) & 0x7FFFFFFF, int(b) >> 31 == 1) for a, b in packed.pieces]
    return [pieces[a:b] for a, b in zip(packed.firsts[:-1], packed.firsts[1:], strict=True)]


def best_fit_by_hand(sizes: list[int], length: int) -> list[list[int]]:
    """Best-fit decreasing by looking at every open bin."""
    bins: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        fitting = [b for b in bins if sum(b) + size <= length]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            bins.append([size])
    return bins


lengths_of_documents = st.lists(st.integers(2, 40), min_size=1, max_size=50)


@given(lengths_of_documents, st.integers(1, 20))
@settings(max_examples=80, deadline=None)
def test_best_fit_packs_every_prediction_once_and_cuts_what_it_must(lengths: list[int], length: int) -> None:
    edges, packed = edges_of(lengths), best_fit(edges_of(lengths), length)
    rows = rows_of(packed)
    assert all(0 < sum(size for _, size, _ in row) <= length for row in rows)
    seen = sorted(at for row in rows for start, size, _ in row for at in range(start, start + size))
    assert seen == [at for a, b in pairwise(edges) for at in range(a, b - 1)]
    sizes = [size for row in rows for _, size, _ in row]
    wanted = [min(length, n - 1 - at) for n in lengths for at in range(0, n - 1, length)]
    assert sorted(sizes) == sorted(wanted)
    # of bins with the same room either takes a piece: the same number of bins is left with each room
    by_hand = best_fit_by_hand(sizes, length)
    assert Counter(sum(s for _, s, _ in row) for row in rows) == Counter(map(sum, by_hand))
    ends = {int(b) - 1 for b in edges[1:]}
    assert all((start + size in ends) == last for row in rows for start, size, last in row)
    counts = packed.counts
    assert counts.documents_cut == sum(n - 1 > length for n in lengths)
    assert counts.cuts == len(sizes) - len(lengths)
    assert counts.needlessly_cut == 0
    assert counts.padding == len(rows) * length - counts.predictions
    assert counts.predictions == sum(lengths) - len(lengths)


@given(lengths_of_documents, st.integers(1, 20))
@settings(max_examples=80, deadline=None)
def test_concatenation_counts_what_it_cuts(lengths: list[int], length: int) -> None:
    packed = concatenate(edges_of(lengths), length)
    rows, tokens = rows_of(packed), sum(lengths)
    assert [at for [(start, size, _)] in rows for at in range(start, start + size)] == list(range(tokens - 1))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    predicting = [at for at in range(tokens - 1) if owner[at] == owner[at + 1]]
    sequences = {d: {at // length for at in predicting if owner[at] == d} for d in range(len(lengths))}
    counts = packed.counts
    assert counts.cuts == sum(len(s) - 1 for s in sequences.values())
    assert counts.documents_cut == sum(len(s) > 1 for s in sequences.values())
    assert counts.needlessly_cut == sum(len(s) > 1 and lengths[d] - 1 <= length for d, s in sequences.items())
    assert counts.padding == len(rows) * length - (tokens - 1)


@given(lengths_of_documents, st.integers(1, 20), st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_windows_keep_a_sequence_in_one_place(lengths: list[int], length: int, window: int) -> None:
    edges = edges_of(lengths)
    whole, packed = best_fit(edges, length), best_fit(edges, length, window)
    assert sorted(p for row in rows_of(packed) for p in row) == sorted(p for row in rows_of(whole) for p in row)
    for row in rows_of(packed):
        assert max(a + n for a, n, _ in row) - min(a for a, _, _ in row) <= window + max(lengths)
        assert sum(n for _, n, _ in row) <= length
    assert packed.counts.predictions == whole.counts.predictions
    assert packed.counts.sequences == len(packed.firsts) - 1 >= whole.counts.sequences
    assert packed.counts.padding == packed.counts.sequences * length - packed.counts.predictions


def test_best_fit_fills_real_lengths() -> None:
    """Documents as they are: lognormal lengths, a tenth longer than a sequence; under one in a thousand is padding."""
    lengths = np.random.default_rng(0).lognormal(6.2, 1.1, 20_000).astype(int) + 2
    packed, plain = best_fit(edges_of(lengths.tolist()), 2048), concatenate(edges_of(lengths.tolist()), 2048)
    assert packed.counts.padding < 0.001 * packed.counts.sequences * 2048
    assert packed.counts.documents_cut < 0.5 * plain.counts.documents_cut
    assert plain.counts.needlessly_cut == plain.counts.documents_cut - packed.counts.documents_cut
