"""The filter stage: rules by kind and in order, what is shown of a removal, odd documents, and the same bytes."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gristmill.data.documents import read_rows, shards
from gristmill.data.executor import close_cluster
from gristmill.data.filters import FilterConfig, Profile, check_filters, filter_documents
from gristmill.data.filters.profile import sections
from gristmill.data.filters.rule import RuleConfig
from gristmill.data.filters.words import ExactSplitter
from gristmill.data.sieve import Edit, Verdict, edited
from gristmill.data.stage_types import silent

PROSE = (
    "The committee met on Tuesday to talk about the budget for the coming year, and it was agreed that the plan "
    "should be read again by the people who wrote it. They had asked for more time, and that was given to them. Some "
    "of those who were there thought otherwise, because a year had already gone by with nothing to show for it; but in "
    "the end nobody wanted to be the one to say so aloud, with the chair looking at the clock and the door still open. "
)
EVERY_RULE = {name: {} for name in sections() if name not in ("blocklist", "quality", "hub_classifier")}


def row(text: str, name: str = "a", kind: str = "prose") -> dict[str, Any]:
    known = {"source": "s", "kind": kind, "url": None, "date": None, "licence": None}
    return {"text": text, "id": f"s/{name}", "metadata": known}


def judged(text: str, **profile: Any) -> Verdict:
    return Profile.model_validate({"mode": "fast", **profile}).judge()(row(text))


@pytest.mark.parametrize(
    ("rule", "bound", "text"),
    [
        ("gopher_repetition", "most_duplicate_lines", "One line.\nOne line.\nAnother."),
        ("gopher_repetition", "most_duplicate_paragraphs", "One piece.\n\nOne piece.\n\nAnother."),
        ("gopher_quality", "most_symbols", "# One line.\nAnother."),
        ("gopher_quality", "most_bullet_lines", "- One line.\nAnother."),
        ("gopher_quality", "most_ellipsis_lines", "One line…\nAnother."),
    ],
)
def test_a_bound_of_0_allows_none_and_null_allows_all(rule: str, bound: str, text: str) -> None:
    n_grams = ("top_n_grams", "duplicate_n_grams")
    section = Profile.model_validate({rule: {}}).model_dump()[rule]
    loose = {name: () if name in n_grams or name == "stop_words" else None for name in section}
    assert judged(text, **{rule: loose}).reason == ""
    assert judged(text, **{rule: {**loose, bound: 0}}).reason.startswith(f"{rule}: ")
    assert judged("One line.", **{rule: {**loose, bound: 0}}).reason == ""


WITHOUT_SPACY = """
import sys
from gristmill.data.filters import FilterConfig, Profile, check_filters
config = FilterConfig()
check_filters(config)
known = {"source": "s", "kind": "code", "url": None, "date": None, "licence": None}
profile = Profile.model_validate({"mode": "exact", "length": {}, "lines": {}, "language": {}, "pii": {}})
for judge in (config.profiles["code"].judge(), profile.judge()):
    judge({"text": "A line of words, and another one.\\n" * 3, "id": "s/a", "metadata": known})
