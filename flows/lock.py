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
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Protocol

from gristmill.flows.errors import StoreInUse, UsageError
from gristmill.flows.remote import Remote
from gristmill.flows.store import Store

LOCK = "lock.json"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
POLL_SECONDS = 1.0
SETTLE_SECONDS = 0.5

Holder = dict[str, Any]


class Held(Protocol):
    """A lock of one kind: `take` once, `release` once."""

    lost: bool

    def take(self) -> Holder | None: ...

    def holder(self) -> Holder: ...

    def release(self) -> None: ...


class StoreLock:
    """Held while a run writes to a store.

    On a disk it is an advisory lock of the operating system, which ends with the process that holds it, so a stale one
    is taken over by itself. On a remote store it is an object with a heartbeat; it is stale when its process is gone
    (seen from the same machine) or when it has not beaten for a minute.
    """

    def __init__(self, store: Store, *, wait: bool = False, say: Callable[[str], None] = print) -> None:
        self.store, self.wait, self.say = store, wait, say
        self.held: Held = RemoteLock(store.far) if store.remote else LocalLock(store.local / "lock")

    def __enter__(self) -> StoreLock:
        told = False
        while (before := self.held.take()) is None:
            holder = described(self.held.holder())
            if not self.wait:
                raise StoreInUse(
                    f"store {self.store.uri!r} is in use by {holder}: wait for it, add --wait, or name another store"
                )
            if not told:
                self.say(f"waiting for store {self.store.uri}: it is in use by {holder}")
                told = True
            time.sleep(POLL_SECONDS)
        if before:
            self.say(f"took over the store's lock from {described(before)}, which ended without giving it back")
        return self

    def __exit__(self, *_: object) -> None:
        self.held.release()

    def check(self) -> None:
        """Raises RuntimeError where the lock was taken over by another run, as after a long sleep of this machine."""
        if self.held.lost:
            raise RuntimeError(
                f"the lock of store {self.store.uri!r} was taken over by {described(self.held.holder())} while "
                f"this run was out of reach: wait for it and run again"
            )


def described(holder: Holder) -> str:
    """A holder in words."""
    if not holder:
        return "another run"
    return f"process {holder['pid']} on {holder['host']} ({holder['command']}, since {holder['since']})"


def holder_of(store: Store) -> Holder:
    """Who holds a store now; empty where nobody does."""
    held: LocalLock | RemoteLock = RemoteLock(store.far) if store.remote else LocalLock(store.local / "lock")
    return held.holder() if held.taken() else {}


def _self() -> Holder:
    return {
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "host": socket.gethostname(),
        "machine": _machine(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "token": uuid.uuid4().hex,
    }


def _machine() -> str:
    """Where a process id means something: this boot of this machine and its namespace of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return f"{socket.gethostname()}/{uuid.getnode()}"


def _started(pid: int) -> float | None:
    """When a process began, since ids are used again; none where it is gone."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else round(process.create_time(), 2)
    except psutil.NoSuchProcess:
        return None


def _dead(holder: Holder) -> bool:
    """Whether a holder is known to be gone: only its own machine can tell."""
    if holder.get("machine") != _machine():
        return False
    started = _started(holder["pid"])
    return started is None or abs(started - holder["started"]) > 1.0


class LocalLock:
    """`flock` on a file that names the holder."""

    def __init__(self, path: Path) -> None:
        self.path, self.lost = path, False
        self.file: TextIOWrapper | None = None

    def take(self) -> Holder | None:
        """The holder that left the lock behind (empty where none did), or none where somebody has it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"store {str(self.path.parent)!r} is not writable ({error.strerror}): name another place with --store"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        left = self.holder()
        file.truncate(0)
        file.write(json.dumps(_self()))
        file.flush()
        self.file = file
        return left

    def taken(self) -> bool:
        if not self.path.exists():
            return False
        with self.path.open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def holder(self) -> Holder:
        """Who stands in the file; empty where nobody does, or where its name is just being written."""
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def release(self) -> None:
        if self.file is not None:
            self.file.truncate(0)
            self.file.close()
            self.file = None


class RemoteLock:
    """An object with a heartbeat; written on condition that nobody else did, where the server knows conditions."""

    def __init__(self, far: Remote) -> None:
        self.far, self.lost = far, False
        self.own, self.over = _self(), threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True, name="store-lock")

    def take(self) -> Holder | None:
        """The stale holder it was taken from (empty where there was none), or none where somebody has it."""
        tag = self.far.tag(LOCK)  # asked for before the holder is read, so that a change between the two is noticed
        holder = self.holder()
        if holder and not self._stale(holder):
            return None
        condition = {} if not self._conditional else {"IfMatch": tag} if tag else {"mode": "create"}
        try:
            self._write(**condition)
        except FileExistsError:
            return None  # another was quicker
        except PermissionError as error:
            raise UsageError(
                f"store {self.far.uri!r} is not writable ({error}): give these credentials the right to write there"
            ) from error
        if not self._conditional:
            time.sleep(SETTLE_SECONDS)  # of two that wrote at once the last has it
        if self.holder().get("token") != self.own["token"]:
            return None
        self.thread.start()
        return holder

    def taken(self) -> bool:
        holder = self.holder()
        return bool(holder) and not self._stale(holder)

    def holder(self) -> Holder:
        text = self.far.read(LOCK)
        return json.loads(text) if text else {}

    def release(self) -> None:
        self.over.set()
        if self.thread.ident is not None:
            self.thread.join()
            if self.holder().get("token") == self.own["token"]:
                self.far.remove(LOCK)

    @property
    def _conditional(self) -> bool:
        """Whether the server compares before it writes: S3's conditional writes."""
        return self.far.uri.startswith(("s3://", "s3a://"))

    def _stale(self, holder: Holder) -> bool:
        return _dead(holder) or time.time() - holder["beat"] > STALE_SECONDS

    def _write(self, **condition: str) -> None:
        self.far.write(LOCK, json.dumps({**self.own, "beat": time.time()}).encode(), **condition)

    def _beat(self) -> None:
        while not self.over.wait(HEARTBEAT_SECONDS):
            try:
                if self.holder().get("token") != self.own["token"]:
                    self.lost = True
                    return
                self._write()
            except Exception:  # a network that is away for a moment: the next beat tells
                continue
