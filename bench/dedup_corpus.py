"""Documents for bench/dedup.py: real ones, grown ones with planted duplicates, and the true pairs by brute force."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import sysconfig
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import regex

from gristmill.data.documents import open_rows

A_SHARD = 1000  # documents
WORDS = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}&&\p{L}]\p{M}*|[\p{L}\p{M}\p{N}_]+",
    regex.V1,
)
UNSEEN = regex.compile(r"[\p{Cf}\u0640]|[\p{Mn}&&[\p{Arabic}\p{Hebrew}\u064b-\u065f]]", regex.V1)
GRAM = 5
LEAST = 0.5  # similarity of the pairs that are looked for


def shared_corpora() -> Path:
    """Where the corpora of the tests are."""
    return Path(os.environ.get("GRISTMILL_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")) / "corpus"


def real_texts() -> Iterator[str]:
    """PEPs, WikiText, the Declaration of Human Rights in 388 languages, and this Python's own sources."""
    for path in sorted(shared_corpora().glob("*.jsonl.gz")):
        with gzip.open(path) as file:
            for line in file:
                yield json.loads(line)["text"]
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:  # test files in other encodings
                continue


def grown(count: int, seed: int = 0) -> Iterator[str]:
    """`count` documents: the real ones, then pieces of English ones with a third of the words redrawn, and duplicates.

    Every fifth grown document is an earlier one again: every tenth of these in other case and white space, the others
    with words changed so that the Jaccard similarity is about a number drawn evenly from [0.5, 1).
    """
    rng = np.random.default_rng(seed)
    real = list(itertools.islice(real_texts(), count))
    yield from real
    words = " ".join(t for t in real if t.isascii())[:12_000_000].split()
    vocabulary = np.array(words, dtype=object)
    made: list[list[str]] = []
    for number in range(count - len(real)):
        if made and number % 5 == 4:
            text = list(made[int(rng.integers(len(made)))])
            if number % 50 == 49:
                yield "  " + "\n".join(text).upper()
                continue
            jaccard = rng.uniform(LEAST, 1)
            shingles = max(1, len(text) - GRAM + 1)
            broken = round(shingles * (1 - jaccard) / (1 + jaccard))
            places = rng.choice(len(text), min(len(text), max(1, broken // GRAM)), replace=False)
            for place in places:
                text[place] = f"changed{int(rng.integers(10**9))}"
        else:
            length = int(rng.integers(60, 700))
            start = int(rng.integers(len(words) - length))
            redrawn = np.flatnonzero(rng.random(length) < 1 / 3)
            text = words[start : start + length]
            for place, word in zip(redrawn, vocabulary[rng.integers(0, len(words), len(redrawn))], strict=True):
                text[place] = word
            made.append(text)
        yield " ".join(text)


def small(count: int, seed: int = 0) -> Iterator[str]:
    """Documents of 60 to 140 drawn words; every tenth is an earlier one with one word changed."""
    rng = np.random.default_rng(seed)
    vocabulary = [f"word{i:x}" for i in range(50_000)]
    recent: list[list[str]] = []
    for number in range(count):
        if recent and number % 10 == 9:
            text = list(recent[int(rng.integers(len(recent)))])
            text[int(rng.integers(len(text)))] = "changed"
        else:
            text = [vocabulary[i] for i in rng.integers(0, 50_000, int(rng.integers(60, 140))).tolist()]
            recent = [*recent[-200:], text]
        yield " ".join(text)


def write_documents(folder: Path, texts: Iterator[str], a_shard: int = A_SHARD) -> int:
    """Lay texts out as a stage's folder; bytes of text."""
    size, number = 0, 0
    for shard in itertools.count():
        part = list(itertools.islice(texts, a_shard))
        if not part:
            return size
        with open_rows(folder / "documents" / f"{shard:05d}.jsonl.zst") as rows:
            for text in part:
                size += len(text.encode())
                rows.write({"text": text, "id": f"d{number}", "metadata": {"source": "bench", "kind": "prose"}})
                number += 1
    raise AssertionError("count() does not end")


def true_pairs(texts: list[str]) -> dict[tuple[int, int], float]:
    """All pairs (i < j) with a Jaccard similarity of at least LEAST, by an inverted index of shingles.

    Two sets that are alike by t share one of the rarest n − ⌈t·n⌉ + 1 shingles of each (prefix filtering; Chaudhuri,
    Ganti and Kaushik 2006): the index of these alone finds every pair.
    """
    known: dict[str, int] = {}
    sets = [_shingles(text, known) for text in texts]
    values, inverse, counts = np.unique(np.concatenate(sets), return_inverse=True, return_counts=True)
    del values
    holders: dict[int, list[int]] = {}
    start = 0
    for number, own in enumerate(sets):
        ids = inverse[start : start + len(own)]
        start += len(own)
        rarest = ids[np.lexsort((ids, counts[ids]))][: len(ids) - math.ceil(LEAST * len(ids)) + 1]
        for shingle in rarest[counts[rarest] > 1].tolist():
            holders.setdefault(shingle, []).append(number)
    met = {pair for members in holders.values() for pair in itertools.combinations(members, 2)}
    pairs = {}
    for a, b in met:
        if LEAST * max(len(sets[a]), len(sets[b])) <= min(len(sets[a]), len(sets[b])):
            common = len(np.intersect1d(sets[a], sets[b], assume_unique=True))
            alike = common / (len(sets[a]) + len(sets[b]) - common)
            if alike >= LEAST:
                pairs[a, b] = alike
    return pairs


def _shingles(text: str, known: dict[str, int]) -> np.ndarray:
    """Distinct 5-grams of a text's words, each as a number of 64 bits made of its words' numbers."""
    found = WORDS.findall(UNSEEN.sub("", unicodedata.normalize("NFKC", text).lower()))
    ids = np.array([known.setdefault(w, len(known) + 1) for w in found] or [0], dtype=np.uint64)
    count = max(1, len(ids) - GRAM + 1)
    mixed = np.zeros(count, np.uint64)
    for i in range(min(GRAM, len(ids))):
        mixed = (mixed ^ ids[i : i + count]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed)
