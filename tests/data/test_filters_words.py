"""What rules count on: characters, words, repeated pieces, languages, edits; each against another implementation."""

from __future__ import annotations

import gzip
import json
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.data.filters import characters, counting
from gristmill.data.filters.characters import character_table
from gristmill.data.filters.edits import compose, original_spans
from gristmill.data.filters.fasttext_model import language_identifier, model_path, read_model
from gristmill.data.filters.splitting import BEYOND, split_fast
from gristmill.data.filters.words import (
    LONGEST_RUN,
    ExactSplitter,
    FastSplitter,
    TooManyWords,
    check_words,
    code_points,
    runs,
)
from gristmill.data.sieve import Edit, edited

# Pieces from which spaCy's special words, affixes and contractions come together, blanks of all kinds among them.
MARKS = "( ) : ; = - ' \" . , [ ] 8 D p x o O 3 0 _ ^ * < > / \\ | … — – ’ “ ” $ % § + # @ ... 10 km 5km C++"
LETTERS = "a A b the it's don't can't cannot e.g. i.e. U.S. a.m. Mr. he we'll http://a.b-c.de/f?g x@y.org foo-bar a/b"
OTHERS = ["", " ", "  ", "\n", "\t", "\xa0", "\u3000", "\r\n", "\x00", "é", "Ж", "語", "ไทย", "😀", "٣"]
PIECES = st.sampled_from([*MARKS.split(), *LETTERS.split(), *OTHERS])
TEXTS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=25).map("".join))


def rows_of(path: Path, step: int = 1) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][::step]


# --- characters


def test_the_table_says_what_python_and_spacy_say() -> None:
    from datatrove.utils.text import PUNCTUATION_SET, TERMINAL_PUNCTUATION
    from spacy.pipeline.sentencizer import Sentencizer

    table = character_table()
    # Every code point where any is assigned, and some of the others.
    codes = [*range(0x33000), *range(0x33000, sys.maxunicode + 1, 997), *range(0xE0000, 0xE0200)]
    table, letters = table[codes], [chr(code) for code in codes]
    for bit, says in {
        characters.SPACE: str.isspace,
        characters.ALPHA: str.isalpha,
        characters.LOWER: str.islower,
        characters.UPPER: str.isupper,
        characters.LINE_BREAK: lambda c: len(f"a{c}b".splitlines()) == 2,
        characters.CATEGORY_P: lambda c: unicodedata.category(c)[0] == "P",
        characters.SYMBOL: PUNCTUATION_SET.__contains__,
        characters.TERMINAL: TERMINAL_PUNCTUATION.__contains__,
        characters.SENTENCE: set(Sentencizer.default_punct_chars).__contains__,
    }.items():
        assert np.array_equal(table & bit != 0, np.fromiter(map(says, letters), bool, len(letters))), bit


# --- words


@pytest.fixture(scope="module")
def exact() -> ExactSplitter:
    return ExactSplitter()


def split_by_datatrove(text: str, language: str = "en") -> list[str]:
    from datatrove.utils.word_tokenizers import load_word_tokenizer

    return load_word_tokenizer(language).word_tokenize(text)


@given(TEXTS)
@settings(max_examples=400, deadline=None)
def test_exact_words_are_datatroves(exact: ExactSplitter, text: str) -> None:
    assert exact.split(text, code_points(text)).of(text) == split_by_datatrove(text)


def test_a_special_word_over_a_blank_hides_one_beside_it(exact: ExactSplitter) -> None:
    for text in ("x = (= (y)", "f(x) :( y)", "a (: ( b", "): (:", "(x :) ) :("):
        assert exact.split(text, code_points(text)).of(text) == split_by_datatrove(text)


@pytest.mark.parametrize("language", ["de", "fr", "it", "es", "ru"])
def test_exact_words_of_other_languages(language: str, shared_data: Path) -> None:
    splitter = ExactSplitter(language)
    for row in rows_of(shared_data / "corpus" / "udhr.jsonl.gz", 40):
        text = row["text"][:1500]
        assert splitter.split(text, code_points(text)).of(text) == split_by_datatrove(text, language), row["id"]


