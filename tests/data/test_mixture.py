"""The mix stage and its reader, here and on S3."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from gristmill.data.executor import close_cluster
from gristmill.data.mix import MixConfig, MixPhase, mix
from gristmill.data.mixture import Mixture, MixtureError
from gristmill.data.shards import ShardError, TokenShards, write_index, write_shard
from gristmill.data.stage_types import silent


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
        ({"weights": {"a": -1}}, "the weight of 'a' is -1"),
        ({"weights": {"a": 0}}, "the weight of every source is 0"),
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
    counts = tmp_path / "mix" / "train" / "a" / "counts"
    held = counts.read_bytes()
    for damaged in (held[:-3], held[:-8], bytes([held[24] ^ 1]) + held[1:]):
        counts.write_bytes(damaged)
        with pytest.raises(MixtureError, match=r"a/counts does not count the [\d,]+ tokens of "):
            mixture.token_counts("a")
    with pytest.raises(MixtureError, match=r"has no mixture\.json"):
        Mixture(tmp_path, mixture.shards)
    other = token_folder(tmp_path / "other", {**STREAMS, ("train", "c"): [[5]]})
    with pytest.raises(MixtureError, match=r"was made from other token shards than .*: mix again"):
        Mixture(tmp_path / "mix", TokenShards(other / "tokens"))
    described = json.loads((tmp_path / "mix" / "mixture.json").read_text())
    (tmp_path / "mix" / "mixture.json").write_text(json.dumps({**described, "format": 9}))
    with pytest.raises(MixtureError, match="has format 9, this code reads 1: mix again"):
        Mixture(tmp_path / "mix", mixture.shards)
    shard = tokens / "tokens" / "train" / "b" / "00000.tokens"
    shard.write_bytes(bytes(2) + shard.read_bytes()[2:-2] + b"\xff\x00")
    with pytest.raises(ShardError, match=r"b/00000\.tokens does not hash to what index\.json says"):
        mixed(config, tokens, tmp_path / "again")


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
