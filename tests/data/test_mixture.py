"""Packing, the order of a run, the mix stage and its reader, here and on S3."""

from __future__ import annotations

import json
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gristmill.data.executor import close_cluster
from gristmill.data.mix import MixConfig, MixPhase, mix, shared_out
from gristmill.data.mixture import Mixture, MixtureError
from gristmill.data.order import Order, Phase, key_of, permute, unpermute
from gristmill.data.packing import Packed, best_fit, concatenate
from gristmill.data.ranges import BLOCK, RangeError, RemoteFiles
from gristmill.data.shards import ShardError, TokenShards, write_index, write_shard
from gristmill.data.stage_types import silent

# --- packing


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


# --- the order


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


# --- the stage


def token_folder(folder: Path, streams: dict[tuple[str, str], list[list[int]]], vocab_size: int = 50_000) -> Path:
    """Token shards of documents of these lengths: bos, counting tokens, eos."""
    at, listed = 3, {}
    for (split, source), shards in streams.items():
        entries = []
        for number, lengths in enumerate(shards):
            documents = []
            for n in lengths:
                documents.append(np.array([0, *((at + np.arange(n - 2)) % (vocab_size - 3) + 3), 1]))
                at += n - 2
            ids = list(range(at, at + len(lengths)))
            entries.append(
                write_shard(
                    folder / "tokens",
                    split,
                    source,
                    number,
                    documents,
                    ids,
                    "uint16" if vocab_size <= 1 << 16 else "uint32",
                )
            )
        listed[split, source] = (entries, 4 * sum(map(sum, shards)))
    write_index(folder / "tokens", vocab_size, "0" * 64, listed)
    return folder


def lengths(seed: int, count: int, mean: float = 30) -> list[int]:
    return (2 + np.random.default_rng(seed).exponential(mean, count).astype(int)).tolist()


STREAMS = {
    ("train", "a"): [lengths(1, 90), lengths(2, 70), lengths(3, 5)],
    ("train", "b"): [lengths(4, 60, 200)],
    ("train", "c"): [[2, 3, 2]],
    ("held_out", "a"): [lengths(5, 20)],
    ("held_out", "b"): [lengths(6, 9)],
}


def mixed(
    config: MixConfig, tokens: Path, out: Path, seed: int = 0, workers: int = 0
) -> tuple[Mixture, dict[str, Any]]:
    out.mkdir()
    metrics = mix(config, tokens, out, seed, workers=workers, progress=silent)
    return Mixture(out, TokenShards(tokens / "tokens")), metrics


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_folder(tmp_path_factory.mktemp("tokens"), STREAMS)


def predicted(rows: Any, which: str = "targets") -> Counter[tuple[int, int]]:
    """(token, target) pairs of a batch."""
    pairs = np.stack([rows.tokens.ravel(), getattr(rows, which).ravel()], axis=1)
    return Counter(map(tuple, pairs[pairs[:, 1] >= 0].tolist()))


