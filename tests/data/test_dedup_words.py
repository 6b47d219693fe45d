"""Normalised text and words of every script, against Python's own Unicode functions."""

from __future__ import annotations

import gzip
import json
import random
import sys
import unicodedata

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.data.dedup import words
from gristmill.data.dedup.minhash import Signer
from gristmill.data.dedup.words import normalised


@pytest.fixture(scope="module")
def signer() -> Signer:
    return Signer(5, 14, 8)


def exact_of(text: str) -> tuple[int, int]:
    digest = xxhash.xxh3_128_intdigest(
        " ".join(unicodedata.normalize("NFKC", text).lower().split()).encode("utf-8", "surrogatepass")
    )
    return digest >> 64, digest & (2**64 - 1)


def words_of(text: str) -> list[str]:
    """An implementation of its own: characters one after another, categories asked of unicodedata."""
    found: list[str] = []
    word, lone = "", False
    for c in unicodedata.normalize("NFKC", text).lower():
        category = unicodedata.category(c)
        name = unicodedata.name(c, "")
        harakat = (name.startswith(("ARABIC", "HEBREW")) and category == "Mn") or c == "ـ"
        if category == "Cf" or "VARIATION SELECTOR" in name or harakat:
            continue
        alone = category in ("Lo", "Lm", "Nl") and name.startswith(words.WITHOUT_BLANKS)
        letter = not alone and (category[0] in "LN" or c == "_")
        if alone or (letter and lone) or not (letter or category[0] == "M"):
            found += [word] if word else []
            word, lone = "", False
        if alone or letter or category[0] == "M":
            word, lone = word + c, lone or alone
    return found + ([word] if word else [])


def shingles_as_sets(signer: Signer, texts: list[str]) -> list[frozenset[int]]:
    return [frozenset(signer.sign(t).shingles.tolist()) for t in texts]


def test_every_character_is_normalised_as_python_does(signer: Signer) -> None:
    """All of Unicode in texts of a thousand characters, in order and shuffled, so that neighbours vary."""
    every = [chr(c) for c in range(sys.maxunicode + 1)]
    shuffled = random.Random(0).sample(every[:0x32000], 0x32000)
    for start in range(0, 0x32000, 1024):
        for characters in (every, shuffled):
            text = "".join(characters[start : start + 1024])
            assert signer.sign(text).exact == exact_of(text), hex(start)
    for character in every[:0x32000:7]:
        text = f"a{character}b"
        assert signer.sign(text).exact == exact_of(text), hex(ord(character))


