"""Tokenizer, fill-in-the-middle, shards and the tokenize stage."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.data import fim, tokenizer_sample
from gristmill.data import tokenizer as bpe
from gristmill.data.documents import id_hash
from gristmill.data.executor import close_cluster
from gristmill.data.shards import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    ShardError,
    TokenShards,
    dtype_for,
    write_index,
    write_shard,
)
from gristmill.data.stage_types import silent
from gristmill.data.tokenize import TokenizeConfig, tokenize

PROSE = (
    "The committee met on Tuesday to talk about the budget for the coming year, and it was agreed that the plan "
    "should be read again by the people who wrote it. They had asked for more time, and that was given to them. Some "
    "of those who were there thought otherwise, because a year had already gone by with nothing to show for it; but in "
    "the end nobody wanted to be the one to say so aloud, with the chair looking at the clock and the door still open. "
)


def corpus_rows(path: Path, count: int) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for _, line in zip(range(count), lines, strict=False)]


def row(text: str, name: str, kind: str = "prose", source: str = "s") -> dict:
    return {"text": text, "id": f"{source}/{name}", "metadata": {"source": source, "kind": kind}}


# --- tokenizer


@pytest.fixture(scope="module")
def small() -> bpe.Tokenizer:
    return bpe.train([PROSE, "def f(x):\n    return x + 12\n" * 20, "7+5=12\n12-3=9\n" * 20], 400)


def test_special_tokens_have_their_ids(small: bpe.Tokenizer) -> None:
    fim_marks = ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"]
    names = [bpe.BOS, bpe.EOS, bpe.PAD, *fim_marks, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]
    assert [small.token_to_id(n) for n in names] == list(range(10))
    assert (BOS_ID, EOS_ID, PAD_ID) == (0, 1, 2)
    ids = small.encode("<｜User｜>2+2=?<｜Assistant｜><think>\n</think>\n4", add_special_tokens=False).ids
    assert ids[0] == 6
    assert {7, 8, 9} <= set(ids)
    assert small.decode([*ids, 1], skip_special_tokens=True).endswith("</think>\n4")


def test_digits_are_split_singly(small: bpe.Tokenizer) -> None:
    tokens = small.encode("in 2024 and 12+345=357", add_special_tokens=False).tokens
    assert all(len(t) == 1 for t in tokens if any(c.isdigit() for c in t))


@given(st.text(max_size=80))
@settings(max_examples=150, deadline=None)
def test_round_trip_of_any_text(small: bpe.Tokenizer, text: str) -> None:
    assert small.decode(small.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_round_trip_of_every_language(small: bpe.Tokenizer, shared_data: Path) -> None:
    rows = corpus_rows(shared_data / "corpus" / "udhr.jsonl.gz", 1000)
    assert len(rows) == 388
    texts = [r["text"] for r in rows]
    encoded = small.encode_batch_fast(texts, add_special_tokens=False)
    for r, text, e in zip(rows, texts, encoded, strict=True):
        assert small.decode(e.ids, skip_special_tokens=False) == text, r["id"]


def test_pieces_of_a_long_text_give_the_tokens_of_the_whole(small: bpe.Tokenizer, shared_data: Path) -> None:
    rows = corpus_rows(shared_data / "corpus" / "udhr.jsonl.gz", 40)
    text = "".join(r["text"][:700] for r in rows) + "x\n\n\n  y\t z   <think>\n\n1 2  34 \u3000\u00a0 a \r\n" * 50
    whole = small.encode(text, add_special_tokens=False).ids
    for most in (30, 31, 64, 1000, len(text) - 1, len(text)):
        cut = bpe.pieces(text, most)
        assert "".join(cut) == text
        assert max(len(p) for p in cut) <= most
        together = [i for p in cut for i in small.encode(p, add_special_tokens=False).ids]
        # Below some hundred characters a word, or a run of blanks, fills half a piece and is cut inside.
        assert together == whole or most < 100
    assert bpe.pieces("a" * 70, 20) == ["a" * 20] * 3 + ["a" * 10]


def test_control_tokens_spelled_out_in_a_text_are_text(small: bpe.Tokenizer, tmp_path: Path) -> None:
    bpe.save(small, tmp_path)
    text = f"a{bpe.EOS}b<｜fim▁hole｜>{bpe.PAD}<think>"
    reader = bpe.load_for_documents(tmp_path)
    ids = reader.encode(text, add_special_tokens=False).ids
    assert not set(ids) & set(range(6))
    assert reader.decode(ids, skip_special_tokens=False) == text
    assert bpe.load(tmp_path).encode(text, add_special_tokens=False).ids[1] == EOS_ID


def test_equal_texts_give_equal_files(tmp_path: Path, bytes_of) -> None:
    texts = [PROSE + str(i) for i in range(30)]
    for name in ("a", "b"):
        bpe.save(bpe.train(texts, 350), tmp_path / name)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_transformers_loads_it_with_the_chat_form(small: bpe.Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from gristmill.model.chat import Chat

    bpe.save(small, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "7+5=?"}]
    prompt = loaded.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == f"{bpe.BOS}<｜User｜>7+5=?<｜Assistant｜><think>\n"
    answered = [*messages, {"role": "assistant", "reasoning_content": "7+5=12", "content": "12"}]
    whole = loaded.apply_chat_template(answered, tokenize=False)
    assert whole == f"{prompt}7+5=12\n</think>\n12{bpe.EOS}"
    chat = Chat(tmp_path)
    both = chat.prompt("7+5=?") + chat.response("7+5=12", "12")
    assert both == loaded(whole, add_special_tokens=False)["input_ids"]
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size 100 is less than the 266"):
        bpe.train(["x"], 100)


# --- fill in the middle


@given(st.text(max_size=60), st.integers(0, 50))
@settings(max_examples=200, deadline=None)
def test_a_rearranged_document_comes_back(small: bpe.Tokenizer, text: str, name: int) -> None:
    marks = fim.Marks(small)
    cut = fim.cuts(text, 7, str(name), 1.0)
    if cut is None:
        assert len(text) < 3
        return
    assert 0 <= cut[0] <= cut[1] <= len(text)
    prefix, suffix, middle = parts = fim.parts(text, *cut)
    assert prefix + middle + suffix == text
    small.encode_special_tokens = True
    try:
        ids = [small.encode(p, add_special_tokens=False).ids for p in parts]
    finally:
        small.encode_special_tokens = False
    written = fim.rearranged(*ids, marks)
    assert (written[0], written.count(4), written.count(5)) == (3, 1, 1)
    assert small.decode(fim.restored(written, marks), skip_special_tokens=False) == text
    assert fim.restored(ids[0], marks) == ids[0]  # what was not rearranged stays


def test_the_rate_and_the_cuts_are_even() -> None:
    text = "x" * 999
    found = [fim.cuts(text, 0, str(i), 0.1) for i in range(20_000)]
    cuts = [c for c in found if c is not None]
    # Binomial, standard deviation 42; the cuts of 2,000 documents lie at a third and two thirds, to within 6 deviations.
    assert abs(len(cuts) - 2000) < 6 * 42
    assert abs(np.mean([a for a, _ in cuts]) - 333) < 6 * 236 / 2000**0.5
    assert abs(np.mean([b for _, b in cuts]) - 666) < 6 * 236 / 2000**0.5
    assert found == [fim.cuts(text, 0, str(i), 0.1) for i in range(20_000)]
    assert [fim.cuts(text, 1, str(i), 0.1) for i in range(20_000)] != found
    assert all(fim.cuts(text, 0, str(i), 0.0) is None for i in range(1000))


# --- shards


def shard_folder(folder: Path, lengths: list[list[int]], vocab_size: int = 1000) -> list[np.ndarray]:
    """Shards of documents of these lengths, with counting tokens; the documents."""
    documents, entries, at = [], [], 0
    for number, shard in enumerate(lengths):
        own = [np.arange(at + sum(shard[:i]), at + sum(shard[: i + 1])) % vocab_size for i in range(len(shard))]
        at += sum(shard)
        documents += own
        ids = [id_hash(f"{number}/{i}") for i in range(len(own))]
        entries.append(write_shard(folder, "train", "s", number, own, ids, dtype_for(vocab_size)))
    write_index(folder, vocab_size, "0" * 64, {("train", "s"): (entries, 4 * at)})
    return documents


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(0, 200),
    st.integers(0, 60),
    st.sampled_from([1000, 100_000]),
)
@settings(max_examples=60, deadline=None)
def test_reads_anywhere(tmp_path_factory, lengths, start: int, count: int, vocab_size: int) -> None:
    folder = tmp_path_factory.mktemp("shards")
    documents = shard_folder(folder, lengths, vocab_size)
    whole, owner = np.concatenate(documents), np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    stream = TokenShards(folder).stream("train", "s")
    assert len(stream) == len(whole)
    if start + count > len(whole):
        with pytest.raises(ShardError, match="were asked for"):
            stream.read(start, count)
        return
    tokens, own = stream.read(start, count)
    assert tokens.tolist() == whole[start : start + count].tolist()
    assert own.tolist() == owner[start : start + count].tolist()


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    shard_folder(tmp_path, [[5, 6], [7]])
    path = tmp_path / "train" / "s" / "00001.tokens"
    good = path.read_bytes()
    path.write_bytes(good[:-2])
    with pytest.raises(ShardError, match=r"00001\.tokens has 12 bytes, not the 14"):
        TokenShards(tmp_path)
    path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    assert TokenShards(tmp_path).verify() == [str(path)]
    TokenShards(tmp_path).stream("train", "s")
    with pytest.raises(ShardError, match=r"00001\.tokens does not hash to what index\.json says"):
        TokenShards(tmp_path, hashes_on_touch=True).stream("train", "s")
    path.write_bytes(good)
    ids = tmp_path / "train" / "s" / "00000.ids"
    ids.write_bytes(bytes(16))
    assert TokenShards(tmp_path).verify() == [str(ids)]
    path.unlink()
    with pytest.raises(ShardError, match="is missing"):
        TokenShards(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    for other in (1, 99):
        (tmp_path / "index.json").write_text(json.dumps({**index, "format": other}))
        with pytest.raises(ShardError, match=f"has format {other} and this code reads 2: tokenize again"):
            TokenShards(tmp_path)
    with pytest.raises(ShardError, match=r"has no index\.json"):
        TokenShards(tmp_path / "train")


def test_a_document_is_found_by_its_id(tmp_path: Path) -> None:
    documents = shard_folder(tmp_path, [[5, 6], [7], [3, 3, 9]])
    shards = TokenShards(tmp_path)
    owner = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
    for (number, place), tokens in zip(owner, documents, strict=True):
        [found] = shards.find(id_hash(f"{number}/{place}"))
        assert (found.split, found.source, found.shard, found.document) == ("train", "s", number, place)
        shard = shards.shard("train", "s", number)
        assert shard.tokens[found.start : found.start + found.tokens].tolist() == tokens.tolist()
    assert shards.find(id_hash("another")) == []


def test_the_format_is_what_its_page_says(tmp_path: Path) -> None:
    """Read by the page alone: struct, hashlib and json."""
    shard_folder(tmp_path, [[2, 3]], 100_000)
    base, index = tmp_path / "train" / "s" / "00000", json.loads((tmp_path / "index.json").read_text())
    tokens = struct.unpack("<5I", base.with_suffix(".tokens").read_bytes())
    starts = struct.unpack("<2Q", base.with_suffix(".starts").read_bytes())
    ids = struct.unpack("<2Q", base.with_suffix(".ids").read_bytes())
    assert (tokens, starts) == ((0, 1, 2, 3, 4), (0, 2))
    assert ids == tuple(struct.unpack("<Q", hashlib.sha256(n.encode()).digest()[:8])[0] for n in ("0/0", "0/1"))
    [stream] = index["streams"]
    [shard] = stream["shards"]
    assert (index["format"], index["dtype"], shard["tokens"], shard["documents"]) == (2, "uint32", 5, 2)
    for ending in ("tokens", "starts", "ids"):
        data = base.with_suffix(f".{ending}").read_bytes()
        assert shard[f"{ending}_sha256"] == hashlib.sha256(data).hexdigest()


# --- the stage


def test_tokenize_holds_out_by_document_and_is_a_pure_function(tmp_path: Path, bytes_of, laid_out) -> None:
    rows = [row(f"{PROSE[:200]} {i}", str(i), source="ab"[i % 2]) for i in range(120)]
    config = TokenizeConfig(vocab_size=300, sample_bytes=5000, held_out=0.2, shard_tokens=900, fim_rate=0.3)
    made = {}
    for name, workers, seed, a_shard in (
        ("none", 0, 0, 30),
        ("two", 2, 0, 30),
        ("other seed", 0, 1, 30),
        ("other shards", 0, 0, 50),
    ):
        out = tmp_path / name
        out.mkdir()
        tokenize(config, laid_out(tmp_path / f"in {name}", rows, a_shard), out, seed, workers=workers, progress=silent)
        made[name] = bytes_of(out / "tokens")
    close_cluster()
    assert made["none"] == made["two"] == made["other shards"]
    assert made["none"] != made["other seed"]
    shards = TokenShards(tmp_path / "none" / "tokens")
    tokenizer = bpe.load(tmp_path / "none" / "tokenizer")
    texts, marks, rearranged = {}, fim.Marks(tokenizer), {"train": 0, "held_out": 0}
    for split in ("train", "held_out"):
        texts[split] = []
        for source in shards.streams(split):
            stream = shards.stream(split, source)
            tokens, owner = stream.read(0, len(stream))
            for d in range(owner[-1] + 1):
                ids = tokens[owner == d].tolist()
                assert (ids[0], ids[-1]) == (0, 1)
                rearranged[split] += ids[1] == marks.begin
                texts[split].append(tokenizer.decode(fim.restored(ids[1:-1], marks), skip_special_tokens=False))
    assert sorted(texts["train"] + texts["held_out"]) == sorted(r["text"] for r in rows)
    assert 8 <= len(texts["held_out"]) <= 45
    assert 12 <= rearranged["train"] <= 50  # of about 96, three in ten
    assert rearranged["held_out"] == 0
    for r in rows:
        [found] = shards.find(id_hash(r["id"]))
        assert found.source == r["metadata"]["source"]


def test_the_order_is_that_of_the_hashes(tmp_path: Path, laid_out) -> None:
    """Against the order made in memory, from the formula on the format's page."""
    rows = [row(f"{PROSE[:50]} {i}", str(i)) for i in range(200)]
    out = tmp_path / "out"
    out.mkdir()
    config = TokenizeConfig(vocab_size=300, held_out=0.1, shard_tokens=700, fim_kinds=())
    metrics = tokenize(config, laid_out(tmp_path / "in", rows, 37), out, 5, workers=0, progress=silent)
    shards = TokenShards(out / "tokens")

    def hash_of(what: str, name: str) -> int:
        return struct.unpack("<Q", hashlib.sha256(f"5/{what}/{name}".encode()).digest()[:8])[0]

    for split in ("train", "held_out"):
        names = [r["id"] for r in rows if (hash_of("held_out", r["id"]) < 0.1 * 2**64) == (split == "held_out")]
        names.sort(key=lambda name: hash_of("order", name))
        ids = np.concatenate([shards.shard(split, "s", n).ids for n in range(len(shards.entries(split, "s")))])
        assert ids.tolist() == [id_hash(name) for name in names]
        assert all(e.tokens >= 700 for e in shards.entries(split, "s")[:-1])
    assert metrics["shards"] >= 5


