"""What is wrong with a record is said with file, record and reason; nothing is lost without a count, nothing is slow."""

from __future__ import annotations

import bz2
import gzip
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from gristmill.data.documents import read_rows, shards
from gristmill.data.ingest import IngestConfig, check_sources, ingest
from gristmill.data.sources.fields import iso_date
from gristmill.data.stage_types import silent

GOOD = [json.dumps({"text": f"good document {n}"}).encode() for n in range(60)]
LINES = b"\n".join(GOOD) + b"\n"


def go(
    tmp_path: Path, on_bad: str = "quarantine", config: dict | None = None, **source: Any
) -> tuple[dict, list[dict], list[dict]]:
    out = tmp_path / f"out-{on_bad}"
    out.mkdir(exist_ok=True)
    asked = {"type": "files", "name": "mine", "paths": [str(tmp_path / "in")], **source}
    sources = IngestConfig.model_validate({"sources": [asked], "on_bad": on_bad, **(config or {})})
    check_sources(sources)
    metrics = ingest(sources, out, 0, workers=0, progress=silent)
    bad = [json.loads(line) for f in sorted((out / "quarantine").glob("*")) for line in f.read_text().splitlines()]
    return metrics, [row for shard in shards(out) for row in read_rows(shard)], bad


def table(path: Path, **columns: Any) -> bytes:
    pq.write_table(pa.table(columns), path)
    return path.read_bytes()


def parquet_of(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def not_utf8() -> bytes:
    column = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0\4\0\0\0"), pa.py_buffer(b"ab\xffc")]
    )
    return parquet_of(text=column)


# file, its bytes, the record that is bad, the reason, and how many good documents it holds beside
CASES: dict[str, tuple[str, bytes, int, str, int]] = {
    "truncated gz": ("x.jsonl.gz", gzip.compress(LINES)[:-5], 61, "cut short or damaged", 60),
    "truncated bz2": ("x.jsonl.bz2", bz2.compress(LINES)[:-20], 1, "cut short or damaged", 0),
    "truncated zst": ("x.jsonl.zst", zstandard.compress(LINES)[:-3], 1, "cut short or damaged", 0),
    "truncated in the second member": (
        "x.jsonl.zst",
        zstandard.compress(LINES) + zstandard.compress(LINES)[:-3],
        61,
        "cut short or damaged",
        60,
    ),
    "no gz at all": ("x.jsonl.gz", b"plain words", 1, "cut short or damaged", 0),
    "damaged gz": (
        "x.jsonl.gz",
        gzip.compress(LINES, mtime=0)[:40] + b"\xff\xff\xff" + gzip.compress(LINES, mtime=0)[43:],
        1,
        "cut short or damaged",
        0,
    ),
    "truncated Parquet": ("x.parquet", parquet_of(text=["a", "b"])[:-9], 1, "not a whole Parquet file", 0),
    "empty Parquet": ("x.parquet", b"", 1, "not a whole Parquet file", 0),
    "no such column": ("x.parquet", parquet_of(body=["a"]), 1, "no text field", 0),
    "a column of numbers": ("x.parquet", parquet_of(text=[1, 2]), 1, "no text field", 0),
    "a null in a column": ("x.parquet", parquet_of(text=["a", None, "b"]), 2, "no text", 2),
    "invalid UTF-8 in Parquet": ("x.parquet", not_utf8(), 2, "invalid UTF-8", 2),
    "invalid UTF-8 in JSON": ("x.jsonl", GOOD[0] + b'\n{"text": "a\xff"}\n' + GOOD[1], 2, "invalid UTF-8", 2),
    "a lone surrogate": ("x.jsonl", GOOD[0] + b'\n{"text": "a\\ud83d"}\n', 2, "lone surrogate", 1),
    "a NUL in JSON": ("x.jsonl", GOOD[0] + b'\n{"text": "a\\u0000b"}\n', 2, "NUL character", 1),
    "a raw NUL in JSON": ("x.jsonl", GOOD[0] + b'\n{"text": "a\0b"}\n', 2, "not JSON", 1),
    "a NUL in text": ("x.txt", b"a\0b", 1, "NUL character", 0),
    "a hundred thousand brackets": ("x.jsonl", b"[" * 100_000 + b"\n" + GOOD[0], 1, "not JSON", 1),
    "a number of many digits": (
        "x.jsonl",
        b'{"text": "a", "n": NaN, "m": ' + b"1" * 5000 + b"}\n" + GOOD[0],
        1,
        "not JSON",
        1,
    ),
    "a list": ("x.jsonl", b'["text"]\n' + GOOD[0], 1, "no text field", 1),
    "an empty file": ("x.txt", b"", 1, "no text", 0),
    "an empty file of rows": ("x.jsonl", b"", 1, "no text", 0),
    "an empty gz": ("x.jsonl.gz", gzip.compress(b""), 1, "no text", 0),
    "a long line": ("x.jsonl", GOOD[0] + b'\n{"text": "' + b"a" * 9000 + b'"}\n' + GOOD[1], 2, "too large", 2),
    "a long text": ("x.txt", b"a" * 9000, 1, "too large", 0),
    "a long cell": ("x.parquet", parquet_of(text=["a", "b" * 9000, "c"]), 2, "too large", 2),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_records(case: str, tmp_path: Path) -> None:
    name, data, number, reason, good = CASES[case]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(data)
    (tmp_path / "in" / "zz.txt").write_text("a good document")
    bound = {"max_record_bytes": 8192} if reason == "too large" else {}
    metrics, rows, bad = go(tmp_path, config=bound)
    assert len(rows) == good + 1
    found = [(b["source"], b["file"], b["record"], b["reason"]) for b in bad]
    assert found == [("mine", name, number, reason)]
    assert bad[0]["detail"]
    assert metrics["quarantined_by_reason"] == {reason: 1}
    assert metrics["quarantined_by_source"] == {"mine": 1}
    shown = json.loads((tmp_path / "out-quarantine" / "samples.jsonl").read_text().splitlines()[-1])
    assert (shown["outcome"], shown["reason"], shown["id"]) == ("quarantined", reason, f"{name}#{bad[0]['record']}")
    with pytest.raises(ValueError, match=rf"{name}, record \d+: {reason} .*quarantine"):
        go(tmp_path, "refuse", config=bound)


def test_a_text_of_a_dataset_is_bounded_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    rows = [{"text": mark * 5000} for mark in ("a", "ä")]  # 5,000 characters each, the second of 10,000 bytes
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"type": "dataset", "name": "mine", "dataset": str(tmp_path / "set")}
    config = {"sources": [source], "on_bad": "quarantine", "max_record_bytes": 8192}
    (tmp_path / "out").mkdir()
    metrics = ingest(IngestConfig.model_validate(config), tmp_path / "out", 0, workers=0, progress=silent)
    assert metrics["documents_out"] == 1
    assert metrics["quarantined_by_reason"] == {"too large": 1}


