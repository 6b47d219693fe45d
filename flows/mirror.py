"""Unfinished work on a remote store: snapshots from which another machine can resume.

    <stage>/<key>.partial/snapshot.json          path and hash of each file; replaced at once by the next
    <stage>/<key>.partial/snapshot-before.json   the one before it, whose files stay: to go back to if one is damaged
    <stage>/<key>.partial/<sha256>               the files, by what they hold

A stage that can be killed at any moment leaves its folder fit to resume from at any moment. Files sent one by one would
lose that: a checkpoint's second half could come from a later moment than its first. So a snapshot counts only if the
folder looked the same before its files were read and after, and it becomes the one to resume from in a single write.

An upload that fails is said, noted in log/uploads.jsonl and the manifest, and tried again at the next interval.
"""

from __future__ import annotations

import contextvars
import json
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gristmill.flows.errors import StoreDamaged
from gristmill.flows.manifest import is_unfinished, listed_files, sha256
from gristmill.flows.remote import Remote

SNAPSHOT, BEFORE = "snapshot.json", "snapshot-before.json"
UPLOADS = "log/uploads.jsonl"
MIRROR_SECONDS = 10.0

View = dict[str, tuple[int, int, int]]
Snapshot = dict[str, str]  # hash of each file, by its path
Say = Callable[[str], None]


class Mirror:
    """Sends a snapshot of a running stage's folder now and then, from a thread, while it is entered."""

    def __init__(self, far: Remote | None, place: str, folder: Path, say: Say, seconds: float = MIRROR_SECONDS) -> None:
        self.far, self.place, self.folder, self.say, self.seconds = far, place, folder, say, seconds
        self.failure = ""  # of the last upload
        self._over = threading.Event()
        self._hashes: dict[tuple[str, tuple[int, int, int]], str] = {}
        self._sent: set[str] = set()
        self._placed: set[str] = set()  # what was sent and what may have been half sent
        self._there: tuple[Snapshot, Snapshot] | None = None  # the latest and the one before, once they were looked for
        self._published = False  # whether the latest is of this process, and so whole
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Mirror:
        if self.far is not None:
            run = contextvars.copy_context().run  # an orchestrator's log is found by the context
            self._thread = threading.Thread(target=run, args=(self._run,), daemon=True, name="store-mirror")
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            if kind is None:
                return
            self._try()
            if self.failure:
                self.say(f"another machine would find at {self.place} what was sent before, not this last state")

    def _run(self) -> None:
        while not self._over.wait(self.seconds):
            self._try()

    def _try(self) -> None:
        try:
            self.send()
        except Exception as error:  # a network that is away must not end the stage: the next round tries again
            self._note(" ".join(str(error).split()) or type(error).__name__)
        else:
            self._note("")

    def _note(self, failure: str) -> None:
        """Say and write down that uploads began to fail, fail otherwise, or work again."""
        if failure == self.failure:
            return
        self.failure = failure
        if failure:
            self.say(f"unfinished work could not be sent to {self.place} ({failure}); it is tried again")
        else:
            self.say(f"unfinished work is sent to {self.place} again")
        (self.folder / UPLOADS).parent.mkdir(exist_ok=True)
        # where the disk is full, what was said must do
        with suppress(OSError), (self.folder / UPLOADS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"at": round(time.time(), 3), "failure": failure}) + "\n")

    def send(self) -> bool:
        """Send a snapshot; whether the folder held still for one and it differs from the last."""
        assert self.far is not None
        before = self._view()
        hashes = self._hashes_of(before)
        if hashes is None or self._view() != before:
            return False
        if self._there is None:
            self._placed = {*self.far.names(self.place)} - {SNAPSHOT, BEFORE}
            self._there = self._earlier(SNAPSHOT), self._earlier(BEFORE)
        if not hashes or (self._published and hashes == self._there[0]):
            return False
        for path, digest in hashes.items():
            if digest not in self._sent:
                self._placed.add(digest)
                if not self._send_file(path, digest, before[path]):
                    return False
                self._sent.add(digest)
        self._publish(hashes)
        return True

    def _earlier(self, name: str) -> Snapshot:
        """What an earlier attempt has sent; a snapshot of it that cannot be read is replaced."""
        assert self.far is not None
        with suppress(StoreDamaged):
            return snapshot(self.far, self.place, name) or {}
        return {}

    def _publish(self, hashes: Snapshot) -> None:
        """Make what was sent the snapshot, the one that was it the one before, and remove what neither holds."""
        assert self.far is not None
        assert self._there is not None
        latest, before = self._there
        if self._published and latest != hashes:  # an earlier process's may be damaged
            before = latest
            self.far.write(f"{self.place}/{BEFORE}", json.dumps(before, sort_keys=True).encode())
        self.far.write(f"{self.place}/{SNAPSHOT}", json.dumps(hashes, sort_keys=True).encode())
        self._there, self._published = (hashes, before), True
        used = {*hashes.values(), *before.values()}
        for digest in self._placed - used:
            self.far.remove(f"{self.place}/{digest}")
        self._placed = used
        self._sent &= used

    def _view(self) -> View:
        view: View = {}
        for name in listed_files(self.folder):
            if is_unfinished(name) or name.startswith("log/"):
                continue
            try:
                view[name] = _stamp(self.folder / name)
            except FileNotFoundError:
                continue  # removed or renamed since it was listed: the second look will differ
        return view

    def _hashes_of(self, view: View) -> Snapshot | None:
        found = {}
        for name, seen in view.items():
            if (name, seen) not in self._hashes:
                try:
                    self._hashes[name, seen] = sha256(self.folder / name)
                except FileNotFoundError:
                    return None
            found[name] = self._hashes[name, seen]
        self._hashes = {(name, seen): found[name] for name, seen in view.items()}
        return found

    def _send_file(self, name: str, digest: str, seen: tuple[int, int, int]) -> bool:
        """Send a file under its hash, unless it changed meanwhile."""
        assert self.far is not None
        try:
            self.far.put(self.folder / name, f"{self.place}/{digest}")
            return _stamp(self.folder / name) == seen
        except FileNotFoundError:
            return False