def test_stopped_anywhere_and_begun_again_it_ends_in_the_same_bytes(tmp_path: Path, bytes_of, laid_out) -> None:
    rows = [row(f"{PROSE[:80]} {i}", str(i), source="ab"[i % 2]) for i in range(60)]
    documents = laid_out(tmp_path / "in", rows, 20)
    config = TokenizeConfig(vocab_size=300, held_out=0.2, shard_tokens=500)
    whole = tmp_path / "whole"
    whole.mkdir()
    tokenize(config, documents, whole, 0, workers=0, progress=silent)
    out = tmp_path / "stopped"
    out.mkdir()
    stops = 0
    for last in range(1, 60):  # each attempt gets a little further, in the same folder
        seen = 0

        def stop(*_: object, last: int = last, **__: float) -> None:
            nonlocal seen
            seen += 1
            if seen == last:
                raise KeyboardInterrupt

        try:
            tokenize(config, documents, out, 0, workers=0, progress=stop)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 5
    assert bytes_of(out) == bytes_of(whole)


def test_a_small_source_trains_first(tmp_path: Path, laid_out) -> None:
    rows = [row(PROSE, f"{source}{i}", source=source) for source, n in (("a", 1), ("b", 2), ("c", 3)) for i in range(n)]
    for seed in range(4):
        out = tmp_path / f"out{seed}"
        out.mkdir()
        config = TokenizeConfig(vocab_size=300, held_out=(0.01, 0.99)[seed % 2])
        tokenize(config, laid_out(tmp_path / f"in{seed}", rows, 2), out, seed, workers=0, progress=silent)
        shards = TokenShards(out / "tokens")
        assert shards.streams("train") == ["a", "b", "c"]
        assert shards.streams("held_out") == ["b", "c"]