def test_files_of_other_columns_in_one_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    table(tmp_path / "in" / "a.parquet", text=["one"], url=["https://a"])
    table(tmp_path / "in" / "b.parquet", id=[1, 2], text=pa.array(["two", "three"], pa.large_string()))
    table(tmp_path / "in" / "c.parquet", body=["lost?"], id=["x"])
    table(tmp_path / "in" / "d.parquet", text=pa.array(["four", "four"]).dictionary_encode(), url=[7, 8])
    metrics, rows, bad = go(tmp_path)
    assert [r["text"] for r in rows] == ["one", "two", "three", "four", "four"]
    assert [r["metadata"]["url"] for r in rows] == ["https://a", None, None, None, None]
    assert [(b["file"], b["reason"]) for b in bad] == [("c.parquet", "no text field")]
    assert "there are: body, id" in bad[0]["detail"]
    assert metrics["quarantined"] == 1


def test_what_is_known_of_a_row(tmp_path: Path) -> None:
    import datetime

    (tmp_path / "in").mkdir()
    rows = [
        {"text": "a", "link": "https://a.org", "when": 0, "terms": "MIT", "lang": "en", "score": 0.5, "other": [1]},
        {"text": "b", "metadata": {"link": "https://b.org", "when": "Tue, 02 Jan 2024 03:04:05 +0000"}},
        {"text": "c", "link": "x" * 10_000, "when": "soon", "terms": ["CC0-1.0", "MIT"]},
    ]
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stamps = pa.array([datetime.datetime(2020, 5, 6, tzinfo=datetime.UTC)], pa.timestamp("us", "UTC"))
    table(tmp_path / "in" / "b.parquet", text=["d"], when=stamps)
    fields = {
        "url_field": "link",
        "date_field": "when",
        "licence_field": "terms",
        "keep_fields": ["lang", "score", "other"],
    }
    _, found, _ = go(tmp_path, licence="CC-BY-4.0", **fields)
    known = [(r["metadata"]["url"], r["metadata"]["date"], r["metadata"]["licence"]) for r in found]
    assert known == [
        ("https://a.org", "1970-01-01T00:00:00+00:00", "MIT"),
        ("https://b.org", "2024-01-02T03:04:05+00:00", "CC-BY-4.0"),
        (None, None, "CC0-1.0"),
        (None, "2020-05-06T00:00:00+00:00", "CC-BY-4.0"),
    ]
    assert {k: v for k, v in found[0]["metadata"].items() if k in ("lang", "score", "other")} == {
        "lang": "en",
        "score": 0.5,
    }
    assert iso_date(True) is None
    assert iso_date(1e300) is None
    assert iso_date("2024-02-30") is None


