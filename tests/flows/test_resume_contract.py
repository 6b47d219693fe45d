"""Kills: whatever is killed and started again ends in the same bytes, and no finished work is done again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gristmill.flows import runners
from gristmill.flows.compute import RETURNED
from gristmill.flows.errors import StageFailed
from gristmill.flows.execution import Execution
from gristmill.flows.plan import Plan
from gristmill.flows.stage import stage
from gristmill.flows.store import Store
from gristmill.model.launch import JobFailed, JobHung, JobRefused
from tests.flows.toys import Frozen, Heard, Parts, Toy, go, ran, toy

TOYS = Path(__file__).with_name("toys.py")
PARTS = 12


def killed_in_the_middle(store: Store, cache: Path, after: int) -> None:
    """Run the toys in a process group of their own and kill it when so many parts are there."""
    process = subprocess.Popen(
        [sys.executable, "-P", str(TOYS), store.uri, str(cache), str(PARTS)],
        env={**os.environ, "TOY_SLEEP": "0.1"},
        start_new_session=True,
    )
    until = time.monotonic() + 60
    while len(list(store.local.glob("write/*/part-*.txt"))) < after:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_killed_twice_ends_in_the_same_bytes(where: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    recipe = Toy(write=Parts(parts=PARTS))
    undisturbed = Store(tmp_path / "undisturbed")
    go(undisturbed, recipe)
    place = tmp_path / "store" if where == "disk" else f"{request.getfixturevalue('s3')}/store"
    store = Store(place, tmp_path / "cache")
    for after in (2, 6):
        killed_in_the_middle(store, tmp_path / "cache", after)
        assert Plan(store).run(toy, recipe).named("write").state == "partial"
        assert store.runs()[-1]["state"] == "running"  # it had no time to say otherwise
    (first,) = store.local.glob("write/*/part-0.txt")
    made = first.stat().st_mtime_ns
    go(store, recipe)
    assert first.stat().st_mtime_ns == made  # what was finished was not made again
    assert store.verify()["stages"] == undisturbed.verify()["stages"]
    manifest = store.manifests("write")[0]
    assert manifest["attempts"] == 3
    assert manifest["work_seconds"] >= manifest["seconds"]


def test_a_kill_between_the_last_byte_and_the_manifest_costs_no_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")

    class Killed(BaseException):
        pass

    def killed(manifest: dict[str, Any]) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(store, "finish", killed)
        with pytest.raises(Killed):
            go(store)
    assert ran == ["write"]
    go(store)
    assert ran == ["join", "count"]
    assert store.verify()["bad"] == []


@pytest.mark.parametrize("changed", ["boot", "bytes"])
def test_after_a_restart_of_the_machine_nothing_is_taken_on_trust(changed: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    go(store)
    (folder,) = store.local.glob("join/*")
    (folder / "manifest.json").unlink()
    if changed == "boot":
        returned = folder / RETURNED
        returned.write_text(returned.read_text().replace('"boot": "', '"boot": "another'))
    else:
        (folder / "joined.txt").write_text("")
    go(store)
    assert ran == ["join"]
    assert store.verify()["bad"] == []


def test_a_discard_that_is_killed_leaves_no_half_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store")
    go(store)
    with monkeypatch.context() as patched:
        patched.setattr(Store, "sweep", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.discard("write", store.keys("write")[0])
    assert Plan(store).run(toy, Toy()).named("write").state == "run"
    go(store)
    assert ran == ["write"]
    assert not (store.local / ".trash").exists()


def test_another_machine_takes_up_unfinished_work_from_s3(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gristmill.flows import mirror

    monkeypatch.setattr(mirror, "MIRROR_SECONDS", 0.02)
    recipe = Toy(write=Parts(parts=PARTS))
    one, two = (Store(f"{s3}/store", tmp_path / name) for name in ("one", "two"))
    monkeypatch.setattr(
        one,
        "mirror",
        lambda stage, key, say: mirror.Mirror(one.far, f"{stage}/{key}.partial", one.folder(stage, key), say, 0.02),
    )
    stopped = Heard()

    def stop(name: str, done: int, total: int, **values: float) -> None:
        time.sleep(0.05)
        if done == 6:
            raise KeyboardInterrupt

    stopped.progress = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        go(one, recipe, watcher=stopped)
    (snapshot,) = [n for n in one.far.names("write") if n.endswith(".partial")]
    assert one.far.exists(f"write/{snapshot}/snapshot.json")
    assert Plan(two).run(toy, recipe).named("write").state == "partial"
    seen = []
    heard = Heard()
    heard.progress = lambda name, done, total, **values: seen.append(len(list(two.local.glob("write/*/part-*.txt"))))  # type: ignore[method-assign]
    go(two, recipe, watcher=heard)
    assert seen[0] >= 6  # it began with what the first machine had made
    assert not two.far.exists(f"write/{snapshot}/snapshot.json")
    undisturbed = Store(tmp_path / "undisturbed")
    go(undisturbed, recipe)
    assert two.verify()["stages"] == undisturbed.verify()["stages"]


def test_a_failure_says_which_stage_where_its_log_is_and_how_to_go_on(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")

    def broken(config: Frozen, out: Path) -> dict[str, Any]:
        raise ValueError("row 7 of x.jsonl has no text.")

    declared = stage("broken", version=1)(broken)
    said = (
        r"stage broken failed: row 7 of x.jsonl has no text\. Its log is in .*/log\. .*the same command again to resume"
    )
    with pytest.raises(StageFailed, match=said) as caught:
        go(store, pipeline=lambda recipe: declared(Frozen()))
    assert caught.value.stage == "broken"
    assert "row 7" in next(store.local.glob("broken/*/log/error.txt")).read_text()
    record = store.runs()[-1]
    assert (record["state"], record["stages"][0]["state"]) == ("failed", "failed")
    with pytest.raises(StageFailed, match="run the same command again without --from to resume"):
        go(store, pipeline=lambda recipe: declared(Frozen()), from_="broken")


def test_what_may_pass_is_tried_again_and_bad_input_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "LONGEST_PAUSE", 0.0)
    store, tries = Store(tmp_path / "store"), []

    def flaky(config: Frozen, out: Path) -> dict[str, Any]:
        tries.append(1)
        if len(tries) < 3:
            raise OSError("the line was busy")
        return {}

    def bad(config: Frozen, out: Path) -> dict[str, Any]:
        tries.append(1)
        raise ValueError("no text")

    twice = Execution(workers=0, retries=2)
    go(store, pipeline=lambda recipe: stage("flaky", version=1)(flaky)(Frozen()), execution=twice)
    assert len(tries) == 3
    assert store.manifests("flaky")[0]["attempts"] == 3
    tries.clear()
    with pytest.raises(StageFailed, match="no text"):
        go(store, pipeline=lambda recipe: stage("bad", version=1)(bad)(Frozen()), execution=twice)
    assert len(tries) == 1


@pytest.mark.parametrize(
    ("error", "times"),
    [
        (OSError("the line was busy"), 3),
        (JobFailed("rank 0 was ended by signal 9"), 3),
        (JobHung("rank 1 showed no sign of life for 45 s"), 3),
        (JobRefused("out of memory"), 1),
    ],
)
def test_what_never_passes_is_tried_as_often_as_was_asked_and_no_more(
    error: Exception, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners, "LONGEST_PAUSE", 0.0)
    store, heard, tries = Store(tmp_path / "store"), Heard(), []

    def hopeless(config: Frozen, out: Path) -> dict[str, Any]:
        tries.append(1)
        raise error

    declared, twice = stage("hopeless", version=1)(hopeless), Execution(workers=0, retries=2)
    with pytest.raises(StageFailed, match=f"stage hopeless failed: {error}") as caught:
        go(store, pipeline=lambda recipe: declared(Frozen()), execution=twice, watcher=heard)
    assert caught.value.__cause__ is error
    assert len(tries) == times
    assert heard.said == [f"stage hopeless failed ({error}); trying again"] * (times - 1)
    assert heard.states == [("hopeless", "running"), ("hopeless", "failed")]
    assert store.runs()[-1]["stages"][0]["error"].startswith(f"stage hopeless failed: {error}")
    assert store.manifests("hopeless") == []
