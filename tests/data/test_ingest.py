"""Sources: every format gives its documents, and what cannot be read is named, never dropped without a word."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from gristmill.data.arithmetic import Chain, draw_chain, generator, is_held_out, lesson, thought
from gristmill.data.documents import read_rows, shards, write_rows
from gristmill.data.ingest import IngestConfig, check_sources, fingerprint_sources, ingest
from gristmill.data.problems import ProblemsConfig, make_problems
from gristmill.data.sources import FilesSource
from gristmill.data.stage_types import silent

LINES = [json.dumps({"text": f"document number {i}", "other": i}) for i in range(5)]


def go(tmp_path: Path, source: dict, **config) -> tuple[dict, list[dict]]:
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    asked = IngestConfig.model_validate({"sources": [source], **config})
    check_sources(asked)
    metrics = ingest(asked, out, 0, workers=0, progress=silent)
    return metrics, [row for shard in shards(out) for row in read_rows(shard)]


def files(path: Path | str) -> dict:
    return {"type": "files", "name": "mine", "paths": [str(path)]}


def written(tmp_path: Path, form: str) -> Path:
    path = tmp_path / f"mine.{form}"
    data = ("\n".join(LINES) + "\n").encode()
    if form == "parquet":
        pq.write_table(pa.table({"text": [json.loads(line)["text"] for line in LINES]}), path)
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(data))
    elif form == "jsonl.zst":
        path.write_bytes(zstandard.compress(data))
    else:
        path.write_bytes(data)
    return path


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_rows_of_every_format(form: str, tmp_path: Path) -> None:
    metrics, rows = go(tmp_path, files(written(tmp_path, form)))
    assert [r["text"] for r in rows] == [json.loads(line)["text"] for line in LINES]
    assert len({r["id"] for r in rows}) == 5
    assert metrics["documents_by_source"] == {"mine": 5}
    known = {"source": "mine", "kind": "prose", "url": None, "date": None, "licence": None}
    assert rows[0]["metadata"] == {**known, "file": f"mine.{form}", "record": 1}


def test_text_files_and_patterns(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("b.txt", "a.md"):
        (tmp_path / "in" / name).write_text(f"text of {name}")
    _, rows = go(tmp_path, files(tmp_path / "in"))
    assert [r["text"] for r in rows] == ["text of a.md", "text of b.txt"]


def test_a_local_dataset(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(str(tmp_path / "set"))
    _, rows = go(tmp_path, {"type": "dataset", "name": "set", "dataset": str(tmp_path / "set")})
    assert [r["text"] for r in rows] == ["one", "two"]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "train.jsonl").write_text("\n".join(LINES))
    _, rows = go(tmp_path, {"type": "dataset", "name": "plain", "dataset": str(tmp_path / "plain")})
    assert len(rows) == 5


def test_files_on_s3(tmp_path: Path, s3: str) -> None:
    import fsspec

    with fsspec.open(f"{s3}/corpus/mine.jsonl.gz", "wb") as file:
        file.write(gzip.compress("\n".join(LINES).encode()))  # type: ignore[union-attr]
    source = files(f"{s3}/corpus/*.jsonl.gz")
    before = fingerprint_sources(IngestConfig.model_validate({"sources": [source]}))
    metrics, rows = go(tmp_path, source)
    assert metrics["documents_out"] == len(rows) == 5
    with fsspec.open(f"{s3}/corpus/mine.jsonl.gz", "wb") as file:
        file.write(gzip.compress("\n".join(LINES[1:]).encode()))  # type: ignore[union-attr]
    fsspec.filesystem("s3").invalidate_cache()
    assert fingerprint_sources(IngestConfig.model_validate({"sources": [source]})) != before


BAD = {
    "truncated gz": ("bad.jsonl.gz", gzip.compress("\n".join(LINES * 50).encode())[:-20], "cut short or damaged"),
    "truncated zst": ("bad.jsonl.zst", zstandard.compress("\n".join(LINES * 50).encode())[:-8], "cut short or damaged"),
    "invalid utf-8 line": ("bad.jsonl", LINES[0].encode() + b'\n{"text": "\xff\xfe"}\n', "record 2: invalid UTF-8"),
    "invalid utf-8 text": (
        "bad.txt",
        b"good line\nbad \xff line\n",
        "invalid UTF-8 .at byte 14 of the file, in its line 2",
    ),
    "no text": ("bad.jsonl", b'{"text": "fine"}\n{"body": "x"}\n', "record 2: no text field .no field 'text'"),
    "empty text": ("bad.jsonl", b'{"text": "fine"}\n{"text": "  "}\n', "record 2: no text"),
    "not json": ("bad.jsonl", b'{"text": "fine"}\nnot json\n', "record 2: not JSON"),
    "not parquet": ("bad.parquet", b"PAR1 and then nothing", "not a whole Parquet file"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_is_refused_with_file_and_line(case: str, tmp_path: Path) -> None:
    name, data, message = BAD[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as told:
        go(tmp_path, files(tmp_path / name))
    assert name in str(told.value)
    assert "quarantine" in str(told.value)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_is_set_aside_and_counted(case: str, tmp_path: Path) -> None:
    name, data, _ = BAD[case]
    (tmp_path / name).write_bytes(data)
    (tmp_path / "good.txt").write_text("a good document")
    source = {"type": "files", "name": "mine", "paths": [str(tmp_path / name), str(tmp_path / "good.txt")]}
    metrics, rows = go(tmp_path, source, on_bad="quarantine")
    assert metrics["quarantined"] == 1
    assert any(r["text"] == "a good document" for r in rows)
    set_aside = [json.loads(x) for f in (tmp_path / "out" / "quarantine").glob("*") for x in f.read_text().splitlines()]
    assert [Path(r["file"]).name for r in set_aside] == [name]
    assert set_aside[0]["record"] >= 1


def test_a_damaged_document_shard_is_named(tmp_path: Path) -> None:
    path = tmp_path / "00000.jsonl.zst"
    write_rows(path, [{"text": "x" * 1000, "id": str(i)} for i in range(100)])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"00000\.jsonl\.zst is not a whole document shard"):
        list(read_rows(path))


def test_contents_enter_the_fingerprint(tmp_path: Path) -> None:
    path = written(tmp_path, "jsonl")
    config = IngestConfig.model_validate({"sources": [files(path)]})
    before = fingerprint_sources(config)
    path.write_text(path.read_text().replace("number 3", "number x"))
    assert fingerprint_sources(config) != before


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"type": "files", "name": "a", "paths": ["/nowhere/x.txt"]}, "names no file"),
        ({"type": "dataset", "name": "a", "dataset": "owner/name"}, "has no revision"),
        ({"type": "dataset", "name": "a", "dataset": "nowhere"}, "is no folder and no hub name"),
    ],
)
def test_sources_that_cannot_be(source: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sources(IngestConfig.model_validate({"sources": [source]}))


def test_workers_change_no_byte_and_the_seed_does(tmp_path: Path, bytes_of) -> None:
    from gristmill.data.executor import close_cluster

    config = IngestConfig.model_validate(
        {
            "sources": [
                {"type": "lessons", "count": 5100},
                {"type": "stdlib", "max_documents": 20},
                files(written(tmp_path, "jsonl.zst")),
                files(written(tmp_path, "parquet")) | {"name": "other"},
            ]
        }
    )
    made = {}
    for name, workers, seed in (("none", 0, 0), ("two", 2, 0), ("other seed", 0, 1)):
        out = tmp_path / name
        out.mkdir()
        ingest(config, out, seed, workers=workers, progress=silent)
        made[name] = bytes_of(out)
    close_cluster()
    assert made["none"] == made["two"]
    assert made["none"] != made["other seed"]


def test_lessons_hold_no_test_chain_and_are_right() -> None:
    import re

    for index in range(300):
        text = lesson(0, index)
        for line in re.findall(r"^(\d+(?:[+-]\d+)+)=(\d+)$", text, flags=re.M):
            assert sum(int(n) for n in re.findall(r"[+-]?\d+", line[0])) == int(line[1])
        for asked in re.findall(r"(\d+(?:[+-]\d+)+)=\?", text):
            start, *steps = (int(n) for n in re.findall(r"[+-]?\d+", asked))
            assert not is_held_out(Chain(start, tuple(steps)))


def test_thoughts_by_style() -> None:
    chain = Chain(7, (5, -3, 9))
    assert thought(chain, "thorough") == "7+5=12\n12-3=9\n9+9=18"
    assert thought(chain, "hasty") == "7+5-3=9\n9+9=18"
    assert thought(chain, "guess") == ""
    drawn = draw_chain(generator(0, "x"), (4, 6), 9, held_out=True)
    assert is_held_out(drawn)
    assert all(0 <= s <= 99 for s in drawn.sums)


def test_problem_sets_share_no_question(tmp_path: Path) -> None:
    metrics = make_problems(ProblemsConfig(cold_start=400, train=400, test=60), tmp_path, 0, progress=silent)
    read = {
        n: [json.loads(x) for x in (tmp_path / f"{n}.jsonl").read_text().splitlines()]
        for n in ("cold_start", "train", "test")
    }
    tests = {r["question"] for r in read["test"]}
    assert len(tests) == 60
    assert not tests & {r["question"] for n in ("cold_start", "train") for r in read[n]}
    assert sum(metrics["styles"].values()) == 400
    assert all(r["answer"].endswith(f"#### {r['final']}") for r in read["cold_start"])


def test_problems_stopped_in_the_middle_end_in_the_same_bytes(tmp_path: Path) -> None:
    config = ProblemsConfig(cold_start=40, train=40, test=20)

    def stop(done: int, total: int, **_: float) -> None:
        raise KeyboardInterrupt

    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    with pytest.raises(KeyboardInterrupt):
        make_problems(config, tmp_path / "broken", 0, progress=stop)
    (tmp_path / "broken" / "train.jsonl").write_text("half a li")
    made = [make_problems(config, tmp_path / name, 0, progress=silent) for name in ("whole", "broken")]
    assert made[0] == made[1]
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "broken")]
    assert files[0] == files[1]


def test_gsm8k_files_take_their_place(tmp_path: Path, shared_data: Path) -> None:
    config = ProblemsConfig(
        family="gsm8k",
        cold_start=100,
        train=200,
        test=50,
        train_file=str(shared_data / "gsm8k" / "train.jsonl.gz"),
        test_file=str(shared_data / "gsm8k" / "test.jsonl.gz"),
    )
    metrics = make_problems(config, tmp_path, 0, progress=silent)
    assert (metrics["cold_start_problems"], metrics["train_problems"], metrics["test_problems"]) == (100, 200, 50)
    first = json.loads((tmp_path / "cold_start.jsonl").read_text().splitlines()[0])
    assert "<<" not in first["thought"]
    assert first["answer"].endswith(first["final"])


def test_a_bad_gsm8k_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"question": "a", "answer": "#### 1"}\n{"question": "b", "answer": "no mark"}\n')
    config = ProblemsConfig(family="gsm8k", train_file=str(tmp_path / "x.jsonl"), test_file=str(tmp_path / "x.jsonl"))
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2, is not a GSM8K row"):
        make_problems(config, tmp_path, 0, progress=silent)


def test_what_comes_or_goes_beside_a_file_changes_no_id(tmp_path: Path) -> None:
    """An id must name the same document tomorrow: takedowns and traces go by it."""
    for name in ("notes/deep/a.txt", "notes/b.txt", "more/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"the text of {name}")

    def names(*paths: str) -> set[str]:
        source = FilesSource(name="s", paths=[str(tmp_path / path) for path in paths])
        return {entry.name for entry in source.entries()}

    assert names("notes") == {"deep/a.txt", "b.txt"}
    assert names("notes", "more/*.txt") == {"deep/a.txt", "b.txt", "c.txt"}
    (tmp_path / "notes/b.txt").unlink()
    assert names("notes") == {"deep/a.txt"}
    assert names("notes/deep/a.txt") == {"a.txt"}
    (tmp_path / "more/a.txt").write_text("another")
    with pytest.raises(ValueError, match=r"both called 'a.txt' in it: name the folder above both"):
        names("notes/deep/a.txt", "more/*.txt")
