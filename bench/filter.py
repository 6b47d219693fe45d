"""Filters against datatrove's: core-seconds over PEPs and WikiText, and whether the verdicts are the same.

    python -P bench/filter.py [--documents N] [--repeats R]

Both sides judge every document by Gopher quality, Gopher repetition, C4, FineWeb and language, from texts in memory,
on one core; no document is spared a filter because another removed it. datatrove's filters run one after the other
over all documents, each splitting words anew, and once more document by document, where its cache of the last five
splits serves. Ours are measured in mode exact (an empty memory of runs each time) and in mode fast, as medians.
Verdicts are compared on the Universal Declaration of Human Rights in 388 languages as well. Both sides identify
languages by the same model. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gristmill.data.filters.fasttext_model import model_path
from gristmill.data.filters.profile import Profile
from gristmill.data.filters.rule import Prepared
from gristmill.data.filters.words import ExactSplitter
from gristmill.data.sieve import edited

SHARED = Path(os.environ.get("GRISTMILL_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
NAMES = ("gopher_quality", "gopher_repetition", "c4", "fineweb", "language")
WARM = "It is a test of the words that we have, and of the plan they made. [1]\nIt is [x] a { line.\n\n" * 20

Verdict = tuple[bool, str, str]
"""Whether a document stays, datatrove's name of the reason, and the text that goes on."""


