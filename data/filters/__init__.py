"""The `filter` stage: rules on documents, by kind; what is removed or edited is kept with the rule that asked for it.

Each document is split into words once, and every rule counts on the same arrays: see `rule.py` for how rules follow
each other, `profile.py` for the rules there are, and docs/rules.md for each with its source.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from gristmill.data.config import Config
from gristmill.data.documents import Row, shards
from gristmill.data.executor import Task, remove_work, run_tasks
from gristmill.data.filters.gopher import GopherQuality, GopherRepetition
from gristmill.data.filters.language import Language
from gristmill.data.filters.lines import Length, Lines
from gristmill.data.filters.outside import check_outside, made_ready, outside_files, reports
from gristmill.data.filters.pii import Pii
from gristmill.data.filters.profile import Profile
from gristmill.data.sieve import KEEP, Verdict, conclude, sieve_shard, tally_path
from gristmill.data.stage_types import Metrics, Progress


class FilterConfig(Config):
    """A profile of rules for each kind of document; a kind without a profile passes whole."""

    profiles: dict[str, Profile] = Field(
        default_factory=lambda: {
            "prose": Profile(
                length=Length(),
                language=Language(),
                gopher_quality=GopherQuality(),
                gopher_repetition=GopherRepetition(),
            ),
            "code": Profile(length=Length(least_characters=200), lines=Lines()),
            "lessons": Profile(length=Length(least_characters=20)),
        },
        title="Profiles",
        description="Rules by kind of document: prose, code, lessons.",
    )


def rule_files(config: FilterConfig) -> list[str]:
    """The files outside the store that rules are read from; their contents belong to the stage's key.

    Raises:
        ValueError: a pattern names no file.
    """
    return outside_files(config.profiles)


def check_filters(config: FilterConfig) -> None:
    """Refuse languages without a splitter, and lists, examples and models that cannot be read, before anything runs.

    Raises:
        ValueError: with the language or the file, and what to do.
    """
    for kind, profile in config.profiles.items():
        try:
            profile.check()
        except ValueError as error:
            raise ValueError(f"the profile of {kind!r}: {error}") from error
    check_outside(config.profiles)


def filter_documents(config: FilterConfig, documents: Path, out: Path, *, workers: int, progress: Progress) -> Metrics:
    """Write documents/ (what passed, with the edits made), removed/, changed/ and the tables of `sieve.conclude`.

    A quality classifier of a profile is trained first, into classifiers/<kind>; the metrics say how well it tells.

    Raises:
        ValueError: a shard of `documents` is damaged, or a profile cannot be made (a language's words, a model).
    """
    sources = shards(documents)
    ready = config.model_copy(update={"profiles": made_ready(config.profiles, sources, out / "classifiers")})
    run_tasks([Task(_filter_shard, (ready, s, out), tally_path(out, s)) for s in sources], workers, progress)
    metrics = conclude(out, sources) | reports(out / "classifiers")
    remove_work(out / "work")
    return metrics


def _filter_shard(config: FilterConfig, shard: Path, out: Path) -> None:
    """One shard; the rules of a kind are made when the first document of it comes."""
    judges: dict[str, Callable[[Row], Verdict]] = {}

    def judge(row: Row, place: int) -> Verdict:
        kind = row["metadata"]["kind"]
        if kind not in config.profiles:
            return KEEP
        if kind not in judges:
            judges[kind] = config.profiles[kind].judge()
        return judges[kind](row)

    hides = {kind: Pii(profile.pii) for kind, profile in config.profiles.items() if profile.pii is not None}

    def hide(row: Row) -> list[tuple[int, int]]:
        pii = hides.get(row["metadata"]["kind"])
        return [(start, end) for _, start, end in pii.findings(row["text"])] if pii else []

    sieve_shard(shard, out, judge, hide)


__all__ = ["FilterConfig", "Profile", "check_filters", "filter_documents", "rule_files"]
