"""Dumps of wikis: articles as plain text, everything else counted; XML that would harm is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import time
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from gristmill.data.documents import read_rows, shards
from gristmill.data.ingest import IngestConfig, ingest
from gristmill.data.sources.wikitext import plain_text
from gristmill.data.stage_types import silent

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">
<siteinfo><sitename>Wikipedia</sitename><base>https://de.wikipedia.org/wiki/Hauptseite</base>
<namespaces><namespace key="-2" case="first-letter">Medium</namespace><namespace key="0" case="first-letter" />
<namespace key="6" case="first-letter">Datei</namespace><namespace key="10" case="first-letter">Vorlage</namespace>
<namespace key="14" case="first-letter">Kategorie</namespace></namespaces></siteinfo>
"""


def page(
    number: int, text: str, title: str = "", space: str = "<ns>0</ns>", more: str = "", model: str = "wikitext"
) -> str:
    return (
        f"<page><title>{title or f'Seite {number}'}</title>{space}<id>{number}</id>{more}<revision><id>9{number}</id>"
        f"<timestamp>2024-01-0{number % 9 + 1}T00:00:00Z</timestamp><contributor><username>x</username><id>3</id></contributor>"
        f"<model>{model}</model><format>text/x-wiki</format><text bytes='1' xml:space='preserve'>{escape(text)}</text></revision></page>\n"
    )


def dump(*pages: str) -> bytes:
    return (HEAD + "".join(pages) + "</mediawiki>\n").encode()


def go(
    tmp_path: Path, name: str, data: bytes, on_bad: str = "quarantine", **more
) -> tuple[dict, list[dict], list[dict]]:
    (tmp_path / name).write_bytes(data)
    source = {"type": "dump", "name": "wiki", "paths": [str(tmp_path / name)], "licence": "CC-BY-SA-4.0"}
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    config = IngestConfig.model_validate({"sources": [source], "on_bad": on_bad, **more})
    metrics = ingest(config, out, 0, workers=0, progress=silent)
    bad = [json.loads(line) for f in sorted((out / "quarantine").glob("*")) for line in f.read_text().splitlines()]
    return metrics, [row for shard in shards(out) for row in read_rows(shard)], bad


PAGES = (
    page(1, "'''Mühlen''' sind [[Maschine|Maschinen]]. [[Datei:x.jpg|mini|Bild]][[Kategorie:Mühle]]"),
    page(2, "#WEITERLEITUNG [[Seite 1]]", more='<redirect title="Seite 1" />'),
    page(3, "Vorlage", "Vorlage:X", "<ns>10</ns>"),
    page(4, "{}", model="json"),
    page(5, "{{Infobox|a=b}}"),
    page(6, "Ein alter Text.", "Alt & neu?".replace("&", "&amp;"), ""),
    page(7, "Ohne Zahl.", "Datei:x.png", ""),
)


@pytest.mark.parametrize("form", ["xml", "xml.bz2", "xml.gz"])
def test_articles(form: str, tmp_path: Path) -> None:
    pack = {"xml": bytes, "xml.bz2": bz2.compress, "xml.gz": gzip.compress}[form]
    metrics, rows, bad = go(tmp_path, f"d.{form}", pack(dump(*PAGES)))
    assert not bad
    assert [(r["id"], r["text"]) for r in rows] == [("wiki/1", "Mühlen sind Maschinen."), ("wiki/6", "Ein alter Text.")]
    assert rows[1]["metadata"] == {
        "source": "wiki",
        "kind": "prose",
        "url": "https://de.wikipedia.org/wiki/Alt_%26_neu%3F",
        "date": "2024-01-07T00:00:00Z",
        "licence": "CC-BY-SA-4.0",
        "title": "Alt & neu?",
        "file": f"d.{form}",
        "record": 6,
    }
    assert metrics["skipped_by_reason"] == {
        "a page without text": 1,
        "content model json": 1,
        "namespace 10": 1,
        "namespace 6": 1,
        "redirect": 1,
    }