def test_a_vocabulary_that_the_sample_cannot_fill_is_told(tmp_path: Path, laid_out) -> None:
    out = tmp_path / "out"
    out.mkdir()
    config = TokenizeConfig(vocab_size=5000)
    metrics = tokenize(config, laid_out(tmp_path / "in", [row("a few words", "1")]), out, 0, workers=0, progress=silent)
    assert metrics["vocab_size"] < metrics["vocab_size_asked"] == 5000


def test_compression_by_source_and_language(tmp_path: Path, laid_out) -> None:
    rows = [row(PROSE, f"en{i}") for i in range(4)] + [row("Не может быть. " * 30, f"ru{i}") for i in range(3)]
    for r in rows:
        r["metadata"]["language"] = r["id"][2:4]
    out = tmp_path / "out"
    out.mkdir()
    metrics = tokenize(
        TokenizeConfig(vocab_size=320), laid_out(tmp_path / "in", rows), out, 0, workers=0, progress=silent
    )
    tokenizer = bpe.load(out / "tokenizer")
    for line in map(json.loads, (out / "compression.jsonl").read_text().splitlines()):
        own = [r["text"] for r in rows if r["metadata"]["language"] == line["language"]]
        assert line["documents"] == len(own)
        assert line["bytes"] == sum(len(t.encode()) for t in own)
        whole = sum(len(tokenizer.encode(t, add_special_tokens=False).ids) for t in own)
        assert line["tokens"] == pytest.approx(whole, rel=0.02)  # a cut for the middle costs a token or two
        assert metrics["bytes_per_token_by_language"][line["language"]] == line["bytes_per_token"]