def test_exact_words_are_the_same_whatever_was_split_before(exact: ExactSplitter, monkeypatch) -> None:
    monkeypatch.setattr("gristmill.data.filters.words.AT_ONCE", 3)
    monkeypatch.setattr("gristmill.data.filters.words.KNOWN_CHARACTERS", 400)
    forgetful = ExactSplitter()
    for text in ("It's (= (x) a test, isn't it? Yes :) ) and so on.", "No: a/b (: ( it isn't.  x", "It's a test"):
        for _ in range(2):
            assert forgetful.split(text, code_points(text)).of(text) == split_by_datatrove(text)


@pytest.mark.parametrize(
    ("language", "says"),
    [
        ("th", "not split by rules alone"),
        ("ko", "not split by rules alone"),
        ("zh_Hani", "not split by rules alone"),
        ("no such", "a language that datatrove's table lacks"),
        ("zh", "name one .*zh_Hani"),
        ("ar", "name one .*ar_Arab"),
    ],
)
def test_languages_without_one_splitter_of_rules_are_refused(language: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"{says}.*use mode fast"):
        ExactSplitter(language)
    with pytest.raises(ValueError, match=f"{says}.*use mode fast"):
        check_words(language)


def test_a_code_without_its_script_means_other_words_to_datatrove_than_the_one_with_it() -> None:
    """Why such codes are refused: the reference itself splits Arabic by the rules of no language, if asked for `ar`."""
    text = "الساعة ٥ ص.ب. ٢٠٢٠"
    assert split_by_datatrove(text, "ar") != split_by_datatrove(text, "ar_Arab")
    assert ExactSplitter("ar_Arab").split(text, code_points(text)).of(text) == split_by_datatrove(text, "ar_Arab")


@given(text=st.text("ab'dnt:().[-語 ", max_size=40))
@settings(max_examples=300, deadline=None)
def test_a_splitter_that_stops_has_found_all_or_more_than_it_may(text: str) -> None:
    codes, table = code_points(text), character_table()
    starts, _ = split_fast(codes, table, len(codes))
    for most in range(len(starts) + 2):
        some, _ = split_fast(codes, table, most)
        assert len(some) > most if len(starts) > most else np.array_equal(some, starts)


@pytest.mark.parametrize("piece", ["'d", "n't", ":)", "(:", "a-", ".)", "語", "[1]", "'s", "a,b"])
@pytest.mark.parametrize("before", ["", "x", "x y ("])
def test_a_run_of_one_thing_stays_within_its_bounds(piece: str, before: str) -> None:
    text = before + piece * 40_000
    codes, table = code_points(text), character_table()
    everything, _ = split_fast(codes, table, len(codes))
    for most in (0, 1, 7, 1000):
        some, ends = split_fast(codes, table, most)
        assert min(most + 1, len(everything)) <= len(some) <= most + BEYOND
        assert np.array_equal(some[:most], everything[:most])
        assert (ends <= len(codes)).all()


def test_a_text_of_too_many_words_is_refused_and_the_next_is_split(exact: ExactSplitter, monkeypatch) -> None:
    monkeypatch.setattr("gristmill.data.filters.words.MOST_WORDS", 100)
    runs_of_marks = " ".join("(" * (2001 + i) for i in range(3))
    for text in ("a b " * 51, "(" * 101, "x" * 3000 + ")" * 101, ": ) " * 60, runs_of_marks, "it's, " * 40):
        for splitter in (exact, FastSplitter()):
            with pytest.raises(TooManyWords, match="more than 100 words"):
                splitter.split(text, code_points(text))
    for text in ("a b " * 50, "(" * 100, ":) " * 100):
        assert len(FastSplitter().split(text, code_points(text))) == 100
        assert exact.split(text, code_points(text)).of(text) == split_by_datatrove(text)


