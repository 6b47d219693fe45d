"""Spans against brute force over all windows; planted ones in real corpora; the same bytes whoever works."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import regex
from pydantic import ValidationError

from gristmill.data.documents import read_rows, shards, write_rows
from gristmill.data.executor import close_cluster, cluster_client
from gristmill.data.sieve import Edit, edited
from gristmill.data.spans import SpansConfig, remove_spans
from gristmill.data.spans.tokens import Tokeniser
from gristmill.data.stage_types import silent

ALONE = (
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tai_Le}\p{New_Tai_Lue}"
    r"\p{Tai_Tham}\p{Tai_Viet}\p{Javanese}\p{Balinese}]"
)
EXTEND = r"[[\p{M}\p{Cf}]--[\s\u200b\ufeff]]"
LETTER = rf"[[\p{{L}}\p{{N}}\p{{Pc}}]--{ALONE}--[\p{{M}}\p{{Cf}}]]"
SYMBOL = rf"[^\p{{L}}\p{{N}}\p{{Pc}}\p{{M}}\p{{Cf}}\s{ALONE[1:-1]}]"
TOKEN = regex.compile(rf"(?:{LETTER}|{EXTEND})+|({SYMBOL})\1*{EXTEND}*|{ALONE}{EXTEND}*", regex.V1)


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


def test_small_tables_runs_and_pieces_change_no_byte(tmp_path: Path, laid_out, monkeypatch) -> None:
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


@pytest.fixture(scope="session")
def corpora(shared_data: Path) -> dict[str, list[str]]:
    """Texts of the shared corpora by name."""
    found = {}
    for name in ("peps", "wikitext2", "udhr"):
        with gzip.open(shared_data / "corpus" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            found[name] = [json.loads(line)["text"] for line in file]
    return found


def test_tokens_are_those_of_the_definition_in_every_script(corpora, monkeypatch) -> None:
    tokeniser = Tokeniser()
    texts = [t[:3000] for t in corpora["udhr"]]
    for text in [
        *texts,
        "e\u0301 \u0301x ——— -- -\u0301- 👩\u200d🔬 __init__ \x00\x00 \ud800 ก็ x\u200by\ufeffz 𠀀𠀀 か\u3099",
    ]:
        found = [
            (text[p.at + a : p.at + b], p.at + a, p.at + b)
            for p in tokeniser.pieces(text)
            for a, b in zip(p.starts.tolist(), p.ends.tolist(), strict=True)
        ]
        assert found == tokens_of(text)


def test_pieces_and_long_words(monkeypatch) -> None:
    text = "a" * 5000 + " " * 9000 + "-" * 2500 + "b c" * 3000
    whole = [(int(a), int(b)) for p in Tokeniser().pieces(text) for a, b in zip(p.starts, p.ends, strict=True)]
    assert whole[:5] == [(0, 1024), (1024, 2048), (2048, 3072), (3072, 4096), (4096, 5000)]
    assert whole[5:8] == [(14000, 15024), (15024, 16048), (16048, 16500)]
    monkeypatch.setattr("gristmill.data.spans.tokens.PIECE", 2048)
    tokeniser = Tokeniser()
    cut = [
        (p.at + int(a), p.at + int(b)) for p in tokeniser.pieces(text) for a, b in zip(p.starts, p.ends, strict=True)
    ]
    assert cut == whole
    assert tokeniser.locate(text, [(0, 6), (5, 8), (7, 7 + 1000)]) == [
        (0, 15024),
        (14000, 16500),
        (16048, whole[1006][1]),
    ]
    assert tokeniser.digest(text, 0, len(text)) == tokeniser.digest(text.replace(" " * 9000, "\n"), 0, len(text) - 8999)
    assert tokeniser.digest("ab", 0, 2) != tokeniser.digest("a b", 0, 3)


def test_real_corpora_against_brute_force(tmp_path: Path, corpora, laid_out) -> None:
    texts = [*corpora["peps"][-60:], *(t[:1200] for t in corpora["udhr"][::3]), *corpora["wikitext2"][:15]]
    laid_out(tmp_path / "in", rows_of(texts), 200)
    run(tmp_path / "in", tmp_path / "out", substring={"tokens": 50, "within_documents": True}, least_characters_left=0)
    expected = brute_force(texts, 50, True)
    assert sum(map(bool, expected)) > 10
    assert list(results(tmp_path / "out").values()) == [without(t, e) for t, e in zip(texts, expected, strict=True)]


def without_repeats(folder: Path, laid_out, texts: list[str], config: dict) -> list[str]:
    """What is left of texts when nothing in them repeats any more."""
    for turn in range(10):
        laid_out(folder / f"{turn}", rows_of(texts), 200)
        metrics = run(folder / f"{turn}", folder / f"{turn}.out", **config)
        texts = list(results(folder / f"{turn}.out").values())
        if not metrics["changed"]:
            return texts
    raise AssertionError("repeats do not end")


def planted(texts: list[str], spans: int, least: int, seed: int) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """Spans of earlier documents put between words of later ones, apart from each other, and where they lie there.

    The tokens beside a span differ from those beside its original, else the repeat would be longer than what was put.
    """
    rng = random.Random(seed)
    tokens = [tokens_of(t) for t in texts]
    where: list[dict[int, str]] = [{} for _ in texts]
    long = [d for d, t in enumerate(tokens) if len(t) > 400]
    put = 0
    while put < spans:
        source, target = sorted(rng.sample(long, 2))
        if source % 2 or not target % 2:  # an original that another span is put into would be one no more
            continue
        size = rng.randint(least, 3 * least)
        a = rng.randrange(1, len(tokens[source]) - size - 1)
        at = rng.randrange(1, len(tokens[target]) // 100) * 100
        before, after = tokens[source][a - 1][0], tokens[source][a + size][0]
        beside = tokens[target][at - 1], tokens[target][at]
        apart = beside[0][2] < beside[1][1]
        if not apart or beside[1][1] in where[target] or before == beside[0][0] or after == beside[1][0]:
            continue
        where[target][beside[1][1]] = texts[source][tokens[source][a][1] : tokens[source][a + size - 1][2]]
        put += 1
    found, made = [], []
    for text, own in zip(texts, where, strict=True):
        parts, spans_here, last, size = [], [], 0, 0
        for at, span in sorted(own.items()):
            parts += [text[last:at], span, " "]
            size += at - last
            spans_here.append((size, size + len(span)))
            size, last = size + len(span) + 1, at
        made.append("".join([*parts, text[last:]]))
        found.append(spans_here)
    return made, found


def test_all_planted_spans_are_found_and_no_byte_else(tmp_path: Path, corpora, laid_out) -> None:
    config = {"least_characters_left": 0}
    texts = without_repeats(tmp_path, laid_out, [*corpora["peps"][::8], *corpora["wikitext2"]], config)
    texts, expected = planted(texts, 300, 50, seed=3)
    laid_out(tmp_path / "in", rows_of(texts), 90)
    metrics = run(tmp_path / "in", tmp_path / "out", **config)
    assert list(results(tmp_path / "out").values()) == [without(t, e) for t, e in zip(texts, expected, strict=True)]
    changes = {r["id"]: r["edits"] for s in shards(tmp_path / "out", "changed") for r in read_rows(s)}
    for i, spans in enumerate(expected):
        assert [(e["start"], e["end"], e["reason"]) for e in changes.get(f"d{i}", [])] == [
            (*s, "substring") for s in spans
        ]
    assert metrics["substrings"] >= 300  # an original that repeats in its own document makes two links of one span
    assert len((tmp_path / "out" / "repeats.jsonl").read_text().splitlines()) == 20


def test_colliding_hashes_remove_nothing(tmp_path: Path, laid_out, monkeypatch) -> None:
    """With hashes of a window's last token alone nearly all windows collide: what then goes is what is the same."""
    monkeypatch.setattr("gristmill.data.spans.substring.BASES", (0, 0))
    texts = stitched(5, 60, "abcdefgh", 60)
    laid_out(tmp_path / "in", rows_of(texts), 20)
    metrics = run(tmp_path / "in", tmp_path / "out", substring={"tokens": 10}, least_characters_left=0)
    assert metrics["collisions"] > 100
    for (name, left), text, true in zip(
        results(tmp_path / "out").items(), texts, brute_force(texts, 10, False), strict=True
    ):
        edits = [
            e for s in shards(tmp_path / "out", "changed") for r in read_rows(s) if r["id"] == name for e in r["edits"]
        ]
        assert all(any(a <= e["start"] and e["end"] <= b for a, b in true) for e in edits)
        assert left == edited(text, [Edit(**e) for e in edits])


