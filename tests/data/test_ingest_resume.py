"""A stopped ingest goes on at the record behind its last shard, on a disk, S3 and a web server, to the same bytes."""

from __future__ import annotations

import bz2
import gzip
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from gristmill.data import intake
from gristmill.data.documents import id_hash, read_rows, shards
from gristmill.data.ingest import IngestConfig, ingest
from gristmill.data.stage_types import silent

COUNT, A_SHARD = 23, 5


class Stopped(BaseException):
    """As a kill: nothing catches it."""


def go(out: Path, source: dict, **config: Any) -> dict:
    out.mkdir(exist_ok=True)
    asked = {"sources": [source], "documents_per_shard": A_SHARD, "on_bad": "quarantine", **config}
    return ingest(IngestConfig.model_validate(asked), out, 0, workers=0, progress=silent)


def texts() -> list[str]:
    return [f"document {n} " + "word " * (n % 7) for n in range(COUNT)]


def lines() -> bytes:
    rows = [json.dumps({"text": text}) for text in texts()]
    return ("\n".join([*rows[:7], "{bad", *rows[7:]]) + "\n").encode()


def warc() -> list[bytes]:
    made = []
    for text in texts():
        body = f"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n{text}".encode()
        head = f"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        made.append(head + body + b"\r\n\r\n")
    return made


def lying_warc() -> bytes:
    """Between the records, some whose length is wrong by little or much."""
    made = warc()
    wrong = [
        m.replace(b"Content-Length: ", b"Content-Length: " + more)
        for m, more in zip(made[:3], (b"1", b"2", b"30"), strict=True)
    ]
    return b"".join([*made[:4], wrong[0], *made[4:11], wrong[1], wrong[2], *made[11:]])


def wiki() -> bytes:
    pages = "".join(
        f"<page><title>T{n}</title><ns>0</ns><id>{n}</id><revision><text>{text}</text></revision></page>"
        for n, text in enumerate(texts())
    )
    return f"<mediawiki><siteinfo><base>https://w/x</base></siteinfo>{pages}</mediawiki>".encode()


def parquet(path: Path) -> None:
    pq.write_table(pa.table({"text": texts()}), path, row_group_size=4)


def dataset(path: Path) -> None:
    path.mkdir()
    (path / "train.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts()))


def saved(path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"text": texts()}).save_to_disk(str(path))


def tree(path: Path) -> None:
    path.mkdir()
    for n, text in enumerate(texts()):
        (path / f"{n:02d}.py").write_text(f"# {text}")


def written(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


half = len(lines()) // 2
FORMS: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "jsonl": ("files", "a.jsonl", written(lines())),
    "jsonl.gz": ("files", "a.jsonl.gz", written(gzip.compress(lines()))),
    "jsonl.gz of members": (
        "files",
        "a.jsonl.gz",
        written(gzip.compress(lines()[:half]) + gzip.compress(lines()[half:])),
    ),
    "jsonl.zst": ("files", "a.jsonl.zst", written(zstandard.compress(lines()))),
    "jsonl.bz2": ("files", "a.jsonl.bz2", written(bz2.compress(lines()))),
    "parquet": ("files", "a.parquet", parquet),
    "warc": ("warc", "a.warc", written(b"".join(warc()))),
    "warc with wrong lengths": ("warc", "a.warc", written(lying_warc())),
    "warc.gz": ("warc", "a.warc.gz", written(b"".join(map(gzip.compress, warc())))),
    "dump": ("dump", "a.xml.bz2", written(bz2.compress(wiki()))),
    "tree": ("tree", "tree", tree),
    "streamed dataset": ("dataset", "set", dataset),
    "saved dataset": ("dataset", "saved", saved),
}


def source_of(form: str, folder: Path) -> dict:
    kind, name, make = FORMS[form]
    make(folder / name)
    place = {"dataset": str(folder / name)} if kind == "dataset" else {"paths": [str(folder / name)]}
    return {"type": kind, "name": "mine", **place}


def stop_after(monkeypatch: pytest.MonkeyPatch, done: int, rows: int = 2) -> dict[str, int]:
    """Let the intake fall over some rows into the shard behind the first `done`; counts the rows that are written."""
    counted = {"rows": 0, "left": done * A_SHARD + rows}
    write = intake._Shard.write

    def watched(self: Any, row: dict) -> None:
        counted["rows"] += 1
        if counted["rows"] > counted["left"]:
            raise Stopped
        write(self, row)

    monkeypatch.setattr(intake._Shard, "write", watched)
    return counted