def pairs_of(tokens: Path, split: str, source: str, ahead: int, within: bool = True) -> Counter[tuple[int, int]]:
    """All (token, the one `ahead` of it) of a stream, in one document or in one shard."""
    shards, found = TokenShards(tokens / "tokens"), Counter()
    for number, entry in enumerate(shards.entries(split, source)):
        shard = shards.shard(split, source, number)
        ids = np.asarray(shard.tokens).tolist()
        owner = np.searchsorted(np.asarray(shard.starts), np.arange(entry.tokens), side="right")
        found.update(
            (ids[i], ids[i + ahead]) for i in range(entry.tokens - ahead) if not within or owner[i] == owner[i + ahead]
        )
    return found


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_an_epoch_predicts_every_token_once(tokens: Path, tmp_path: Path, packing: str) -> None:
    """Of every source, each token with the one before it in its document; and the same two ahead, but for cuts."""
    first, _ = mixed(MixConfig(sequence_length=32, sequences=1, packing=packing), tokens, tmp_path / "count")
    sizes = dict(zip(first.orders["train"].sources, first.orders["train"].sizes, strict=True))
    total = sum(sizes.values())
    weights = {name: float(n) for name, n in sizes.items()}
    mixture, metrics = mixed(
        MixConfig(sequence_length=32, sequences=total, packing=packing, weights=weights), tokens, tmp_path / "mix"
    )
    rows = mixture.batch(np.arange(total))
    assert predicted(rows) == sum((pairs_of(tokens, "train", s, 1) for s in "abc"), Counter())
    after = predicted(rows, "next_targets")
    assert after <= sum((pairs_of(tokens, "train", s, 2) for s in "abc"), Counter())
    assert (
        metrics["run_tokens_by_source"]["b"] == sum(n - 1 for n in STREAMS["train", "b"][0]) or packing == "concatenate"
    )
    counts = mixture.predictions(np.arange(total))
    assert counts[:, 0].tolist() == (rows.targets >= 0).sum(1).tolist()
    assert counts[:, 1].tolist() == (rows.next_targets >= 0).sum(1).tolist()
    # documents of a row are numbered apart, and padding apart from them
    inside = rows.documents[:, 1:] == rows.documents[:, :-1]
    assert (rows.tokens[:, 1:] == rows.targets[:, :-1])[inside & (rows.targets[:, :-1] >= 0)].all()
    if packing == "best_fit":
        assert sum(after.values()) == sum((pairs_of(tokens, "train", s, 2) for s in "abc"), Counter()).total()
    else:
        across = mixture.batch(np.arange(total), across=True)
        assert predicted(across) == sum((pairs_of(tokens, "train", s, 1, within=False) for s in "abc"), Counter())
        assert predicted(across, "next_targets") == sum(
            (pairs_of(tokens, "train", s, 2, within=False) for s in "abc"), Counter()
        )


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_resuming_on_other_ranks_gives_each_position_once(tokens: Path, tmp_path: Path, packing: str) -> None:
    """Eight sequences a step: three steps on one rank, then two on four, then the rest on two."""
    config = MixConfig(sequence_length=24, sequences=80, packing=packing, weights={"a": 2, "b": 1})
    mixture, _ = mixed(config, tokens, tmp_path / "mix")
    whole = mixture.batch(np.arange(80))
    taken = []
    for step in range(10):
        ranks = 1 if step < 3 else 4 if step < 5 else 2
        own = 8 // ranks
        again = Mixture(tmp_path / "mix", TokenShards(tokens / "tokens"))
        for rank in range(ranks):
            taken.append(again.batch(np.arange(8 * step + rank * own, 8 * step + (rank + 1) * own)))
    for name in ("tokens", "targets", "next_targets", "documents"):
        assert np.array_equal(np.concatenate([getattr(t, name) for t in taken]), getattr(whole, name))


def test_counts_of_a_run_are_exact(tokens: Path, tmp_path: Path) -> None:
    config = MixConfig(
        sequence_length=16,
        sequences=1000,
        epochs={"b": 1.5},
        caps={"a": 900},
        phases=(
            MixPhase(until=0.331, weights={"a": 3, "b": 1}),
            MixPhase(until=1, weights={"a": 1, "b": 2, "c": 0.01}),
        ),
    )
    mixture, metrics = mixed(config, tokens, tmp_path / "mix")
    rows = mixture.batch(np.arange(1000))
    names = np.array(mixture.sources())[rows.sources]
    assert Counter(names[:331].tolist()) == {"a": 248, "b": 83}  # 331 · ¾ = 248.25
    for source in "abc":
        own = rows.targets[names == source]
        assert metrics["run_tokens_by_source"][source] == int((own >= 0).sum())
        assert metrics["run_sequences_by_source"][source] == len(own)
    assert metrics["tokens_by_source"] == {s: sum(map(sum, STREAMS["train", s])) for s in "abc"}
    assert metrics["run_tokens"] == int((rows.targets >= 0).sum())
    assert metrics["run_padding"] == pytest.approx(float((rows.targets < 0).mean()), abs=1e-6)
    assert len({tuple(r) for r in rows.tokens[names == "a"].tolist()}) == 900 // 16  # the cap: each epoch the same ones
    assert len({tuple(r) for r in rows.tokens[names == "b"].tolist()}) * 1.5 >= metrics["run_sequences_by_source"]["b"]
    listed = {r["source"]: r for r in map(json.loads, (tmp_path / "mix" / "sources.jsonl").read_text().splitlines())}
    assert listed["a"]["pool"] == 900 // 16


