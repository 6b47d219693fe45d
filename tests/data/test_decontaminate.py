"""Decontamination: planted problems are found however they are written, and little else is."""

from __future__ import annotations

import gzip
import json
import random
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.data.arithmetic import lesson
from gristmill.data.decontaminate import (
    DecontaminateConfig,
    Finder,
    check_decontamination,
    cuts,
    decontaminate,
    evaluation_files,
    stands_alone,
)
from gristmill.data.documents import read_rows, shards
from gristmill.data.evaluation_sets import EvaluationSet, Problem, read_set
from gristmill.data.folded_words import OWN, SIGNS, Run, RunIndex, folded, spelled, tables, words_of
from gristmill.data.problems import ProblemsConfig, make_problems
from gristmill.data.sieve import edited
from gristmill.data.stage_types import silent

FILLER = (
    "The committee met again in the spring to consider what had been learned during the long winter, and its members "
    "agreed that the old harbour would have to be dredged before the larger ships could enter it in safety. "
)


def rows_of(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def gsm8k(shared_data: Path) -> list[Problem]:
    rows = rows_of(shared_data / "gsm8k" / "test.jsonl.gz")
    return [Problem("gsm8k", str(i), row["question"]) for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def humaneval(shared_data: Path) -> list[Problem]:
    rows = rows_of(shared_data / "humaneval" / "HumanEval.jsonl.gz")
    return [Problem("humaneval", row["task_id"], row["prompt"]) for row in rows]


@pytest.fixture(scope="module")
def corpora(shared_data: Path) -> dict[str, list[dict]]:
    return {name: rows_of(shared_data / "corpus" / f"{name}.jsonl.gz") for name in ("peps", "wikitext2", "udhr")}


def plain_words(text: str) -> Iterator[tuple[str, int, int]]:
    """Words by their definition, a character at a time, with no table and no numba."""
    word, start, end, number, sign = "", 0, 0, False, None

    def kind(char: str) -> str:
        if char in SIGNS or unicodedata.normalize("NFKC", char) in SIGNS:
            return "sign"
        if char.isspace():
            return "space"
        if unicodedata.category(char)[0] == "M" or unicodedata.category(char) == "Cf":
            return "through"
        if folded(char):
            own = ["HIRAGANA", "KATAKANA", "THAI", "LAO", "MYANMAR", "KHMER", "CJK"]
            first = folded(char)[0]
            name = unicodedata.name(first, "")
            return "own" if name.split(" ")[0] in own and ord(first) >= 0xE00 else "word"
        return "other"

    for at, char in enumerate([*text, "\0"]):
        now = kind(char) if char != "\0" else "other"
        if word and (now not in ("word", "through") or (now == "own")):
            yield word, start, end
            number = folded(word)[-1].isdecimal()
            word, sign = "", None
        if now == "own":
            yield folded(char), at, at + 1
            number, sign = folded(char)[-1].isdecimal(), None
        elif now == "word":
            if not word:
                start = at
                if sign is not None and folded(char)[-1].isdecimal():
                    yield sign[0], sign[1], sign[1] + 1
                sign = None
            word, end = word + folded(char), at + 1
        elif now == "sign" and number and sign is None and not word:
            sign = (SIGNS.get(char) or SIGNS[unicodedata.normalize("NFKC", char)], at)
        elif now not in ("space", "through"):
            number, sign = False, None


def test_words_are_those_of_the_definition(corpora: dict[str, list[dict]]) -> None:
    """On 388 languages, and on texts of code and prose: the numba loop against the definition written plainly."""
    texts = [row["text"][:300] for row in corpora["udhr"]] + [row["text"][:1500] for row in corpora["peps"][:20]]
    texts += [
        "５-1＋9 - 6 = ? ﬁne Straße İstanbul e\u0301le\u0300ve 東京ﾄﾞｰﾑ 3×4÷2 −5 well-known 1.5 2**3 x=1 soft\u00adhyphen ½"
    ]
    for text in texts:
        words = words_of(text)
        got = list(zip(spelled(text, words), words.starts.tolist(), words.ends.tolist(), strict=True))
        assert got == list(plain_words(text))


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="aB1 9+-=*é\u0301中\u00ad.ß×\n", max_size=40))
def test_words_of_any_text(text: str) -> None:
    words = words_of(text)
    assert list(zip(spelled(text, words), words.starts.tolist(), words.ends.tolist(), strict=True)) == list(
        plain_words(text)
    )


