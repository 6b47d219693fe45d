"""Plain text out of wikitext: sentences, headings and lists; no templates, tables, references or pictures.

One pass over the marks with a stack of bounded depth: time is linear in the text, whatever it holds.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection

DEEPEST = 40  # brackets in brackets; deeper ones are taken as they stand
SHORT = 400  # characters of a template that may stand for its own argument
DROPPED = ("ref", "gallery", "timeline", "score", "imagemap", "graph", "templatedata", "inputbox", "maplink")
PICTURES = frozenset({"file", "image", "media"})
CATEGORIES = frozenset({"category"})

TAG = re.compile(rf"<({'|'.join(DROPPED)})\b([^<>]{{0,2000}})>", re.IGNORECASE)
MARK = re.compile(r"\{\{|\}\}|\[\[|\]\]|^[ :]{0,20}\{\||^[ \t]{0,20}\|\}(?!\})|\[(?=(?:https?:)?//)|\]", re.MULTILINE)
LANGUAGE_LINK = re.compile(r":?[a-z]{2,3}(?:-[a-z]{2,12})?$")
MARKUP = re.compile(r"</?[A-Za-z][^<>]{0,2000}>")
BREAK = re.compile(r"<(?:br|hr)\b[^<>]{0,200}>|</(?:p|div|li|tr)>", re.IGNORECASE)
QUOTES = re.compile(r"'{2,5}")
SWITCH = re.compile(r"__[A-Z]{3,30}__")
HEADING = re.compile(r"^(={1,6})[ \t]*([^\n]{0,1000}?)[ \t]*\1[ \t]*$")
LIST = re.compile(r"^[*#:;]{1,20}[ \t]*")
SPACES = re.compile(r"[ \t\u00a0]+")
FIRST = frozenset({"abbr", "nowrap", "nobr", "small", "big", "sic"})  # templates that show their first argument
LAST = frozenset({"lang", "transl", "smallcaps", "em", "strong"})  # their last


def plain_text(wikitext: str, pictures: Collection[str] = PICTURES, categories: Collection[str] = CATEGORIES) -> str:
    """The text of a page.

    Args:
        pictures, categories: names, in lower case, of the namespaces whose links are no words of the text.
    """
    text = _without_tags(_without_comments(wikitext))
    text = _unbracketed(text, pictures, categories)
    text = SWITCH.sub("", QUOTES.sub("", MARKUP.sub("", BREAK.sub("\n", text))))
    return _tidied(html.unescape(text))


def _without_comments(text: str) -> str:
    parts, at = [], 0
    while (start := text.find("<!--", at)) >= 0:
        end = text.find("-->", start)
        parts.append(text[at:start])
        if end < 0:  # MediaWiki takes a comment without end as one to the end
            return "".join(parts)
        at = end + 3
    return "".join([*parts, text[at:]])


def _without_tags(text: str) -> str:
    """Without the elements whose content is no text; one that is never closed loses its tag alone."""
    parts, at = [], 0
    lower = text.lower()
    if len(lower) != len(text):  # a few letters grow: places would not fit
        lower = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    unclosed: set[str] = set()
    for tag in TAG.finditer(text):
        name = tag[1].lower()
        if tag.start() < at:
            continue
        parts.append(text[at : tag.start()])
        at = tag.end()
        if tag[2].endswith("/") or name in unclosed:
            continue
        end = lower.find(f"</{name}", at)
        close = text.find(">", end) if end >= 0 else -1
        if close < 0:
            unclosed.add(name)
        else:
            at = close + 1
    return "".join([*parts, text[at:]])


def _unbracketed(text: str, pictures: Collection[str], categories: Collection[str]) -> str:
    """Templates and tables out, links by their labels."""
    closes = {"{{": "}}", "[[": "]]", "{|": "|}", "[": "]"}
    stack: list[tuple[str, list[str]]] = [("", [])]
    at = 0
    for mark in MARK.finditer(text):
        stack[-1][1].append(text[at : mark.start()])
        at = mark.end()
        sign = mark[0].strip(" :\t")
        if sign in closes:
            if len(stack) < DEEPEST:
                stack.append((sign, []))
            continue
        kind = stack[-1][0]
        if (kind and closes[kind] == sign) or (kind == "[" and sign == "]]"):
            kind, parts = stack.pop()
            stack[-1][1].append(_rendered(kind, "".join(parts), pictures, categories))
        elif sign == "]":
            stack[-1][1].append("]")
    stack[-1][1].append(text[at:])
    while len(stack) > 1:  # never closed: taken as they stand, without the mark
        _, parts = stack.pop()
        stack[-1][1].extend(parts)
    return "".join(stack[0][1])


def _rendered(kind: str, inside: str, pictures: Collection[str], categories: Collection[str]) -> str:
    if kind == "{|":
        return ""
    if kind == "{{":
        return _template(inside)
    if kind == "[":
        return inside.partition(" ")[2]
    target, bar, label = inside.partition("|")
    space, colon, page = target.partition(":")
    name = space.strip().lower()
    if colon and (name in pictures or name in categories):
        return ""
    if colon and not bar and LANGUAGE_LINK.match(name):
        return ""
    if bar:
        return label.rpartition("|")[2]
    return (page if colon and not name else target).removeprefix(":")


def _template(inside: str) -> str:
    """A template's own argument, where it only says how to set it; a measure with its unit."""
    if len(inside) > SHORT:
        return ""
    name, *arguments = inside.split("|")
    name = name.strip().lower()
    plain = [a.strip() for a in arguments if "=" not in a]
    if name in ("convert", "cvt") and len(plain) >= 2:
        return f"{plain[0]} {plain[1]}"
    if plain and (name in FIRST or name in LAST):
        return plain[0] if name in FIRST else plain[-1]
    return ""


def _tidied(text: str) -> str:
    """Headings and list items as plain lines, one empty line between paragraphs, no empty sections."""
    lines: list[str] = []
    heading_at = -1  # of the last heading, while nothing stands below it
    level = 0
    for raw in text.split("\n"):
        line = SPACES.sub(" ", raw).strip()
        heading = HEADING.match(line)
        if heading is not None:
            if heading_at >= 0 and len(heading[1]) <= level:
                del lines[heading_at:]
            heading_at, level = len(lines), len(heading[1])
            lines += ["", heading[2], ""]
            continue
        if not line or line.strip("-") == "" or line in ("|", "()"):
            lines.append("")
            continue
        marked = LIST.match(line)
        if marked is not None:
            line = line[marked.end() :]
            if not line:
                continue
            line = f"- {line}" if marked[0][0] in "*#" else line
        heading_at = -1
        lines.append(line)
    if heading_at >= 0:
        del lines[heading_at:]
    out: list[str] = []
    for line in lines:
        if line or (out and out[-1]):
            out.append(line)
    return "\n".join(out).strip()