def kill_or_stop(monkeypatch, documents: Path, out: Path, after: int, **config) -> bool:
    """Run until `after` tasks are done; whether there were so many."""

    class Stop(Exception):
        pass

    def stopping(done: int, total: int, **_: float) -> None:
        if done >= after:
            raise Stop

    out.mkdir()
    try:
        remove_spans(SpansConfig(**config), documents, out, workers=0, progress=stopping)
    except Stop:
        return True
    return False


def test_taken_up_after_any_task(tmp_path: Path, laid_out, bytes_of, monkeypatch) -> None:
    config = {"lines": {"unit": "line", "least_characters": 8}, "substring": {"tokens": 10}}
    laid_out(tmp_path / "in", rows_of(stitched(1, 40, "abcde", 50)), 14)
    run(tmp_path / "in", tmp_path / "whole", **config)
    after = 1
    while kill_or_stop(monkeypatch, tmp_path / "in", tmp_path / f"{after}", after, **config):
        run(tmp_path / "in", tmp_path / f"{after}", **config)
        assert bytes_of(tmp_path / f"{after}") == bytes_of(tmp_path / "whole"), after
        after += 1
    assert after > 25


def test_stopped_while_its_work_is_removed(tmp_path: Path, laid_out, bytes_of, monkeypatch) -> None:
    """Half of the work is gone, and what is left must not pass for what is done."""
    config = {"lines": {"unit": "line", "least_characters": 8}, "substring": {"tokens": 10}}
    laid_out(tmp_path / "in", rows_of(stitched(1, 40, "abcde", 50)), 14)
    run(tmp_path / "in", tmp_path / "whole", **config)

    class Stop(BaseException):
        pass

    def half(folder: Path, ignore_errors: bool = False) -> None:
        found = sorted(p for p in folder.rglob("*") if p.is_file())
        for path in found[1::2]:
            path.unlink()
        if found:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(Stop):
            run(tmp_path / "in", tmp_path / "out", **config)
    run(tmp_path / "in", tmp_path / "out", **config)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_workers_and_a_killed_one_change_no_byte(tmp_path: Path, laid_out, bytes_of) -> None:
    config = {"lines": {"unit": "line", "least_characters": 8}, "substring": {"tokens": 10}}
    laid_out(tmp_path / "in", rows_of([t for k in range(8) for t in stitched(k, 40, "abcde", 50)]), 80)
    run(tmp_path / "in", tmp_path / "0", 0, **config)
    run(tmp_path / "in", tmp_path / "1", 1, **config)
    victim = next(iter(cluster_client(2).run(os.getpid).values()))
    killer = threading.Thread(target=kill_when, args=(tmp_path / "2" / "work" / "anchors" / "answered", victim))
    killer.start()
    run(tmp_path / "in", tmp_path / "2", 2, **config)
    killer.join()
    close_cluster()
    assert bytes_of(tmp_path / "0") == bytes_of(tmp_path / "1") == bytes_of(tmp_path / "2")


