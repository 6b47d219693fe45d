"""Edits on edits: what two rules, one after the other, did to a text, said in characters of the text before both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gristmill.data.sieve import Edit


@dataclass(frozen=True)
class _Change:
    """Characters [start, end) of the text between, and the edit that made them (first) or that acts on them."""

    start: int
    end: int
    edit: Edit
    first: bool


def compose(first: Sequence[Edit], then: Sequence[Edit]) -> list[Edit]:
    """Edits of the original text that do what `first` and then `then`, edits of the result, do.

    Edits that touch the same characters become one, with the reason of the last; the others stay as they are.
    """
    changes, shift = [], 0
    for edit in first:
        changes.append(_Change(edit.start + shift, edit.start + shift + len(edit.now), edit, True))
        shift += len(edit.now) - (edit.end - edit.start)
    changes += [_Change(edit.start, edit.end, edit, False) for edit in then]
    changes.sort(key=lambda c: (c.start, c.end, not c.first))
    composed, shift = [], 0  # shift: from the text between to the original, before the group at hand
    for group in _groups(changes):
        own = [c for c in group if c.first]
        start = min(c.start for c in group)
        end = max(c.end for c in group)
        grown = sum(len(c.edit.now) - (c.edit.end - c.edit.start) for c in own)
        last = next((c for c in reversed(group) if not c.first), group[-1])
        now = last.edit.now if len(group) == 1 else _text_of(group, start, end)
        composed.append(Edit(start - shift, end - shift - grown, last.edit.reason, now))
        shift += grown
    return composed


def _groups(changes: list[_Change]) -> list[list[_Change]]:
    """Runs of changes that touch each other; two edits of one rule may touch and stay apart."""
    groups: list[list[_Change]] = []
    end = -1
    for change in changes:
        meets = groups and (change.start < end or (change.start == end and _joins(groups[-1], change)))
        if meets:
            groups[-1].append(change)
            end = max(end, change.end)
        else:
            groups.append([change])
            end = change.end
    return groups


def _joins(group: list[_Change], change: _Change) -> bool:
    """Whether a change that begins where a group ends belongs to it: where one is empty, their order would be lost."""
    return any(c.first != change.first for c in group)


def _text_of(group: list[_Change], start: int, end: int) -> str:
    """What stands at the end for the characters [start, end) of the text between.

    All of these characters come from first edits or go by second ones: else the group would have fallen apart.
    """
    between: dict[int, str] = {}
    for change in group:
        if change.first:
            between |= {change.start + i: letter for i, letter in enumerate(change.edit.now)}
    parts, at = [], start
    for change in (c for c in group if not c.first):
        parts += [between[i] for i in range(at, change.start)]
        parts.append(change.edit.now)
        at = change.end
    parts += [between[i] for i in range(at, end)]
    return "".join(parts)


def original_spans(edits: Sequence[Edit], spans: Sequence[Sequence[int]]) -> list[list[int]]:
    """Spans of a text after its edits, as spans of the text before; what an edit put there stands for what it took."""
    found = []
    for start, end in spans:
        first, _ = _original(edits, int(start))
        found.append([first, _original(edits, int(end) - 1)[1] if end > start else first])
    return found


def _original(edits: Sequence[Edit], at: int) -> tuple[int, int]:
    """The characters of the text before that character `at` of the text after stands for."""
    grown = 0
    for edit in edits:
        start = edit.start + grown
        if at < start:
            break
        if at < start + len(edit.now):
            return edit.start, edit.end
        grown += len(edit.now) - (edit.end - edit.start)
    return at - grown, at - grown + 1
