"""The store: manifests, damage, verification, ledger, lineage, and a store on S3."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from gristmill.flows.errors import StageFailed, UsageError
from gristmill.flows.execution import Execution
from gristmill.flows.ledger import ledger_line
from gristmill.flows.lineage import descendants, lineage
from gristmill.flows.manifest import checked_metrics, content_hash, described_files, identity_of
from gristmill.flows.mirror import Mirror, restore
from gristmill.flows.plan import Plan
from gristmill.flows.stage import stage
from gristmill.flows.store import Store
from tests.flows.toys import Frozen, Heard, Join, Toy, go, ran, toy


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def only(store: Store, name: str) -> dict[str, Any]:
    (manifest,) = store.manifests(name)
    return manifest


def test_two_stores_two_times_one_content(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "elsewhere" / "other")
    go(store)
    go(other, execution=Execution(workers=2, threads=2))
    for name in ("write", "join", "count"):
        one, two = only(store, name), only(other, name)
        assert one["content_hash"] == two["content_hash"]
        assert identity_of(one) == identity_of(two)
        assert str(store.local) not in json.dumps(one)
    observed = {f["path"]: f["content"] for f in only(store, "write")["files"]}
    assert observed["log/when.txt"] is False
    assert observed["part-0.txt"] is True


def test_the_content_hash_is_of_names_bytes_and_metrics(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "x").write_text("now")
    first = content_hash(described_files(tmp_path), {"n": 1})
    (tmp_path / "log" / "x").write_text("later")
    assert content_hash(described_files(tmp_path), {"n": 1}) == first
    assert content_hash(described_files(tmp_path), {"n": 2}) != first
    (tmp_path / "a").rename(tmp_path / "b")
    assert content_hash(described_files(tmp_path), {"n": 1}) != first


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "joined.txt").write_text("xx+xx+xxx"), "joined.txt has"),
        (lambda f: (f / "joined.txt").unlink(), "joined.txt is missing"),
        (lambda f: (f / "joined.txt").write_bytes(b"\xff" + (f / "joined.txt").read_bytes()[1:]), "has other bytes"),
        (lambda f: (f / "log" / "attempts.json").write_text("[]"), "attempts.json has"),
        (lambda f: (f / "extra.txt").write_text("x"), "extra.txt is not in its manifest"),
        (lambda f: _edit(f / "manifest.json", "metrics", {"parts": 4}), "does not hash to its content_hash"),
    ],
)
def test_verify_names_every_damage(store: Store, change: Any, said: str) -> None:
    go(store)
    assert store.verify()["bad"] == []
    change(store.folder("join", only(store, "join")["key"]))
    (bad,) = store.verify()["bad"]
    assert bad.startswith("join/")
    assert said in bad
    go(store)
    assert ran == ["join"]
    assert store.verify()["bad"] == []


def _edit(path: Path, name: str, value: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))


def test_verify_tells_other_rounding_from_damage(store: Store) -> None:
    """An input that was made again with other bytes (other threads, say) is no damage, and is said."""
    rounding = ["one"]

    def rounded(config: Frozen, out: Path) -> dict[str, Any]:
        (out / "value.txt").write_text(rounding[0])
        return {}

    def user(config: Join, value: Path, out: Path) -> dict[str, Any]:
        (out / "used.txt").write_text((value / "value.txt").read_text())
        return {}

    first, second = stage("rounded", version=1)(rounded), stage("user", version=1)(user)

    def pipeline(recipe: Toy) -> Any:
        return second(recipe.join, value=first(Frozen()))

    go(store, pipeline=pipeline)
    rounding[0] = "two"
    (store.folder("rounded", only(store, "rounded")["key"]) / "value.txt").write_text("broken")
    heard = Heard()
    go(store, pipeline=pipeline, watcher=heard, execution=Execution(workers=0, threads=2))
    assert any("made again with other bytes than before (threads" in line for line in heard.said)
    found = store.verify()
    assert found["bad"] == []
    assert found["notes"] == [
        f"user/{only(store, 'user')['key']}: its input value was made again since with other bytes"
    ]


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (None, "returned NoneType, not its metrics"),
        ({"a": [1]}, "metric a as list"),
        ({"a": {"b": {}}}, "metric a.b as dict"),
        ({"a": math.nan}, "metric a as nan: a metric must be finite"),
        ({"a": {"b": math.inf}}, "metric a.b as inf"),
    ],
)
def test_metrics_of_another_form_fail_the_stage(metrics: Any, said: str, store: Store) -> None:
    def stating(config: Frozen, out: Path) -> Any:
        return metrics

    declared = stage("stating", version=1)(stating)
    with pytest.raises(StageFailed, match=said):
        go(store, pipeline=lambda recipe: declared(Frozen()))
    assert checked_metrics({"a": 1, "t": {"x": 0.5, "y": "z"}}, "s")
    assert store.manifests("stating") == []


def test_work_left_behind_fails_the_stage(store: Store) -> None:
    def untidy(config: Frozen, out: Path) -> dict[str, Any]:
        (out / "work").mkdir(exist_ok=True)
        return {}

    declared = stage("untidy", version=1)(untidy)
    with pytest.raises(StageFailed, match="left its work/ folder behind"):
        go(store, pipeline=lambda recipe: declared(Frozen()))


def test_the_ledger_charges_what_a_stage_asked_for(store: Store) -> None:
    go(store)
    lines = store.ledger()
    assert [line["stage"] for line in lines] == ["write", "join", "count"]
    assert lines[0]["tokens"] == 3
    assert all(line["estimated_cost_usd"] >= 0 for line in lines)
    manifest = {**only(store, "write"), "work_seconds": 3600.0}
    execution = Execution(workers=3, threads=2, ranks=2, watts=100.0, price_per_device_hour=2.0)

    def hours(*services: str) -> float:
        return ledger_line(manifest, execution, list(services))["device_hours"]

    assert hours("progress") == 1
    assert hours("workers") == 3
    assert hours("threads", "ranks") == 4
    line = ledger_line(manifest, execution, ["workers"])
    assert (line["estimated_kwh"], line["estimated_cost_usd"]) == (0.3, 6.0)
    (store.local / "ledger.jsonl").open("a").write('{"stage": "half')  # a power cut
    go(store, Toy(seed=1), until="write")
    assert [line["stage"] for line in store.ledger()] == ["write", "join", "count", "write"]


def test_lineage_up_and_down(store: Store) -> None:
    go(store)
    go(store, Toy(join=Join(between="-")))
    ends = store.manifests("count")
    chain = lineage(store, ends[0]["key"])
    assert [node["stage"] for node in chain] == ["count", "join", "write"]
    assert chain[0]["inputs"]["joined"]["key"] == chain[1]["key"]
    start = only(store, "write")["key"]
    assert sorted(d["stage"] for d in descendants(store, start)) == ["count", "count", "join", "join"]
    with pytest.raises(UsageError, match="no finished result with the key 'nothing'"):
        lineage(store, "nothing")


def test_stores_that_cannot_be_used_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for where, said in {
        str(tmp_path / "file"): "is a file, not a folder",
        str(tmp_path / "file" / "below"): "is a file, not a folder",
        "/proc/nowhere": "is not writable",
        "zz://bucket/store": "cannot be opened",
    }.items():
        with pytest.raises(UsageError, match=said):
            go(Store(where, tmp_path / "cache"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


# --- on S3 ------------------------------------------------------------------------------------------------------


def test_s3_gives_what_a_disk_gives_and_another_machine_goes_on_from_it(s3: str, store: Store, tmp_path: Path) -> None:
    go(store)
    one, two = (Store(f"{s3}/store", tmp_path / name) for name in ("one", "two"))
    go(one, until="join")
    go(two)
    assert ran == ["count"]
    assert two.verify()["stages"] == store.verify()["stages"]
    assert [line["stage"] for line in two.ledger()] == ["write", "join", "count"]
    assert len(one.runs()) == 2
    assert go(Store(f"{s3}/store", tmp_path / "three"))["state"] == "completed"
    assert ran == []
    assert not list((tmp_path / "three").rglob("part-*.txt"))  # nothing is fetched that nobody reads


def test_s3_a_flipped_byte_is_found_and_mended(s3: str, tmp_path: Path) -> None:
    here = Store(f"{s3}/store", tmp_path / "one")
    go(here)
    hashes, key = here.verify()["stages"], only(here, "join")["key"]
    here.far.write(f"join/{key}/joined.txt", b"A0/0+a1/0+a2/0")
    assert here.verify()["bad"] == [f"join/{key}/joined.txt has other bytes than when it was made"]
    other = Store(f"{s3}/store", tmp_path / "two")
    heard = Heard()
    go(other, from_="count", watcher=heard)  # another machine needs it as an input
    assert ran == ["join", "count"]
    assert any("it is made again" in line for line in heard.said)
    assert here.verify() == {**here.verify(), "stages": hashes, "bad": []}


def test_s3_refusals(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="there is no such bucket"):
        go(Store("s3://nobody-made-this/store", tmp_path / "cache"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UsageError, match=r"cannot be reached \(Unable to locate credentials\): set AWS_ACCESS_KEY_ID"):
        go(Store(f"{s3}/store", tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_snapshot_is_of_one_moment(s3: str, tmp_path: Path) -> None:
    far, folder, said = Store(f"{s3}/store", tmp_path / "cache").far, tmp_path / "work", []
    (folder / "checkpoint").mkdir(parents=True)
    for name in ("a", "b"):
        (folder / "checkpoint" / name).write_text(f"{name}1")
    (folder / "half.tmp").write_text("not yet")
    mirror = Mirror(far, "write/0.partial", folder, said.append)
    assert mirror.send()
    assert not mirror.send()  # nothing changed
    put = far.put

    def changed_meanwhile(path: Path, name: str) -> None:
        put(path, name)
        path.write_text("a3, longer")

    (folder / "checkpoint" / "a").write_text("a2")
    (folder / "checkpoint" / "b").write_text("b2")
    far.put = changed_meanwhile  # type: ignore[method-assign]
    assert not mirror.send()
    far.put = put  # type: ignore[method-assign]
    assert restore(far, "write/0.partial", tmp_path / "elsewhere", said.append)
    files = {p.relative_to(tmp_path / "elsewhere").as_posix(): p.read_text() for p in _files(tmp_path / "elsewhere")}
    assert files == {"checkpoint/a": "a1", "checkpoint/b": "b1"}
    assert mirror.send()
    assert restore(far, "write/0.partial", tmp_path / "later", said.append)
    assert (tmp_path / "later" / "checkpoint" / "b").read_text() == "b2"
    assert len(far.names("write/0.partial")) == 6  # two snapshots of two files
    (folder / "checkpoint" / "b").write_text("b3")
    assert mirror.send()
    assert len(far.names("write/0.partial")) == 5  # they share one: what is no longer used is gone
    assert said == []


def _files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()]


def test_a_plan_of_a_cached_store_on_s3_is_all_cached(s3: str, tmp_path: Path) -> None:
    go(Store(f"{s3}/store", tmp_path / "one"))
    plan = Plan(Store(f"{s3}/store", tmp_path / "two")).run(toy, Toy())
    assert plan.cached
