"""One run at a time on a store, on a disk and on S3."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gristmill.flows import lock as locks
from gristmill.flows.errors import StoreInUse
from gristmill.flows.lock import StoreLock, holder_of
from gristmill.flows.store import Store
from tests.flows.toys import Heard, go, ran

HOLD = """
import sys, time
from pathlib import Path
from gristmill.flows.lock import StoreLock
from gristmill.flows.store import Store
with StoreLock(Store(sys.argv[1], Path(sys.argv[2]))):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    where = tmp_path / "store" if request.param == "disk" else f"{request.getfixturevalue('s3')}/store"
    return Store(where, tmp_path / "cache")


@contextmanager
def held_elsewhere(store: Store, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the store; it is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", HOLD, store.uri, str(tmp_path / "other cache")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "held"
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_second_run_is_refused_with_the_holders_name(store: Store, tmp_path: Path) -> None:
    with held_elsewhere(store, tmp_path) as process:
        with pytest.raises(StoreInUse, match=rf"is in use by process {process.pid} on .*: wait for it, add --wait"):
            go(store)
        assert ran == []
        assert store.runs() == []
        assert holder_of(store)["pid"] == process.pid


def test_a_killed_holders_lock_is_taken_over_at_once(store: Store, tmp_path: Path) -> None:
    with held_elsewhere(store, tmp_path) as process:
        pass
    heard = Heard()
    began = time.monotonic()
    go(store, watcher=heard)
    assert ran == ["write", "join", "count"]
    assert time.monotonic() - began < 10  # far less than a minute without a heartbeat
    assert f"took over the store's lock from process {process.pid}" in heard.said[0]
    assert holder_of(store) == {}


def test_waiting_goes_on_when_the_holder_has_ended(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.05)
    heard = Heard()
    with held_elsewhere(store, tmp_path) as process:

        def say(text: str) -> None:
            heard.said.append(text)
            if text.startswith("waiting for store"):
                process.send_signal(signal.SIGKILL)

        monkeypatch.setattr(heard, "say", say)
        go(store, watcher=heard, wait=True)
    assert ran == ["write", "join", "count"]
    assert f"it is in use by process {process.pid} on" in heard.said[0]


def _planted(store: Store, **changed: object) -> None:
    holder = {**locks._self(), "beat": time.time(), **changed}
    store.far.write("lock.json", json.dumps(holder).encode())


def test_s3_a_lock_of_another_machine_is_stale_after_a_minute(s3: str, tmp_path: Path) -> None:
    store = Store(f"{s3}/store", tmp_path / "cache")
    _planted(store, machine="elsewhere", token="theirs")
    with pytest.raises(StoreInUse):
        go(store)
    _planted(store, machine="elsewhere", token="theirs", beat=time.time() - locks.STALE_SECONDS - 1)
    go(store)
    assert ran == ["write", "join", "count"]


def test_s3_a_process_id_that_is_used_again_is_another_process(s3: str, tmp_path: Path) -> None:
    store = Store(f"{s3}/store", tmp_path / "cache")
    _planted(store, token="theirs", pid=os.getpid(), started=time.time() - 1e6)
    assert holder_of(store) == {}


def test_s3_of_two_that_find_a_stale_lock_one_gets_it(s3: str, tmp_path: Path) -> None:
    store = Store(f"{s3}/store", tmp_path / "cache")
    _planted(store, machine="elsewhere", token="theirs", beat=0.0)
    one, two = locks.RemoteLock(store.far), locks.RemoteLock(store.far)
    tag = store.far.tag(locks.LOCK)
    assert one.take() is not None
    with pytest.raises(FileExistsError):  # what the second would write, had it looked before the first wrote
        two._write(IfMatch=tag)
    assert two.take() is None
    one.release()
    assert two.take() == {}
    two.release()


def test_s3_a_lost_lock_ends_the_run(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.05)
    store = Store(f"{s3}/store", tmp_path / "cache")
    with StoreLock(store) as lock:
        lock.check()
        _planted(store, machine="elsewhere", token="theirs")
        until = time.monotonic() + 10
        while not lock.held.lost:
            assert time.monotonic() < until
            time.sleep(0.02)
        with pytest.raises(RuntimeError, match="was taken over by process"):
            lock.check()
    assert store.far.exists("lock.json")  # it is another's now