def test_an_empty_shard_changes_nothing(tmp_path: Path) -> None:
    """As a shard is whose documents were all taken out."""
    streams = {**STREAMS, ("train", "a"): [lengths(1, 90), [], lengths(3, 5)]}
    tokens = token_folder(tmp_path / "in", streams)
    for packing in ("best_fit", "concatenate"):
        config = MixConfig(sequence_length=32, sequences=200, packing=packing, weights={"a": 1})
        mixture, _ = mixed(config, tokens, tmp_path / packing)
        rows = mixture.batch(np.arange(mixture.orders["train"].sizes[0]))
        assert predicted(rows) == pairs_of(tokens, "train", "a", 1)
        assert mixture.where("train", "a", 1, 0, 10) == []
    assert len(TokenShards(tokens / "tokens").stream("train", "a")) == sum(map(sum, streams["train", "a"]))


def test_temperature_flattens_sizes(tokens: Path, tmp_path: Path) -> None:
    sizes = {s: sum(map(sum, STREAMS["train", s])) for s in "abc"}
    for temperature in (1.0, 2.0):
        config = MixConfig(sequence_length=16, sequences=10_000, temperature=temperature)
        _, metrics = mixed(config, tokens, tmp_path / str(temperature))
        whole = sum(n ** (1 / temperature) for n in sizes.values())
        for source, n in sizes.items():
            share = metrics["run_sequences_by_source"][source] / 10_000
            assert share == pytest.approx(n ** (1 / temperature) / whole, abs=1.01e-4)  # rounded to one sequence


def test_a_document_is_traced_to_the_positions_that_read_it(tokens: Path, tmp_path: Path) -> None:
    for packing in ("best_fit", "concatenate"):
        config = MixConfig(sequence_length=16, sequences=400, packing=packing, weights={"a": 1, "b": 2})
        mixture, _ = mixed(config, tokens, tmp_path / packing)
        rows = mixture.batch(np.arange(400))
        shards = mixture.shards
        for source, number, document in (("a", 0, 3), ("a", 1, 69), ("a", 2, 0), ("b", 0, 17)):
            shard = shards.shard("train", source, number)
            [found] = shards.find(int(shard.ids[document]))
            last = found.start + found.tokens - 1
            own = set(np.asarray(shard.tokens[found.start + 1 : last]).tolist())  # of no other document
            reading = [p for p in range(400) if own & set(rows.tokens[p].tolist())]
            where = mixture.where("train", source, number, found.start, last)
            assert set(reading) <= set(where)
            assert where == sorted(where)
            if packing == "best_fit":
                assert where == reading or not own
    with pytest.raises(MixtureError, match="has no shard 7 of train/a"):
        mixture.where("train", "a", 7, 0, 1)


def test_a_token_is_traced_to_all_sequences_that_have_it_as_input_or_target(tmp_path: Path) -> None:
    """A document of 40 different tokens in pieces of 16: those beside a cut are read on both sides of it."""
    folder = tmp_path / "in" / "tokens"
    document = np.arange(100, 140, dtype=np.uint16)
    entries = {s: [write_shard(folder, s, "a", 0, [document], [7], "uint16")] for s in ("train", "held_out")}
    write_index(folder, 1024, "0" * 64, {(s, "a"): (e, 40) for s, e in entries.items()})
    mixture, _ = mixed(MixConfig(sequence_length=16, sequences=3), tmp_path / "in", tmp_path / "mix")
    rows = mixture.batch(np.arange(3))
    for at, token in enumerate(document):
        reading = [
            p for p in range(3) if any((r[p] == token).any() for r in (rows.tokens, rows.targets, rows.next_targets))
        ]
        assert mixture.where("train", "a", 0, at, at) == reading
    assert len(mixture.where("train", "a", 0, 17, 17)) == 2