def kill_when(folder: Path, pid: int) -> None:
    while not any(folder.glob("*.npy")):
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)


def test_documents_without_text_and_without_much_left(tmp_path: Path, laid_out) -> None:
    first = " ".join(f"word{i}" for i in range(60))
    texts = ["", first, " \n\t", first, f"And so: {first}\n", f"{first} with much that nobody has said before", "short"]
    laid_out(tmp_path / "in", rows_of(texts), 3)
    metrics = run(tmp_path / "in", tmp_path / "out")
    assert results(tmp_path / "out") == {
        "d0": "", "d1": first, "d2": " \n\t", "d5": " with much that nobody has said before", "d6": "short",
    }  # fmt: skip
    removed = [r for s in shards(tmp_path / "out", "removed") for r in read_rows(s)]
    assert [(r["id"], r["text"], r["reason"]) for r in removed] == [
        ("d3", texts[3], "spans: too little left"),
        ("d4", texts[4], "spans: too little left"),
    ]
    assert removed[1]["because"] == {
        "detail": f"7 characters are left of {len(texts[4])}", "duplicate_of": "d1", "spans": [[8, 8 + len(first)]],
    }  # fmt: skip
    assert metrics["documents_out"] == 5
    assert metrics["removed_by_reason"] == {"spans: too little left": 2}


