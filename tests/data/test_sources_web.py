"""Web archives: pages give their text, records that lie about their length are found, the others are not lost."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import time
from pathlib import Path

import pytest
import zstandard

from gristmill.data.documents import read_rows, shards
from gristmill.data.ingest import IngestConfig, ingest
from gristmill.data.sources import warc
from gristmill.data.sources.base import Cursor
from gristmill.data.sources.html import page_licence, web_text
from gristmill.data.sources.streams import Stream
from gristmill.data.stage_types import silent

PAGE = """<html><head><title>Mills</title></head><body><nav><a href="/">Home</a> <a href="/x">Menu entry</a></nav>
<article><h1>On mills {n}</h1><p>A gristmill grinds cereal grain into flour and middlings, and page {n} says it at length.</p>
<p>The term can refer to either the grinding mechanism or the building that holds it, as readers of page {n} know.</p>
</article><footer>Copyright notice and cookies <a rel="license" href="https://creativecommons.org/licenses/by-sa/4.0/">x</a></footer></body></html>"""


def http(body: bytes, kind: str = "text/html; charset=utf-8", status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{more}\r\n".encode() + body


def record(content: bytes, kind: str = "response", length: int | None = None, **fields: str) -> bytes:
    head = {
        "WARC-Type": kind,
        "WARC-Record-ID": "<urn:uuid:7f1b>",
        "WARC-Date": "2024-02-03T04:05:06Z",
        "WARC-Target-URI": "https://example.org/mills",
        "Content-Length": str(len(content) if length is None else length),
    } | fields
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return b"WARC/1.0\r\n" + lines.encode() + b"\r\n" + content + b"\r\n\r\n"


def pages(count: int) -> list[bytes]:
    return [
        record(http(PAGE.replace("{n}", str(n)).encode()), **{"WARC-Target-URI": f"https://example.org/{n}"})
        for n in range(count)
    ]


def go(
    tmp_path: Path, name: str, data: bytes, on_bad: str = "quarantine", **source
) -> tuple[dict, list[dict], list[dict]]:
    (tmp_path / name).write_bytes(data)
    asked = {"type": "warc", "name": "web", "paths": [str(tmp_path / name)], **source}
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    metrics = ingest(
        IngestConfig.model_validate({"sources": [asked], "on_bad": on_bad}), out, 0, workers=0, progress=silent
    )
    bad = [json.loads(line) for f in sorted((out / "quarantine").glob("*")) for line in f.read_text().splitlines()]
    return metrics, [row for shard in shards(out) for row in read_rows(shard)], bad


def packed(records: list[bytes], form: str) -> bytes:
    pack = {"warc": bytes, "warc.gz": gzip.compress, "warc.zst": zstandard.compress}[form]
    return b"".join(pack(r) for r in records)


@pytest.mark.parametrize("form", ["warc", "warc.gz", "warc.zst"])
def test_pages_give_their_main_text(form: str, tmp_path: Path) -> None:
    records = [
        record(b"software: x\r\n", "warcinfo"),
        record(b"GET / HTTP/1.1\r\n\r\n", "request"),
        *pages(2),
        record(http(b"not here", status="404 Not Found")),
        record(http(b"\x89PNG", "image/png")),
        record(http(b"plain words of a text file", "text/plain")),
    ]
    metrics, rows, bad = go(tmp_path, f"a.{form}", packed(records, form))
    assert not bad
    assert [r["id"] for r in rows] == [f"web/a.{form}#3", f"web/a.{form}#4", f"web/a.{form}#7"]
    assert rows[0]["metadata"] == {
        "source": "web",
        "kind": "prose",
        "url": "https://example.org/0",
        "date": "2024-02-03T04:05:06Z",
        "licence": "CC-BY-SA-4.0",
        "file": f"a.{form}",
        "record": 3,
    }
    assert "grinds cereal grain into flour" in rows[0]["text"]
    assert "Menu entry" not in rows[0]["text"]
    assert rows[2]["text"] == "plain words of a text file"
    assert metrics["skipped_by_reason"] == {
        "HTTP status 404": 1,
        "WARC record of type request": 1,
        "WARC record of type warcinfo": 1,
        "served as image/png": 1,
    }


def test_the_library_that_defines_the_text_agrees(tmp_path: Path) -> None:
    import trafilatura

    _, rows, _ = go(tmp_path, "a.warc.gz", packed(pages(1), "warc.gz"))
    asked = trafilatura.extract(PAGE.replace("{n}", "0"), favor_precision=True, include_comments=False)
    assert rows[0]["text"] == asked


def test_texts_of_a_wet_file(tmp_path: Path) -> None:
    texts = ["one text\nof two lines", "ein Text mit Umlauten: äöü"]
    records = [record(b"x: y\r\n", "warcinfo"), *(record(t.encode(), "conversion") for t in texts)]
    bad_one = record(b"not \xff UTF-8", "conversion")
    metrics, rows, bad = go(tmp_path, "a.warc.wet.gz", packed([*records, bad_one], "warc.gz"))
    assert [r["text"] for r in rows] == texts
    assert metrics["quarantined_by_reason"] == {"invalid UTF-8": 1}
    assert bad[0]["record"] == 4


@pytest.mark.parametrize("form", ["warc", "warc.gz"])
@pytest.mark.parametrize("wrong", [-7, 9, 100_000])
def test_a_wrong_length_is_found_and_the_next_records_are_read(form: str, wrong: int, tmp_path: Path) -> None:
    content = http(PAGE.replace("{n}", "bad").encode())
    lying = record(content, length=len(content) + wrong)
    records = [*pages(2), lying, *pages(3)]
    metrics, rows, bad = go(tmp_path, f"a.{form}", packed(records, form))
    assert [r["metadata"]["url"][-2:] for r in rows] == ["/0", "/1", "/0", "/1", "/2"]
    assert [(b["record"], b["reason"], b["file"], b["source"]) for b in bad] == [
        (3, "wrong length", f"a.{form}", "web")
    ]
    assert metrics["quarantined_by_source"] == {"web": 1}


def test_a_wrong_length_is_refused_with_file_and_record(tmp_path: Path) -> None:
    content = http(b"<p>x</p>")
    with pytest.raises(ValueError, match=r"a\.warc, record 2: wrong length .*states \d+ bytes"):
        go(tmp_path, "a.warc", packed([*pages(1), record(content, length=len(content) - 3)], "warc"), "refuse")


SIZE = len(record(b"x", length=99_999))
LYING = record(b"x", length=100 * SIZE + 10)  # in the middle of the header of the hundredth after it


def test_an_archive_full_of_wrong_lengths_takes_no_more_than_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records that each claim almost all that follows would be read with the square of their number."""
    monkeypatch.setattr(warc, "MOST_READ_AGAIN", 100_000)
    metrics, rows, bad = go(tmp_path, "a.warc", b"".join([*pages(2), *[LYING] * 200, *pages(1)]))
    assert len(rows) == 2
    assert {b["reason"] for b in bad} == {"wrong length"}
    assert [b["record"] for b in bad] == list(range(3, 3 + len(bad)))
    assert ["not read" in b["detail"] for b in bad] == [False] * (len(bad) - 1) + [True]
    assert 100_000 // len(LYING * 100) <= len(bad) < 20
    assert metrics["quarantined_by_reason"] == {"wrong length": len(bad)}