def test_equal_words_and_no_others_have_equal_hashes(corpora: dict[str, list[dict]]) -> None:
    of_hash: dict[int, str] = {}
    of_word: dict[str, int] = {}
    for row in corpora["udhr"]:
        words = words_of(row["text"][:4000])
        for word, number in zip(spelled(row["text"], words), words.hashes.tolist(), strict=True):
            assert of_hash.setdefault(number, word) == word
            assert of_word.setdefault(word, number) == number
    assert len(of_word) > 50_000


def test_every_assigned_letter_is_in_the_table() -> None:
    what, _ = tables()
    missing = [
        code
        for code in range(0x110000)
        if not 0xD800 <= code < 0xE000 and folded(chr(code)) and not what[code] & 1 and chr(code) not in SIGNS
    ]
    assert missing == []
    assert what[ord("字")] & OWN
    assert not what[ord("z")] & OWN


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("ab12+"), min_size=1, max_size=6), min_size=1, max_size=5),
    st.lists(st.sampled_from("ab12+"), max_size=60),
)
def test_runs_are_found_as_by_looking_everywhere(wanted: list[list[str]], document: list[str]) -> None:
    """Brute force: every window of the document's words against every wanted run."""
    texts, text = [" ".join(words) for words in wanted], " ".join(document)
    own = [spelled(t, words_of(t)) for t in texts]
    runs = [Run(i, 0, len(words)) for i, words in enumerate(own) if words]
    index = RunIndex(texts, runs)
    got = sorted((run.text, start, end) for n, start, end in index.hits(text) for run in index.uses[n])
    words = words_of(text)
    said = spelled(text, words)
    expected = [
        (run.text, int(words.starts[i]), int(words.ends[i + run.length - 1]))
        for run in runs
        for i in range(len(said) - run.length + 1)
        if said[i : i + run.length] == own[run.text]
    ]
    assert got == sorted(expected)


def rewritten(text: str, how: int) -> str:
    """The same problem as another site would print it."""
    if how == 0:
        return text
    if how == 1:
        return text.upper().replace(" ", "\n  ")
    if how == 2:
        return text.replace("'", "’").replace(",", " ;").replace("?", " ??!").replace('"', "“")
    return unicodedata.normalize("NFD", text.title()).replace("  ", " ").replace(". ", ".\u00a0— ")


@pytest.mark.parametrize("how", range(4))
def test_every_planted_problem_is_found(gsm8k: list[Problem], humaneval: list[Problem], how: int) -> None:
    """1,319 + 164 problems inside longer documents, as they are and written otherwise: each is found, in its place."""
    finder = Finder(DecontaminateConfig(), [*gsm8k, *humaneval])
    assert finder.too_short == []
    assert finder.found(FILLER * 20) == []
    for problem in [*gsm8k, *humaneval][how :: 4 if how else 1]:  # as they are, all; otherwise, a quarter each
        found = finder.found(f"{FILLER}\n{rewritten(problem.text, how)}\n{FILLER}")
        assert (problem.set, problem.id) in [(m.problem.set, m.problem.id) for m in found[:2]], problem
        own = next(m for m in found if m.problem == problem)
        assert own.overlap == 1
        assert all(len(FILLER) <= a and b <= len(FILLER) + len(rewritten(problem.text, how)) + 1 for a, b in own.spans)


def test_few_documents_of_other_corpora_hold_a_problem(
    gsm8k: list[Problem], humaneval: list[Problem], corpora: dict[str, list[dict]], shared_data: Path
) -> None:
    """PEPs, WikiText and the declarations hold none.

    In GSM8K's training problems the one found shares 19 words running of 25 with a test problem: "miles in 3 hours. At
    the same rate, how many additional hours would it take to travel an additional … miles?", which is that problem
    with other numbers. It stands there twice.
    """
    finder = Finder(DecontaminateConfig(), [*gsm8k, *humaneval])
    for name, rows in corpora.items():
        assert [row["id"] for row in rows if finder.found(row["text"])] == [], name
    train = rows_of(shared_data / "gsm8k" / "train.jsonl.gz")
    found = [finder.found(f"{row['question']}\n{row['answer']}") for row in train]
    assert [(m.problem.id, len(m.words), m.size) for ms in found for m in ms] == [("602", 19, 25)] * 2
    any_ngram = Finder(DecontaminateConfig(least_overlap=0), gsm8k)
    documents = sum(bool(any_ngram.found(f"{row['question']}\n{row['answer']}")) for row in train)
    print(f"GSM8K training problems with any 13-gram of the test: {documents} of {len(train)}")
    assert documents <= 6  # four: GPT-3's own rule errs little more on these