def test_workers_and_a_killed_run_change_no_byte(tokens: Path, tmp_path: Path, bytes_of) -> None:
    config = MixConfig(sequence_length=16, sequences=300)
    for name, workers in (("none", 0), ("two", 2)):
        mixed(config, tokens, tmp_path / name, workers=workers)
    close_cluster()
    out = tmp_path / "killed"
    out.mkdir()
    stopped = 0

    def stop(done: int, total: int, **_: float) -> None:
        nonlocal stopped
        stopped += 1
        if stopped == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mix(config, tokens, out, 0, workers=0, progress=stop)
    mix(config, tokens, out, 0, workers=0, progress=silent)
    assert bytes_of(tmp_path / "none") == bytes_of(tmp_path / "two") == bytes_of(out)
    mixed(config, tokens, tmp_path / "other", seed=1)
    assert bytes_of(tmp_path / "none") != bytes_of(tmp_path / "other")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"weights": {"a": -1}}, "mix gives 'a' the weight -1"),
        ({"weights": {"a": 0}}, "every source the weight 0"),
        ({"epochs": {"a": 0}}, "epochs gives 'a' 0"),
        ({"temperature": 0.01}, "greater than or equal to 0.1"),  # sizes to the power of 100 are no numbers
        ({"caps": {"a": 5}}, "caps gives 'a' 5 tokens, less than a sequence of 128"),
        ({"phases": [{"until": 0.5}]}, r"phases end at \[0.5\]: let them ascend, and the last end at 1"),
        ({"phases": [{"until": 1}, {"until": 0.5}]}, "let them ascend"),
        ({"phases": [{"until": 1}], "weights": {"a": 1}}, "weights and phases"),
    ],
)
def test_a_mixture_that_means_nothing_is_refused_at_the_door(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        MixConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"weights": {"books": 1}}, "mix: weights names 'books', and the train shards have only a, b, c"),
        ({"epochs": {"books": 1}}, "epochs names 'books'"),
        ({"phases": (MixPhase(until=1, weights={"d": 1}),)}, "the phase until 1.0 names 'd'"),
        (
            {"epochs": {"a": 1, "b": 1, "c": 1}, "sequences": 9999},
            r"asks for 9999 sequences up to 1.0 of it, and epochs and caps leave \d+: raise them",
        ),
        ({"weights": {"c": 1}}, "no source of the mixture holds out a document"),
    ],
)
def test_a_mixture_that_the_shards_cannot_give_is_refused(
    tokens: Path, tmp_path: Path, fields: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        mixed(MixConfig(**{"sequence_length": 16, "sequences": 50, **fields}), tokens, tmp_path / "mix")


def test_damage_is_named(tmp_path: Path) -> None:
    tokens = token_folder(tmp_path / "in", STREAMS)
    config = MixConfig(sequence_length=16, sequences=50)
    mixture, _ = mixed(config, tokens, tmp_path / "mix")
    assert mixture.verify() == []
    path = tmp_path / "mix" / "train" / "a" / "00001.pieces"
    good = path.read_bytes()
    path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    assert mixture.verify() == [str(path)]
    path.write_bytes(good[:-8])
    with pytest.raises(MixtureError, match=rf"00001\.pieces has {len(good) - 8} bytes, not the {len(good)} of mixture"):
        Mixture(tmp_path / "mix", mixture.shards)
    with pytest.raises(MixtureError, match=r"has no mixture\.json"):
        Mixture(tmp_path, mixture.shards)
    other = token_folder(tmp_path / "other", {**STREAMS, ("train", "c"): [[5]]})
    with pytest.raises(MixtureError, match=r"was made from other token shards than .*: mix again"):
        Mixture(tmp_path / "mix", TokenShards(other / "tokens"))
    described = json.loads((tmp_path / "mix" / "mixture.json").read_text())
    (tmp_path / "mix" / "mixture.json").write_text(json.dumps({**described, "format": 9}))
    with pytest.raises(MixtureError, match="has format 9, this code reads 1"):
        Mixture(tmp_path / "mix", mixture.shards)
    shard = tokens / "tokens" / "train" / "b" / "00000.tokens"
    shard.write_bytes(bytes(2) + shard.read_bytes()[2:-2] + b"\xff\x00")
    with pytest.raises(ShardError, match=r"b/00000\.tokens does not hash to what index\.json says"):
        mixed(config, tokens, tmp_path / "again")


# --- remote


def put(s3: str, name: str, folder: Path) -> str:
    import fsspec

    filesystem = fsspec.filesystem("s3")
    for path in folder.rglob("*"):
        if path.is_file():
            filesystem.pipe_file(f"{s3}/{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    filesystem.invalidate_cache()
    return f"{s3}/{name}"


@pytest.mark.parametrize("vocab_size", [50_000, 100_000])
@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_s3_gives_the_rows_of_the_local_folder(s3: str, tmp_path: Path, packing: str, vocab_size: int) -> None:
    streams = {**STREAMS, ("train", "b"): [lengths(4, 400, 300)]}
    tokens = token_folder(tmp_path / "in", streams, vocab_size)
    local, _ = mixed(MixConfig(sequence_length=64, sequences=600, packing=packing), tokens, tmp_path / "mix")
    shards = TokenShards(put(s3, "tokens", tokens / "tokens"))
    remote = Mixture(put(s3, "mix", tmp_path / "mix"), shards)
    assert shards.verify() == []
    for first in (0, 40, 568):
        at = np.arange(first, first + 32)
        for across in (False, True):
            ours, theirs = local.batch(at, across=across), remote.batch(at, across=across)
            for name in ("tokens", "targets", "next_targets", "sources"):
                assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
            same = [(r.documents[:, 1:] == r.documents[:, :-1]).tolist() for r in (ours, theirs)]
            assert same[0] == same[1]
        assert np.array_equal(local.predictions(at), remote.predictions(at))
        remote.prefetch(at + 1 if first < 500 else at)
    [found] = shards.find(int(local.shards.shard("train", "a", 1).ids[7]))
    assert local.shards.find(int(local.shards.shard("train", "a", 1).ids[7])) == [found]
    assert remote.where("train", "a", 1, found.start, found.start + 1) == local.where(
        "train", "a", 1, found.start, found.start + 1
    )
    shards.files.close()


def test_the_cache_is_bounded_fetches_once_and_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    data = np.arange(64 * BLOCK // 4, dtype="<u4")
    memory.pipe_file("/ranges/x", data.tobytes())
    files = RemoteFiles("memory://ranges", cache_bytes=10 * BLOCK)
    asked: list[tuple[int, int]] = []
    real = files.filesystem.cat_ranges

    def counted(paths: list[str], starts: list[int], ends: list[int], **more: Any) -> list[bytes]:
        asked.extend((start // BLOCK, -(-end // BLOCK)) for start, end in zip(starts, ends, strict=True))
        return real(paths, starts, ends, **more)

    monkeypatch.setattr(files.filesystem, "cat_ranges", counted)
    array = files.array("x", np.dtype("<u4"))
    per = BLOCK // 4
    assert array[per - 2 : per + 3].tolist() == list(range(per - 2, per + 3))
    assert array[5:9].tolist() == [5, 6, 7, 8]
    assert asked == [(0, 2)]  # one request for neighbours
    files.ahead(files.load, [(array, 20 * per, 21 * per), (array, 23 * per, 24 * per), (array, 50 * per, 50 * per + 1)])
    deadline = time.monotonic() + 20
    while len(asked) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert array[21 * per : 21 * per + 1].tolist() == [21 * per]  # a small gap was fetched along
    assert asked == [(0, 2), (20, 24), (50, 51)]
    for block in range(64):
        assert int(array[block * per : block * per + 1][0]) == block * per
    assert len(files._blocks) <= 10
    assert array[0:0].tolist() == []
    assert array[len(array) - 1 : len(array) + 5].tolist() == [len(array) - 1]
    files.close()


def test_a_remote_file_that_shrinks_is_named() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/shrinks/x", bytes(3 * BLOCK))
    files = RemoteFiles("memory://shrinks")
    array = files.array("x", np.dtype("u1"))
    assert len(array[0:10]) == 10
    memory.pipe_file("/shrinks/x", bytes(BLOCK))
    with pytest.raises(
        RangeError, match=rf"bytes {BLOCK} to {2 * BLOCK} of memory://shrinks/x cannot be read .*changed"
    ):
        array[BLOCK : BLOCK + 10]
    files.close()
