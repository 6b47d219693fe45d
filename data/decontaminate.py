"""The `decontaminate` stage: documents that hold problems of an evaluation set go, or lose the places that do.

A problem is found in a document by word n-grams (13 as in Brown et al. 2020, appendix C), compared as
`folded_words.py` says: case, accents, white space and punctuation do not matter.

- A problem of fewer than `whole_below` words is looked for as one run of all its words: problems that short are often
  made from a template, and part of one is another problem. A run that begins or ends with a number must not go on with
  a sum: 1+2 does not stand in 11+2, nor in 1+2-3.
- A longer one counts as found where its n-grams that stand in the document cover `least_overlap` of its words, or
  `enough_words` of them. A single n-gram is often a turn of phrase that many problems share.
- A problem of fewer than `least_words` words is not looked for, and counted: whatever it asks, others say it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from gristmill.data.config import Config
from gristmill.data.documents import Row, atomic, encoded, open_rows, read_rows, shards, write_rows
from gristmill.data.evaluation_sets import (
    PROBLEMS,
    EvaluationSet,
    Problem,
    check_set,
    read_set,
    recipe_problems,
    set_files,
)
from gristmill.data.executor import Task, remove_work, run_tasks
from gristmill.data.folded_words import MOST_WORDS, SIGNS, Run, RunIndex, words_of
from gristmill.data.sieve import KEEP, Edit, Verdict, conclude, remove, sieve_shard
from gristmill.data.stage_types import Metrics, Progress

SPANS_SHOWN = 50  # of a removed document
ROWS_A_DOCUMENT = 100  # in matches.jsonl
NEAR = 16  # characters around a match in which a sum may go on
SNAP = 40  # characters by which a cut is moved to white space


class DecontaminateConfig(Config):
    """Which evaluation sets are looked for, when one of their problems counts as found, and what is done then."""

    problems: bool = Field(
        default=True, title="The recipe's problems", description="Look for the test questions of the problems stage."
    )
    sets: list[EvaluationSet] = Field(default=[], title="Sets", description="Further evaluation sets.")
    action: Literal["remove", "cut"] = Field(
        default="remove",
        title="Action",
        description="Remove the document, or cut what was found out of it with the text around (GPT-3).",
    )
    ngram: int = Field(default=13, ge=5, le=MOST_WORDS, title="n-gram", description="Words of a run (GPT-3: 13).")
    whole_below: int = Field(
        default=20,
        ge=1,
        le=MOST_WORDS,
        title="Whole below",
        description="Problems of fewer words are looked for as a whole.",
    )
    least_words: int = Field(
        default=7, ge=1, title="Least words", description="Problems of fewer words are not looked for."
    )
    least_overlap: float = Field(
        default=0.5,
        ge=0,
        le=1,
        title="Least overlap",
        description="Share of a problem's words that must be found; 0 takes any n-gram, as GPT-3 did.",
    )
    enough_words: int = Field(
        default=50, ge=1, title="Enough words", description="Words of a problem that are enough whatever their share."
    )
    cut_characters: int = Field(
        default=200, ge=0, title="Characters cut", description="On each side of what was found (GPT-3: 200)."
    )
    most_cuts: int = Field(
        default=10, ge=1, title="Most cuts", description="A document that needs more is removed (GPT-3: 10)."
    )
    least_left: int = Field(
        default=200, ge=0, title="Least left", description="Shorter pieces between cuts go too (GPT-3: 200 characters)."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.whole_below < self.ngram:
            raise ValueError(
                f"whole_below {self.whole_below} is less than ngram {self.ngram}, so problems between them would not "
                f"be looked for: raise it to {self.ngram} or more"
            )
        names = [PROBLEMS, *(s.name for s in self.sets)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two evaluation sets are named {name!r}: rename one ({PROBLEMS!r} is the recipe's)")
        return self


def evaluation_files(config: DecontaminateConfig) -> list[str]:
    """The files outside the store that evaluation sets are read from; their contents belong to the stage's key."""
    return [file for wanted in config.sets for file in set_files(wanted)]


def check_decontamination(config: DecontaminateConfig) -> None:
    """Refuse evaluation sets that cannot be read, before anything runs.

    Raises:
        ValueError: no such file, a missing field, a hub name without a commit.
    """
    for wanted in config.sets:
        check_set(wanted)