def test_lengths_that_are_a_little_wrong_throughout_lose_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A careless writer's archive of any size is read to its end."""
    monkeypatch.setattr(warc, "MOST_READ_AGAIN", 1000)
    content = http(PAGE.replace("{n}", "1").encode())
    careless = record(content, length=len(content) + 2)
    _, rows, bad = go(tmp_path, "a.warc", b"".join([*[careless] * 50, *pages(1)]))
    assert len(rows) == 1
    assert len(bad) == 50


def test_broken_headers_behind_a_wrong_length_cost_what_they_are_long(tmp_path: Path) -> None:
    """Each would otherwise copy all that the wrong length made the reader hold: minutes here, days in a large archive."""
    started = time.process_time()
    broken = b"WARC/1.0\r\n\r\n\r\n\r\n"
    data = record(b"x", length=500_000) + broken * 40_000 + b"".join(pages(1))
    _, rows, bad = go(tmp_path, "a.warc", data)
    assert len(rows) == 1
    assert len(bad) > 10_000
    assert time.process_time() - started < 15


def test_begun_again_at_any_item_it_gives_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = b"WARC/1.0\r\nno colon\r\n\r\n\r\n\r\n"
    data = b"".join([*pages(1), LYING, broken, *pages(1), *[LYING] * 120, *pages(1), broken])

    def items(row: dict) -> list[tuple]:
        cursor = Cursor.of_row(json.loads(json.dumps(row)))
        stream = Stream(io.BytesIO(data), None, (cursor.offset, cursor.offset))
        return [(str(item), cursor.as_row()) for item in warc.warc_records(stream, cursor, 1 << 20)]

    for most, known in ((1 << 32, "not read"), (50_000, "")):
        monkeypatch.setattr(warc, "MOST_READ_AGAIN", most)
        whole = items(Cursor().as_row())
        assert ("not read" in whole[-1][0]) == (not known)
        assert len(whole) > 4
        for number, (_, row) in enumerate(whole):
            assert items(row) == whole[number + 1 :]