def _stamp(path: Path) -> tuple[int, int, int]:
    """What changes when a file does."""
    seen = path.stat()
    return (seen.st_size, seen.st_mtime_ns, seen.st_ino)


def failed_uploads(folder: Path) -> list[dict[str, Any]]:
    """When uploads of a stage's unfinished work began to fail on this machine, and why."""
    path, rows = folder / UPLOADS, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):  # a full disk left half a line
            rows.append(json.loads(line))
    return [row for row in rows if row["failure"]]


def snapshot(far: Remote, place: str, name: str = SNAPSHOT) -> Snapshot | None:
    """A snapshot that was sent; none where there is no snapshot.

    Raises:
        StoreDamaged: it cannot be read.
    """
    where = f"{place}/{name}".lstrip("/")
    text = far.read(where)
    if text is None:
        return None
    try:
        return {str(path): str(digest) for path, digest in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise StoreDamaged(f"{where} cannot be read ({error})") from error


def fetch_sent(far: Remote, name: str, path: Path) -> str:
    """Fetch a file that a snapshot names by its place, which ends in its hash; what is wrong with it, if anything."""
    try:
        far.get(name, path)
    except FileNotFoundError:
        return "is missing"
    return "" if sha256(path) == name.rsplit("/", 1)[-1] else "has other bytes than were sent"


def restore(far: Remote, place: str, folder: Path, say: Say) -> bool:
    """Bring the latest whole snapshot into a folder that holds no work; whether there is one.

    Where a file of the latest is missing or cut short, that is said and the one before it is taken.

    Raises:
        StoreDamaged: neither is whole; the files are named.
    """
    if not far.exists(f"{place}/{SNAPSHOT}"):
        if far.names(place):
            say(f"unfinished work at {place} was never sent whole: the stage begins from the start")
        return False
    wrong = []
    for name in (SNAPSHOT, BEFORE):
        found = _bring(far, place, name, folder)
        if not found:
            if wrong:
                say(f"the latest snapshot of unfinished work is damaged ({wrong[0]}): the one before it is taken up")
            return True
        wrong.append(found)
    raise StoreDamaged(
        f"unfinished work at {far.uri}/{place} is damaged: {wrong[0]}; of the snapshot before it: {wrong[1]}. To make "
        f"the stage from the start, give its name to --from"
    )


def _bring(far: Remote, place: str, name: str, folder: Path) -> str:
    """Bring a snapshot; what is wrong with it, in which case nothing is brought."""
    try:
        files = snapshot(far, place, name)
    except StoreDamaged as error:
        return str(error)
    if files is None:
        return f"{place}/{name} is missing"
    aside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    for path, digest in files.items():
        if wrong := fetch_sent(far, f"{place}/{digest}", aside / path):
            shutil.rmtree(aside, ignore_errors=True)
            return f"{path} ({place}/{digest}) {wrong}"
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return ""