def test_counting_against_an_oracle(gsm8k: list[Problem], shared_data: Path) -> None:
    """With 8-grams there is overlap to count: the same share a problem as sets of joined words give."""
    config = DecontaminateConfig(ngram=8, least_overlap=0.1, enough_words=40, whole_below=8)
    documents = [row["question"] for row in rows_of(shared_data / "gsm8k" / "train.jsonl.gz")[:1500]]
    own = {p.id: [w for w, _, _ in plain_words(p.text)] for p in gsm8k[:600]}
    grams: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    for key, words in own.items():
        for i in range(len(words) - 7):
            grams.setdefault(tuple(words[i : i + 8]), []).append((key, i))
    finder = Finder(config, gsm8k[:600])
    hits = 0
    for text in documents:
        words = [w for w, _, _ in plain_words(text)]
        places: dict[str, set[int]] = {}
        for i in range(len(words) - 7):
            for key, first in grams.get(tuple(words[i : i + 8]), ()):
                places.setdefault(key, set()).update(range(first, first + 8))
        expected = {k: len(p) for k, p in places.items() if len(p) / len(own[k]) >= 0.1 or len(p) >= 40}
        assert {m.problem.id: len(m.words) for m in finder.found(text)} == expected
        hits += len(expected)
    assert hits >= 4


SUM = "5-1+9-6=?"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("What is 5-1+9-6?", True),
        ("1. 5 - 1 + 9 - 6 = 7", True),
        ("- 5−1＋9–6=?", True),
        ("<｜User｜>5-1+9-6=?<｜Assistant｜><think>\n5-1=4\n4+9=13\n13-6=7\n</think>\n7", True),
        ("x=5-1+9-6", True),
        ("5+1-9+6=?", False),
        ("5 1 9 6", False),
        ("5-1+9-6-3=?", False),
        ("2+5-1+9-6=?", False),
        ("15-1+9-6=?", False),
        ("5-1+9-61=?", False),
        ("3.5-1+9-6=?", False),
        ("5-1+9-6.5=?", False),
        ("-5-1+9-6=?", False),
    ],
)
def test_a_sum_stands_by_itself(text: str, found: bool) -> None:
    finder = Finder(DecontaminateConfig(), [Problem("problems", "test/0", SUM)])
    for around in ("", f" {FILLER}"):
        assert bool(finder.found(f"{around}{text}{around}")) is found
    assert stands_alone("1+2", 0, 3)


@pytest.mark.parametrize("count", [3000, pytest.param(12_000, marks=pytest.mark.slow)])
def test_lessons_lose_no_document_wrongly(tmp_path: Path, count: int) -> None:
    """The recipe `tiny`: its (first) lessons against its 700 test problems, which share no chain; and each is found."""
    make_problems(ProblemsConfig(test=700), tmp_path, 0, progress=silent)
    problems = [Problem("problems", r["id"], r["question"]) for r in map(json.loads, (tmp_path / "test.jsonl").open())]
    finder = Finder(DecontaminateConfig(), problems)
    assert finder.too_short == []
    assert [i for i in range(count) if finder.found(lesson(0, i))] == []
    for problem in problems:
        assert finder.found(f"Exercises, page 3\n\n1. {problem.text.upper()}\nAnswer: 7\n")


def documents_of(problems: list[Problem], count: int) -> list[dict]:
    rng = random.Random(5)
    rows = []
    for i in range(count):
        text = FILLER * rng.randint(2, 6)
        if i % 10 == 3:
            text = f"{text}\n{problems[i % len(problems)].text}\n{text}"
        rows.append({"text": text, "id": f"d/{i}", "metadata": {"source": "web", "kind": "prose"}})
    return rows


