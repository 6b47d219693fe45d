"""What is taken out is nowhere in the store, nothing else changed by a byte, and no later run brings it back."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import zstandard
from typer.testing import CliRunner

from gristmill.data.documents import read_rows
from gristmill.flows import takedown, tombstones
from gristmill.flows.corpus_results import chain_of_run
from gristmill.flows.corpus_trace import trace
from gristmill.flows.data_cli import data_app
from gristmill.flows.errors import UsageError
from gristmill.flows.inspection import verify_store
from gristmill.flows.lineage import lineage
from gristmill.flows.store import Store
from tests.flows import corpus_toys as toys

CORPUS = ("ingest", "dedup", "filter", "tokenize")
SECRET = "miller's secret recipe"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs in one store, of which the second filters less."""
    folder = tmp_path_factory.mktemp("corpus")
    files = toys.planted(folder)
    toys.go(Store(folder / "store"), toys.recipe_of(files))
    shutil.copytree(folder / "store", folder / "single")
    toys.go(Store(folder / "store"), toys.recipe_of(files, name="loose", filter=toys.Filter(least_words=1)))
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of that store, beside the same sources."""
    shutil.copytree(made / "store", tmp_path / "store")
    return tmp_path


@pytest.fixture
def single(made: Path, tmp_path: Path) -> Path:
    """The store as it was after the first run."""
    shutil.copytree(made / "single", tmp_path / "store")
    return tmp_path


def remove(place: Path, *arguments: str) -> str:
    arguments = ("remove", *arguments, "--yes", "--store", str(place / "store"))
    result = CliRunner().invoke(data_app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    return zstandard.ZstdDecompressor().stream_reader(data).read() if path.suffix == ".zst" else data


def files_with(store: Path, text: str) -> list[str]:
    """Files that hold a text, as bytes or as the toys' tokens."""
    tokens = b"".join((b + 3).to_bytes(2, "little") for b in text.encode())
    found = []
    for path in sorted(p for p in store.rglob("*") if p.is_file()):
        data = unpacked(path)
        if text.encode() in data or json.dumps(text)[1:-1].encode() in data or tokens in data:
            found.append(path.relative_to(store).as_posix())
    return found


def hashes(store: Path) -> dict[str, str]:
    """Hash of every file of a store's corpus results, without their keys."""
    found = {}
    for path in sorted(p for stage in CORPUS for p in (store / stage).rglob("*") if p.is_file()):
        stage, _, *rest = path.relative_to(store).parts
        found.setdefault("/".join([stage, *rest]), hashlib.sha256(path.read_bytes()).hexdigest())
    return found


def manifests(store: Store) -> dict[tuple[str, str], dict[str, Any]]:
    return {(m["stage"], m["key"]): m for stage in store.stages() for m in store.manifests(stage)}


def test_the_text_is_nowhere_and_the_store_is_whole(place: Path) -> None:
    assert files_with(place / "store", SECRET)
    remove(place, "web/3", "--duplicates")
    assert files_with(place / "store", SECRET) == []
    found = verify_store(Store(place / "store"))
    assert found["bad"] == []
    assert set(found["stages"]) == set(CORPUS)


def test_only_the_shards_touched_are_written_anew(single: Path) -> None:
    place = single
    before = hashes(place / "store")
    remove(place, "web/22")
    after = hashes(place / "store")
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    stream = {name for name in changed if name.startswith("tokenize/tokens/train/web/")}
    assert len({name.rsplit("/", 1)[1].split(".")[0] for name in stream}) == 1
    assert changed - stream == {
        *(f"{stage}/manifest.json" for stage in CORPUS),
        *(f"{stage}/documents/00002.jsonl.zst" for stage in ("ingest", "dedup", "filter")),
        *(f"{stage}/{table}.jsonl" for stage in ("dedup", "filter") for table in ("funnel", "histograms")),
        *(name for name in ("dedup/samples.jsonl", "filter/samples.jsonl") if name in changed),
        "ingest/ids/00002.ids",
        "ingest/tombstones.json",
        "tokenize/tokens/index.json",
    }
    rows = {
        stage: {r["id"] for r in read_rows(next((place / "store" / stage).glob("*/documents/00002.*")))}
        for stage in CORPUS[:3]
    }
    assert all("web/22" not in ids and "web/21" in ids for ids in rows.values())


def test_files_kept_are_the_same_file(place: Path) -> None:
    one = next((place / "store" / "ingest").glob("*/documents/00000.jsonl.zst"))
    number = one.stat().st_ino
    remove(place, "web/22")
    assert next((place / "store" / "ingest").glob("*/documents/00000.jsonl.zst")).stat().st_ino == number