def test_long_runs_are_left_to_the_fast_rules(exact: ExactSplitter) -> None:
    run = "(" * (LONGEST_RUN + 1)
    assert len(exact.split(run, code_points(run))) == len(run)


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_fast_words_are_the_text_without_its_white_space(text: str) -> None:
    codes = code_points(text)
    words = FastSplitter().split(text, codes)
    assert "".join(words.of(text)) == "".join(text.split())
    assert all(a < b for a, b in zip(words.starts, words.ends, strict=True))
    assert all(a <= b for a, b in zip(words.ends[:-1], words.starts[1:], strict=True))
    starts, ends = runs(codes, character_table(), len(codes))
    assert [text[a:b] for a, b in zip(starts, ends, strict=True)] == text.split()


def test_fast_words_of_english_are_spacys(shared_data: Path, exact: ExactSplitter) -> None:
    ours: Counter[str] = Counter()
    theirs: Counter[str] = Counter()
    for name in ("peps", "wikitext2"):
        for row in rows_of(shared_data / "corpus" / f"{name}.jsonl.gz", 12):
            codes = code_points(row["text"])
            ours.update(FastSplitter().split(row["text"], codes).of(row["text"]))
            theirs.update(exact.split(row["text"], codes).of(row["text"]))
    # Abbreviations, units and rare faces differ: a word in a few hundred.
    assert (ours - theirs).total() < 0.005 * theirs.total()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It isn't (really) 'done'...", ["It", "is", "n't", "(", "really", ")", "'", "done", "'", "..."]),
        ("See https://a.b-c.org/d-e.html, or a@b.org!", None),
        ("We'll e-mail 3.5% of A.B. and 10,000.", None),
        ("日本語の文。", ["日", "本", "語", "の", "文", "。"]),
        ("한국어 문장입니다.", ["한국어", "문장입니다", "."]),
        ("العربية، نعم؟", ["العربية", "،", "نعم", "؟"]),
    ],
)
def test_fast_words(text: str, words: list[str] | None) -> None:
    expected = split_by_datatrove(text) if words is None else words
    assert FastSplitter().split(text, code_points(text)).of(text) == expected


# --- repetition


WORDS = st.lists(st.sampled_from(["a", "b", "ab", "ba", "abc", "cab", "a" * 300]), max_size=60)


@given(WORDS, st.integers(1, 6))
@settings(max_examples=300, deadline=None)
def test_repeated_n_grams_are_datatroves(words: list[str], n: int) -> None:
    from datatrove.pipeline.filters.gopher_repetition_filter import (
        find_all_duplicate,
        find_duplicates,
        find_top_duplicate,
        get_n_grams,
    )

    text = " ".join(words)
    codes = code_points(text)
    starts, ends = runs(codes, character_table(), len(codes))
    before, lengths = counting.joined_words(codes, starts, ends)
    found = counting.repeated_n_grams(before, lengths, n)
    assert sum(int(lengths[i + n] - lengths[i]) for i in found) == find_all_duplicate(words, n)
    if len(words) >= n:
        _, size, count = counting.top_n_gram(before, lengths, n)
        assert size * count == find_top_duplicate(get_n_grams(words, n))
    again = counting.repeated_pieces(codes, starts, ends)
    assert (len(again), int((ends - starts)[again].sum())) == find_duplicates(words)


