"""Uploads to a store on S3 that are cut in half, and what was half sent."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gristmill.flows.errors import StageFailed
from gristmill.flows.mirror import BEFORE, SNAPSHOT, Mirror, restore
from gristmill.flows.remote import Remote
from gristmill.flows.stage import stage
from gristmill.flows.store import Store
from tests.flows.toys import Frozen, Heard, go

LARGE = 1 << 20


class Line:
    """A line to the S3 server that, while `cut_after` is set, goes dead behind so many bytes of a large upload."""

    def __init__(self, server: str) -> None:
        host, port = server.removeprefix("http://").split(":")
        self.server, self.cut_after, self.cuts = (host, int(port)), 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self.listener.accept()
            except OSError:
                return
            there = socket.create_connection(self.server)
            threading.Thread(target=self._pass_on, args=(here, there, True), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(there, here, False), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket, up: bool) -> None:
        passed = 0
        try:
            while data := one.recv(1 << 16):
                passed += len(data)
                if up and self.cut_after and passed > self.cut_after:
                    self.cuts += 1
                    break
                other.sendall(data)
        except OSError:
            pass
        for end in (one, other):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


@pytest.fixture
def line(s3: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """The line through which this test's stores reach the S3 server; a cut upload is not tried again by the client."""
    import s3fs

    made = Line(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.address)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    yield made
    made.listener.close()