LAUGHS = '<!DOCTYPE lolz [<!ENTITY a "lol">' + "".join(
    f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(12)
)
BAD = {
    "billion laughs": (LAUGHS + "]><mediawiki><page><title>&m;</title></page></mediawiki>", "entity declarations"),
    "an outer entity": (
        '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><mediawiki>&a;</mediawiki>',
        "entity declarations",
    ),
    "cut short": (dump(*PAGES).decode()[:-30], "not XML"),
    "no XML": ("just words", "not XML"),
    "a NUL": (dump(page(1, "x")).decode().replace(">x<", ">x\0<"), "not XML"),
    "deep": ("<mediawiki>" + "<a>" * 100, "not XML"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_xml(case: str, tmp_path: Path) -> None:
    text, reason = BAD[case]
    started = time.process_time()
    with pytest.raises(ValueError, match=rf"d\.xml, record \d+: {reason}"):
        go(tmp_path, "d.xml", text.encode(), "refuse")
    assert time.process_time() - started < 2
    (tmp_path / "second").mkdir()
    both = HEAD + PAGES[0] + "</mediawiki>"
    (tmp_path / "second" / "e.xml").write_text(both)
    (tmp_path / "second" / "d.xml").write_text(text)
    out = tmp_path / "second" / "out"
    out.mkdir()
    source = {"type": "dump", "name": "wiki", "paths": [str(tmp_path / "second" / "*.xml")]}
    config = IngestConfig.model_validate({"sources": [source], "on_bad": "quarantine"})
    metrics = ingest(config, out, 0, workers=0, progress=silent)
    assert metrics["quarantined_by_reason"][reason] >= 1
    assert metrics["documents_out"] >= 1


def test_invalid_utf8_in_a_dump(tmp_path: Path) -> None:
    _, rows, bad = go(tmp_path, "d.xml", dump(PAGES[0], page(2, "zzz")).replace(b"zzz", b"z\xffz"))
    assert len(rows) == 1
    assert [(b["reason"], b["record"]) for b in bad] == [("not XML", 2)]


def test_a_page_beyond_the_bound_is_set_aside_and_the_next_is_read(tmp_path: Path) -> None:
    _, rows, bad = go(tmp_path, "d.xml", dump(page(1, "x" * 50_000), page(2, "gut")), max_record_bytes=10_000)
    assert [r["text"] for r in rows] == ["gut"]
    assert [(b["reason"], b["record"]) for b in bad] == [("too large", 1)]


def test_numbers_that_only_look_like_numbers(tmp_path: Path) -> None:
    odd = page(1, "eins", space="<ns>²</ns>").replace("<id>1<", "<id>²<")
    _, rows, bad = go(tmp_path, "d.xml", dump(odd, page(2, "zwei")))
    assert not bad
    assert [r["id"] for r in rows] == ["wiki/d.xml#1", "wiki/2"]


def test_a_page_twice_is_named_with_both_places(tmp_path: Path) -> None:
    twice = dump(page(1, "eins"), page(2, "zwei"), page(1, "noch einmal"))
    with pytest.raises(ValueError, match=r"d\.xml, record 3: duplicate id .*'wiki/1' is that of record 1 of d\.xml"):
        go(tmp_path, "d.xml", twice, "refuse")


TEXTS = {
    "[[Berlin]] and [[Paris|the city]]": "Berlin and the city",
    "a<ref name=x>see [http://x y]</ref>b<ref name=x/>c": "abc",
    "{{Infobox\n| a = {{b|c}}\n}}Text": "Text",
    "{|\n! a\n|-\n| b {{c}}\n|}\nText": "Text",
    "== Head ==\ntext\n== Empty ==\n== See also ==\n* [[x]]": "Head\n\ntext\n\nSee also\n\n- x",
    "''it'' '''bold''' &amp; &nbsp;x<br/>y": "it bold & x\ny",
    "[http://x.org label here] [http://y.org] z": "label here z",
    "[[File:a.jpg|thumb|a [[link]] in it]]after": "after",
    "a <!-- hidden {{ --> b": "a b",
    "{{convert|5|km|mi}} long, {{lang|de|Mühle}}": "5 km long, Mühle",
    "[[de:Mühle]][[Category:Mills]]x": "x",
    "open {{ never closed": "open never closed",
    "<math>x^2</math> stays": "x^2 stays",
    "__NOTOC__text": "text",
}


@pytest.mark.parametrize("text", TEXTS)
def test_wikitext(text: str) -> None:
    assert plain_text(text) == TEXTS[text]


def test_against_the_parser_that_others_use() -> None:
    """Of ordinary prose mwparserfromhell's strip_code gives the same words."""
    import mwparserfromhell

    text = "The '''mill''' ([[watermill|water]]) grinds [[grain]]. It stands{{cn}} [[here]].\n\n== More ==\nWords &amp; more."
    assert plain_text(text).split() == mwparserfromhell.parse(text).strip_code().split()


@pytest.mark.parametrize(
    "unit", ["{{", "[[", "{|\n", "<ref>", "<!--", "[http://", "''", "= ", "]]", "}}", "<a ", "&", "<ref name=", "\n|}"]
)
def test_time_is_linear_in_what_it_reads(unit: str) -> None:
    def seconds(count: int) -> float:
        text = unit * count
        started = time.process_time()
        plain_text(text)
        return time.process_time() - started

    seconds(1000)
    small, large = seconds(20_000), seconds(160_000)
    # eight times as much may take eight times as long; a clock that ticks, and caches, ask for room
    assert large < 25 * small + 0.2