@given(st.text(max_size=60) | st.text(alphabet="aA bB\n\t\x1c\u00a0\u0301Σς İ\u2003…ﬁ", max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_text_is_normalised_as_python_does(text: str) -> None:
    assert Signer(5, 2, 2).sign(text).exact == exact_of(text)


def test_long_texts_are_normalised_in_pieces(signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        "ΟΔΟΣ ΟΔΟΣ: e\u0301 a \u0301b ﬁn… İx  Plain ASCII words " * 40,
        "中文。" * 200,
        "one " * 300,
        "x" * 900,
        " " * 500,
    ]
    whole = [signer.sign(t) for t in texts]
    for piece in (5, 64, 700):
        monkeypatch.setattr(words, "PIECE", piece)
        for text, one in zip(texts, whole, strict=True):
            assert signer.sign(text).exact == one.exact == exact_of(text)
            assert signer.sign(text).shingles.tolist() == one.shingles.tolist()


@pytest.mark.parametrize("block", [1, 3, 64])
def test_blocks_are_no_part_of_a_signature(block: int, signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        "  Some ASCII text,  with\n blanks of_all kinds.  " * 3,
        "Ünïcode — 中文字 ไทยก็ดี and more … words  ",
        "",
        " ",
        "one",
        "🙂",
    ]
    whole = [signer.sign(t) for t in texts]
    import gristmill.data.dedup.minhash as minhash

    monkeypatch.setattr(minhash, "BLOCK", block)
    small = Signer(5, 14, 8)
    for text, one in zip(texts, whole, strict=True):
        other = small.sign(text)
        assert other.exact == one.exact
        assert other.shingles.tolist() == one.shingles.tolist()
        assert (other.keys == one.keys).all()


SOME = st.sampled_from(
    ["", " ", "one", "two words", "a b c d e", "A  B\tc d e f", "é b c d e f", "中文字中文字", "x " * 9000]
)


@given(st.lists(SOME | st.text(max_size=30), max_size=12))
@settings(max_examples=100, deadline=None)
def test_texts_are_signed_together_as_each_alone(texts: list[str]) -> None:
    made = Signer(5, 14, 8).sign_all(texts)
    ends = [0, *made.ends.tolist()]
    assert len(made.exact) == len(made.keys) == len(made.ends) == len(texts)
    assert ends[-1] == len(made.shingles)
    for number, text in enumerate(texts):
        one = Signer(5, 14, 8).sign(text)
        assert tuple(made.exact[number].tolist()) == one.exact == exact_of(text)
        assert made.keys[number].tolist() == one.keys.tolist()
        assert made.shingles[ends[number] : ends[number + 1]].tolist() == one.shingles.tolist()


def test_n_grams_are_those_of_the_words(shared_data, signer: Signer) -> None:
    """In 388 languages: as many distinct shingles as there are n-grams of an independent splitter's words."""
    with gzip.open(shared_data / "corpus" / "udhr.jsonl.gz") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 388
    seen: dict[int, tuple[str, ...]] = {}
    clashes = 0
    for row in rows:
        text = row["text"][:1500]
        own = words_of(text)
        assert len(own) >= min(100, len(text) // 20), row["metadata"]  # a few editions are a line or nothing
        grams = [tuple(own[i : i + 5]) for i in range(len(own) - 4)]
        if not grams:
            continue
        made = signer.sign(text).shingles.tolist()
        assert len(made) == len(grams), row["metadata"]
        for hashed, gram in zip(made, grams, strict=True):
            clashes += seen.setdefault(hashed, gram) != gram
    expected = len(seen) ** 2 / 2**33  # of 32 random bits; the bound is four standard deviations above
    assert clashes <= expected + 4 * expected**0.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The quick_brown fox's 2nd", ["the", "quick_brown", "fox", "s", "2nd"]),
        ("中文字，abc汉", ["中", "文", "字", "abc", "汉"]),
        ("ひらがなカタ", ["ひ", "ら", "が", "な", "カ", "タ"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("ສະບາຍ", ["ສ", "ະ", "ບ", "າ", "ຍ"]),
        ("ကြောင်", ["ကြော", "င်"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("مُحَمَّد", ["محمد"]),
        ("محـــمد", ["محمد"]),
        ("שָׁלוֹם", ["שלום"]),
        ("soft\u00adhyphen zero\u200bwidth", ["softhyphen", "zerowidth"]),
        ("한국어 단어", ["한국어", "단어"]),
        ("Ｆｕｌｌ", ["full"]),
    ],
)
def test_words_of_scripts(text: str, expected: list[str]) -> None:
    assert words_of(text) == expected
    one = Signer(1, 2, 2)
    assert one.sign(text).shingles.tolist() == [one.sign(w).shingles.tolist()[0] for w in expected]


def test_arabic_with_and_without_vowel_points_is_alike(signer: Signer) -> None:
    bare = "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق"
    pointed = "يُولَدُ جَمِيعُ النَّاسِ أَحْرَارًا مُتَسَاوِينَ فِي الْكَرَامَةِ وَالْحُقُوقِ"
    a, b = shingles_as_sets(signer, [bare, pointed])
    assert a == b
    assert signer.sign(bare).exact != signer.sign(pointed).exact


def test_documents_with_fewer_words_than_n_differ_by_their_words(signer: Signer) -> None:
    texts = ["", "one", "one two", "two one", "one two three four", "🙂", "🙃"]
    made = shingles_as_sets(signer, texts)
    assert len(set(made)) == len(texts)
    assert all(len(s) == 1 for s in made)
    assert shingles_as_sets(signer, ["One, two!"]) == [made[2]]


def test_signatures_estimate_jaccard() -> None:
    signer = Signer(5, 256, 2)
    vocabulary = [f"w{i}" for i in range(500)]
    a, b = signer.sign(" ".join(vocabulary[:400])), signer.sign(" ".join(vocabulary[100:500]))
    true = len(set(a.shingles.tolist()) & set(b.shingles.tolist())) / len(
        set(a.shingles.tolist()) | set(b.shingles.tolist())
    )
    assert abs(true - 296 / 496) < 1e-9
    # A bucket of two minima agrees with probability J²; 256 of them have a standard error of 0.03, and four of it. The
    # buckets of a row share a mix, which leaves them independent but for draws of the same shingle, 1 in 200.
    agreeing = float((a.keys == b.keys).mean())
    assert abs(agreeing - true**2) < 4 * (true**2 * (1 - true**2) / 256) ** 0.5


def test_minima_are_those_of_the_permutations(signer: Signer) -> None:
    """Against plain Python's whole numbers."""
    from gristmill.data.dedup.minhash import LANES, MOST, lower_minima

    rng = np.random.default_rng(0)
    grams = np.zeros(40 + LANES, np.uint64)
    grams[:37] = rng.integers(0, 2**63, 37, dtype=np.uint64)
    mixers, flips = rng.integers(-(2**63), 2**63, 3) | 1, rng.integers(-(2**63), 2**63, 4)
    minima = np.full((3, 4), MOST)
    lower_minima(grams, 37, mixers, flips, np.zeros(60, np.int64), minima)

    def permuted(gram: int, mixer: int, flip: int) -> int:
        mask = 2**64 - 1
        x = gram * mixer & mask
        x ^= x >> 32
        x = (x * mixer & mask) ^ (flip & mask)
        return x - 2**64 if x >> 63 else x

    for row, mixer in enumerate(mixers.tolist()):
        for bucket, flip in enumerate(flips.tolist()):
            assert minima[row, bucket] == min(permuted(g, mixer, flip) for g in grams[:37].tolist())


def test_normalising_folds_case_width_and_space() -> None:
    assert normalised("Ｆｕｌｌ  WIDTH\n\ttext") == "full width text"
