"""The card of a corpus stage: the funnel adds up, what decided is bold, pairs are diffs, and no content breaks it."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from gristmill.flows.cards import card_markdown, text
from gristmill.flows.funnel import by_reason, by_source, joined_histograms
from tests.flows.report_fixture import make_run, write_rows

FUNNEL = [
    {"source": "web", "outcome": "kept", "reason": "", "documents": 90, "bytes_in": 900, "bytes_out": 900},
    {"source": "web", "outcome": "removed", "reason": "too short", "documents": 10, "bytes_in": 20, "bytes_out": 0},
    {"source": "code", "outcome": "changed", "reason": "e-mail", "documents": 5, "bytes_in": 60, "bytes_out": 55},
    {"source": "code", "outcome": "removed", "reason": "too short", "documents": 1, "bytes_in": 2, "bytes_out": 0},
]


def card(folder: Path, **manifest: Any) -> str:
    return card_markdown({"stage": "sieve", **manifest}, folder)


def section(shown: str, title: str) -> str:
    """The lines from a heading to the next of the same depth."""
    after = shown.split(f"{title}\n", 1)[1]
    depth = title.split(" ", 1)[0]
    return after.split(f"\n{depth} ", 1)[0]


def test_the_funnel_adds_up_by_source_and_by_reason(tmp_path: Path) -> None:
    write_rows(tmp_path / "funnel.jsonl", FUNNEL)
    shown = card(tmp_path)
    assert "| source | documents in | kept | changed | removed | bytes in | bytes out |" in shown
    assert "| web | 100 | 90 | 0 | 10 | 920 B | 900 B |" in shown
    assert "| all | 106 | 90 | 5 | 11 | 982 B | 955 B |" in shown
    assert "| removed | too short | 11 | 22 B | 0 B | 10.38% |" in shown
    assert shown.count("data:image/png") == 2
    assert [row["source"] for row in by_source(FUNNEL)] == ["web", "code", "all"]
    assert sum(row["documents"] for row in by_reason(FUNNEL)) == 16
    named_so = by_source([{**row, "source": "all" if row["source"] == "web" else "code"} for row in FUNNEL])
    assert [row["documents in"] for row in named_so] == [100, 6, 106]


def test_tokens_are_shown_where_a_stage_counts_them(tmp_path: Path) -> None:
    write_rows(tmp_path / "funnel.jsonl", [{**row, "tokens_in": 7, "tokens_out": 3} for row in FUNNEL])
    assert "| web | 100 | 90 | 0 | 10 | 920 B | 900 B | 14 | 6 |" in card(tmp_path)


def test_changed_documents_count_as_kept_in_a_histogram() -> None:
    rows = [
        {"name": "characters", "outcome": o, "low": 64.0, "documents": n}
        for o, n in (("kept", 3), ("changed", 2), ("removed", 1))
    ]
    assert joined_histograms(rows) == {"characters": {"kept": {64.0: 5}, "removed": {64.0: 1}}}


def test_what_decided_is_bold_and_nothing_else_is_a_mark(tmp_path: Path) -> None:
    nasty = "a|b ⟦<b>*c*</b>⟧ ⟦ d ⟧`e`⟦⟧ ⟦f"
    write_rows(tmp_path / "samples.jsonl", [{"outcome": "removed", "reason": "r", "source": "s", "text": nasty}])
    row = next(line for line in card(tmp_path).splitlines() if line.startswith("| r | s |"))
    assert "a\\|b \u200a**&lt;b&gt;\\*c\\*&lt;/b&gt;**\u200a \u200a**d**\u200a\\`e\\`\u200a**␣**\u200a ⟦f" in row
    assert row.replace("\\|", "").count("|") == 4


def test_markdown_reads_marks_as_bold_wherever_they_stand() -> None:
    """By a CommonMark parser: the bold part is the text between the marks, and nothing else is markup."""
    from markdown_it import MarkdownIt

    insides = ("b", "(b)", '"b"', " b ", "*b*", "b_c", "<i>b</i>", "`b`")
    for before, inside, after in product(("", "a", "a ", "(", "*", "é"), insides, ("", "c", " c", ")", "*", "中")):
        html = MarkdownIt().renderInline(text.cell(text.Marked(f"x{before}⟦{inside}⟧{after}")))
        bold = inside.strip().replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
        assert f"<strong>{bold}</strong>" in html, (before, inside, after)
        assert html.count("<") == 2, (before, inside, after)


def test_a_cut_inside_a_mark_closes_it() -> None:
    assert text.cell(text.Marked("⟦" + "x" * 50, 10)) == "\u200a**xxxxxxxx…**\u200a"


@pytest.mark.parametrize("outcome", ["removed", "kept"])
def test_at_most_twenty_samples_of_each_outcome(tmp_path: Path, outcome: str) -> None:
    rows = [{"outcome": outcome, "reason": "r", "id": f"id-{i}", "text": "t"} for i in range(30)]
    write_rows(tmp_path / "samples.jsonl", rows)
    assert card(tmp_path).count("| id-") == 20


def pair(kept: str, removed: str, differs: str = "") -> dict[str, Any]:
    names = {"removed": "x/1", "kept": "x/2", "similarity": 0.91}
    return {**names, "kept_text": kept, "removed_text": removed, "differs": differs}


def test_pairs_are_diffs_that_no_text_can_leave(tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", [pair("a b ``` c\n# no title", "a d ``` c\n# no title e")])
    shown = section(card(tmp_path), "## Duplicates, as diffs")
    assert "removed x/1 · kept x/2 · similarity 0.91" in shown
    assert "````diff\n  a\n- b\n+ d\n  ``` c # no title\n+ e\n````" in shown


def test_texts_that_differ_behind_what_is_kept_of_them_show_the_words(tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", [pair("same words", "same words", "−one +two … −gone  … +new")])
    assert "  same words\n- one\n+ two\n- gone \n+ new\n" in card(tmp_path)


def test_long_diffs_are_cut_and_say_so(tmp_path: Path) -> None:
    kept = " ".join(f"k{i} same{i}" for i in range(60))
    write_rows(tmp_path / "pairs.jsonl", [pair(kept, kept.replace("k", "r"))])
    shown = card(tmp_path)
    assert "… 140 lines more" in shown
    long = pair("w" * 5000, "v" * 5000)
    write_rows(tmp_path / "pairs.jsonl", [long])
    assert len(card(tmp_path)) < 1_000


def test_a_mixture_is_shown_before_and_after(tmp_path: Path) -> None:
    metrics = {"tokens_by_source": {"web": 300, "code": 100}, "run_tokens_by_source": {"web": 150, "code": 150}}
    shown = card(tmp_path, metrics=metrics)
    assert "| web | 300 | 75.0% | 150 | 50.0% | 0.50 × |" in shown
    assert "| code | 100 | 25.0% | 150 | 50.0% | 1.50 × |" in shown


def test_a_stage_of_sources_has_a_funnel_of_what_it_counts(tmp_path: Path) -> None:
    metrics = {"documents_by_source": {"web": 9}, "bytes_by_source": {"web": 90}, "quarantined_by_source": {"web": 1}}
    shown = card(tmp_path, metrics=metrics)
    assert "| web | 10 | 9 | 0 | 1 | 90 B |" in shown
    assert "| removed | set aside | 1 | 0 B | 10.00% |" in shown
    assert "### Documents by source" not in shown


@pytest.mark.parametrize("file", ["repeats.jsonl", "matches.jsonl", "packing.jsonl"])
def test_tables_of_other_stages_are_shown(tmp_path: Path, file: str) -> None:
    write_rows(tmp_path / file, [{"what": "of ⟦this⟧ span", "times": 12}])
    assert "| of \u200a**this**\u200a span | 12 |" in card(tmp_path)


def test_deciles_of_a_classifier_are_shown(tmp_path: Path) -> None:
    deciles = [{"from": i / 10, "to": (i + 1) / 10, "examples": 5, "good": i / 9} for i in range(10)]
    about = {"report": {"auc": 0.98765, "calibration_error": 0.0321, "deciles": deciles}}
    (tmp_path / "classifiers" / "prose").mkdir(parents=True)
    (tmp_path / "classifiers" / "prose" / "classifier.json").write_text(json.dumps(about))
    shown = card(tmp_path)
    assert "## Quality classifier of prose" in shown
    assert "area under the curve 0.9877, calibration error 0.0321" in shown
    assert "| 0.9 – 1 | 5 | 100.0% |" in shown
    assert shown.count("data:image/png") == 1


def test_a_whole_card_stays_small(tmp_path: Path) -> None:
    folder = make_run(tmp_path)["dedup"]
    long = [
        {"outcome": o, "reason": f"rule {i}", "source": "web", "id": "i" * 200, "text": "⟦w⟧ " * 80}
        for o in ("removed", "kept", "changed")
        for i in range(20)
    ]
    write_rows(folder / "samples.jsonl", long)
    shown = card_markdown(json.loads((folder / "manifest.json").read_text()), folder)
    assert len(shown) < 400_000
    assert shown.count("data:image/png") == 3