@given(st.text(alphabet="ab \n\r\x0b\x85\u2028", max_size=40), st.integers(1, 3))
@settings(max_examples=300, deadline=None)
def test_lines_are_pythons(text: str, least: int) -> None:
    codes, table = code_points(text), character_table()
    starts, ends = counting.split_at_breaks(codes, table)
    assert [text[a:b] for a, b in zip(starts, ends, strict=True)] == text.splitlines()
    stripped = counting.strip_lines(codes, starts, ends, table)
    assert [text[a:b] for a, b in zip(*stripped, strict=True)] == [line.strip() for line in text.splitlines()]
    starts, ends = counting.split_at_line_feeds(codes, 0, len(codes), least)
    assert [text[a:b] for a, b in zip(starts, ends, strict=True)] == re.split(f"\n{{{least},}}", text)


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_sentences_are_spacys(exact: ExactSplitter, text: str) -> None:
    from datatrove.utils.text import split_into_sentences

    codes = code_points(text)
    words = exact.split(text, codes)
    count = counting.count_sentences(codes, words.starts, words.ends, 0, len(codes), 0, len(words), character_table())
    assert count == len(split_into_sentences(text))


# --- language


def test_scores_are_fasttexts(shared_data: Path) -> None:
    from fasttext.FastText import _FastText

    theirs, ours = _FastText(str(model_path())), language_identifier()
    rows = rows_of(shared_data / "corpus" / "udhr.jsonl.gz", 3) + rows_of(shared_data / "corpus" / "peps.jsonl.gz", 60)
    for text in [*(row["text"] for row in rows), "", " \t\x00 ", "a", "__label__en __label__de", "x" * 5000, "😀 語"]:
        labels, scores = theirs.predict(text.replace("\n", " "), k=-1)
        expected = dict(zip(labels, scores, strict=True))
        in_order, by_word = ours.scores(text, in_order=True), ours.scores(text)
        for label, score, quick in zip(ours.labels, in_order, by_word, strict=True):
            # Rounding of exp and log in single precision; then fastText's own error of a long sum as well.
            assert abs(score - expected.get(f"__label__{label}", 0.0)) < 2e-5
            assert abs(quick - score) < 1e-4
    assert ours.identify("Ceci est une phrase tout à fait ordinaire en français.")[0] == "fr"


def test_scores_do_not_depend_on_earlier_texts() -> None:
    fresh, used = read_model(model_path()), read_model(model_path())
    for i in range(2000):
        used.scores(f"ein anderer Text mit Wort{i} und noch{i * 7} mehr")
    text = "This is a plain sentence, and there is nothing odd about it."
    assert np.array_equal(fresh.scores(text), used.scores(text))


def test_another_file_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "other.ftz"
    path.write_bytes(b"not a model, but long enough to be read")
    with pytest.raises(ValueError, match=r"other\.ftz is not a fastText model"):
        read_model(path)


# --- edits


@st.composite
def edits_of(draw, length: int, reason: str) -> list[Edit]:
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=8)))
    return [
        Edit(a, b, reason, draw(st.text(alphabet="XYZ", max_size=3)))
        for a, b in zip(cuts[::2], cuts[1::2], strict=False)
    ]


@given(st.data(), st.text(alphabet="abcdef", max_size=20))
@settings(max_examples=400, deadline=None)
def test_composed_edits_do_what_both_do(data, text: str) -> None:
    first = data.draw(edits_of(len(text), "first"))
    between = edited(text, first)
    then = data.draw(edits_of(len(between), "then"))
    composed = compose(first, then)
    assert edited(text, composed) == edited(between, then)
    assert {edit.reason for edit in composed} <= {"first", "then"}
    assert compose([], then) == then
    assert compose(first, []) == list(first)


def test_edits_apart_stay_apart_and_spans_come_back() -> None:
    text = "keep DROP keep 12345 end"
    first = [Edit(5, 10, "lines")]
    between = edited(text, first)
    assert between == "keep keep 12345 end"
    then = [Edit(10, 15, "pii", "<number>")]
    assert compose(first, then) == [Edit(5, 10, "lines"), Edit(15, 20, "pii", "<number>")]
    assert [text[a:b] for a, b in original_spans(first, [[0, 4], [5, 9], [10, 15]])] == ["keep", "keep", "12345"]
    replaced = [Edit(15, 20, "pii", "<number>")]
    after = edited(text, replaced)
    start = after.index("umb")
    assert original_spans(replaced, [[start, start + 3]]) == [[15, 20]]