@pytest.mark.parametrize("form", FORMS)
def test_a_stop_at_any_shard_ends_in_the_same_bytes(
    form: str, tmp_path: Path, bytes_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(form, tmp_path)
    whole = go(tmp_path / "whole", source)
    assert whole["documents_out"] == COUNT
    for done in (0, 2, 4):
        out = tmp_path / f"stopped{done}"
        with monkeypatch.context() as patch:
            stop_after(patch, done)
            with pytest.raises(Stopped):
                go(out, source)
        with monkeypatch.context() as patch:
            counted = stop_after(patch, 100)
            assert go(out, source) == whole
        assert counted["rows"] == COUNT - done * A_SHARD  # what was finished is not done again
        assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_a_stop_while_shards_are_moved_ends_in_the_same_bytes(
    tmp_path: Path, bytes_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    source = source_of("jsonl", tmp_path) | {"id_field": None}
    whole = go(tmp_path / "whole", source)
    replace, unlink = os.replace, Path.unlink
    for stop in range(1, 30):
        calls = {"n": 0}

        def counting(work: Callable[..., Any], calls: dict[str, int], stop: int, *args: Any, **more: Any) -> Any:
            calls["n"] += 1
            if calls["n"] == stop:
                raise Stopped
            return work(*args, **more)

        out = tmp_path / f"o{stop}"
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", partial(counting, replace, calls, stop))
            patch.setattr(
                Path, "unlink", lambda self, missing_ok=False, c=calls, s=stop: counting(unlink, c, s, self, missing_ok)
            )
            try:
                go(out, source)
            except Stopped:
                assert calls["n"] >= stop
        if (out / "work").exists():
            assert go(out, source) == whole
        assert bytes_of(out) == bytes_of(tmp_path / "whole"), stop


def test_the_index_of_ids_fits_the_rows(tmp_path: Path) -> None:
    go(tmp_path / "out", source_of("jsonl.zst", tmp_path))
    for shard in shards(tmp_path / "out"):
        held = np.fromfile(tmp_path / "out" / "ids" / shard.name.replace(".jsonl.zst", ".ids"), dtype="<u8")
        assert held.tolist() == [id_hash(row["id"]) for row in read_rows(shard)]


def test_documents_taken_down_stay_away_and_move_no_other(tmp_path: Path) -> None:
    rows = [{"text": t, "url": f"http://www.Example.org/{n}/"} for n, t in enumerate(texts())]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"type": "files", "name": "mine", "paths": [str(tmp_path / "a.jsonl")], "max_documents": 20}
    go(tmp_path / "before", source)
    (tmp_path / "after").mkdir()
    gone = {"ids": [f"mine/a.jsonl#{n}" for n in range(6, 11)], "urls": ["https://example.org/11"]}
    (tmp_path / "after" / "tombstones.json").write_text(json.dumps(gone))
    metrics = go(tmp_path / "after", source)
    assert metrics["taken_down"] == 6
    assert metrics["documents_out"] == 14
    before = {s.name: s.read_bytes() for s in shards(tmp_path / "before")}
    after = {s.name: s.read_bytes() for s in shards(tmp_path / "after")}
    assert sorted(after) == ["00000.jsonl.zst", "00002.jsonl.zst", "00003.jsonl.zst"]  # the second has no document left
    assert after["00000.jsonl.zst"] == before["00000.jsonl.zst"]
    assert after["00003.jsonl.zst"] == before["00003.jsonl.zst"]
    ids = [r["id"] for s in shards(tmp_path / "after") for r in read_rows(s)]
    assert ids == [f"mine/a.jsonl#{n}" for n in range(1, 21) if n not in (6, 7, 8, 9, 10, 12)]


# ---------------------------------------------------------------------------------------------------- other machines


def put(address: str, data: bytes) -> None:
    import fsspec

    with fsspec.open(address, "wb") as file:
        file.write(data)  # type: ignore[union-attr]


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "warc.gz"])
def test_a_stop_on_s3(form: str, s3: str, tmp_path: Path, bytes_of, monkeypatch: pytest.MonkeyPatch) -> None:
    local = source_of(form, tmp_path)
    name = Path(local["paths"][0]).name
    put(f"{s3}/in/{name}", Path(local["paths"][0]).read_bytes())
    source = local | {"paths": [f"{s3}/in/{name}"]}
    whole = go(tmp_path / "whole", local)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            go(tmp_path / "out", source)
    counted = stop_after(monkeypatch, 100)
    assert go(tmp_path / "out", source) == whole
    assert counted["rows"] == COUNT - 2 * A_SHARD
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_an_object_that_changes_between_two_ranges_is_refused(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same size, other bytes: the second range is asked for under the first one's etag."""
    from gristmill.data.sources import storage

    monkeypatch.setattr(storage, "FETCHED", 1 << 16)
    rows = [json.dumps({"text": f"{n:06d} " + "x" * 500}) for n in range(3000)]
    data = "\n".join(rows).encode()
    put(f"{s3}/in/a.jsonl", data)
    write = intake._Shard.write
    seen = {"n": 0}

    def changing(self: Any, row: dict) -> None:
        seen["n"] += 1
        if seen["n"] == 10:
            put(f"{s3}/in/a.jsonl", data.replace(b"x", b"y"))
        write(self, row)

    monkeypatch.setattr(intake._Shard, "write", changing)
    source = {"type": "files", "name": "mine", "paths": [f"{s3}/in/a.jsonl"]}
    with pytest.raises(ValueError, match=r"in/a\.jsonl changed while it was read: run again when it is at rest"):
        go(tmp_path / "out", source, on_bad="refuse")
    assert 10 <= seen["n"] < 3000


class Handler(http.server.SimpleHTTPRequestHandler):
    """A web server with etags, and with ranges if `ranges` is set; `before` is called before each answer."""

    ranges = True
    before: Callable[[], None] = staticmethod(lambda: None)
    asked: list[str]

    def log_message(self, *args: object) -> None:
        """Not a word."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        type(self).before()
        path = Path(self.translate_path(self.path.partition("?")[0]))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        etag = f'"{hash(data) & 0xFFFFFFFF:x}"'
        if self.headers.get("If-Match", etag) != etag:
            self.send_error(412)
            return
        asked = self.headers.get("Range")
        type(self).asked.append(asked or "")
        first = 0
        if asked and self.ranges:
            first, last = (int(x or len(data)) for x in asked.removeprefix("bytes=").split("-"))
            total = len(data)
            data = data[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes" if self.ranges else "none")
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def web(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path, type[Handler]]]:
    """A web server of our own on a free loopback port: its address, its folder and its handler."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = type("Own", (Handler,), {"ranges": request.param, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder, handler
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz"])
def test_a_stop_on_a_web_server(form: str, web, tmp_path: Path, bytes_of, monkeypatch: pytest.MonkeyPatch) -> None:
    address, folder, _ = web
    local = source_of(form, tmp_path)
    name = Path(local["paths"][0]).name
    (folder / name).write_bytes(Path(local["paths"][0]).read_bytes())
    source = local | {"paths": [f"{address}/{name}"]}
    whole = go(tmp_path / "whole", local)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            go(tmp_path / "out", source)
    counted = stop_after(monkeypatch, 100)
    assert go(tmp_path / "out", source) == whole
    assert counted["rows"] == COUNT - 2 * A_SHARD
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_served_file_that_changes_is_refused(web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address, folder, _ = web
    rows = [json.dumps({"text": f"{n:06d} " + "x" * 500}) for n in range(300)]
    (folder / "a.jsonl").write_text("\n".join(rows))
    write = intake._Shard.write

    def changing(self: Any, row: dict) -> None:
        (folder / "a.jsonl").write_text("\n".join(rows).replace("x", "y"))
        write(self, row)

    monkeypatch.setattr(intake._Shard, "write", changing)
    with pytest.raises(ValueError, match=r"a\.jsonl changed while it was read"):
        go(tmp_path / "out", {"type": "files", "name": "mine", "paths": [f"{address}/a.jsonl"]}, on_bad="refuse")


KILLED = """
import sys
from pathlib import Path
from gristmill.data.ingest import IngestConfig, ingest
from gristmill.data.stage_types import silent
source = {"type": "files", "name": "mine", "paths": [sys.argv[1]]}
config = IngestConfig.model_validate({"sources": [source], "documents_per_shard": 200})
ingest(config, Path(sys.argv[2]), 0, workers=0, progress=silent)
"""


@pytest.mark.slow
def test_signal_9_at_moments_of_its_own_ends_in_the_same_bytes(tmp_path: Path, bytes_of) -> None:
    """One large file, one task: each start goes on with the shard at which the last one was killed."""
    import random
    import subprocess
    import sys
    import time

    data = b"".join(json.dumps({"text": f"{n} " + "some words of it " * 60}).encode() + b"\n" for n in range(20_000))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(data))
    whole, out = tmp_path / "whole", tmp_path / "out"
    command = [sys.executable, "-P", "-c", KILLED, str(tmp_path / "a.jsonl.zst")]
    for folder in (whole, out):
        folder.mkdir()
    subprocess.run([*command, str(whole)], check=True)
    draw, kills = random.Random(0), 0
    for attempt in range(40):
        held = len(list((out / "work").glob("*.jsonl.zst"))) if (out / "work").exists() else 0
        process = subprocess.Popen([*command, str(out)])
        while process.poll() is None and attempt < 8:
            made = len(list((out / "work").glob("*.jsonl.zst"))) if (out / "work").exists() else 0
            if made >= held + 5:
                time.sleep(draw.random() / 50)
                process.kill()
                kills += 1
                break
            time.sleep(0.005)
        if process.wait() == 0:
            break
    assert kills >= 5
    assert process.returncode == 0
    assert bytes_of(out) == bytes_of(whole)