def test_an_empty_corpus_and_an_empty_shard(tmp_path: Path, laid_out) -> None:
    lines = {"unit": "line"}
    (tmp_path / "none" / "documents").mkdir(parents=True)
    assert run(tmp_path / "none", tmp_path / "out0", lines=lines)["documents_in"] == 0
    write_rows(tmp_path / "empty" / "documents" / "00000.jsonl.zst", [])
    assert run(tmp_path / "empty", tmp_path / "out1", lines=lines)["documents_in"] == 0
    assert [s.name for s in shards(tmp_path / "out1")] == ["00000.jsonl.zst"]


def test_other_kinds_pass_whole_and_count_for_nothing(tmp_path: Path, laid_out) -> None:
    text = " ".join(f"word{i}" for i in range(80))
    rows = [*rows_of([text, text], "lessons"), *rows_of([text], "code"), *rows_of([text], "prose")]
    for i, row in enumerate(rows):
        row["id"] = f"d{i}"
    laid_out(tmp_path / "in", rows)
    run(tmp_path / "in", tmp_path / "out", lines={"unit": "paragraph"})
    assert list(results(tmp_path / "out")) == ["d0", "d1", "d2"]
    run(tmp_path / "in", tmp_path / "all", kinds=["prose", "code", "lessons"])
    assert list(results(tmp_path / "all")) == ["d0"]


def test_a_document_of_one_long_line(tmp_path: Path, laid_out) -> None:
    """Four megabytes without a line break, among them a span that stands there twice and in another document."""
    rng = np.random.default_rng(0)
    words = [f"{w:x}" for w in rng.integers(0, 1 << 40, 400_000)]
    span = [f"span{i}" for i in range(70)]
    giant = " ".join([*words[:300_000], *span, *words[300_000:], *span])
    texts = [giant, "before " + " ".join(span) + " and much that is after it", giant[-2_000_000:]]
    laid_out(tmp_path / "in", rows_of(texts), 2)
    run(tmp_path / "in", tmp_path / "out", substring={"within_documents": True})
    assert results(tmp_path / "out") == {"d0": giant[: -len(" ".join(span))], "d1": "before  and much that is after it"}


def test_a_damaged_shard_is_named(tmp_path: Path, laid_out) -> None:
    laid_out(tmp_path / "in", rows_of(["some text"] * 50))
    shard = shards(tmp_path / "in")[0]
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"00000\.jsonl\.zst is not a whole document shard"):
        run(tmp_path / "in", tmp_path / "out")


def test_a_stage_without_work_is_refused() -> None:
    with pytest.raises(ValidationError, match="neither lines nor substring"):
        SpansConfig(substring=None)


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path, laid_out, bytes_of) -> None:
    """The whole process killed with signal 9 at random moments, until one attempt gets through."""
    config = {"lines": {"unit": "line", "least_characters": 8}, "substring": {"tokens": 20}}
    laid_out(tmp_path / "in", rows_of([t for k in range(40) for t in stitched(k, 40, "abcdefgh", 120)]), 100)
    run(tmp_path / "in", tmp_path / "whole", **config)
    script = tmp_path / "attempt.py"
    script.write_text(
        "import json, sys\nfrom pathlib import Path\nfrom gristmill.data.spans import SpansConfig, remove_spans\n"
        "from gristmill.data.stage_types import silent\n"
        "config = SpansConfig.model_validate_json(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "remove_spans(config, Path(sys.argv[2]), Path(sys.argv[3]), workers=0, progress=silent)\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-P", str(script), json.dumps(config), str(tmp_path / "in"), str(out)]
    rng, kills = random.Random(0), 0
    while True:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as attempt:
            assert attempt.stdout is not None
            assert attempt.stdout.readline() == "ready\n"
            try:
                attempt.wait(rng.uniform(0.0, 0.3) if kills < 20 else None)
            except subprocess.TimeoutExpired:
                attempt.kill()
                kills += 1
        if attempt.returncode == 0:
            break
        assert attempt.returncode == -signal.SIGKILL
    assert kills >= 5
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