assert "spacy" not in sys.modules, "loaded"
"""


def test_rules_that_count_no_words_load_no_splitter() -> None:
    """In a process of its own, since another test may have loaded it here."""
    subprocess.run([sys.executable, "-P", "-c", WITHOUT_SPACY], check=True)


WITHOUT_TORCH = """
import sys
from gristmill.data.filters.words import ExactSplitter, code_points
text = "I don't know."
assert ExactSplitter("en").split(text, code_points(text)).of(text) == ["I", "do", "n't", "know", "."]
assert "spacy" in sys.modules
assert "torch" not in sys.modules, "loaded"
import torch
assert torch.ones(2).sum() == 2
"""


def test_the_splitter_loads_no_torch_and_leaves_it_loadable() -> None:
    subprocess.run([sys.executable, "-P", "-c", WITHOUT_TORCH], check=True)


def test_a_language_without_rules_is_refused_before_the_run() -> None:
    config = FilterConfig.model_validate({"profiles": {"prose": {"words": "zh", "gopher_quality": {}}}})
    with pytest.raises(ValueError, match=r"profile of 'prose'.*'zh'.*zh_Hani.*use mode fast"):
        check_filters(config)
    check_filters(FilterConfig.model_validate({"profiles": {"prose": {"words": "zh", "mode": "fast"}}}))


def test_shards_of_one_process_share_a_splitter(monkeypatch) -> None:
    made: list[str] = []

    class Counted(ExactSplitter):
        def __init__(self, language: str) -> None:
            made.append(language)
            super().__init__(language)

    monkeypatch.setattr("gristmill.data.filters.words.ExactSplitter", Counted)
    monkeypatch.setattr("gristmill.data.filters.words._of_thread", threading.local())
    profile = Profile.model_validate({"gopher_quality": {}})
    verdicts = [profile.judge()(row(PROSE)) for _ in range(3)]
    assert made == ["en"]
    assert verdicts == [verdicts[0]] * 3


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("prose", PROSE, None),
        ("prose", "too short", "length: too short"),
        (
            "prose",
            "Der Ausschuss hat am Dienstag über den Haushalt des kommenden Jahres gesprochen. " * 8,
            "language: another language",
        ),
        ("code", "x = 1\n" * 200, "lines: duplicate lines"),
        ("code", "y = '" + "a" * 2000 + "'\n", "lines: line too long"),
        ("lessons", "7+5=12\n12-3=9\nAnswer: 9", None),
        ("unheard of", "anything", None),
    ],
)
def test_rules_by_kind(kind: str, text: str, reason: str | None, tmp_path: Path, laid_out) -> None:
    out = tmp_path / "out"
    out.mkdir()
    documents = laid_out(tmp_path / "in", [row(text, kind=kind)])
    metrics = filter_documents(FilterConfig(), documents, out, workers=0, progress=silent)
    assert metrics["removed_by_reason"] == ({reason: 1} if reason else {})
    assert metrics["documents_out"] == (0 if reason else 1)
    assert [r["text"] for kind in ("documents", "removed") for s in shards(out, kind) for r in read_rows(s)] == [text]


def test_kept_documents_carry_their_language() -> None:
    verdict = judged(PROSE, language={})
    assert verdict.metadata["language"] == "en"
    assert verdict.metadata["language_score"] == pytest.approx(verdict.values["language certainty"], abs=1e-4)
    known = row(PROSE)
    known["metadata"]["language"] = "eng"  # a source knows better
    assert "language" not in Profile.model_validate({"language": {}}).judge()(known).metadata
    german = "Der Ausschuss hat am Dienstag über den Haushalt gesprochen."
    assert judged(german, language={"label_only": True}).metadata["language"] == "de"
    assert judged(german, language={"languages": []}).reason == ""
    assert judged("zq 7 xj", language={"languages": []}).reason == "language: uncertain"


@pytest.mark.parametrize(
    ("profile", "text", "shown"),
    [
        ({"lines": {}}, "a\nb\na\nb\n  a \n", ["a", "b", "a"]),
        ({"lines": {"longest_line": 5}}, "short\n too long \nend", ["too long"]),
        ({"gopher_repetition": {}}, "one line\nanother\none line\none line", ["one line", "one line"]),
        ({"gopher_repetition": {}}, "first.\n\nsame here.\n\nsame here.\n\nsame here.", ["same here.", "same here."]),
        ({"gopher_repetition": {}}, "go on, go on, and go on, then", ["go on", "go on", "go on"]),
        ({"gopher_quality": {}}, "# word " * 60, ["#"] * 40),
        (
            {"gopher_quality": {"most_ellipsis_lines": 0.3}},
            f"{PROSE}\n and so on...\nand on…  ",
            ["and so on...", "and on…"],
        ),
        (
            {"gopher_quality": {"most_bullet_lines": 0.5}},
            f"{PROSE}\n - one\n• two",
            ["- one", "• two"],
        ),
        ({"c4": {}}, "A good line, it is.\nA bad { line, it is.\n", ["A bad { line, it is."]),
        ({"fineweb": {}}, "No end here\nnor here\n", ["No end here", "nor here"]),
        (
            {"fineweb": {"most_duplicate_characters": 0.1}},
            "A line that ends and is quite long.\nA line that ends and is quite long.\n",
            ["A line that ends and is quite long."],
        ),
    ],
)
def test_what_decided_is_shown(profile: dict, text: str, shown: list[str]) -> None:
    verdict = judged(text, **profile)
    assert verdict.reason.startswith(next(iter(profile)) + ": ")
    assert [text[a:b] for a, b in verdict.because["spans"]] == shown


def test_a_rule_sees_what_the_rules_before_it_left() -> None:
    text = (
        "No end here [2]\n"
        + "A line of the text [1] that stays. Yes, it is so.\n" * 3
        + "  Mail me: a@example.org.  \n"
    )
    c4 = judged(text, c4={})
    left = edited(text, c4.edits)
    assert left == "A line of the text  that stays. Yes, it is so.\n" * 3 + "Mail me: a@example.org."
    assert {e.reason for e in c4.edits} == {"c4: no_terminal_punct", "c4: citation", "c4: white space"}
    both = judged(text, c4={}, pii={})
    assert edited(text, both.edits) == left.replace("a@example.org", "<email>")
    # A span of a later rule is said in characters of the text that came in.
    gone = judged(text, c4={}, lines={"most_duplicate_lines": 0.4}, order=("c4", "lines"))
    assert gone.reason == "lines: duplicate lines"
    assert {text[a:b] for a, b in gone.because["spans"]} == {"A line of the text [1] that stays. Yes, it is so."}
    # In its usual place, before c4, it sees one line more, and two of five are no more than the bound.
    assert judged(text, c4={}, lines={"most_duplicate_lines": 0.4}).reason == ""
    assert judged(text, c4={}, length={"least_characters": 175}, order=("c4",)).reason == "length: too short"


def test_the_stage_writes_edits_that_give_the_text(tmp_path: Path, laid_out) -> None:
    text = "No end here\n" + "A line of the text that stays. Yes, it is so.\n" * 3
    out = tmp_path / "out"
    out.mkdir()
    config = FilterConfig.model_validate({"profiles": {"prose": {"mode": "fast", "c4": {}}}})
    metrics = filter_documents(config, laid_out(tmp_path / "in", [row(text)]), out, workers=0, progress=silent)
    assert metrics["changed_by_reason"] == {"c4: no_terminal_punct": 1}
    (kept,) = [r for s in shards(out) for r in read_rows(s)]
    (changed,) = [r for s in shards(out, "changed") for r in read_rows(s)]
    assert edited(text, [Edit(**e) for e in changed["edits"]]) == kept["text"] != text


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_workers_and_shards_change_no_verdict(mode: str, tmp_path: Path, bytes_of, laid_out) -> None:
    rows = [row(f"{PROSE[i:]} And that is number {i}.\nNo end here", str(i)) for i in range(0, 120, 3)]
    rows += [row("short", f"s{i}") for i in range(9)] + [row(f"(= x) {PROSE} isn't it :) ", "f")]
    softer = {"c4": {"least_sentences": 2}, "c4_paragraphs": {"least_paragraphs": 1}}
    config = FilterConfig.model_validate({"profiles": {"prose": {"mode": mode, **EVERY_RULE, **softer}}})
    made, decided = [], []
    for name, workers, a_shard in (("a", 0, 10), ("b", 2, 10), ("c", 0, 7)):
        out = tmp_path / name
        out.mkdir()
        filter_documents(
            config, laid_out(tmp_path / f"in{a_shard}", rows, a_shard), out, workers=workers, progress=silent
        )
        made.append(bytes_of(out))
        decided.append([r for kind in ("documents", "removed") for s in shards(out, kind) for r in read_rows(s)])
    close_cluster()
    assert made[0] == made[1]
    assert any("reason" in r for r in decided[0])
    assert sum("reason" not in r for r in decided[0]) > 30
    assert sorted(decided[0], key=lambda r: r["id"]) == sorted(decided[2], key=lambda r: r["id"])


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize(
    "text", ["", " ", "\x00", "\x00 \x00\n" * 50, "\n" * 9, "\u2028", "\ud7ff\U0010ffff", "…", "{"]
)
def test_odd_texts_are_judged(mode: str, text: str) -> None:
    for name in EVERY_RULE:
        verdict = judged(text, mode=mode, **{name: {}})
        assert not verdict.reason or verdict.reason.startswith(f"{name}: ")
        edited(text, verdict.edits)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_every_language_is_judged(mode: str, shared_data: Path) -> None:
    off = {"gopher_quality": {"least_words": None, "least_mean_length": None, "most_mean_length": None}}
    judge = Profile.model_validate({"mode": mode, **EVERY_RULE, **off, "language": {"label_only": True}}).judge()
    reasons = set()
    with gzip.open(shared_data / "corpus" / "udhr.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            document = row(json.loads(line)["text"][:3000])
            verdict = judge(document)
            edited(document["text"], verdict.edits)
            reasons.add(verdict.reason)
    assert len(reasons) > 3


LOOSE = {
    "lines": {"most_duplicate_lines": None, "longest_line": None},
    "language": {"label_only": True},
    "gopher_repetition": {"top_n_grams": [], "duplicate_n_grams": [[10, 1]]},
    "gopher_quality": {
        **dict.fromkeys(("least_words", "most_words", "least_mean_length", "most_mean_length"), None),
        **{"least_lettered_words": None, "least_stop_words": None},
    },
    "c4": {"need_end_mark": False, "least_words_a_line": None, "least_sentences": 0, "longest_word": None},
    "c4_paragraphs": {"least_paragraphs": 1},
    "fineweb": {"least_ended_lines": 0},
}
"""Every rule, and none that removes long lines."""
TOO_MANY = "gopher_repetition: too many words"
ONE_LINES = {
    "words": "word and the others of it ",
    "one run": "x",
    "marks": "(",
    "dots": ".",
    "addresses": "a.b/",
    "blanks": " ",
    "ideographs": "語",
    "brackets": "[1] {",
    "faces": ": ) ",
}


@pytest.mark.parametrize("piece", ONE_LINES)
def test_time_grows_with_the_length_of_a_line(piece: str) -> None:
    grows_linearly(ONE_LINES[piece], 300_000, "fast")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("piece", ONE_LINES)
def test_time_grows_with_the_length_of_a_line_of_50_megabytes(piece: str, mode: str) -> None:
    grows_linearly(ONE_LINES[piece], 5_000_000, mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_a_worker_under_its_limit_judges_lines_of_50_megabytes(mode: str, tmp_path: Path, laid_out) -> None:
    """A worker that outgrows the default limit of memory is ended, and after some more the run is refused."""
    size, most = 50_000_000, 4_000_000
    lines = {name: piece * (size // len(piece.encode())) for name, piece in ONE_LINES.items()}
    lines["numbers"] = " ".join(f"{i:x}" for i in range(8_000_000))[:size]
    lines["runs of marks"] = " ".join("(" * (3_900_000 + i) for i in range(12))
    lines["numbers just below"] = " ".join(f"{i:09x}" for i in range(most))
    lines["faces just below"] = ": ) " * (most // 2)
    rows = [row(text, name) for name, text in [*lines.items(), ("prose", PROSE)]]
    documents, out = laid_out(tmp_path / "in", rows, 1), tmp_path / "out"
    del rows
    out.mkdir()
    config = FilterConfig.model_validate({"profiles": {"prose": {"mode": mode, **EVERY_RULE, **LOOSE}}})
    try:
        metrics = filter_documents(config, documents, out, workers=1, progress=silent)
    finally:
        close_cluster()
    assert metrics["documents_in"] == len(lines) + 1
    assert {r["id"][2:]: r["reason"] for s in shards(out, "removed") for r in read_rows(s)} == {
        **dict.fromkeys(
            ("words", "marks", "runs of marks", "addresses", "ideographs", "brackets", "faces", "numbers"), TOO_MANY
        ),
        "blanks": "gopher_quality: gopher_short_doc",
        "dots": "gopher_quality: gopher_too_many_ellipsis",
    }


def grows_linearly(piece: str, size: int, mode: str) -> None:
    """Ten times the text takes less than thirty times as long, where time by the square would be a hundred times."""
    off = {"gopher_quality": {"least_words": None, "most_words": None}, "length": {"least_characters": 0}}
    profile = Profile.model_validate({"mode": mode, **EVERY_RULE, **off, "language": {"label_only": True}})
    splitter, rules = profile.splitter(), profile.rules()

    def seconds(length: int) -> float:
        from gristmill.data.filters.rule import judge_in_turn

        text = (piece * (length // len(piece) + 1))[:length]
        start = time.process_time()
        for rule in rules:
            judge_in_turn([rule], row(text), splitter)
        return time.process_time() - start

    seconds(1000)
    assert seconds(10 * size) < 30 * max(seconds(size), 0.02)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"order": ["c5"]}, "order names 'c5', which is no rule"),
        ({"order": ["c4", "c4"]}, "order names a rule twice"),
        ({"language": {"languages": ["english"]}}, "which the identifier does not know"),
        ({"length": {"least_characters": 9, "most_characters": 8}}, "no document would stay"),
        ({"fineweb": {"stop_characters": ["..."]}}, "single characters"),
        ({"gopher_quality": {"most_word": 3}}, "Extra inputs are not permitted"),
    ],
)
def test_profiles_that_make_no_sense_are_refused(profile: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Profile.model_validate(profile)


def test_every_field_of_every_rule_is_explained() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rules.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z0-9_]+)`", page))
    for section in sections():
        (rule,) = [t for t in Profile.model_fields[section].annotation.__args__ if t is not type(None)]
        assert issubclass(rule, RuleConfig)
        assert f"\n## {section}\n" in page
        missing = set(rule.model_fields) - named
        assert not missing, (section, missing)