def test_the_sample_is_bounded_and_the_same_however_the_corpus_lies(tmp_path: Path, laid_out) -> None:
    rows = [row(f"{i} " * (1 + i % 50), str(i), source="ab"[i % 5 == 0]) for i in range(600)]
    chosen = []
    for a_shard in (100, 170):
        folder = laid_out(tmp_path / str(a_shard), rows, a_shard)
        surveys, samples = [], []
        for shard in sorted((folder / "documents").iterdir()):
            surveys.append(shard.with_suffix(".survey"))
            tokenizer_sample.survey_shard(shard, surveys[-1], 0, 0.1)
        survey = tokenizer_sample.merged(surveys)
        bounds = tokenizer_sample.bounds(survey, 4000)
        assert bounds["a"] < 0.5
        for shard in sorted((folder / "documents").glob("*.zst")):
            samples.append(shard.with_suffix(".sample"))
            tokenizer_sample.draw_shard(shard, samples[-1], bounds)
        chosen.append(tokenizer_sample.chosen(samples, 4000, 2))
    assert chosen[0] == chosen[1]
    by_source = {
        s: [t for t in chosen[0] if t in {r["text"] for r in rows if r["metadata"]["source"] == s}] for s in "ab"
    }
    for texts in by_source.values():  # the share of 2,000, and the document that fills it
        assert 2000 <= sum(map(len, texts)) < 2000 + 4 * 50


