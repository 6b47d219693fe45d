"""What stands between a kernel's products: a look at a program of a GPU, as nvdisasm writes it.

A loop's products go to the tensor cores one after the other, and the loop is as fast as they are if all else happens
meanwhile. A number that is read from global memory and worked with before the next product begins is not meanwhile:
the product waits for the memory, hundreds of cycles at every turn. Compilers move such loads and what is done with them
about, so only the finished program tells.
"""

from __future__ import annotations

import re

PRODUCT = re.compile(r"\b[HIQ]G?MMA\.")
LOAD = re.compile(r"\bLDG\.(\S*)\s+R(\d+),")
END = re.compile(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x0\b")
BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
WORDS = {"64": 2, "128": 4}
"""Registers that a load of so many bits fills; of others one."""


def waits(listing: str) -> list[str]:
    """What the products of innermost loops wait for at every turn: loads, each with the instruction that takes it, and
    one another, where a compiler lets each end before the next begins.
    """
    program, labels = _instructions(listing)
    loops = []
    for end, text in enumerate(program):
        branch = BRANCH.search(text)
        # A loop's own way back is taken on a condition; others lead back into it from where barriers are waited for.
        if branch and text.startswith("@") and labels[branch[1]] <= end:
            loops.append(range(labels[branch[1]], end + 1))
    loops = [loop for loop in loops if any(PRODUCT.search(program[at]) for at in loop)]
    inner = [a for a in loops if not any(a != b and a.start <= b.start and b.stop <= a.stop for b in loops)]
    found = []
    for loop in inner:
        body = program[loop.start : loop.stop]
        found += _one_by_one(body) + _loads(body, labels, loop.start)
    return found


def _one_by_one(body: list[str]) -> list[str]:
    products, ends = (sum(bool(wanted.search(text)) for text in body) for wanted in (PRODUCT, END))
    return [f"each other, {products} products one by one"] if products > 1 and ends >= products else []


def _instructions(listing: str) -> tuple[list[str], dict[str, int]]:
    program: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(program)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            program.append(instruction[1])
    return program, labels


def _loads(body: list[str], labels: dict[str, int], start: int) -> list[str]:
    products = [at for at, text in enumerate(body) if PRODUCT.search(text)]
    skipped: set[int] = set()  # by a branch ahead: not of every turn
    for at, text in enumerate(body):
        if (branch := BRANCH.search(text)) and at < labels[branch[1]] - start < len(body):
            skipped |= set(range(at + 1, labels[branch[1]] - start))
    found = []
    for at, text in enumerate(body):
        load = LOAD.search(text)
        if not load or at in skipped:
            continue
        first = int(load[2])
        words = max((WORDS.get(part, 1) for part in load[1].split(".")), default=1)
        mentioned = re.compile(r"\bR(" + "|".join(str(first + word) for word in range(words)) + r")\b")
        turn = [*range(at + 1, len(body)), *range(at + 1)]  # on into the next turn
        use = next((place for place in turn if mentioned.search(body[place])), at)
        between = turn[: turn.index(use)]
        if not any(product in between for product in products):
            found.append(f"{text} <- {body[use]}")
    return found