def decontaminate(
    config: DecontaminateConfig, documents: Path, problems: Path, out: Path, *, workers: int, progress: Progress
) -> Metrics:
    """Write what `sieve.py` says, and matches.jsonl: a row a problem found in a document, with the words found.

    Args:
        problems: the folder of the exam stage (or of problems); its test.jsonl is read.

    Raises:
        ValueError: a shard is damaged, or an evaluation set cannot be read.
    """
    work, sources = out / "work", shards(documents)
    wanted = work / "evaluation.jsonl.zst"
    own = recipe_problems(problems) if config.problems else iter(())
    texts = list(chain(own, *(read_set(s) for s in config.sets)))
    write_rows(wanted, (vars(problem) for problem in texts))
    tasks = [Task(_decontaminate_shard, (config, s, wanted, out), work / "matches" / s.name) for s in sources]
    run_tasks(tasks, workers, progress)
    metrics = conclude(out, sources)
    found = _collect([t.result for t in tasks], out / "matches.jsonl")
    short = [p for p in texts if len(words_of(p.text).hashes) < config.least_words]
    remove_work(work)
    names = ([PROBLEMS] if config.problems else []) + [s.name for s in config.sets]
    return {
        **metrics,
        "problems": {name: len({p.id for p in texts if p.set == name}) for name in names},
        "found": {name: len({key for key in found if key[0] == name}) for name in names},
        "too_short": {name: sum(p.set == name for p in short) for name in names},
    }


def _decontaminate_shard(config: DecontaminateConfig, shard: Path, wanted: Path, out: Path) -> None:
    """One shard; work/matches/<shard> is written last and so marks that it is done."""
    state = wanted.stat()
    finder = _finder(config.model_dump_json(), wanted, state.st_mtime_ns, state.st_size)
    with open_rows(out / "work" / "matches" / shard.name) as matches:

        def judge(row: Row, place: int) -> Verdict:
            found = finder.found(row["text"])
            for match in found[:ROWS_A_DOCUMENT]:
                matches.write({"document": row["id"], "source": row["metadata"]["source"], **match.as_row()})
            return verdict(config, row["text"], found)

        sieve_shard(shard, out, judge)


@lru_cache(maxsize=1)
def _finder(config: str, wanted: Path, changed: int, size: int) -> Finder:
    """Made once a worker: its tasks share it. The file's time and size tell one run from the next."""
    problems = [Problem(**row) for row in read_rows(wanted)]
    return Finder(DecontaminateConfig.model_validate_json(config), problems)


def _collect(parts: Sequence[Path], to: Path) -> set[tuple[str, str]]:
    """Join the shards' matches into one file; the (set, problem) of all."""
    found = set()
    with atomic(to) as part, part.open("wb") as file:
        for row in chain.from_iterable(map(read_rows, parts)):
            found.add((row["set"], row["problem"]))
            file.write(encoded(row))
    return found


@dataclass
class Match:
    """A text of a problem in a document.

    Attributes:
        words: places of the problem's words that were found.
        spans: characters of the document, in order and apart.
        size: words that the problem's text has.
        ngram: the first run found, as its folded words.
    """

    problem: Problem
    size: int
    ngram: str
    words: set[int] = field(default_factory=set)
    spans: list[list[int]] = field(default_factory=list)

    @property
    def overlap(self) -> float:
        return len(self.words) / self.size

    def add(self, run: Run, start: int, end: int) -> None:
        """Count a run found at characters [start, end); runs come in the order of their ends."""
        self.words.update(range(run.first, run.first + run.length))
        while self.spans and self.spans[-1][1] >= start:
            start = min(start, self.spans.pop()[0])
        self.spans.append([start, end])

    def as_row(self) -> Row:
        """The row of matches.jsonl."""
        return {
            "set": self.problem.set,
            "problem": self.problem.id,
            "ngram": self.ngram,
            "words_found": len(self.words),
            "words": self.size,
            "overlap": round(self.overlap, 4),
            "spans": self.spans[:SPANS_SHOWN],
        }


