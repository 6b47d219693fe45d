"""How a model thinks, told from what it wrote: the ways its thoughts follow, and how often each was right.

A way is told by the number of lines alone, against the number of steps of the problem: every step on a line
is thorough, two steps a line is hasty, none is a guess, any other number is other. Whether the lines are
right is not asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from gristmill.flows.cards.figures import STYLES
from gristmill.flows.cards.folder import Row, StageFolder

FEWEST_TERMS = 3  # with two numbers, every step on a line and two steps a line are the same


def way_of_thinking(thought: str, terms: int) -> str:
    """One of `STYLES` for a thought on a problem of `terms` numbers."""
    lines, steps = sum(bool(line.strip()) for line in thought.splitlines()), terms - 1
    if lines == 0:
        return "guess"
    if lines == steps:
        return "thorough"
    return "hasty" if lines == -(-steps // 2) else "other"


def thought_of(response: str) -> str | None:
    """The thought of a response that closes it exactly once, else none."""
    parts = response.split("</think>")
    return parts[0] if len(parts) == 2 else None


def cold_start_data(problems: StageFolder) -> dict[str, Any] | None:
    """What the cold-start examples hold: how many of each way, and the mean number of lines each writes."""
    number, styles, lines = 0, Counter[str](), Counter[str]()
    for row in problems.each("cold_start.jsonl"):
        number += 1
        styles[row.get("style", "other")] += 1
        lines[row.get("style", "other")] += sum(bool(x.strip()) for x in row.get("thought", "").splitlines())
    if not number:
        counted = {k: int(v) for k, v in (problems.metrics.get("styles") or {}).items()}
        number, styles = sum(counted.values()), Counter(counted)
    if not number:
        return None
    return {
        "examples": number,
        "counts": {s: styles[s] for s in STYLES if styles[s]},
        "shares": {s: round(styles[s] / number, 5) for s in STYLES if styles[s]},
        "mean_lines": {s: round(lines[s] / styles[s], 3) for s in STYLES if styles[s] and lines},
    }


def models(evaluate: StageFolder, problems: StageFolder, names: Iterable[str]) -> dict[str, Any]:
    """For each model its responses' ways of thinking, and how often each was right; empty without answers."""
    terms = {row["id"]: int(row.get("terms") or 0) for row in problems.each("test.jsonl")}
    found = {}
    for name in names:
        counts, right = Counter[str](), Counter[str]()
        for row in evaluate.each(f"answers/{name}.jsonl"):
            if terms.get(row["id"], 0) >= FEWEST_TERMS:
                _count(row, terms[row["id"]], counts, right)
        total = sum(counts.values())
        if total:
            found[name] = {
                "responses": total,
                "shares": {s: round(counts[s] / total, 5) for s in STYLES},
                "right": {s: round(right[s] / counts[s], 5) for s in STYLES if counts[s]},
                "counts": {s: counts[s] for s in STYLES},
            }
    return found


def _count(row: Row, terms: int, counts: Counter[str], right: Counter[str]) -> None:
    for response, correct in zip(row["responses"], row["right"], strict=True):
        thought = thought_of(response)
        way = "other" if thought is None else way_of_thinking(thought, terms)
        counts[way] += 1
        right[way] += int(bool(correct))
