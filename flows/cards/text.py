"""Numbers and tables as people read them: units, short forms, Markdown that no content can break."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

CELL = 240  # characters of a table's cell; longer ones are cut, with a mark
OPENS, CLOSES = "⟦", "⟧"  # around what is to be seen in a sample's text
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # a young model writes them; not every database takes them
HAIR = "\u200a"  # a space beside a mark of bold, without which Markdown reads it as stars in some places


@dataclass(frozen=True)
class Marked:
    """A cell's value in which what stands between ⟦ and ⟧ is to be bold."""

    value: Any
    characters: int = CELL


def number(value: Any) -> str:
    """A number with separators and about four digits; anything else as JSON would say it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**9 else short(value)
    if isinstance(value, float):
        if value and not 1e-3 <= abs(value) < 1e9:
            return f"{value:.3g}"
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def short(value: float) -> str:
    """A count in thousands (K), millions (M), and so on: 13_400_000 is 13.4 M."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def size(count: int) -> str:
    """Bytes in decimal units."""
    for step, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= step:
            return f"{count / step:.3g} {unit}"
    return f"{count} B"


def duration(seconds: float | None) -> str:
    """Seconds as 0.4 s, 12 s, 3 min 20 s or 2 h 5 min."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def money(dollars: float) -> str:
    """US dollars, below one in cents."""
    return f"${dollars:,.2f}" if dollars >= 1 else f"{dollars * 100:.2g} ¢"


def times(factor: float) -> str:
    """A large factor in words: 133 billion."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if factor >= size:
            return f"{factor / size:.3g} {word}"
    return f"{factor:,.0f}"


def cell(value: Any) -> str:
    """A value as one cell of a Markdown table: on one line, cut at `CELL`, its marks escaped."""
    if isinstance(value, Marked):
        return marked(value)
    return escaped(number(value).replace("\r", "").strip(), CELL) or " "


def marked(value: Marked) -> str:
    """A cell in which what stands between ⟦ and ⟧ is bold; an opening mark without its end is text."""
    if not isinstance(value.value, str):
        return cell(value.value)
    text = value.value.replace("\r", "").strip()
    if len(text) > value.characters:
        text = text[: value.characters - 1] + "…"
        if text.rfind(OPENS) > text.rfind(CLOSES):
            text += CLOSES
    first, *rest = text.split(OPENS)
    parts = [escaped(first, len(first))]
    for piece in rest:
        inner, closed, after = piece.partition(CLOSES)
        bold = escaped(inner, len(inner)).strip()
        if not closed:
            parts.append(OPENS + escaped(piece, len(piece)))
        else:
            parts.append(f"{HAIR}**{bold or '␣'}**{HAIR}{escaped(after, len(after))}")
    return "".join(parts) or " "


def escaped(text: str, characters: int) -> str:
    """A text on one line, cut after so many characters, that Markdown shows as it is."""
    if len(text) > characters:
        text = text[: characters - 1] + "…"
    text = CONTROL.sub("�", text)
    for mark in "\\`*_[]|~#":
        text = text.replace(mark, "\\" + mark)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ⏎ ")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[int] = ()) -> str:
    """A Markdown table; the columns in `right` are aligned to the right."""
    lines = ["| " + " | ".join(cell(h) for h in head) + " |"]
    lines.append("|" + "|".join(" ---: " if i in right else " --- " for i in range(len(head))) + "|")
    lines += ["| " + " | ".join(cell(v) for v in row) + " |" for row in rows]
    return "\n".join(lines)


def code(text: str, language: str = "") -> str:
    """A fenced block that holds any text: the fence is longer than any in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
