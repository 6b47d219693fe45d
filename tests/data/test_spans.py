"""Spans against brute force over all windows; planted ones in real corpora; the same bytes whoever works."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.data.documents import read_rows, shards
from gristmill.data.executor import close_cluster, cluster_client
from gristmill.data.sieve import Edit, edited
from gristmill.data.spans import LinesConfig, SpansConfig, SubstringConfig, remove_spans
from gristmill.data.stage_types import silent

ALONE = (
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tai_Le}\p{New_Tai_Lue}"
    r"\p{Tai_Tham}\p{Tai_Viet}\p{Javanese}\p{Balinese}]"
)
EXTEND = r"[[\p{M}\p{Cf}]--[\s\u200b\ufeff]]"
LETTER = rf"[[\p{{L}}\p{{N}}\p{{Pc}}]--{ALONE}--[\p{{M}}\p{{Cf}}]]"
TOKEN = regex.compile(rf"(?:{LETTER}|{EXTEND})+|[^\s\u200b\ufeff]{EXTEND}*", regex.V1)


def tokens_of(text: str) -> list[tuple[str, int, int]]:
    """Independent of the tokeniser: by a regular expression. Words here are short."""
    return [(m[0], m.start(), m.end()) for m in TOKEN.finditer(text)]


def brute_force(texts: list[str], n: int, within: bool) -> list[list[tuple[int, int]]]:
    """Characters that go, by a dictionary of all windows."""
    first: dict[tuple[str, ...], tuple[int, int]] = {}
    found = []
    for d, text in enumerate(texts):
        tokens = tokens_of(text)
        goes: set[int] = set()
        for i in range(len(tokens) - n + 1):
            window = tuple(t for t, _, _ in tokens[i : i + n])
            where = first.setdefault(window, (d, i))
            if where[0] < d or (within and where[1] + n <= i):
                goes |= set(range(i, i + n))
        spans: list[tuple[int, int]] = []
        for i in sorted(goes):
            if i - 1 in goes:
                spans[-1] = spans[-1][0], tokens[i][2]
            else:
                spans.append(tokens[i][1:])
        found.append(spans)
    return found


def rows_of(texts: list[str], kind: str = "prose") -> list[dict]:
    metadata = {"source": "s", "kind": kind, "url": None, "date": None, "licence": None}
    return [{"text": t, "id": f"d{i}", "metadata": metadata} for i, t in enumerate(texts)]


def run(documents: Path, out: Path, workers: int = 0, **config) -> dict:
    out.mkdir(exist_ok=True)
    return remove_spans(SpansConfig(**config), documents, out, workers=workers, progress=silent)


def results(out: Path) -> dict[str, str]:
    return {r["id"]: r["text"] for s in shards(out) for r in read_rows(s)}


def repeats(out: Path) -> list[dict]:
    return [r for s in shards(out, "repeats") for r in read_rows(s)]


def without(text: str, spans: list[tuple[int, int]]) -> str:
    return edited(text, [Edit(a, b, "") for a, b in spans])


def stitched(seed: int, documents: int, alphabet: str, longest: int) -> list[str]:
    """Documents of few different words, stitched from each other, so that repeats overlap, nest and chain."""
    rng = random.Random(seed)
    texts: list[str] = []
    for _ in range(documents):
        parts = []
        for _ in range(rng.randint(0, 5)):
            if texts and rng.random() < 0.6:
                words = rng.choice(texts).split()
                begin = rng.randint(0, len(words))
                parts += words[begin : begin + rng.randint(0, longest)]
            else:
                parts += [rng.choice(alphabet) for _ in range(rng.randint(0, longest))]
        texts.append(rng.choice([" ", "\n", "  "]).join(parts))
    return texts


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize(
    ("seed", "n", "alphabet"),
    [(0, 2, "abc"), (1, 5, "ab"), (2, 8, "abcd,."), (3, 13, "ab漢字"), (4, 50, "abcdefgh"), (5, 3, "a")],
)
def test_what_goes_is_what_brute_force_finds(
    tmp_path: Path, laid_out, seed: int, n: int, alphabet: str, within: bool
) -> None:
    texts = [t for k in range(4) for t in stitched(10 * seed + k, 20, alphabet, 3 * n)]
    laid_out(tmp_path / "in", rows_of(texts), 17)
    substring = {"tokens": n, "within_documents": within}
    metrics = run(tmp_path / "in", tmp_path / "out", substring=substring, least_characters_left=0)
    expected = brute_force(texts, n, within)
    assert sum(map(len, expected)) > 10
    assert list(results(tmp_path / "out").values()) == [without(t, e) for t, e in zip(texts, expected, strict=True)]
    assert metrics["substring_characters"] == sum(b - a for spans in expected for a, b in spans)
    assert metrics["collisions"] == 0
    for r in repeats(
        tmp_path / "out"
    ):  # what is said to be the same is the same, at both places, and the other is before
        own, kept = int(r["id"][1:]), int(r["kept_id"][1:])
        mine = [t for t, _, _ in tokens_of(texts[own][r["start"] : r["end"]])]
        assert mine == [t for t, _, _ in tokens_of(texts[kept][r["kept_start"] : r["kept_end"]])]
        assert len(mine) == r["tokens"] >= n
        assert (kept, r["kept_end"]) < (own, r["end"])


def test_small_tables_runs_and_pieces_change_no_byte(tmp_path: Path, laid_out, bytes_of, monkeypatch) -> None:
    """Tables that fill many times over, runs and texts that are cut: what a corpus of terabytes does to them."""
    texts = [" ".join(stitched(seed, 6, "abcdefgh", 400)) for seed in range(24)]
    assert max(map(len, texts)) > 4 * 2048
    laid_out(tmp_path / "in", rows_of([*texts, *texts[:3]]), 7)
    config = {"substring": {"tokens": 20, "within_documents": True}, "lines": {"unit": "line", "least_characters": 5}}
    run(tmp_path / "in", tmp_path / "whole", **config)
    for module, name, small in [
        ("exchange", "RUN", 100),
        ("exchange", "BLOCK", 37),
        ("substring", "BLOCK", 50),
        ("tables", "KEYS", 64),
        ("tokens", "PIECE", 2048),
        ("texts", "AT_ONCE", 3),
        ("lines", "HELD", 5),
        ("__init__", "PARTITIONS", (5, 5)),
    ]:
        monkeypatch.setattr(f"gristmill.data.spans{'' if module == '__init__' else '.' + module}.{name}", small)
    run(tmp_path / "in", tmp_path / "parts", **config)
    for name in ("documents", "removed", "changed", "funnel.jsonl"):
        assert list_of(tmp_path / "parts" / name) == list_of(tmp_path / "whole" / name)
    key = lambda r: json.dumps({k: v for k, v in r.items() if k != "count"})  # noqa: E731
    assert sorted(map(key, repeats(tmp_path / "parts"))) == sorted(map(key, repeats(tmp_path / "whole")))


def list_of(path: Path) -> list[tuple[str, bytes]]:
    paths = [path] if path.is_file() else sorted(path.glob("*"))
    return [(p.name, p.read_bytes()) for p in paths]
