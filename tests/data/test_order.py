"""The order of a run: a permutation and its inverse, shares of the sources, any position at once."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.data.mix import shared_out
from gristmill.data.order import Order, Phase, key_of, permute, unpermute


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 16, 60, 97, 1000, 4097])
def test_permutations_are_bijections_of_their_own(size: int) -> None:
    orders = []
    for key in (key_of(0, "a"), key_of(0, "b"), key_of(1, "a")):
        order = permute(np.arange(size), size, key)
        assert sorted(order.tolist()) == list(range(size))
        assert (unpermute(order, size, key) == np.arange(size)).all()
        orders.append(tuple(order.tolist()))
    assert len(set(orders)) == 3 or size < 16


def test_permutations_look_random() -> None:
    """Neighbours do not stay neighbours, and each value comes everywhere: over 400 keys, to within six deviations."""
    size, keys = 50, 400
    orders = np.stack([permute(np.arange(size), size, key_of(k)) for k in range(keys)])
    table = np.zeros((size, size))
    for order in orders:
        table[np.arange(size), order] += 1
    expected = keys / size
    chi_square = ((table - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_square - freedom) < 6 * (2 * freedom) ** 0.5
    steps = (np.diff(orders, axis=1) == 1).mean()
    assert abs(steps - 1 / size) < 6 * (1 / size / (keys * (size - 1))) ** 0.5


@st.composite
def orders(draw: st.DrawFn) -> Order:
    sources = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(1, 30), min_size=sources, max_size=sources))
    pools = [draw(st.integers(1, size)) for size in sizes]
    phases, at = [], 0
    for _ in range(draw(st.integers(1, 4))):
        quotas = draw(st.lists(st.integers(0, 40), min_size=sources, max_size=sources))
        phases.append(Phase(at, at + sum(quotas), tuple(quotas)))
        at += sum(quotas)
    return Order(draw(st.integers(0, 99)), [f"s{i}" for i in range(sources)], sizes, pools, phases)


@given(orders())
@settings(max_examples=60, deadline=None)
def test_an_epoch_reads_each_sequence_once_and_shares_are_exact(order: Order) -> None:
    source, sequence = order.locate(np.arange(order.total))
    for phase in order.phases:
        own = source[phase.first : phase.end]
        assert tuple(np.bincount(own, minlength=len(phase.quotas))) == phase.quotas
        for s, quota in enumerate(phase.quotas):  # evenly over the phase: never off by more than the sources before it
            share = np.arange(1, len(own) + 1) * quota / max(1, len(own))
            assert (np.abs(np.cumsum(own == s) - share) <= 1 + s).all()
    for s, pool in enumerate(order.pools):
        read = sequence[source == s].tolist()
        epochs = [read[i : i + pool] for i in range(0, len(read), pool)]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
        assert all(set(epoch) <= set(epochs[0]) or len(epochs[0]) < pool for epoch in epochs)


@given(orders(), st.data())
@settings(max_examples=40, deadline=None)
def test_the_inverse_and_any_piece_of_the_order_agree_with_the_whole(order: Order, data: st.DataObject) -> None:
    source, sequence = order.locate(np.arange(order.total))
    for s in range(len(order.sources)):
        for number in range(order.sizes[s]):
            assert order.positions(s, number) == np.flatnonzero((source == s) & (sequence == number)).tolist()
    if order.total:
        some = np.array(data.draw(st.lists(st.integers(0, order.total - 1), min_size=1, max_size=10)))
        part = order.locate(some)
        assert part[0].tolist() == source[some].tolist()
        assert part[1].tolist() == sequence[some].tolist()
    with pytest.raises(ValueError, match=f"the run has {order.total}: mix again"):
        order.locate(np.array([order.total]))


def test_a_billion_positions_cost_what_one_costs() -> None:
    quotas = (700_000_000, 270_000_000, 30_000_000)
    order = Order(0, ["a", "b", "c"], [10**8, 777, 31], [10**8, 777, 31], [Phase(0, 10**9, quotas)])

    def seconds(first: int) -> float:
        best = 1.0
        for _ in range(5):
            began = time.perf_counter()
            order.locate(np.arange(first, first + 512))
            best = min(best, time.perf_counter() - began)
        return best

    assert seconds(10**9 - 512) < 3 * seconds(0) + 0.001
    source, sequence = order.locate(np.arange(10**9 - 2000, 10**9))
    assert abs(np.bincount(source) - [1400, 540, 60]).max() <= 2
    for s, number, at in zip(
        source[::97].tolist(), sequence[::97].tolist(), range(10**9 - 2000, 10**9, 97), strict=True
    ):
        if s == 0:
            assert at in order.positions(s, number)


@given(
    st.integers(0, 500),
    st.lists(st.tuples(st.floats(0, 10), st.integers(0, 300)), min_size=1, max_size=6),
)
@settings(max_examples=200, deadline=None)
def test_shares_are_proportional_up_to_their_limits(count: int, given_: list[tuple[float, int]]) -> None:
    weights, limits = [w for w, _ in given_], [n for _, n in given_]
    shares = shared_out(count, weights, limits)
    most = sum(n for w, n in given_ if w > 0)
    if shares is None:
        assert most < count
        return
    assert sum(shares) == count
    assert all(0 <= n <= limit for n, limit in zip(shares, limits, strict=True))
    free = [(n, w) for n, w, limit in zip(shares, weights, limits, strict=True) if w > 1e-3 and n < limit]
    for n, w in free:  # those below their limits are in proportion, to within the one that rounding gives
        for m, v in free:
            assert abs(n * v - m * w) <= v + w + 1e-6
