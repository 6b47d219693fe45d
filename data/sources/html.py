"""Web pages: bytes to characters as browsers do it, the main text by trafilatura, and the licence that is stated."""

from __future__ import annotations

import codecs
import re

MOST_HTML = 16 << 20  # bytes; a larger page would take a parser beyond a worker's memory
MOST_TAGS = 60_000  # trafilatura's time grows with their square: seconds here, minutes at four times as many
HEAD = 4096
# What browsers understand by names that servers give (WHATWG Encoding, section 4.2)
WIDER = {
    "iso-8859-1": "cp1252",
    "latin-1": "cp1252",
    "latin1": "cp1252",
    "us-ascii": "cp1252",
    "ascii": "cp1252",
    "iso8859-9": "cp1254",
    "iso-8859-9": "cp1254",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "x-sjis": "cp932",
    "euc-kr": "cp949",
    "ks_c_5601-1987": "cp949",
    "tis-620": "cp874",
    "big5": "big5hkscs",
}
# Others of that standard's, by Python's names; more would let a page choose codecs that take quadratic time (punycode)
KNOWN = {
    *("utf-8", "utf-16", "utf-16-le", "utf-16-be", "gb18030", "big5hkscs", "euc_jp", "iso2022_jp", "cp932", "cp949"),
    *("koi8-r", "koi8-u", "cp866", "cp874", "mac-roman", "mac-cyrillic"),
    *(f"cp125{n}" for n in range(9)),
    *(f"iso8859-{n}" for n in range(1, 17) if n != 12),
}
MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
CHARSET = re.compile(rb"""<meta[^>]{0,256}?charset\s{0,8}=\s{0,8}["']?\s{0,8}([\w.:-]{2,40})""", re.IGNORECASE)
LICENCE = re.compile(
    r"https?://creativecommons\.org/(licenses|publicdomain)/(by(?:-nc)?(?:-sa|-nd)?|zero|mark)/(\d\.\d)", re.IGNORECASE
)


def web_text(data: bytes, stated: str | None) -> tuple[str, int]:
    """A page's characters, and how many of them stand for bytes that its encoding does not know.

    A byte order mark tells the encoding, then the server's header (`stated`), then the page's own <meta>, else it is
    UTF-8 or, where it cannot be that, Windows-1252. NUL characters are dropped, as parsers of HTML do.
    """
    for mark, name in MARKS.items():
        if data.startswith(mark):
            return _counted(data[len(mark) :].decode(name, "replace"))
    declared = CHARSET.search(data[:HEAD])
    for name in (stated, declared[1].decode("ascii") if declared else None, "utf-8"):
        codec = _codec(name)
        if codec is not None:
            try:
                return _counted(data.decode(codec), lossless=True)
            except UnicodeDecodeError:
                continue
    codec = _codec(stated) or (_codec(declared[1].decode("ascii")) if declared else None) or "cp1252"
    return _counted(data.decode(codec, "replace"))


def _codec(name: str | None) -> str | None:
    if not name:
        return None
    name = WIDER.get(name.strip().lower(), name.strip().lower())
    try:
        found = codecs.lookup(name)
    except (LookupError, ValueError):
        return None
    return found.name if found.name in KNOWN else None


def _counted(text: str, lossless: bool = False) -> tuple[str, int]:
    text = text.replace("\0", "")
    return text, 0 if lossless else text.count("\ufffd")


def page_text(html: str, *, precise: bool = True) -> str:
    """The main text of a page, paragraphs on lines of their own; empty where there is none."""
    from trafilatura import extract

    text = extract(
        html,
        output_format="txt",
        favor_precision=precise,
        include_comments=False,
        include_tables=True,
        deduplicate=False,
        with_metadata=False,
    )
    return text or ""


def page_licence(html: str) -> str | None:
    """The Creative Commons licence that a page links to, as an SPDX identifier, if it links to one alone."""
    found = {_spdx(m[1].lower(), m[2].lower(), m[3]) for m in LICENCE.finditer(html)}
    return found.pop() if len(found) == 1 else None


def _spdx(shelf: str, name: str, version: str) -> str | None:
    if shelf == "publicdomain":
        return "CC0-1.0" if name == "zero" else "CC-PDDC"
    return f"CC-{name.upper()}-{version}"