def test_ids_of_the_rows_own(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(
        '{"text": "a", "id": "one"}\n{"text": "b", "id": 2}\n{"text": "c", "id": 2}\n'
    )
    with pytest.raises(
        ValueError, match=r"a\.jsonl, record 3: duplicate id .*'mine/2' is that of record 2 of a\.jsonl"
    ):
        go(tmp_path, "refuse", id_field="id")
    (tmp_path / "in" / "b.jsonl").write_text('{"text": "d", "id": "one"}\n{"text": "e"}\n{"text": "f", "id": "3"}\n')
    metrics, rows, bad = go(tmp_path, id_field="id", config={"documents_per_shard": 2})
    assert [(r["id"], r["text"]) for r in rows] == [("mine/one", "a"), ("mine/2", "b"), ("mine/3", "f")]
    assert [
        (b["file"], b["record"], b["reason"], b["detail"]) for b in sorted(bad, key=lambda b: (b["file"], b["record"]))
    ] == [
        ("a.jsonl", 3, "duplicate id", "its id 'mine/2' is that of record 2 of a.jsonl"),
        ("b.jsonl", 1, "duplicate id", "its id 'mine/one' is that of record 1 of a.jsonl"),
        ("b.jsonl", 2, "no id", "field 'id' holds no short text or whole number"),
    ]
    assert metrics["quarantined_by_reason"] == {"duplicate id": 2, "no id": 1}
    assert metrics["documents_out"] == 3
    assert metrics["bytes_out"] == 3


def test_repeats_are_those_of_a_plain_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several passes over many ids find what one dictionary finds."""
    import random

    from gristmill.data import unique_ids

    monkeypatch.setattr(unique_ids, "AT_ONCE", 100)
    draw = random.Random(0)
    ids = [draw.randrange(700) for _ in range(1000)]
    (tmp_path / "in").mkdir()
    for part in range(4):
        rows = [{"text": f"{n}", "id": ids[n]} for n in range(part * 250, part * 250 + 250)]
        (tmp_path / "in" / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    metrics, rows, _ = go(tmp_path, id_field="id", config={"documents_per_shard": 60})
    first: dict[int, str] = {}
    for n, identifier in enumerate(ids):
        first.setdefault(identifier, str(n))
    assert [r["text"] for r in rows] == sorted(first.values(), key=int)
    assert metrics["quarantined"] == 1000 - len(first)


def test_a_line_of_fifty_megabytes_is_kept_and_quick(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    size = 50 << 20
    (tmp_path / "in" / "a.txt").write_text("word " * (size // 5))
    with (tmp_path / "in" / "b.jsonl").open("w") as file:
        file.write('{"text": "' + "word " * (size // 5) + '"}\n')
    started = time.process_time()
    metrics, _, _ = go(tmp_path)
    assert metrics["documents_out"] == 2
    assert metrics["bytes_out"] == 2 * 5 * (size // 5)
    assert time.process_time() - started < 10  # about 1 s; a quadratic reader would take hours


MEMORY = """
import sys
from pathlib import Path
from gristmill.data.ingest import IngestConfig, ingest
from gristmill.data.stage_types import silent
out = Path(sys.argv[2])
out.mkdir()
source = {"type": "files", "name": "mine", "paths": [sys.argv[1]]}
config = IngestConfig.model_validate({"sources": [source], "on_bad": "quarantine"})
metrics = ingest(config, out, 0, workers=0, progress=silent)
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(metrics["documents_out"], metrics["quarantined_by_reason"], int(peak) >> 10)
"""


def measured(path: Path, out: Path) -> list[str]:
    command = [sys.executable, "-P", "-c", MEMORY, str(path), str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.rsplit(maxsplit=1)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_a_line_of_two_hundred_megabytes_is_never_held(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    piece, pieces = b"words and " * 100_000, 200
    opened: dict[str, Any] = {"jsonl": open, "jsonl.gz": gzip.open, "jsonl.zst": zstandard.open}
    with opened[ending](path, "wb") as file:
        file.write(GOOD[0] + b'\n{"text": "')
        for _ in range(pieces):
            file.write(piece)
        file.write(b'"}\n' + GOOD[1] + b"\n")
    said, peak = measured(path, tmp_path / "out")
    assert said == "2 {'too large': 1}"
    assert int(peak) < 400  # MiB; the interpreter with Arrow and fsspec takes 120, the bound 64, joined once


@pytest.mark.slow
def test_the_largest_record_stays_below_a_worker_s_memory(tmp_path: Path) -> None:
    """The costliest text of the default bound: one character outside the first plane makes each take four bytes."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write('{"text": "\U0001f600'.encode() + b"a" * ((64 << 20) - 100) + b'"}\n' + b"{\n")
    said, peak = measured(path, tmp_path / "out")
    assert said == "1 {'not JSON': 1}"
    assert int(peak) < 1024


def test_a_network_that_fails_is_no_damaged_file() -> None:
    import io

    from gristmill.data.sources import Cursor, FilesSource
    from gristmill.data.sources.records import parquet_rows

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() < 100:
                raise ConnectionResetError("the other side hung up")
            return super().read(size)

    data = parquet_of(text=[f"text {n} " * 50 for n in range(1000)])
    source = FilesSource(name="mine", paths=["x"])
    with pytest.raises(ConnectionResetError):
        list(parquet_rows(Failing(data), source, Cursor(), 1 << 20))
