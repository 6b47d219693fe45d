"""What counts as seen in training, and how votes are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gristmill.data.arithmetic import draw_chain, lesson, thought
from gristmill.data.problems import ProblemsConfig, make_problems
from gristmill.data.stage_types import silent
from gristmill.model.evaluation import majority, seen_in_training

CHAIN = "12-8=4\n4+7=11\n11-3=8"


def problem(identifier: str, question: str, solution: str, final: int) -> dict[str, Any]:
    return {"id": identifier, "question": question, "answer": f"{solution}\n#### {final}"}


def seen(
    tmp_path: Path, laid_out: Any, texts: list[str], train: list[dict[str, Any]], *asked: dict[str, Any]
) -> set[str]:
    rows = [{"text": t, "id": f"x/{i}", "metadata": {"source": "x", "kind": "prose"}} for i, t in enumerate(texts)]
    documents = laid_out(tmp_path / "in", rows)
    for name, held in (("cold_start", []), ("train", train)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in held))
    return seen_in_training(list(asked), tmp_path, documents)


def test_a_short_chain_is_not_seen_in_a_longer_one(tmp_path: Path, laid_out: Any) -> None:
    asked = problem("a", "12-8+7-3=?", CHAIN, 8)
    longer = [f"12-8+7-3+8=?\n{CHAIN}\n8+8=16\nAnswer: 16", f"15-3-8+7-3=?\n15-3=12\n{CHAIN}\nAnswer: 8"]
    assert seen(tmp_path, laid_out, longer, [], asked) == set()


def test_a_question_and_a_whole_solution_are_seen(tmp_path: Path, laid_out: Any) -> None:
    asked = problem("a", "12-8+7-3=?", CHAIN, 8)
    told = problem("b", "Ben has 12 pens, sells 8, buys 7, gives 3. How many pens?", CHAIN, 8)
    other = problem("c", "3+4=?", "3+4=7", 7)
    assert seen(tmp_path / "1", laid_out, [f"Exercises\n{CHAIN}\nAnswer: 8"], [], asked, other) == {"a"}
    assert seen(tmp_path / "2", laid_out, ["see 12-8+7-3=? below"], [], asked, other) == {"a"}
    assert seen(tmp_path / "3", laid_out, ["112-8+7-3=? below, and 13+4=?"], [], asked, other) == set()
    assert seen(tmp_path / "4", laid_out, ["nothing"], [told], asked, other) == {"a"}  # the same sums in other words


def test_generated_problems_are_in_no_lesson(tmp_path: Path, laid_out: Any) -> None:
    made = ProblemsConfig(cold_start=200, train=200, test=200, least_terms=4, most_terms=6)
    out = tmp_path / "problems"
    out.mkdir()
    make_problems(made, out, 0, progress=silent)
    rows = [{"text": lesson(0, i), "id": f"l/{i}", "metadata": {"source": "l", "kind": "lessons"}} for i in range(3000)]
    test = [json.loads(line) for line in (out / "test.jsonl").read_text().splitlines()]
    chain = draw_chain(np.random.default_rng(0), (5, 5), 9)
    planted = problem("planted", f"{chain.symbols}=?", thought(chain, "thorough"), chain.answer)
    rows[7]["text"] += f"\n{planted['question']}\n{thought(chain, 'thorough')}\nAnswer: {chain.answer}\n"
    assert seen_in_training([*test, planted], out, laid_out(tmp_path / "in", rows)) == {"planted"}


def test_votes_are_counted_as_numbers() -> None:
    assert majority(["12", "1,080", "1080", "12.5"]) == "1,080"
    assert majority(["7", "12", "12.0", "7", "12"]) == "12"
    assert majority(["", ""]) == ""
    assert majority(["b", "a"]) == "b"