@pytest.mark.parametrize("form", ["warc", "warc.gz"])
def test_a_truncated_archive_keeps_what_came_before(form: str, tmp_path: Path) -> None:
    _, rows, bad = go(tmp_path, f"a.{form}", packed(pages(3), form)[:-150])
    assert len(rows) == 2
    assert [b["reason"] for b in bad] == ["wrong length" if form == "warc" else "cut short or damaged"]


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    """Whatever byte a compressed archive ends at, its records are given or what is missing is said."""
    whole = packed(pages(2), "warc.gz")
    first = len(gzip.compress(pages(2)[0]))
    for length in range(1, len(whole), 37):
        if length == first:
            continue  # the archive of one record, whole
        (tmp_path / str(length)).mkdir()
        if length < first:
            with pytest.raises(ValueError, match="gave no documents"):
                go(tmp_path / str(length), "a.warc.gz", whole[:length])
            continue
        _, rows, bad = go(tmp_path / str(length), "a.warc.gz", whole[:length])
        assert len(bad) == 1
        assert len(rows) == 1


def test_bodies_as_servers_send_them(tmp_path: Path) -> None:
    html = PAGE.replace("{n}", "7").encode()
    chunks = b"".join(f"{len(c):x}\r\n".encode() + c + b"\r\n" for c in (html[:100], html[100:])) + b"0\r\n\r\n"
    latin = PAGE.replace("{n}", "für Müller").encode("cp1252")
    records = [
        record(http(chunks, more="Transfer-Encoding: chunked\r\n")),
        record(http(html, more="Transfer-Encoding: chunked\r\n")),  # joined by the archive, the header left
        record(http(gzip.compress(html), more="Content-Encoding: gzip\r\n")),
        record(http(html, more="Content-Encoding: gzip\r\n")),
        record(http(latin, "text/html; charset=iso-8859-1")),
        record(http(latin.replace(b"<head>", b'<head><meta charset="windows-1252">'), "text/html")),
        record(http(html + b"\0", "text/html; charset=punycode")),
        record(b"no HTTP at all"),
    ]
    _, rows, bad = go(tmp_path, "a.warc", b"".join(records))
    assert [b["reason"] for b in bad] == ["not an HTTP response"]
    assert [f"page {n}" in r["text"] for n, r in zip([7] * 4 + ["für Müller"] * 2 + [7], rows, strict=True)] == [
        True
    ] * 7


def test_a_compressed_page_that_ends_too_early_says_so(tmp_path: Path) -> None:
    packed_page = gzip.compress(PAGE.replace("{n}", "7").encode())
    records = [record(http(body, more="Content-Encoding: gzip\r\n")) for body in (packed_page, packed_page[:-12])]
    _, rows, _ = go(tmp_path, "a.warc", b"".join(records))
    assert [r["metadata"].get("truncated") for r in rows] == [None, "compressed body"]


