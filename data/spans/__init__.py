"""The `spans` stage: repeated lines or paragraphs, then repeated spans of tokens, are cut out of documents.

    documents/, removed/, changed/, funnel.jsonl, histograms.jsonl, samples.jsonl   as every sieve (`sieve.py`)
    repeats/<shard>   of every line and span that goes: its document and characters, and those of the one that stays
    repeats.jsonl     the twenty most frequent of these, with their text

All passes read the shards as streams, and what partitions hold is bounded: a worker needs the same memory whatever
the corpus is. Places are characters of the documents as they came in.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from gristmill.data.documents import shards, write_json_lines
from gristmill.data.executor import Task, remove_work, run_tasks
from gristmill.data.sieve import conclude
from gristmill.data.spans.config import LinesConfig, SpansConfig, SubstringConfig
from gristmill.data.spans.cut import Cut, cut_marker, cut_shard, most_frequent
from gristmill.data.spans.exchange import Exchange
from gristmill.data.spans.lines import ask_lines, decide_lines
from gristmill.data.spans.search import Search
from gristmill.data.spans.substring import answer_links, ask_anchors, ask_links, ask_windows
from gristmill.data.spans.tables import answer_anchors, answer_lines, answer_windows
from gristmill.data.stage_types import Metrics, Progress

BYTES_A_PARTITION = 8 << 20  # of compressed shards: keys of a partition then fit one table, unless all text repeats
PARTITIONS = 2, 4096  # at least, at most; beyond, tables are filled in several passes


def remove_spans(config: SpansConfig, documents: Path, out: Path, *, workers: int, progress: Progress) -> Metrics:
    """Remove repeated lines and spans from documents, and documents of which too little is left.

    The metrics are those of every sieve, and: lines, line_characters, substrings, substring_characters (what went), and
    collisions (spans that stayed since their hashes agreed with another's and their text did not).

    Raises:
        ValueError: a shard of `documents` is damaged.
    """
    sources = shards(documents)
    search = _search(config, sources, out)
    passes = [*_line_passes(config, search, sources), *_substring_passes(config, search, sources)]
    passes.append(_cut_pass(config, search, sources, out))
    done, total = 0, sum(map(len, passes))
    for tasks in passes:
        run_tasks(tasks, workers, progress, done, total)
        done += len(tasks)
    metrics = {**conclude(out, sources), **_conclude_repeats(out, len(sources))}
    remove_work(out / "work")
    return metrics


def _search(config: SpansConfig, sources: list[Path], out: Path) -> Search:
    least, most = PARTITIONS
    size = sum(s.stat().st_size for s in sources)
    return Search(
        work=out / "work",
        shards=len(sources),
        partitions=min(most, max(least, size // BYTES_A_PARTITION)),
        kinds=tuple(config.kinds),
        lines=config.lines is not None,
        tokens=config.substring.tokens if config.substring else 0,
        within_documents=bool(config.substring and config.substring.within_documents),
    )


def _line_passes(config: SpansConfig, search: Search, sources: list[Path]) -> list[list[Task]]:
    if config.lines is None:
        return []
    exchange, lines = search.line_keys, config.lines
    return [
        [Task(ask_lines, (search, lines, n, s), exchange.asked(n)) for n, s in enumerate(sources)],
        _answers(answer_lines, exchange),
        [Task(decide_lines, (search, lines, n), search.lines_that_go(n)) for n in range(len(sources))],
    ]


def _substring_passes(config: SpansConfig, search: Search, sources: list[Path]) -> list[list[Task]]:
    if config.substring is None:
        return []
    anchors, windows, links = search.anchors, search.windows, search.links
    return [
        # its marker is what it writes last
        [Task(ask_anchors, (search, n, s), search.token_starts(n)) for n, s in enumerate(sources)],
        _answers(answer_anchors, anchors),
        [Task(ask_windows, (search, n, s), windows.asked(n)) for n, s in enumerate(sources)],
        _answers(answer_windows, windows),
        [Task(ask_links, (search, n), links.asked(n)) for n in range(len(sources))],
        [Task(answer_links, (search, n, s), links.answered(n)) for n, s in enumerate(sources)],
    ]


def _answers(answer: Callable[..., None], exchange: Exchange) -> list[Task]:
    return [Task(answer, (exchange, p), exchange.answered(p)) for p in range(exchange.partitions)]


def _cut_pass(config: SpansConfig, search: Search, sources: list[Path], out: Path) -> list[Task]:
    lines = config.lines or LinesConfig()
    cut = Cut(
        unit=lines.unit,
        drops_all_from=lines.least_documents if lines.keep == "none" else 0,
        substring=config.substring is not None,
        least_characters_left=config.least_characters_left,
    )
    return [Task(cut_shard, (search, cut, n, s, out), cut_marker(out, n)) for n, s in enumerate(sources)]


def _conclude_repeats(out: Path, count: int) -> Metrics:
    """Write repeats.jsonl; the sums over all shards."""
    parts = [json.loads(cut_marker(out, n).read_text(encoding="utf-8")) for n in range(count)]
    write_json_lines(out / "repeats.jsonl", most_frequent(row for part in parts for row in part["samples"]))
    names = ("lines", "line_characters", "substrings", "substring_characters", "collisions")
    return {name: sum(part["counts"][name] for part in parts) for name in names}


__all__ = ["LinesConfig", "SpansConfig", "SubstringConfig", "remove_spans"]
