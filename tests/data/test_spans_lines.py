"""Repeated lines and paragraphs against counting them in a dictionary, alone and before spans of tokens."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from gristmill.data.documents import read_rows, shards
from gristmill.data.sieve import Edit, edited
from gristmill.data.spans import SpansConfig, remove_spans
from gristmill.data.spans.lines import folded, key, units
from gristmill.data.spans.texts import back, united, without
from gristmill.data.stage_types import silent

LEAST = 6


def rows_of(texts: list[str]) -> list[dict]:
    metadata = {"source": "s", "kind": "prose", "url": None, "date": None, "licence": None}
    return [{"text": t, "id": f"d{i}", "metadata": metadata} for i, t in enumerate(texts)]


def run(documents: Path, out: Path, lines: dict, workers: int = 0, **config) -> dict:
    out.mkdir(exist_ok=True)
    config = {"substring": None, "least_characters_left": 0, **config, "lines": {"least_characters": LEAST, **lines}}
    return remove_spans(SpansConfig(**config), documents, out, workers=workers, progress=silent)


def rows(out: Path, kind: str = "documents") -> list[dict]:
    return [r for s in shards(out, kind) for r in read_rows(s)]


def texts_of_lines(seed: int, breaks: list[str]) -> list[str]:
    rng = random.Random(seed)
    lines = [f"{w} line number {i}" if i % 3 else f"s{i}" for i in range(40) for w in ("A", "the")]
    texts = []
    for _ in range(60):
        chosen = [rng.choice(["", "  ", " "]) + rng.choice(lines) for _ in range(rng.randint(0, 12))]
        texts.append("".join(line + rng.choice(breaks) for line in chosen).removesuffix(rng.choice(["\n", ""])))
    return texts


def expected_lines(texts: list[str], least_documents: int, keep: str, within: bool) -> list[str]:
    """What is left, character by character. A line that goes takes its break along, the last one that before it."""
    keys = [[(m[0].strip(), *m.span()) for m in re.finditer(r"[^\n]*\n|[^\n]+", t)] for t in texts]
    holders = Counter(k for own in keys for k in {k for k, _, _ in own})
    first: dict[str, int] = {}
    left = []
    for d, (text, own) in enumerate(zip(texts, keys, strict=True)):
        gone: set[int] = set()
        seen: set[str] = set()
        for k, start, end in own:
            repeats = holders[k] >= least_documents and (keep == "none" or first.setdefault(k, d) != d)
            if len(k) >= LEAST and (repeats or (within and k in seen)):
                gone |= set(range(start if text[end - 1] == "\n" else start - 1, end))
            first.setdefault(k, d)
            seen.add(k)
        left.append("".join(c for i, c in enumerate(text) if i not in gone))
    return left


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize(("least_documents", "keep"), [(2, "first"), (4, "first"), (3, "none")])
def test_lines_against_a_dictionary(tmp_path: Path, laid_out, least_documents: int, keep: str, within: bool) -> None:
    texts = texts_of_lines(least_documents, ["\n", "\n", "\n\n", " \n"])
    laid_out(tmp_path / "in", rows_of(texts), 13)
    lines = {"unit": "line", "least_documents": least_documents, "keep": keep, "within_documents": within}
    metrics = run(tmp_path / "in", tmp_path / "out", lines)
    expected = expected_lines(texts, least_documents, keep, within)
    assert [r["text"] for r in rows(tmp_path / "out")] == expected
    assert metrics["lines"] > 50
    assert metrics["bytes_out"] == sum(len(t.encode()) for t in expected)
    changes = {r["id"]: r["edits"] for r in rows(tmp_path / "out", "changed")}
    for i, text in enumerate(texts):
        assert edited(text, [Edit(**e) for e in changes.get(f"d{i}", [])]) == expected[i]
        assert {e["reason"] for e in changes.get(f"d{i}", [])} <= {"line"}
    for r in rows(tmp_path / "out", "repeats"):
        own = texts[int(r["id"][1:])][r["start"] : r["end"]].strip()
        assert r["count"] == sum(own in [line.strip() for line in t.split("\n")] for t in texts)
        if r["kept_id"] is not None:
            assert texts[int(r["kept_id"][1:])][r["kept_start"] : r["kept_end"]].strip() == own
        assert (r["kept_id"] is None) == (keep == "none" and r["count"] >= least_documents)


def test_paragraphs_go_with_the_blank_lines_after_them(tmp_path: Path, laid_out) -> None:
    texts = [
        "One paragraph\nof two lines.\n\nAnother one.\n",
        "Its own start.\n\n\nOne paragraph\nof two lines.\n  \n\nIts own end.",
        "Own words.\n\n  One paragraph\nof two lines. ",
        "One paragraph\nof other lines.\n\nAnother one.\n\n",
    ]
    laid_out(tmp_path / "in", rows_of(texts), 2)
    run(tmp_path / "in", tmp_path / "out", {"unit": "paragraph"})
    assert [r["text"] for r in rows(tmp_path / "out")] == [
        texts[0],
        "Its own start.\n\n\nIts own end.",
        "Own words.\n",
        "One paragraph\nof other lines.\n\n",
    ]


def test_folded_lines(tmp_path: Path, laid_out) -> None:
    assert folded("  Ｃopyright ©  2019-2024, ΑΣ! ") == "copyright 00000000 ασ"
    texts = [
        "Copyright 2019, all rights.\nA text.",
        "COPYRIGHT 2024 all  rights\nAnother text.",
        "Copyright 19, all rights.",
    ]
    laid_out(tmp_path / "in", rows_of(texts))
    run(tmp_path / "in", tmp_path / "out", {"unit": "line", "compare": "folded"})
    assert [r["text"] for r in rows(tmp_path / "out")] == [texts[0], "Another text.", texts[2]]
    run(tmp_path / "in", tmp_path / "words", {"unit": "line", "compare": "folded", "least_words": 5})
    assert [r["text"] for r in rows(tmp_path / "words")] == texts


def test_spans_of_tokens_after_lines(tmp_path: Path, laid_out) -> None:
    """A span that only stands in one piece once a line is gone; places are those of the documents as they came."""
    boiler = "Subscribe to our letter, it is free!"
    words = [f"word{i}" for i in range(60)]
    texts = [
        f"{boiler}\n{' '.join(words)}",
        f"Own start.\n{' '.join(words[:30])}\n{boiler}\n{' '.join(words[30:])}\nOwn end, which is long enough.",
    ]
    laid_out(tmp_path / "in", rows_of(texts))
    metrics = run(tmp_path / "in", tmp_path / "out", {"unit": "line"}, substring={"tokens": 50})
    first, second = (r["text"] for r in rows(tmp_path / "out"))
    assert (first, second) == (texts[0], "Own start.\n\nOwn end, which is long enough.")
    (change,) = rows(tmp_path / "out", "changed")
    assert [e["reason"] for e in change["edits"]] == ["substring", "line", "substring"]
    assert edited(texts[1], [Edit(**e) for e in change["edits"]]) == second
    found = {r["unit"]: r for r in rows(tmp_path / "out", "repeats")}
    assert texts[1][found["line"]["start"] : found["line"]["end"]] == f"{boiler}\n"
    span = found["substring"]
    assert texts[1][span["start"] : span["end"]].split()[0] == "word0"
    assert texts[1][span["start"] : span["end"]].split()[-1] == "word59"
    assert texts[0][span["kept_start"] : span["kept_end"]] == " ".join(words)
    assert (metrics["lines"], metrics["substrings"]) == (1, 1)


def test_characters_of_what_is_left_find_their_way_back() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("abcdef") for _ in range(30))
        ends = sorted(rng.sample(range(31), 6))
        gone = [(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True)]
        places = [i for i in range(30) if not any(a <= i < b for a, b in gone)]
        left = without(text, gone)
        assert left == "".join(text[i] for i in places)
        start = rng.randrange(len(left))
        end = rng.randint(start + 1, len(left))
        spans = back([(start, end)], gone)
        assert [i for a, b in spans for i in range(a, b)] == places[start:end]
        assert all(a < b for a, b in spans)
    assert united([(3, 5), (0, 2), (4, 7), (7, 8)]) == [(0, 2), (3, 8)]


def test_units_are_all_of_a_text() -> None:
    for text in ("", "\n\n", "a", "a\n", "\na\n\n\nb", "a\n \nb\n\n", " \n a\nb"):
        for unit in ("line", "paragraph"):
            found = list(units(text, unit))
            assert all(text[start:end].strip() for start, _, end in found)
            assert [b[0] >= a[2] for a, b in itertools.pairwise(found)] == [True] * (len(found) - 1)
            assert "".join(text[s:e] for s, _, e in found).split() == text.split()
    assert len(key("x")) == 16
