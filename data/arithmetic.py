"""The problem family of the small recipes: chains of additions and subtractions, in symbols and in words.

A chain is a start and a few signed numbers. Whether a chain belongs to the test is a function of the chain alone
(`is_held_out`), so lessons, cold start, training problems and test problems are drawn apart from each other and
share no chain whatever the seeds and counts; evaluation checks this again on the finished files.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

Form = Literal["symbols", "words"]
Style = Literal["thorough", "hasty", "guess"]

HELD_OUT_SHARE = 8  # one chain in eight belongs to the test

NAMES = ("Ada", "Ben", "Eva", "Ian", "Kim", "Leo", "Mia", "Sam")
THINGS = ("coins", "pens", "nuts", "cards", "keys", "eggs")
GAINS = ("gets", "finds", "buys", "wins")
LOSSES = ("loses", "sells", "gives", "drops")


@dataclass(frozen=True)
class Chain:
    """`start`, then `steps` added one after the other; every running sum lies between 0 and 99."""

    start: int
    steps: tuple[int, ...]

    @property
    def sums(self) -> list[int]:
        """The running sums, one a step; the last is the answer."""
        total, sums = self.start, []
        for step in self.steps:
            total += step
            sums.append(total)
        return sums

    @property
    def answer(self) -> int:
        return self.sums[-1]

    @property
    def terms(self) -> int:
        return len(self.steps) + 1

    @property
    def symbols(self) -> str:
        return f"{self.start}" + "".join(f"{step:+d}" for step in self.steps)


def generator(*parts: int | str) -> np.random.Generator:
    """A generator that is a pure function of `parts`: (seed, what for, index)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def is_held_out(chain: Chain) -> bool:
    """Whether the chain belongs to the test: a hash of the chain itself, so no seed can move it."""
    return hashlib.sha256(chain.symbols.encode()).digest()[0] % HELD_OUT_SHARE == 0


def draw_chain(rng: np.random.Generator, terms: tuple[int, int], largest: int, held_out: bool | None = False) -> Chain:
    """A chain of `terms` (least, most) numbers up to `largest`; `held_out` asks for one side of the test split."""
    while True:
        count = int(rng.integers(terms[0], terms[1] + 1))
        total = start = int(rng.integers(2, 2 * largest + 1))
        steps = []
        for _ in range(count - 1):
            step = int(rng.integers(1, largest + 1))
            if total - step >= 0 and (total + step > 99 or rng.random() < 0.5):
                step = -step
            total += step
            steps.append(step)
        chain = Chain(start, tuple(steps))
        if held_out is None or is_held_out(chain) == held_out:
            return chain


def question(chain: Chain, form: Form, rng: np.random.Generator) -> str:
    """The problem as a person would put it."""
    if form == "symbols":
        return f"{chain.symbols}=?"
    name, thing = NAMES[rng.integers(len(NAMES))], THINGS[rng.integers(len(THINGS))]
    deeds = [f"{(GAINS if s > 0 else LOSSES)[rng.integers(4)]} {abs(s)}" for s in chain.steps]
    return f"{name} has {chain.start} {thing}, {', '.join(deeds)}. How many {thing}?"


def thought(chain: Chain, style: Style) -> str:
    """The written thought: every running sum, two steps at a time, or nothing before the answer."""
    if style == "guess":
        return ""
    stride = 1 if style == "thorough" else 2
    lines, total = [], chain.start
    for i in range(0, len(chain.steps), stride):
        part = chain.steps[i : i + stride]
        after = total + sum(part)
        lines.append(f"{total}" + "".join(f"{s:+d}" for s in part) + f"={after}")
        total = after
    return "\n".join(lines)


def lesson(seed: int, index: int, terms: tuple[int, int] = (2, 6), largest: int = 9) -> str:
    """The text of lesson `index`: a page of worked problems, or one question and answer of a conversation.

    Half of the lessons are conversations with the chat markers, so that a base model knows how one looks. Whole
    thoughts, leaps and bare answers are equally frequent in them: nothing tells the model which of them to prefer.
    """
    rng = generator(seed, "lesson", index)
    page = int(rng.integers(6))
    if page < 3:
        chain = draw_chain(rng, terms, largest)
        asked, work = question(chain, _form(rng), rng), thought(chain, _style(rng))
        return f"<｜User｜>{asked}<｜Assistant｜><think>\n{work}\n</think>\n{chain.answer}"
    items = []
    for number in range(1, int(rng.integers(9, 13))):
        chain = draw_chain(rng, terms, largest)
        asked = question(chain, _form(rng), rng)
        work = thought(chain, _style(rng) if page == 3 else "thorough")
        heading = f"{number}. " if page == 3 else ""
        items.append(f"{heading}{asked}\n" + (f"{work}\n" if work else "") + f"Answer: {chain.answer}\n")
    title = {3: "Exercises", 4: "Worked examples", 5: "Running sums"}[page]
    return f"{title}, page {index + 1}\n\n" + "\n".join(items)


def _form(rng: np.random.Generator) -> Form:
    return "symbols" if rng.random() < 0.5 else "words"


def _style(rng: np.random.Generator) -> Style:
    return ("thorough", "hasty", "guess")[int(rng.integers(3))]
