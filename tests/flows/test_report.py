"""The report tells the run as it is: numbers that can be checked, words that follow, nothing from outside."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gristmill.flows.cards.folder import StageFolder
from gristmill.flows.report import ReportConfig, make_report, thinking, words
from gristmill.flows.report.costs import made_earlier, run_cost
from gristmill.flows.report.findings import gather


def _fixture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_fixture", Path(__file__).with_name("report_fixture.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fixture = _fixture()


def quiet(done: int, total: int, **values: float) -> None:
    assert 0 <= done <= total


def report(folders: dict[str, Path], out: Path, **config: Any) -> tuple[dict, dict, str]:
    out.mkdir()
    metrics = make_report(ReportConfig(**config), **folders, trimmed=folders["dedup"], out=out, progress=quiet)
    numbers = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return metrics, numbers, (out / "view" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict, dict, str]:
    root = tmp_path_factory.mktemp("run")
    folders = fixture.make_run(root)
    return (folders, *report(folders, root / "report"))


class Outline(HTMLParser):
    """Which tags are open when the page ends, what it points to, and its ids."""

    VOID = frozenset({"meta", "link", "br", "img", "path", "rect", "use", "image", "hr", "col"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("href", "src", "xlink:href", "srcset"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    return parser


def test_page_is_whole_and_needs_nothing_from_outside(run) -> None:
    *_, page = run
    parsed = outline(page)
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert all(link.startswith(("#", "data:")) for link in parsed.links)
    inside = {"#" + name for name in parsed.ids}
    assert {link for link in parsed.links if link.startswith("#")} <= inside
    assert "<script" not in page
    assert not re.findall(r"url\((?!#)", page)


def test_page_has_every_section_and_figure(run) -> None:
    *_, page = run
    for section in (
        "result",
        "pipeline",
        "corpus",
        "pretraining",
        "experts",
        "reinforcement",
        "thoughts",
        "discovery",
        "cost",
        "again",
        "lineage",
    ):
        assert f'id="{section}"' in page
    assert "unigram tokens 2.94" in page
    assert page.count("<svg") >= 14
    assert page.count('class="thought"') == 5
    assert "40 held-out problems, k = 4 samples" in page
    assert "Not in this report" not in page


def test_numbers_are_those_of_the_folders(run) -> None:
    folders, metrics, numbers, _ = run
    results = {r["model"]: r for r in StageFolder.open("evaluate", folders["evaluate"]).rows("results.jsonl")}
    assert metrics["final_pass1"] == results["rl"]["pass1"]
    assert metrics["rl_gain"] == pytest.approx(results["rl"]["pass1"] - results["cold_start"]["pass1"])
    assert metrics["rl_gain_low"] < metrics["rl_gain"] < metrics["rl_gain_high"]
    assert metrics["thought_growth"] > 1.2
    assert metrics["bpb_vs_unigram"] == pytest.approx(1.6 / 2.94, rel=0.02)  # the curve ends a little above 1.6
    assert numbers["headline"] == metrics
    assert numbers["absent"] == []
    assert numbers["corpus"]["removed"]["filter"]["removed_by_reason"]["too short"] == 118


def test_content_has_the_same_bytes_wherever_and_whenever_the_stages_ran(run, tmp_path: Path) -> None:
    folders, *_ = run
    moved = {name: tmp_path / "elsewhere" / name for name in folders}
    for name, folder in folders.items():
        shutil.copytree(folder, moved[name])
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest |= {"started": 1.0, "seconds": 5.0, "device_hours": 9.0, "environment": {"device": "cuda"}}
        (moved[name] / "manifest.json").write_text(json.dumps(manifest))
    report(folders, tmp_path / "one")
    report(folders, tmp_path / "two")
    report(moved, tmp_path / "three")
    content = {n: (tmp_path / n / "report.json").read_bytes() for n in ("one", "two", "three")}
    assert content["one"] == content["two"] == content["three"]
    assert (tmp_path / "one/view/report.html").read_bytes() == (tmp_path / "two/view/report.html").read_bytes()


@pytest.mark.parametrize("steps", [1, 3])
def test_a_tiny_run_with_nothing_removed_has_a_report(tmp_path: Path, steps: int) -> None:
    folders = fixture.make_run(tmp_path, steps=steps, problems=2, samples=1, removed=False)
    _, numbers, page = report(folders, tmp_path / "report")
    assert outline(page).open == []
    assert "No stage counts a removed document" in page
    assert "No examples of what dedup removed" in page
    assert "nan" not in json.dumps(numbers)


def test_what_is_missing_is_named_and_not_fatal(tmp_path: Path) -> None:
    folders = fixture.make_run(tmp_path, steps=3, problems=4)
    for gone in (
        "evaluate/results.jsonl",
        "evaluate/samples.jsonl",
        "pretrain/curves.jsonl",
        "pretrain/expert_load.jsonl",
        "rl_zero/curves.jsonl",
        "rl/curves.jsonl",
        "export/manifest.json",
    ):
        (tmp_path / gone).unlink()
    shutil.rmtree(tmp_path / "evaluate" / "answers")
    metrics, numbers, page = report(folders, tmp_path / "report")
    assert outline(page).open == []
    assert "rl_gain" not in metrics
    assert "export has no manifest" in numbers["absent"]
    assert "pretrain/curves.jsonl is empty" in numbers["absent"]
    for said in (
        "left no results",
        "Pretraining left no curves",
        "No expert load",
        "Neither RL run left curves",
    ):
        assert said in page


def test_empty_folders_have_a_report_that_says_so(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in fixture.STAGES}
    for folder in folders.values():
        folder.mkdir()
    metrics, numbers, page = report(folders, tmp_path / "report")
    assert metrics == {"tokens": 0, "flops": 0}
    assert len([s for s in numbers["absent"] if s.endswith("has no manifest")]) == len(folders)
    assert "no result after reinforcement learning" in page


def test_what_a_model_wrote_cannot_become_markup(tmp_path: Path) -> None:
    folders = fixture.make_run(tmp_path, steps=2, problems=4)
    evil = "<script>alert(1)</script>\n</think>\n<img src=x onerror=alert(1)>"
    fixture.write_rows(
        folders["evaluate"] / "samples.jsonl",
        [{"question": evil, "reference": "1", "before": evil, "after": evil}],
    )
    *_, page = report(folders, tmp_path / "report", title="<b>title</b>")
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;b&gt;title&lt;/b&gt;" in page


@pytest.mark.parametrize(
    ("thought", "terms", "way"),
    [
        ("1+2=3\n3+4=7\n7-1=6", 4, "thorough"),
        ("1+2+4=7\n7-1=6", 4, "hasty"),
        ("1+2+4=7\n7-1+2=8", 5, "hasty"),
        ("\n \n", 4, "guess"),
        ("a\nb\nc\nd\ne\nf", 4, "other"),
    ],
)
def test_ways_of_thinking_are_told_by_lines(thought: str, terms: int, way: str) -> None:
    assert thinking.way_of_thinking(thought, terms) == way


def test_ways_of_thinking_of_real_cold_start_thoughts_are_their_styles() -> None:
    from gristmill.data.arithmetic import draw_chain, generator
    from gristmill.data.arithmetic import thought as write

    for index in range(60):
        chain = draw_chain(generator(1, "x", index), (3, 6), 9)
        for style in ("thorough", "hasty", "guess"):
            assert thinking.way_of_thinking(write(chain, style), chain.terms) == style


def test_a_response_that_does_not_close_its_thought_once_has_none() -> None:
    assert thinking.thought_of("1+1=2") is None
    assert thinking.thought_of("a</think>b</think>c") is None
    assert thinking.thought_of("a\n</think>\n3") == "a\n"


def _with_gain(low: float, high: float) -> dict[str, Any]:
    gain = {"gain": (low + high) / 2, "low": low, "high": high, "method": "", "before": "", "after": ""}
    results = {"cold_start": {"pass1": 0.5, "thought_length": 10}, "rl": {"pass1": 0.6, "thought_length": 20}}
    return {"gains": {"rl_gain": gain}, "results": results}


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.1, 0.2, "raised"), (-0.2, -0.1, "lowered"), (-0.1, 0.3, "did not measurably change")],
)
def test_headline_claims_no_more_than_the_interval(low: float, high: float, said: str) -> None:
    sentence = words.headline(_with_gain(low, high))
    assert f"Reinforcement learning {said} the share" in sentence
    assert "2 times as long" in sentence


def test_words_on_ways_of_thinking_follow_the_shares() -> None:
    def model(thorough: float, right: float, responses: int = 400) -> dict[str, Any]:
        count = round(thorough * responses)
        return {
            "responses": responses,
            "shares": {"thorough": thorough},
            "right": {"thorough": right, "guess": 0.1},
            "counts": {"thorough": count, "hasty": 0, "guess": responses - count},
        }

    def said(before: dict, after: dict) -> str:
        return " ".join(words.discovered({"thinking": {"models": {"cold_start": before, "rl": after}}}, {}))

    assert "writing every step pays" in said(model(0.3, 0.9), model(0.9, 0.9))
    assert "moved away" in said(model(0.6, 0.9), model(0.2, 0.9))
    assert "no more than chance" in said(model(0.30, 0.9), model(0.32, 0.9))
    assert "not to reckon better" in said(model(0.3, 0.9), model(0.9, 0.91))
    assert "learned to reckon better" in said(model(0.3, 0.6), model(0.9, 0.9))
    assert "reckon" not in said(model(0.3, 0.6, responses=10), model(0.9, 1.0, responses=10))


def test_paired_interval_is_narrower_than_that_of_independent_means(tmp_path: Path) -> None:
    folders = fixture.make_run(tmp_path, steps=2, problems=60)
    paired = gather({n: StageFolder.open(n, p) for n, p in folders.items()})["gains"]["rl_gain"]
    shutil.rmtree(folders["evaluate"] / "answers")
    apart = gather({n: StageFolder.open(n, p) for n, p in folders.items()})["gains"]["rl_gain"]
    assert paired["method"].startswith("paired")
    assert apart["method"].startswith("two independent")
    assert paired["gain"] == apart["gain"]
    # The synthetic answers are independent, so the two agree but for the bootstrap's own noise.
    assert paired["high"] - paired["low"] == pytest.approx(apart["high"] - apart["low"], rel=0.2)


def test_cost_takes_the_ledger_of_the_manifest_where_there_is_one(run) -> None:
    folder = StageFolder.open("rl", run[0]["rl"])
    billed = StageFolder("rl", folder.path, {**folder.manifest, "ledger": {"device": "H100", "devices": 4}})
    cost = run_cost({"rl": billed})
    assert cost.device_hours == pytest.approx(4 * fixture.SECONDS["rl"] / 3600)
    assert [d.name for d in cost.devices] == ["H100"]
    unknown = StageFolder("rl", folder.path, {**folder.manifest, "ledger": {"device": "abacus"}})
    assert run_cost({"rl": unknown}).stages[0].estimate is None


def test_cost_sums_cores_and_names_what_came_from_the_store(run) -> None:
    folders = {n: StageFolder.open(n, p) for n, p in run[0].items()}
    cost = run_cost(folders)
    seconds = sum(fixture.SECONDS.values())
    assert cost.seconds == pytest.approx(seconds)
    assert cost.device_hours == pytest.approx(2 * seconds / 3600)  # two threads: two cores
    assert made_earlier(folders) == set()
    old = {n: StageFolder(n, f.path, {**f.manifest}) for n, f in folders.items()}
    for name in ("ingest", "dedup"):
        old[name].manifest["started"] -= 86_400
    assert made_earlier(old) == {"ingest", "dedup"}
    for folder in old.values():
        folder.manifest["started"] = "2026-01-02T03:04:05Z"
    assert made_earlier(old) == set()