def corpus(name: str) -> list[dict[str, Any]]:
    """Rows of one of the shared corpora."""
    with gzip.open(SHARED / "corpus" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def peers() -> dict[str, Callable[[dict[str, Any]], Verdict]]:
    """datatrove's filters, with its defaults, by the names of ours."""
    from datatrove.data import Document
    from datatrove.pipeline import filters
    from datatrove.pipeline.filters.c4_filters import C4ParagraphFilter
    from fasttext.FastText import _FastText

    class Predictor:
        """The model of the wheel, read by fastText itself; its smaller distribution returns a list of floats."""

        model = _FastText(str(model_path()))

        def predict(self, text: str, k: int) -> tuple[Any, Any]:
            labels, scores = self.model.predict(text, k=k)
            return labels, np.array(scores)

    # It asks for another distribution of fastText by name; this one has the class that it imports.
    filters.LanguageFilter._requires_dependencies = []
    language = filters.LanguageFilter(["en"])
    language.model._model = Predictor()
    made = {
        "gopher_quality": filters.GopherQualityFilter(),
        "gopher_repetition": filters.GopherRepetitionFilter(),
        "c4": filters.C4QualityFilter(),
        "c4_paragraphs": C4ParagraphFilter(),
        "fineweb": filters.FineWebQualityFilter(),
        "language": language,
    }

    def judged(peer: Any) -> Callable[[dict[str, Any]], Verdict]:
        def judge(row: dict[str, Any]) -> Verdict:
            document = Document(text=row["text"], id=row["id"], metadata={})
            result = peer.filter(document)
            stays, reason = result if isinstance(result, tuple) else (result, "")
            return bool(stays), reason, document.text

        return judge

    return {name: judged(peer) for name, peer in made.items()}


def ours(rows: list[dict[str, Any]], mode: str, names: tuple[str, ...] = NAMES) -> dict[str, list[Verdict]]:
    """Verdicts of our rules, each on the text as it came; words are split once a document."""
    profile = Profile.model_validate({"mode": mode, **{name: {} for name in names}})
    rules = profile.rules()
    # A splitter of its own: that of a profile would remember the words of the run before.
    splitter = ExactSplitter(profile.words) if mode == "exact" else profile.splitter()
    found: dict[str, list[Verdict]] = {name: [] for name in names}
    for row in rows:
        document = Prepared(row, row["text"], splitter)
        for rule in rules:
            verdict = rule.judge(document)
            text = edited(row["text"], verdict.edits) if verdict.edits else row["text"]
            found[rule.name].append((not verdict.reason, verdict.reason.partition(": ")[2], text))
    return found


def same(name: str, one: Verdict, other: Verdict) -> bool:
    """Whether two verdicts are one: outcome, text and, where datatrove names it, the reason."""
    named = name in ("language", "c4_paragraphs") or one[1] == other[1]
    return one[0] == other[0] and named and (not one[0] or one[2] == other[2])


def core_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU time of this process for a piece of work, and what it made."""
    start = time.process_time()
    made = work()
    return time.process_time() - start, made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--documents", type=int, help="only so many, evenly drawn; default all")
    parser.add_argument("--repeats", type=int, default=5, help="of our own runs; default 5")
    arguments = parser.parse_args()
    rows = corpus("peps") + corpus("wikitext2")
    if arguments.documents:
        rows = rows[:: max(1, len(rows) // arguments.documents)][: arguments.documents]
    others = corpus("udhr")
    if arguments.documents:
        others = others[:: max(1, len(others) // arguments.documents)][: arguments.documents]
    size = sum(len(row["text"].encode()) for row in rows)
    theirs = peers()
    for name in NAMES:  # models are read, loops compiled
        theirs[name]({"text": WARM, "id": "warm"})
    for mode in ("exact", "fast"):
        ours([{"text": WARM, "id": "warm", "metadata": {}}], mode)

    print(f"{len(rows)} documents of {size / 1e6:.1f} MB; core-seconds")
    took, expected = {}, {}
    for name in NAMES:
        took[name], expected[name] = core_seconds(lambda peer=theirs[name]: [peer(row) for row in rows])
        print(f"  datatrove {name:18} {took[name]:8.2f}", flush=True)
    whole = sum(took.values())
    in_turn, _ = core_seconds(lambda: [theirs[name](row) for row in rows for name in NAMES])
    print(f"  datatrove one after the other {whole:.2f}; document by document, its cache serving {in_turn:.2f}")
    seconds: dict[str, list[float]] = {"exact": [], "fast": []}
    verdicts: dict[str, dict[str, list[Verdict]]] = {}
    for _ in range(arguments.repeats):
        for mode in seconds:
            spent, verdicts[mode] = core_seconds(lambda mode=mode: ours(rows, mode))
            seconds[mode].append(spent)
    medians = {mode: statistics.median(spent) for mode, spent in seconds.items()}
    for mode, median in medians.items():
        spread = f"{min(seconds[mode]):.2f} to {max(seconds[mode]):.2f}"
        print(f"  {mode:5} {median:8.2f} ({spread}), {size / 1e6 / median:.2f} MB/s")
    for name in NAMES:
        expected[name] += [theirs[name](row) for row in others]
    for mode in seconds:
        for name, found in ours(others, mode).items():
            verdicts[mode][name] += found
    compared = len(rows) + len(others)
    unlike = {
        name: sum(not same(name, a, b) for a, b in zip(verdicts["exact"][name], expected[name], strict=True))
        for name in NAMES
    }
    agreement = {
        name: sum(a[0] == b[0] for a, b in zip(verdicts["fast"][name], verdicts["exact"][name], strict=True)) / compared
        for name in NAMES
    }
    result = {
        "ratio": round(whole / medians["exact"], 2),
        "ratio_fast": round(whole / medians["fast"], 2),
        "ratio_cached_splits": round(in_turn / medians["exact"], 2),
        "ratio_fast_cached_splits": round(in_turn / medians["fast"], 2),
        "verdicts_equal": not any(unlike.values()),
        "verdicts_unlike": unlike,
        "verdict_agreement": {name: round(share, 4) for name, share in agreement.items()},
        "documents": len(rows),
        "documents_compared": compared,
        "removed": {name: sum(not v[0] for v in found) for name, found in expected.items()},
        "mb_per_core_second": round(size / 1e6 / medians["exact"], 2),
        "mb_per_core_second_fast": round(size / 1e6 / medians["fast"], 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