def lay_sets(tmp_path: Path, gsm8k: list[Problem], humaneval: list[Problem]) -> tuple[Path, list[EvaluationSet]]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    folder = tmp_path / "problems"
    folder.mkdir()
    lines = [json.dumps({"id": p.id, "question": p.text, "answer": "#### 1"}) + "\n" for p in gsm8k[:100]]
    (folder / "test.jsonl").write_text("".join(lines))
    rows = [{"task": p.id, "prompt": p.text, "choices": ["a", "b"]} for p in humaneval]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "he.parquet")
    packed = "".join(json.dumps({"q": p.text, "hints": [p.text[:9], None]}) + "\n" for p in gsm8k[100:200]).encode()
    (tmp_path / "g.jsonl.zst").write_bytes(zstandard.compress(packed))
    sets = [
        EvaluationSet(name="code", path=str(tmp_path / "he.parquet"), fields=["prompt"], id_field="task"),
        EvaluationSet(name="maths", path=str(tmp_path / "*.jsonl.zst"), fields=["q", "hints"]),
    ]
    return folder, sets


def test_the_stage(
    tmp_path: Path,
    gsm8k: list[Problem],
    humaneval: list[Problem],
    laid_out: Callable[..., Path],
    bytes_of: Callable[[Path], str],
) -> None:
    """Removed with the reason, its spans and a row of matches; the same bytes with 0, 1 and 2 workers and after a kill."""
    folder, sets = lay_sets(tmp_path, gsm8k, humaneval)
    planted = [*gsm8k[:100], *humaneval, *gsm8k[100:200]]
    rows = documents_of(planted, 300)
    documents = laid_out(tmp_path / "in", rows, 70)
    config = DecontaminateConfig(sets=sets)
    check_decontamination(config)
    assert [Path(f).name for f in evaluation_files(config)] == ["he.parquet", "g.jsonl.zst"]
    metrics = decontaminate(config, documents, folder, tmp_path / "0", workers=0, progress=silent)
    removed = [row for shard in shards(tmp_path / "0", "removed") for row in read_rows(shard)]
    assert {row["id"] for row in removed} == {f"d/{i}" for i in range(3, 300, 10)}
    for row in removed:
        start, end = row["because"]["spans"][0]
        assert planted[int(row["id"][2:]) % len(planted)].text[:20].strip() in row["text"][start - 3 : end]
        assert row["reason"].startswith("contaminated: ")
    assert metrics["documents_out"] == 270
    assert metrics["problems"] == {"problems": 100, "code": 164, "maths": 100}
    assert sum(metrics["removed_by_reason"].values()) == sum(metrics["found"].values()) == 30
    assert metrics["too_short"] == {"problems": 0, "code": 0, "maths": 100}
    matches = [json.loads(line) for line in (tmp_path / "0" / "matches.jsonl").open()]
    assert len(matches) == 30
    assert {m["document"] for m in matches} == {row["id"] for row in removed}
    assert all(len(m["ngram"].split()) >= 13 and m["overlap"] == 1 for m in matches)
    assert not (tmp_path / "0" / "work").exists()

    def killed(done: int, total: int, **values: float) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decontaminate(config, documents, folder, tmp_path / "1", workers=0, progress=killed)
    decontaminate(config, documents, folder, tmp_path / "1", workers=2, progress=silent)
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "0")


def test_cutting_takes_the_problem_and_its_neighbourhood(
    tmp_path: Path, gsm8k: list[Problem], laid_out: Callable[..., Path]
) -> None:
    folder, _ = lay_sets(tmp_path, gsm8k, [Problem("humaneval", "0", "x")])
    long = FILLER * 5
    rows = [
        {"text": f"{long}\n{gsm8k[3].text}\n{long}", "id": "one", "metadata": {"source": "web", "kind": "prose"}},
        {"text": gsm8k[4].text, "id": "all", "metadata": {"source": "web", "kind": "prose"}},
        {
            "text": long.join(p.text for p in gsm8k[:20]),
            "id": "many",
            "metadata": {"source": "web", "kind": "prose"},
        },
    ]
    documents = laid_out(tmp_path / "in", rows)
    config = DecontaminateConfig(action="cut")
    metrics = decontaminate(config, documents, folder, tmp_path / "out", workers=0, progress=silent)
    kept = list(read_rows(shards(tmp_path / "out")[0]))
    assert [row["id"] for row in kept] == ["one"]
    text = kept[0]["text"]
    assert not Finder(config, gsm8k).found(text)
    first, second = text.split("\n\n")
    assert long.startswith(first)
    assert long.endswith(second)
    assert all(len(long) - 200 - 41 <= len(part) <= len(long) - 200 for part in (first, second))
    changed = next(iter(read_rows(shards(tmp_path / "out", "changed")[0])))
    assert changed["edits"][0]["reason"] == "contaminated: problems"
    assert metrics["changed"] == 1
    assert metrics["removed_by_reason"] == {"contaminated: problems": 2}


