"""The pass over a shard that every judging stage shares: nothing lost, nothing twice, counted once."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.data.documents import read_rows, shards, write_rows
from gristmill.data.sieve import Edit, Row, Verdict, conclude, edited, highlighted, remove, sieve_shard


def _row(number: int, text: str, source: str = "web") -> Row:
    return {"text": text, "id": f"{source}/{number}", "metadata": {"source": source, "kind": "prose"}}


def _judge(row: Row, place: int) -> Verdict:
    if "bad" in row["text"]:
        start = row["text"].index("bad")
        return remove("words: bad word", spans=[[start, start + 3]], detail="bad")
    if "secret" in row["text"]:
        start = row["text"].index("secret")
        return Verdict(edits=(Edit(start, start + 6, "redacted", "<x>"),), metadata={"redacted": 1})
    return Verdict(values={"score": place / 10})


@pytest.fixture
def sieved(tmp_path: Path) -> tuple[Path, list[Row]]:
    texts = ["fine text", "a bad one", "a secret here", "another fine one", "bad again", "été secret 𝒳"]
    rows = [_row(i, text, "web" if i % 2 else "notes") for i, text in enumerate(texts)]
    write_rows(tmp_path / "in" / "documents" / "00000.jsonl.zst", rows[:4])
    write_rows(tmp_path / "in" / "documents" / "00001.jsonl.zst", rows[4:])
    for shard in shards(tmp_path / "in"):
        sieve_shard(shard, tmp_path / "out", _judge)
    return tmp_path, rows


def _all(folder: Path, kind: str) -> list[Row]:
    return [row for shard in shards(folder, kind) for row in read_rows(shard)]


def test_every_document_goes_to_one_place_and_can_be_taken_back(sieved: tuple[Path, list[Row]]) -> None:
    place, rows = sieved
    kept, removed, changed = (_all(place / "out", kind) for kind in ("documents", "removed", "changed"))
    assert [r["text"] for r in kept] == ["fine text", "a <x> here", "another fine one", "été <x> 𝒳"]
    assert [r["id"] for r in removed] == [rows[1]["id"], rows[4]["id"]]
    assert removed[0]["reason"] == "words: bad word"
    assert removed[0]["because"] == {"spans": [[2, 5]], "detail": "bad"}
    assert [r["text"] for r in removed] == ["a bad one", "bad again"]
    assert {r["id"]: r["edits"] for r in changed}[rows[2]["id"]] == [
        {"start": 2, "end": 8, "reason": "redacted", "now": "<x>"}
    ]
    assert "secret" not in json.dumps(changed)
    assert kept[1]["metadata"]["redacted"] == 1


def test_the_funnel_adds_up(sieved: tuple[Path, list[Row]]) -> None:
    place, rows = sieved
    metrics = conclude(place / "out", shards(place / "in"))
    assert metrics["documents_in"] == 6
    assert metrics["documents_out"] == 4
    assert metrics["bytes_in"] == sum(len(r["text"].encode()) for r in rows)
    assert metrics["bytes_out"] == sum(len(r["text"].encode()) for r in _all(place / "out", "documents"))
    assert metrics["changed"] == 2
    assert metrics["removed_by_reason"] == {"words: bad word": 2}
    assert metrics["removed_by_source"] == {"notes": 1, "web": 1}
    funnel = [json.loads(line) for line in (place / "out" / "funnel.jsonl").open()]
    assert sum(r["documents"] for r in funnel) == 6
    bins = [json.loads(line) for line in (place / "out" / "histograms.jsonl").open()]
    assert sum(b["documents"] for b in bins if b["name"] == "characters") == 6
    assert {b["low"] for b in bins if b["name"] == "score"} == {0.0, 0.3}


def test_samples_show_the_reason_in_its_place(sieved: tuple[Path, list[Row]]) -> None:
    place, _ = sieved
    conclude(place / "out", shards(place / "in"))
    samples = [json.loads(line) for line in (place / "out" / "samples.jsonl").open()]
    assert {s["text"] for s in samples if s["outcome"] == "removed"} == {"a ⟦bad⟧ one", "⟦bad⟧ again"}
    assert {s["outcome"] for s in samples} == {"removed", "changed", "kept"}


def test_the_order_of_work_changes_no_byte(sieved: tuple[Path, list[Row]], tmp_path: Path) -> None:
    place, _ = sieved
    for shard in reversed(shards(place / "in")):
        sieve_shard(shard, place / "again", _judge)
    conclude(place / "out", shards(place / "in"))
    conclude(place / "again", list(reversed(shards(place / "in"))))
    names = [p.relative_to(place / "out") for p in sorted((place / "out").rglob("*")) if p.is_file()]
    assert len(names) == 11
    for name in names:
        assert (place / "out" / name).read_bytes() == (place / "again" / name).read_bytes(), name


def test_a_shard_judged_again_is_the_same(sieved: tuple[Path, list[Row]]) -> None:
    place, _ = sieved
    shard = shards(place / "in")[0]
    files = [place / "out" / kind / shard.name for kind in ("documents", "removed", "changed")]
    before = [file.read_bytes() for file in files]
    sieve_shard(shard, place / "out", _judge)  # its worker was taken for dead, or it was killed before its tally
    assert [file.read_bytes() for file in files] == before


def test_a_text_that_compresses_a_thousandfold_is_read_in_bites(tmp_path: Path) -> None:
    shard = tmp_path / "documents" / "00000.jsonl.zst"
    write_rows(shard, (_row(i, "a" * 200_000) for i in range(500)))
    assert shard.stat().st_size < 100_000
    tracemalloc.start()
    try:
        assert sum(len(row["text"]) for row in read_rows(shard)) == 100_000_000
        assert tracemalloc.get_traced_memory()[1] < 40 << 20  # a first KiB holds at most 256 blocks of 128 KiB
    finally:
        tracemalloc.stop()


def test_no_removals_leave_an_empty_shard_of_documents(tmp_path: Path) -> None:
    write_rows(tmp_path / "in" / "documents" / "00000.jsonl.zst", [_row(0, "x")])
    shard = shards(tmp_path / "in")[0]
    sieve_shard(shard, tmp_path / "out", lambda row, _: remove("all"))
    assert list(read_rows(tmp_path / "out" / "documents" / shard.name)) == []
    assert conclude(tmp_path / "out", [shard])["documents_out"] == 0


@given(st.text(max_size=60), st.data())
def test_edits_can_be_undone(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    edits = [Edit(a, b, "r", data.draw(st.text(max_size=4))) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    now = edited(text, edits)
    back, shift = now, 0
    for edit in edits:
        start = edit.start + shift
        assert back[start : start + len(edit.now)] == edit.now
        back = back[:start] + text[edit.start : edit.end] + back[start + len(edit.now) :]
    assert back == text


def test_edits_that_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match="does not follow"):
        edited("abcdef", [Edit(0, 3, "r"), Edit(2, 4, "r")])
    with pytest.raises(ValueError, match="does not follow"):
        edited("abc", [Edit(2, 4, "r")])


def test_a_highlight_far_into_a_text_is_shown() -> None:
    text = "x " * 1000 + "here it is" + " y" * 1000
    shown = highlighted(text, [[2000, 2010]])
    assert "⟦here it is⟧" in shown
    assert shown.startswith("…")
    assert shown.endswith("…")
    assert len(shown) < 340