def test_a_document_of_one_long_line_is_encoded_in_bounded_memory(tmp_path: Path, laid_out) -> None:
    """6 MB without a blank and 1.5 MB with: the process that encodes them stays below 1 GiB."""
    rows = [row("ж" * 3_000_000, "a"), row("word " * 300_000, "b"), row(PROSE, "c")]
    folder = laid_out(tmp_path / "in", rows)
    out = tmp_path / "out"
    out.mkdir()
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from gristmill.data.stage_types import silent\n"
        "from gristmill.data.tokenize import TokenizeConfig, tokenize\n"
        "config = TokenizeConfig(vocab_size=300, sample_bytes=100000, fim_rate=0)\n"
        "tokenize(config, Path(sys.argv[1]), Path(sys.argv[2]), 0, workers=0, progress=silent)\n"
        # not ru_maxrss, which begins with what the process that started this one held
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
    )
    run = [sys.executable, "-P", "-c", script, str(folder), str(out)]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=os.environ | {"RAYON_NUM_THREADS": "1"})
    assert int(done.stdout) < 1 << 20  # kibibytes
    shards = TokenShards(out / "tokens")
    [found] = shards.find(id_hash("s/b"))
    shard = shards.shard(found.split, "s", found.shard)
    ids = shard.tokens[found.start + 1 : found.start + found.tokens - 1].tolist()
    assert bpe.load(out / "tokenizer").decode(ids) == "word " * 300_000
