"""Filters, tokenizer, shards and the tokenize stage."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.data import tokenizer as bpe
from gristmill.data.executor import close_cluster
from gristmill.data.filters import FilterConfig, filter_documents, first_failure
from gristmill.data.filters.rules import Profile, build, identify
from gristmill.data.shards import ShardError, TokenShards, write_index, write_shard
from gristmill.data.sources import StdlibSource
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


# --- filters


def library_docstrings() -> list[dict]:
    """Text that is on every machine."""
    source = StdlibSource(name="docstrings", docstrings=True)
    return [r for r in source.read(source.parts(0)[0], 0) if isinstance(r, dict)][:100]


def test_verdicts_on_docstrings_are_datatroves_own() -> None:
    compare_with_datatrove(library_docstrings())


def test_verdicts_on_articles_are_datatroves_own(shared_data: Path) -> None:
    rows = corpus_rows(shared_data / "corpus" / "wikitext2.jsonl.gz", 30)
    compare_with_datatrove(rows + corpus_rows(shared_data / "corpus" / "peps.jsonl.gz", 10))


def compare_with_datatrove(rows: list[dict]) -> None:
    from datatrove.data import Document
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter

    ours = {
        "gopher_quality": build(Profile(least_characters=0, gopher_quality=True)),
        "gopher_repetition": build(Profile(least_characters=0, gopher_repetition=True)),
    }
    theirs = {"gopher_quality": GopherQualityFilter(), "gopher_repetition": GopherRepetitionFilter()}
    verdicts = []
    for r in rows:
        for name, rules in ours.items():
            document = Document(text=r["text"][:6000], id=r["id"], metadata={})
            expected = theirs[name].filter(document)
            passed, detail = expected if isinstance(expected, tuple) else (expected, "")
            assert first_failure(rules, document) == (None if passed else f"{name}: {detail}"), r["id"]
            verdicts.append(bool(passed))
    assert 0 < sum(verdicts) < len(verdicts)  # both verdicts occurred


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("prose", PROSE, None),
        ("prose", "too short", "length: too short"),
        (
            "prose",
            "Der Ausschuss hat am Dienstag über den Haushalt des kommenden Jahres gesprochen. " * 8,
            "language: de",
        ),
        ("code", "x = 1\n" * 200, "lines: duplicate lines"),
        ("code", "y = '" + "a" * 2000 + "'\n", "lines: line too long"),
        ("lessons", "7+5=12\n12-3=9\nAnswer: 9", None),
        ("unheard of", "anything", None),
    ],
)
def test_rules_by_kind(kind: str, text: str, reason: str | None, tmp_path: Path, laid_out) -> None:
    out = tmp_path / "out"
    out.mkdir()
    metrics = filter_documents(
        FilterConfig(), laid_out(tmp_path / "in", [row(text, "a", kind)]), out, workers=0, progress=silent
    )
    assert metrics["removed_by_reason"] == ({reason: 1} if reason else {})
    assert metrics["documents_out"] == (0 if reason else 1)


def test_language_is_identified_without_a_download() -> None:
    assert identify("This is a plain sentence in English, and there is nothing odd about it.")[0] == "en"
    assert identify("Ceci est une phrase tout à fait ordinaire en français.")[0] == "fr"


def test_filter_workers_change_no_byte(tmp_path: Path, bytes_of, laid_out) -> None:
    rows = [row(PROSE[i:] + f" number {i}", str(i)) for i in range(0, 120, 3)] + [
        row("short", f"s{i}") for i in range(9)
    ]
    documents = laid_out(tmp_path / "in", rows, 10)
    made = []
    for workers in (0, 2):
        out = tmp_path / f"out{workers}"
        out.mkdir()
        filter_documents(FilterConfig(), documents, out, workers=workers, progress=silent)
        made.append(bytes_of(out))
    close_cluster()
    assert made[0] == made[1]


# --- tokenizer


@pytest.fixture(scope="module")
def small() -> bpe.Tokenizer:
    return bpe.train([PROSE, "def f(x):\n    return x + 12\n" * 20, "7+5=12\n12-3=9\n" * 20], 400)


def test_special_tokens_have_their_ids(small: bpe.Tokenizer) -> None:
    names = [bpe.BOS, bpe.EOS, bpe.PAD, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]
    assert [small.token_to_id(n) for n in names] == list(range(7))
    ids = small.encode("<｜User｜>2+2=?<｜Assistant｜><think>\n</think>\n4", add_special_tokens=False).ids
    assert ids[0] == 3
    assert {4, 5, 6} <= set(ids)
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
    for r in rows:
        text = r["text"][:1500]
        assert small.decode(small.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text, r[
            "id"
        ]


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
    with pytest.raises(ValueError, match="vocab_size 100 is less than the 263"):
        bpe.train(["x"], 100)


# --- shards


def shard_folder(folder: Path, lengths: list[list[int]], vocab_size: int = 1000) -> list[np.ndarray]:
    """Shards of documents of these lengths, with counting tokens; the documents."""
    documents, entries, at = [], [], 0
    for number, shard in enumerate(lengths):
        own = [np.arange(at + sum(shard[:i]), at + sum(shard[: i + 1])) % vocab_size for i in range(len(shard))]
        at += sum(shard)
        documents += own
        entries.append(write_shard(folder, "train", "s", number, own, "uint16" if vocab_size <= 1 << 16 else "uint32"))
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
    path.unlink()
    with pytest.raises(ShardError, match="is missing"):
        TokenShards(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, "format": 99}))
    with pytest.raises(ShardError, match="has format 99"):
        TokenShards(tmp_path)
    with pytest.raises(ShardError, match=r"has no index\.json"):
        TokenShards(tmp_path / "train")


# --- the stage


def test_tokenize_holds_out_by_document_and_is_a_pure_function(tmp_path: Path, bytes_of, laid_out) -> None:
    rows = [row(f"{PROSE[:200]} {i}", str(i), source="ab"[i % 2]) for i in range(120)]
    config = TokenizeConfig(vocab_size=300, sample_bytes=5000, held_out=0.2, shard_tokens=900)
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
    texts = {}
    for split in ("train", "held_out"):
        texts[split] = []
        for source in shards.streams(split):
            stream = shards.stream(split, source)
            tokens, owner = stream.read(0, len(stream))
            for d in range(owner[-1] + 1):
                ids = tokens[owner == d].tolist()
                assert (ids[0], ids[-1]) == (0, 1)
                texts[split].append(tokenizer.decode(ids[1:-1], skip_special_tokens=False))
    assert sorted(texts["train"] + texts["held_out"]) == sorted(r["text"] for r in rows)
    assert 8 <= len(texts["held_out"]) <= 45