def test_short_pieces_between_cuts_go_too() -> None:
    config = DecontaminateConfig(cut_characters=10, least_left=30)
    text = "".join(chr(97 + i % 26) for i in range(400))
    edits = cuts(config, text, [[50, 60], [100, 110], [300, 310]], "r")
    assert [(e.start, e.end) for e in edits] == [(40, 70), (90, 120), (290, 320)] or len(edits) == 2
    assert [(e.start, e.end) for e in cuts(config, text, [[20, 30], [380, 390]], "r")] == [(0, 40), (370, 400)]
    left = edited(text, edits).split("\n\n")
    assert all(len(piece) >= 30 for piece in left)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"path": "nowhere.jsonl"}, "names no file"),
        ({"path": "owner/name"}, "name a commit"),
        ({"path": "owner/name", "revision": "main"}, "name a commit"),
        ({"path": "data.txt"}, "convert it"),
        ({"path": "rows.jsonl", "fields": ["text"]}, "has no field 'text', but id, question"),
        ({"path": "rows.jsonl", "fields": ["id"]}, "has no text in 'id'"),
        ({"path": "bad.jsonl"}, "bad.jsonl, line 1, is not JSON"),
        ({"path": "cut.jsonl.gz"}, "cannot be read after line 0"),
        ({"path": "cut.parquet"}, "not a whole Parquet file"),
        ({"path": "empty.jsonl"}, "holds no rows"),
        ({"path": "latin.jsonl"}, "line 1, is no UTF-8"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.txt").write_text("x")
    Path("rows.jsonl").write_text('{"id": 3, "question": "why"}\n')
    Path("bad.jsonl").write_text("{'a'}\n")
    Path("cut.jsonl.gz").write_bytes(
        gzip.compress(b'{"question": "' + np.random.default_rng(0).bytes(99).hex().encode())[:40]
    )
    Path("cut.parquet").write_bytes(b"PAR1")
    Path("empty.jsonl").write_text("\n")
    Path("latin.jsonl").write_bytes(b'{"question": "\xe9"}\n')
    wanted = EvaluationSet(**{"name": "s", "fields": ["question"], **change})
    with pytest.raises(ValueError, match=said):
        check_decontamination(DecontaminateConfig(sets=[wanted]))


def test_names_and_sizes_fit_together() -> None:
    one = EvaluationSet(name="problems", path="a.jsonl", fields=["q"])
    with pytest.raises(ValueError, match="two evaluation sets are named 'problems'"):
        DecontaminateConfig(sets=[one])
    with pytest.raises(ValueError, match="whole_below 5 is less than ngram 13"):
        DecontaminateConfig(whole_below=5)


def test_a_folder_that_datasets_loads(tmp_path: Path) -> None:
    """The way of a hub's dataset, without a hub."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").write_text('{"question": "How far is it to the moon?"}\n' * 2)
    wanted = EvaluationSet(name="far", path=str(tmp_path / "set"), fields=["question"])
    check_decontamination(DecontaminateConfig(sets=[wanted]))
    assert [(p.id, p.text) for p in read_set(wanted)] == [
        ("test/0", "How far is it to the moon?"),
        ("test/1", "How far is it to the moon?"),
    ]


def test_it_is_fast_and_linear(gsm8k: list[Problem], humaneval: list[Problem], corpora: dict[str, list[dict]]) -> None:
    """The PEPs and WikiText at 15 MB a core-second and more (about 100 on an idle core), and no text that runs away."""
    finder = Finder(DecontaminateConfig(), [*gsm8k, *humaneval])
    texts = [row["text"] for name in ("peps", "wikitext2") for row in corpora[name]]
    size = sum(len(text.encode()) for text in texts)
    finder.found("warm"), finder.found("wärm")
    began = time.process_time()
    assert not any(finder.found(text) for text in texts)
    rate = size / 1e6 / (time.process_time() - began)
    print(f"{rate:.0f} MB/s a core")
    assert rate > 15
    for piece in ("a", "1+", "é ", "- ", "1 ", " " * 7, gsm8k[0].text + " "):
        took = []
        for count in (1, 4):
            text = (piece * (count * 500_000 // len(piece) + 1))[: count * 500_000]
            began = time.process_time()
            finder.found(text)
            took.append(time.process_time() - began)
        assert took[1] < 12 * took[0] + 0.1, piece  # four times the text, with room for a busy machine