def test_a_decompression_bomb_stays_small(tmp_path: Path) -> None:
    bomb = gzip.compress(b"<p>" + b"a" * (70 << 20))
    _, rows, bad = go(tmp_path, "a.warc", b"".join([record(http(bomb, more="Content-Encoding: gzip\r\n")), *pages(1)]))
    assert [b["reason"] for b in bad] == ["too large"]
    assert len(rows) == 1


def test_a_page_of_a_million_tags_costs_no_hours(tmp_path: Path) -> None:
    started = time.process_time()
    page = b"<html><body>" + b"<b>x</b>" * 500_000
    _, rows, bad = go(tmp_path, "a.warc", b"".join([record(http(page)), *pages(1)]))
    assert [(b["record"], b["reason"]) for b in bad] == [(1, "too large")]
    assert len(rows) == 1
    assert time.process_time() - started < 10


def test_servers_and_archives_do_not_choose_the_reasons_that_are_counted(tmp_path: Path) -> None:
    records = [record(http(b"x", f"image/x-{n}")) for n in range(5)]
    records += [record(http(b"x", f"own{n}/x")) for n in range(5)]
    records += [record(b"x", f"kind{n}") for n in range(5)]
    metrics, _, _ = go(tmp_path, "a.warc", b"".join([*records, *pages(1)]))
    assert metrics["skipped_by_reason"] == {
        "WARC record of type unknown": 5,
        "served as image": 5,
        "served as something unknown": 5,
    }


def test_a_content_type_of_a_million_semicolons_costs_no_hours(tmp_path: Path) -> None:
    started = time.process_time()
    page = http(PAGE.encode(), kind='text/html; x="' + ";" * 1_000_000)
    _, rows, _ = go(tmp_path, "a.warc", record(page))
    assert len(rows) == 1
    assert time.process_time() - started < 10  # the library takes a quarter of an hour


def test_encodings() -> None:
    assert web_text("é".encode("cp1252"), None) == ("é", 0)
    assert web_text("漢字".encode("gb18030"), "GB2312") == ("漢字", 0)
    assert web_text(b"\xef\xbb\xbfx", "utf-16") == ("x", 0)
    assert web_text(b"a\xffb", "euc-jp") == ("a�b", 1)
    assert (
        page_licence(
            "https://creativecommons.org/licenses/by/3.0/ and https://creativecommons.org/publicdomain/zero/1.0/"
        )
        is None
    )


def test_files_takes_archives_by_their_ending(tmp_path: Path) -> None:
    _, rows, _ = go(tmp_path, "a.warc.gz", packed(pages(2), "warc.gz"), type="files")
    assert len(rows) == 2


def test_streams_are_bounded_and_begin_again() -> None:
    """Every format gives the bytes that its own library gives, from the front and from where a member begins."""
    from gristmill.data.sources.streams import DamagedError, Stream

    parts = [bytes([65 + n]) * 70_000 + b"\n" for n in range(5)]
    for form, pack in {"gzip": gzip.compress, "bzip2": bz2.compress, "zstd": zstandard.compress}.items():
        data = b"".join(map(pack, parts))
        stream = Stream(io.BytesIO(data), form)
        assert stream.read(70_001 * 3) == b"".join(parts[:3])
        start = stream.restart(stream.offset)
        assert start[1] in (70_001 * 2, 70_001 * 3)
        again = Stream(io.BytesIO(data), form, start)
        again.skip(70_001 * 3 - again.offset)
        assert again.read() == b"".join(parts[3:]), form
        with pytest.raises(DamagedError):
            Stream(io.BytesIO(data[:-3]), form).read()
    crumbs = Stream(io.BytesIO(b"".join(gzip.compress(bytes([c])) for c in b"x" * 2000 + b"\ny")), "gzip")
    assert crumbs.line(1500) == b"x" * 1500
    assert crumbs.line(1500) == b"x" * 500 + b"\n"
    assert (crumbs.offset, crumbs.line(9), crumbs.line(9)) == (2001, b"y", b"")
    bomb = zstandard.compress(b"\0" * (150 << 20))
    assert max(map(len, iter(Stream(io.BytesIO(bomb), "zstd").some, b""))) <= 128 << 20
