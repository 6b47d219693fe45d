"""Rule rewards: is the answer right, is the form kept, is the thought in one language (R1 sections 2.2.2, 2.3.2)."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from gristmill.model.rl.config import RewardConfig

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Judged:
    """What the rules found in one response."""

    accuracy: float
    format: float
    language: float
    reward: float
    final: str


def reference_answer(answer: str) -> str:
    """The final answer of a GSM8K-format `answer`: what follows `####`."""
    return answer.rsplit("####", 1)[-1].strip()


def split_response(text: str) -> tuple[str, str] | None:
    """(thought, final answer) of a response that closes its thought exactly once, else none."""
    parts = text.split("</think>")
    if len(parts) != 2 or not parts[1].strip() or "<think>" in text:
        return None
    return parts[0].strip("\n"), parts[1].strip()


def same_answer(given: str, reference: str) -> bool:
    """Equal as numbers where the reference is one, else equal as text; a sentence around a number is no answer."""
    wanted, got = _number(reference), _number(given)
    if wanted is None:
        return given.strip() == reference.strip()
    return got is not None and got == wanted


def _number(text: str) -> Decimal | None:
    stripped = text.strip().strip("$. ")
    if not NUMBER.fullmatch(stripped):
        return None
    try:
        return Decimal(stripped.replace(",", ""))
    except InvalidOperation:
        return None


def language_consistency(thought: str, question: str) -> float:
    """Share of the thought's words written in the script of most of the question's words; 1 where there are none.

    R1 counts words of the target language. Scripts are what can be told of a word without a dictionary: a thought
    that leaves English for Chinese or Russian is caught, one that leaves it for Spanish is not.
    """
    asked = [_script(w) for w in WORD.findall(question)]
    words = [_script(w) for w in WORD.findall(thought)]
    if not words:
        return 1.0
    target = max(sorted(set(asked)), key=asked.count) if asked else "LATIN"
    return sum(w == target for w in words) / len(words)


def _script(word: str) -> str:
    return unicodedata.name(word[0], "UNKNOWN").split(" ")[0]


def judge(text: str, ended: bool, question: str, reference: str, config: RewardConfig) -> Judged:
    """The weighted sum of the rules for one response; a response that broke off has neither form nor answer."""
    parts = split_response(text) if ended else None
    if parts is None:
        return Judged(0.0, 0.0, 0.0, 0.0, "")
    thought, final = parts
    accuracy = float(same_answer(final, reference))
    language = language_consistency(thought, question)
    reward = config.accuracy * accuracy + config.format + config.language * language
    return Judged(accuracy, 1.0, language, reward, final)