def test_counts_follow(place: Path) -> None:
    before = {(m["stage"]): m["metrics"] for m in manifests(Store(place / "store")).values()}
    remove(place, "web/9", "web/17", "web/5")
    store = Store(place / "store")
    for (stage, key), manifest in manifests(store).items():
        if stage not in ("dedup", "filter"):
            continue
        funnel = [json.loads(line) for line in (store.folder(stage, key) / "funnel.jsonl").open()]
        metrics = manifest["metrics"]
        counted = {
            kind: sum(1 for shard in (store.folder(stage, key) / kind).glob("*") for _ in read_rows(shard))
            for kind in ("documents", "removed", "changed")
        }
        assert (
            metrics["documents_in"] == counted["documents"] + counted["removed"] == sum(r["documents"] for r in funnel)
        )
        assert metrics["documents_out"] == counted["documents"]
        assert metrics["changed"] == counted["changed"] == 0
        assert metrics["bytes_out"] == sum(r["bytes_out"] for r in funnel)
        assert "e-mail" not in metrics["changed_by_reason"]
    tokens = next(m for (stage, _), m in manifests(store).items() if stage == "tokenize")
    index = json.loads((store.folder("tokenize", tokens["key"]) / "tokens" / "index.json").read_text())
    train = [s for s in index["streams"] if s["split"] == "train"]
    assert (
        tokens["metrics"]["tokens"]
        == sum(e["tokens"] for s in train for e in s["shards"])
        < before["tokenize"]["tokens"]
    )
    assert tokens["metrics"]["documents"] == sum(e["documents"] for s in index["streams"] for e in s["shards"])


def test_a_later_run_takes_what_was_amended_and_trains_anew(place: Path, made: Path) -> None:
    remove(place, "web/3")
    record = toys.go(Store(place / "store"), toys.recipe_of({n: made / f"{n}.jsonl" for n in ("web", "notes")}))
    states = {entry["stage"]: entry["state"] for entry in record["stages"]}
    assert states == {**dict.fromkeys(CORPUS, "cached"), **dict.fromkeys(("mix", "pretrain", "page"), "completed")}


def test_another_store_with_the_tombstone_ingests_the_same_bytes(place: Path, made: Path) -> None:
    remove(place, "web/3", "--url", "http://www.example.org/20#part")
    fresh = Store(place / "fresh")
    fresh.local.mkdir()
    shutil.copy(place / "store" / tombstones.TOMBSTONES, fresh.local)
    toys.go(fresh, toys.recipe_of({n: made / f"{n}.jsonl" for n in ("web", "notes")}))
    (one,), (other,) = fresh.manifests("ingest"), Store(place / "store").manifests("ingest")
    assert one["key"] == other["key"]
    assert one["content_hash"] == other["content_hash"]
    ids = {
        row["id"]
        for result in chain_of_run(fresh, fresh.runs()[-1])[:1]
        for s in result.shards
        for row in result.rows("documents", s)
    }
    assert not ids & {"web/3", "web/20"}
    # without web/3, web/17 is the first of its text: decided anew, while the amended result keeps the old decision
    assert trace(fresh, fresh.runs()[-1], "web/17")["stages"][-1]["outcome"] == "kept"


def test_a_tombstone_holds_for_new_sources_under_the_same_url(place: Path, made: Path) -> None:
    remove(place, "--url", "https://example.org/3")
    web = made / "web.jsonl"
    renamed = toys.written_source(
        place / "dump.jsonl", [{**json.loads(line), "name": f"new-{i}"} for i, line in enumerate(web.open())]
    )
    store = Store(place / "store")
    record = toys.go(store, toys.recipe_of({"dump": renamed}, name="dump"))
    ingested = chain_of_run(store, record)[0]
    ids = {row["id"] for shard in ingested.shards for row in ingested.rows("documents", shard)}
    assert "dump/new-2" in ids
    assert "dump/new-3" not in ids


def test_checkpoints_that_saw_it_are_listed_and_stay(place: Path) -> None:
    store = Store(place / "store")
    seen = trace(store, store.runs()[0], "web/3")["trained"][0]
    said = remove(place, "web/3", "--reason", "asked by its author")
    assert f"seen by pretrain {seen['key']} in step" in said
    assert "also removed as duplicates of it: web/17, web/28" in said
    assert store.manifest("pretrain", seen["key"]) is not None
    (row,) = tombstones.read(store)
    assert (row["id"], row["reason"], row["duplicates"]) == ("web/3", "asked by its author", ["web/17", "web/28"])
    assert {"stage": "pretrain", "key": seen["key"], "steps": seen["steps"], "held_out": False} in row["results"]
    assert any(node.get("removed") for node in lineage(store, seen["key"]))
    after = trace(store, store.runs()[-1], "web/3")
    assert after["tombstone"]["id"] == "web/3"
    assert after["stages"] == []


