"""One run at a time on a store."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec

from gristmill.flows.errors import UsageError
from gristmill.flows.store import Store

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
POLL_SECONDS = 1.0


class StoreLock:
    """Held while a run writes to a store.

    On a disk it is an advisory lock of the operating system, which ends with the process that holds it, so a stale
    one is taken over by itself. On S3 it is an object with a heartbeat; one that has not beaten for a minute is stale.
    """

    def __init__(self, store: Store, *, wait: bool = False, say: Callable[[str], None] = print) -> None:
        self.store, self.wait, self.say = store, wait, say
        self.held = _Remote(store) if store.remote else _Local(store.local / "lock")

    def __enter__(self) -> StoreLock:
        told = False
        while not self.held.take():
            holder = described(self.held.holder())
            if not self.wait:
                raise UsageError(
                    f"store {self.store.uri!r} is in use by {holder}: wait for it, add --wait, or name another store"
                )
            if not told:
                self.say(f"waiting for the store: it is in use by {holder}")
                told = True
            time.sleep(POLL_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self.held.release()


def described(holder: dict[str, Any]) -> str:
    """A holder in words."""
    if not holder:
        return "another run"
    return f"process {holder['pid']} on {holder['host']} ({holder['command']}, since {holder['since']})"


def _self() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": " ".join(["gristmill", *sys.argv[1:]])[:200],
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "token": uuid.uuid4().hex,
    }


class _Local:
    def __init__(self, path: Path) -> None:
        self.path, self.file = path, None

    def take(self) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        file.truncate(0)
        file.write(json.dumps(_self()))
        file.flush()
        self.file = file
        return True

    def holder(self) -> dict[str, Any]:
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        return json.loads(text) if text else {}

    def release(self) -> None:
        if self.file is not None:
            self.file.truncate(0)
            self.file.close()
            self.file = None


class _Remote:
    def __init__(self, store: Store) -> None:
        self.filesystem, root = fsspec.core.url_to_fs(store.uri)
        self.path = f"{root}/lock.json"
        self.own, self.over = _self(), threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True, name="store-lock")

    def take(self) -> bool:
        holder = self.holder()
        if holder and time.time() - holder["beat"] < STALE_SECONDS:
            return False
        self._write()
        time.sleep(0.2)  # two that wrote at once read the same last writer
        if self.holder().get("token") != self.own["token"]:
            return False
        self.thread.start()
        return True

    def holder(self) -> dict[str, Any]:
        self.filesystem.invalidate_cache()
        try:
            return json.loads(self.filesystem.cat_file(self.path))
        except FileNotFoundError:
            return {}

    def _write(self) -> None:
        self.filesystem.pipe_file(self.path, json.dumps({**self.own, "beat": time.time()}).encode())

    def _beat(self) -> None:
        while not self.over.wait(HEARTBEAT_SECONDS):
            self._write()

    def release(self) -> None:
        self.over.set()
        if self.thread.ident is not None:
            self.thread.join()
            if self.holder().get("token") == self.own["token"]:
                self.filesystem.rm_file(self.path)