class Finder:
    """Finds the problems of evaluation sets in texts.

    Attributes:
        too_short: the problems that are not looked for.
    """

    def __init__(self, config: DecontaminateConfig, problems: Sequence[Problem]) -> None:
        self._config = config
        sizes = [len(words_of(p.text).hashes) for p in problems]
        self.too_short = [p for p, n in zip(problems, sizes, strict=True) if n < config.least_words]
        kept = [(p, n) for p, n in zip(problems, sizes, strict=True) if n >= config.least_words]
        self._problems = [p for p, _ in kept]
        self._sizes = [n for _, n in kept]
        self._index = RunIndex([p.text for p in self._problems], self._runs())

    def _runs(self) -> Iterator[Run]:
        for text, size in enumerate(self._sizes):
            length = min(size, self._config.ngram)
            yield from (Run(text, first, length) for first in range(size - length + 1))

    def found(self, text: str) -> list[Match]:
        """The problems that stand in a text, those with most words found first."""
        matches: dict[int, Match] = {}
        for run, start, end in self._found_runs(text):
            if run.text not in matches:
                ngram = " ".join(self._index.words_of(run)[: self._config.ngram])
                matches[run.text] = Match(self._problems[run.text], self._sizes[run.text], ngram)
            matches[run.text].add(run, start, end)
        counted = [m for m in matches.values() if self._counts(m)]
        return sorted(counted, key=lambda m: (-len(m.words), m.problem.set, m.problem.id))

    def _found_runs(self, text: str) -> Iterator[tuple[Run, int, int]]:
        """Runs of problems and the characters [start, end) where they stand; of short problems only whole ones.

        A whole is put together of n-grams that follow each other word by word: looking for one length of run is faster
        than looking for each problem's own.
        """
        begun: dict[tuple[int, int], tuple[int, int]] = {}  # (problem, next word) → where its run begins and ends
        for number, start, end in self._index.hits(text):
            for run in reversed(self._index.uses[number]):
                size = self._sizes[run.text]
                if size >= self._config.whole_below:
                    yield run, start, end
                    continue
                first, until = (start, end) if run.first == 0 else begun.pop((run.text, run.first), (0, -1))
                if until <= start:
                    continue
                if run.first + run.length < size:
                    begun[run.text, run.first + 1] = first, end
                elif stands_alone(text, first, end):
                    yield Run(run.text, 0, size), first, end

    def _counts(self, match: Match) -> bool:
        return match.overlap >= self._config.least_overlap or len(match.words) >= self._config.enough_words


def stands_alone(text: str, start: int, end: int) -> bool:
    """Whether characters [start, end), where they begin or end with a number, are no part of a longer sum or number.

    A result may follow or come before (1+2=3), and a dash with a blank after it is a bullet.
    """
    before, after = text[max(0, start - NEAR) : start], text[end : end + NEAR]
    begun = text[start].isdigit() and (_is_sign(before[-1:]) or _goes_on(before[::-1]))
    return not begun and not (text[end - 1].isdigit() and _goes_on(after))


def _goes_on(beside: str) -> bool:
    """Whether a number goes on with what is beside it, read away from it: a fraction's point, or a sum's sign."""
    if beside[:1] in (".", ",") and beside[1:2].isdigit():
        return True
    bare = beside.lstrip()
    return _is_sign(bare[:1]) and bare[1:].lstrip()[:1].isdigit()


def _is_sign(char: str) -> bool:
    return SIGNS.get(char, "=") in "+-*/^"


def verdict(config: DecontaminateConfig, text: str, found: Sequence[Match]) -> Verdict:
    """What becomes of a document in which these problems were found."""
    if not found:
        return KEEP
    worst = found[0]
    reason = f"contaminated: {worst.problem.set}"
    spans = _joined([span for match in found for span in match.spans])
    because: dict[str, Any] = {
        "spans": spans[:SPANS_SHOWN],
        "set": worst.problem.set,
        "problem": worst.problem.id,
        "ngram": worst.ngram,
        "detail": f"{len(worst.words)} of {worst.size} words of {worst.problem.id}, {len(found)} problems found",
    }
    values = {"evaluation_overlap": worst.overlap}
    if config.action == "remove":
        return remove(reason, values=values, **because)
    edits = cuts(config, text, spans, reason)
    if len(edits) > config.most_cuts or sum(e.end - e.start for e in edits) >= len(text):
        return remove(reason, values=values, **because)
    return Verdict(edits=edits, values=values)


def cuts(config: DecontaminateConfig, text: str, spans: Sequence[Sequence[int]], reason: str) -> list[Edit]:
    """Edits that take the spans out with the text around them, and pieces between that would be too short.

    What is left on both sides of a cut is parted by a blank line: it was not said in one breath.
    """
    wide = [[_blank(text, a - config.cut_characters, -1), _blank(text, b + config.cut_characters, 1)] for a, b in spans]
    gone: list[list[int]] = []
    for start, end in _joined(wide):
        before = gone[-1][1] if gone else 0
        if start - before < config.least_left:
            start = before
        if gone and start == before:
            gone[-1][1] = end
        else:
            gone.append([start, end])
    if gone and len(text) - gone[-1][1] < config.least_left:
        gone[-1][1] = len(text)
    return [Edit(a, b, reason, "\n\n" if a > 0 and b < len(text) else "") for a, b in gone]


def _blank(text: str, at: int, step: int) -> int:
    """The nearest white space or end of the text from `at` on in a direction; `at` itself where there is none near."""
    at = min(max(at, 0), len(text))
    for place in range(at, at + step * SNAP, step):
        if place in (0, len(text)) or text[place - 1 if step < 0 else place].isspace():
            return place
    return at


def _joined(spans: Sequence[Sequence[int]]) -> list[list[int]]:
    """Spans in order, those that touch as one."""
    joined: list[list[int]] = []
    for start, end in sorted(map(tuple, spans)):
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([start, end])
    return joined