def test_a_duplicate_names_what_it_is_a_copy_of(place: Path) -> None:
    assert "removed as a duplicate of web/3, which stays unless it is named" in remove(place, "web/17")


def test_by_a_text_that_documents_hold(place: Path) -> None:
    (place / "claim.txt").write_text("The  miller's secret recipe:\nrye, oats | and a *pinch* of salt.")
    said = remove(place, "--match", str(place / "claim.txt"))
    assert all(f"{name}  (web" in said for name in ("web/3", "web/17", "web/28"))
    assert files_with(place / "store", SECRET) == []


def test_a_page_that_shows_the_text_goes(place: Path) -> None:
    assert any(name.startswith("page/") for name in files_with(place / "store", "Page 10: the mill grinds 70"))
    said = remove(place, "web/10")
    assert "its view/page.html showed the text" in said
    assert files_with(place / "store", "Page 10: the mill grinds 70") == []


def test_a_whole_shard_may_go(place: Path, made: Path) -> None:
    remove(place, *(f"web/{i}" for i in range(30, 35)))
    store = Store(place / "store")
    assert "00003" not in chain_of_run(store, store.runs()[-1])[0].shards
    assert verify_store(store)["bad"] == []
    fresh = Store(place / "fresh")
    fresh.local.mkdir()
    shutil.copy(place / "store" / tombstones.TOMBSTONES, fresh.local)
    toys.go(fresh, toys.recipe_of({n: made / f"{n}.jsonl" for n in ("web", "notes")}), until="ingest")
    assert fresh.manifests("ingest")[0]["content_hash"] == store.manifests("ingest")[0]["content_hash"]


def test_results_that_never_had_it_keep_their_bytes_under_a_new_key(place: Path) -> None:
    other = toys.planted(place / "other")
    lines = other["web"].read_text().splitlines()
    other["web"].write_text("\n".join(lines[4:]) + "\n")
    store = Store(place / "store")
    before = toys.go(store, toys.recipe_of(other, name="other"))
    remove(place, "web/3")
    after = toys.go(store, toys.recipe_of(other, name="other"))
    assert {e["state"] for e in after["stages"]} == {"cached"}
    for one, two in zip(before["stages"], after["stages"], strict=True):
        assert one["key"] != two["key"]
        # of ingest tombstones.json is new, and nothing else
        assert one["stage"] == "ingest" or one["content_hash"] == two["content_hash"]
        assert store.manifest(one["stage"], one["key"]) is not None


def test_unfinished_work_goes_as_well(place: Path) -> None:
    left = place / "store" / "dedup" / ("0" * 16) / "work" / "x"
    left.parent.mkdir(parents=True)
    left.write_text(SECRET)
    remove(place, "web/3", "--duplicates")
    assert not left.exists()


def test_ids_that_no_document_has_are_refused_unless_asked_for(place: Path, made: Path) -> None:
    with pytest.raises(UsageError, match="no document of the store has the id 'web/99'"):
        remove(place, "web/99")
    assert tombstones.read(Store(place / "store")) == []
    remove(place, "web/99", "--absent")
    assert [row["id"] for row in tombstones.read(Store(place / "store"))] == ["web/99"]
    record = toys.go(Store(place / "store"), toys.recipe_of({n: made / f"{n}.jsonl" for n in ("web", "notes")}))
    assert {e["state"] for e in record["stages"]} == {"cached"}


@pytest.mark.parametrize("line", ["{", "[]", '{"who": "x"}', '{"id": 3}'])
def test_damaged_tombstones_stop_every_run(place: Path, made: Path, line: str) -> None:
    remove(place, "web/3")
    with (place / "store" / tombstones.TOMBSTONES).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UsageError, match=r"line 2 of tombstones\.jsonl .* is damaged"):
        toys.go(Store(place / "store"), toys.recipe_of({n: made / f"{n}.jsonl" for n in ("web", "notes")}))


def test_a_damaged_shard_is_named_and_nothing_is_taken_out(place: Path) -> None:
    shard = next((place / "store" / "ingest").glob("*/documents/00000.jsonl.zst"))
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(UsageError, match=r"00000\.jsonl\.zst is not a whole document shard"):
        remove(place, "web/3")
    assert tombstones.read(Store(place / "store")) == []


def test_a_no_changes_nothing(place: Path, bytes_of: Callable[[Path], str]) -> None:
    before = hashes(place / "store")
    result = CliRunner().invoke(data_app, ["remove", "web/3", "--store", str(place / "store")], input="n\n")
    assert result.exit_code == 1
    assert hashes(place / "store") == before
    assert tombstones.read(Store(place / "store")) == []


class Killed(BaseException):
    """What a kill does to a process, seen from inside: nothing after it happens."""