def mirrored_often(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def often(name: str, key: str, say: Any) -> Mirror:
        return Mirror(store.far, f"{name}/{key}.partial", store.folder(name, key), say, 0.05)

    monkeypatch.setattr(store, "mirror", often)


def until(condition: Any, seconds: float = 30) -> None:
    over = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < over
        time.sleep(0.02)


def test_a_cut_upload_is_said_recorded_and_made_good(
    line: Line, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, heard = Store(f"{s3}/store", tmp_path / "cache"), Heard()
    mirrored_often(store, monkeypatch)

    def work(config: Frozen, out: Path) -> dict[str, Any]:
        line.cut_after = LARGE // 4
        (out / "large").write_bytes(os.urandom(LARGE))
        until(lambda: heard.said)
        assert not any(SNAPSHOT in name for key in store.far.names("large") for name in store.far.names(f"large/{key}"))
        line.cut_after = 0
        until(lambda: store.far.exists(f"large/{out.name}.partial/{SNAPSHOT}"))  # tried again
        return {}

    go(store, pipeline=lambda recipe: stage("large", version=1)(work)(Frozen()), watcher=heard)
    assert line.cuts
    failed, again = heard.said
    assert "unfinished work could not be sent to large/" in failed
    assert "is sent to large/" in again
    (manifest,) = store.manifests("large")
    (row,) = manifest["failed_uploads"]
    assert row["failure"] in failed
    assert store.verify()["bad"] == []


def test_a_result_that_cannot_be_sent_fails_its_stage_and_harms_nothing(
    line: Line, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ran = Store(f"{s3}/store", tmp_path / "cache"), []
    mirrored_often(store, monkeypatch)

    def work(config: Frozen, out: Path) -> dict[str, Any]:
        ran.append(1)
        (out / "large").write_bytes(os.urandom(LARGE))
        until(lambda: store.far.exists(f"large/{out.name}.partial/{SNAPSHOT}"))
        line.cut_after = LARGE // 4
        return {}

    declared = stage("large", version=1)(work)

    def run() -> Any:
        return go(store, pipeline=lambda recipe: declared(Frozen()))

    with pytest.raises(StageFailed, match=r"stage large failed: large/\w+/large could not be sent to s3://.*resume"):
        run()
    line.cut_after = 0
    assert store.manifests("large") == []
    (partial,) = (name for name in store.far.names("large") if name.endswith(".partial"))
    assert restore(store.far, f"large/{partial}", tmp_path / "elsewhere", ran.append)  # as it was
    assert (tmp_path / "elsewhere" / "large").stat().st_size == LARGE
    run()
    assert ran == [1]  # it was sent, not made again
    assert len(store.ledger()) == 1
    assert store.verify()["bad"] == []


@pytest.mark.parametrize("how", ["half", "missing", "other bytes"])
def test_of_half_uploaded_work_the_last_whole_state_is_taken_up(how: str, s3: str, tmp_path: Path) -> None:
    far, folder, said = Remote(f"{s3}/store"), tmp_path / "work", []
    (folder / "work").mkdir(parents=True)
    mirror = Mirror(far, "train/0.partial", folder, said.append)
    for step in (2, 4):
        (folder / "work" / "checkpoint").write_text(f"of step {step}")
        assert mirror.send()
    damage(far, "train/0.partial", SNAPSHOT, how)
    assert restore(far, "train/0.partial", tmp_path / "later", said.append)
    assert (tmp_path / "later" / "work" / "checkpoint").read_text() == "of step 2"
    (line,) = said
    assert "the latest snapshot of unfinished work is damaged (work/checkpoint (train/0.partial/" in line
    assert ("is missing" if how == "missing" else "has other bytes than were sent") in line
    again = Mirror(far, "train/0.partial", tmp_path / "later", said.append)  # what goes on there is sent whole
    (tmp_path / "later" / "work" / "checkpoint").write_text("of step 4")
    assert again.send()
    assert restore(far, "train/0.partial", tmp_path / "third", said.append)
    assert (tmp_path / "third" / "work" / "checkpoint").read_text() == "of step 4"


def test_a_damaged_snapshot_is_never_the_one_to_go_back_to(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far, folder = Remote(f"{s3}/store"), tmp_path / "work"
    folder.mkdir()
    mirror = Mirror(far, "train/0.partial", folder, lambda _: None)
    for step in (2, 4):
        (folder / "checkpoint").write_text(f"of step {step}")
        assert mirror.send()
    damage(far, "train/0.partial", SNAPSHOT, "half")
    assert restore(far, "train/0.partial", tmp_path / "later", lambda _: None)
    again = Mirror(far, "train/0.partial", tmp_path / "later", lambda _: None)
    (tmp_path / "later" / "checkpoint").write_text("of step 6")
    write = far.write

    def cut(name: str, data: bytes) -> None:
        if name.endswith(f"/{SNAPSHOT}"):
            raise OSError("the line is cut")
        write(name, data)

    with monkeypatch.context() as patch:
        patch.setattr(far, "write", cut)
        with pytest.raises(OSError, match="the line is cut"):
            again.send()
    assert restore(far, "train/0.partial", tmp_path / "third", lambda _: None)
    assert (tmp_path / "third" / "checkpoint").read_text() == "of step 2"


def damage(far: Remote, place: str, which: str, how: str) -> None:
    (digest,) = json.loads(far.read(f"{place}/{which}") or b"").values()
    data = far.read(f"{place}/{digest}") or b""
    if how == "missing":
        far.remove(f"{place}/{digest}")
    else:
        far.write(f"{place}/{digest}", data[: len(data) // 2] if how == "half" else b"X" + data[1:])


def test_work_of_which_nothing_is_whole_stops_the_run_with_the_files(s3: str, tmp_path: Path) -> None:
    def work(config: Frozen, out: Path) -> dict[str, Any]:
        (out / "made").write_text("x")
        return {}

    declared = stage("stopped", version=1)(work)

    def pipeline(recipe: Any) -> Any:
        return declared(Frozen())

    key = declared_key(Store(tmp_path / "plain"), pipeline)
    store, folder, heard = Store(f"{s3}/store", tmp_path / "cache"), tmp_path / "work", Heard()
    folder.mkdir()
    place = f"stopped/{key}.partial"
    mirror = Mirror(store.far, place, folder, heard.say)
    for text in ("one", "two"):
        (folder / "part").write_text(text)
        mirror.send()
    for which, how in ((SNAPSHOT, "half"), (BEFORE, "missing")):
        damage(store.far, place, which, how)
    with pytest.raises(
        StageFailed, match=r"is damaged: part \(.* has other bytes .*before it: part .* is missing.*--from"
    ):
        go(store, pipeline=pipeline, watcher=heard)
    assert not store.manifests("stopped")
    go(store, pipeline=pipeline, watcher=heard, from_="stopped")  # as it offers
    assert store.verify()["bad"] == []


def declared_key(store: Store, pipeline: Any) -> str:
    go(store, pipeline=pipeline)
    return store.keys("stopped")[0]


def test_work_that_was_never_sent_whole_is_said(s3: str, tmp_path: Path) -> None:
    far, said = Remote(f"{s3}/store"), []
    far.write("train/0.partial/0123", b"half")
    assert not restore(far, "train/0.partial", tmp_path / "later", said.append)
    assert said == ["unfinished work at train/0.partial was never sent whole: the stage begins from the start"]