def settled_state(store: Path) -> dict[str, str]:
    """Every file but those that say when: run records, tombstones, the lock."""
    found = {}
    for path in sorted(p for p in store.rglob("*") if p.is_file()):
        name = path.relative_to(store).as_posix()
        if name.split("/")[0] not in ("runs", "lock", tombstones.TOMBSTONES):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.parametrize(
    "moment", [m if m % 36 == 0 else pytest.param(m, marks=pytest.mark.slow) for m in range(0, 124, 3)]
)
def test_killed_and_called_again_it_ends_in_the_same_state(
    place: Path, made: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended at the n-th of some 120 calls that change the disk: links, renames, removals."""
    whole = made / "settled"
    if not whole.exists():
        shutil.copytree(made / "store", whole / "store")
        remove(whole, "web/3", "web/22")
    left = moment

    def counted(real: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal left
            if left == 0:
                left = -1
                raise Killed
            left -= left > 0
            return real(*arguments, **more)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", counted(os.link))
        patched.setattr(os, "replace", counted(os.replace))
        patched.setattr(Path, "rename", counted(Path.rename))
        patched.setattr(shutil, "rmtree", counted(shutil.rmtree))
        with suppress(Killed):
            remove(place, "web/3", "web/22")
    remove(place, "web/3", "web/22")
    assert settled_state(place / "store") == settled_state(whole / "store")
    store = Store(place / "store")
    assert sorted(row["id"] for row in tombstones.read(store)) == ["web/22", "web/3"]
    assert verify_store(store)["bad"] == []


@pytest.mark.slow
def test_killed_by_signal_9_at_twenty_moments(place: Path, made: Path) -> None:
    """The command itself, ended from outside at any moment of the second in which it works."""
    whole = made / "settled"
    if not whole.exists():
        shutil.copytree(made / "store", whole / "store")
        remove(whole, "web/3", "web/22")
    expected = settled_state(whole / "store")
    command = [sys.executable, "-P", "-c", "from gristmill.flows.cli import main; main()", "data", "remove"]
    rng, landed = random.Random(9), 0
    for attempt in range(20):
        own = place / str(attempt)
        shutil.copytree(made / "store", own / "store")
        process = subprocess.Popen(
            [*command, "web/3", "web/22", "--yes", "--store", str(own / "store")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not (own / "store" / tombstones.TOMBSTONES).exists():
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        landed += process.wait() == -signal.SIGKILL
        remove(own, "web/3", "web/22")
        assert settled_state(own / "store") == expected
        shutil.rmtree(own)
    assert landed >= 10


def test_settling_again_changes_nothing(place: Path) -> None:
    remove(place, "web/3")
    before = settled_state(place / "store")
    runs = len(Store(place / "store").runs())
    done = takedown.settle(Store(place / "store"), say=lambda _: None)
    assert done.amended == done.removed == []
    assert settled_state(place / "store") == before
    assert len(Store(place / "store").runs()) == runs


def test_a_second_takedown_follows_the_first(place: Path) -> None:
    remove(place, "web/3", "--duplicates")
    remove(place, "web/22")
    store = Store(place / "store")
    assert files_with(place / "store", "Page 22: the mill grinds 154") == []
    assert files_with(place / "store", SECRET) == []
    assert verify_store(store)["bad"] == []
    assert len(store.manifests("ingest")) == 1
    asked = json.loads((store.folder("ingest", store.manifests("ingest")[0]["key"]) / tombstones.FILE).read_text())
    assert asked["ids"] == ["web/17", "web/22", "web/28", "web/3"]


@pytest.mark.slow
def test_on_a_remote_store(s3: str, tmp_path: Path, made: Path) -> None:
    store = Store(f"{s3}/store", cache=tmp_path / "cache")
    files = {n: made / f"{n}.jsonl" for n in ("web", "notes")}
    toys.go(store, toys.recipe_of(files))
    elsewhere = Store(f"{s3}/store", cache=tmp_path / "another")
    targets = takedown.find_targets(elsewhere, ["web/3", "web/17", "web/28"])
    assert [target.identifier for target in targets] == ["web/17", "web/28", "web/3"]
    assert "pretrain" in {row["stage"] for row in targets[2].results}
    assert targets[0].results == targets[1].results == []  # removed as duplicates before the tokens
    tombstones.record(elsewhere, takedown.graves(targets, None, ""))
    done = takedown.settle(elsewhere, say=lambda _: None)
    assert {stage for stage, *_ in done.amended} == set(CORPUS)
    for name, size in store.far.sizes("").items():
        assert size is not None
        data = store.far.read(name) or b""
        data = zstandard.ZstdDecompressor().stream_reader(data).read() if name.endswith(".zst") else data
        assert SECRET.encode() not in data, name
    assert elsewhere.verify()["bad"] == []
    record = toys.go(elsewhere, toys.recipe_of(files))
    assert {e["stage"] for e in record["stages"] if e["state"] == "cached"} == set(CORPUS)
