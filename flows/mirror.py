"""Unfinished work on a remote store: snapshots from which another machine can resume.

    <stage>/<key>.partial/snapshot.json      path and hash of each file; replaced at once by the next
    <stage>/<key>.partial/<sha256>           the files, by what they hold

A stage that can be killed at any moment leaves its folder fit to resume from at any moment. Files sent one by one would
lose that: a checkpoint's second half could come from a later moment than its first. So a snapshot counts only if the
folder looked the same before its files were read and after, and it becomes the one to resume from in a single write.
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

from gristmill.flows.errors import StoreDamaged
from gristmill.flows.manifest import is_unfinished, listed_files, sha256
from gristmill.flows.remote import Remote

SNAPSHOT = "snapshot.json"
MIRROR_SECONDS = 10.0

View = dict[str, tuple[int, int, int]]


class Mirror:
    """Sends a snapshot of a running stage's folder now and then, from a thread, while it is entered."""

    def __init__(self, far: Remote | None, place: str, folder: Path, seconds: float = MIRROR_SECONDS) -> None:
        self.far, self.place, self.folder, self.seconds = far, place, folder, seconds
        self.failure = ""
        self._over = threading.Event()
        self._hashes: dict[tuple[str, tuple[int, int, int]], str] = {}
        self._sent: set[str] = set()
        self._placed: set[str] = set()  # what was sent and what may have been half sent
        self._last = ""
        self._thread = threading.Thread(target=self._run, daemon=True, name="store-mirror")

    def __enter__(self) -> Mirror:
        if self.far is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
            if kind is not None:
                self._try()

    def _run(self) -> None:
        while not self._over.wait(self.seconds):
            self._try()

    def _try(self) -> None:
        try:
            self.send()
        except Exception as error:  # a network that is away must not end the stage: the next round tries again
            self.failure = str(error)

    def send(self) -> bool:
        """Send a snapshot; whether the folder held still for one and it differs from the last."""
        assert self.far is not None
        before = self._view()
        hashes = self._hashes_of(before)
        if hashes is None or self._view() != before:
            return False
        text = json.dumps(hashes, sort_keys=True)
        if not hashes or text == self._last:
            return False
        for path, digest in hashes.items():
            if digest not in self._sent:
                self._placed.add(digest)
                if not self._send_file(path, digest, before[path]):
                    return False
                self._sent.add(digest)
        self.far.write(f"{self.place}/{SNAPSHOT}", text.encode())
        self._last = text
        for digest in self._placed - set(hashes.values()):
            self.far.remove(f"{self.place}/{digest}")
        self._placed &= set(hashes.values())
        self._sent &= self._placed
        return True

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

    def _hashes_of(self, view: View) -> dict[str, str] | None:
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


def snapshot(far: Remote, place: str) -> dict[str, str] | None:
    """Hash of each file of the latest snapshot, by its path; none where there is no snapshot.

    Raises:
        StoreDamaged: it cannot be read.
    """
    where = f"{place}/{SNAPSHOT}".lstrip("/")
    text = far.read(where)
    if text is None:
        return None
    try:
        return {str(name): str(digest) for name, digest in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise StoreDamaged(f"{where} cannot be read ({error}): remove it to begin from the start") from error


def fetch_sent(far: Remote, name: str, path: Path) -> str:
    """Fetch a file that a snapshot names by its place, which ends in its hash; what is wrong with it, if anything."""
    try:
        far.get(name, path)
    except FileNotFoundError:
        return "is missing"
    return "" if sha256(path) == name.rsplit("/", 1)[-1] else "has other bytes than were sent"


def restore(far: Remote, place: str, folder: Path) -> bool:
    """Bring the latest snapshot into a folder that holds no work; whether there was a whole one."""
    text = far.read(f"{place}/{SNAPSHOT}")
    if text is None:
        return False
    aside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    for name, digest in json.loads(text).items():
        try:
            far.get(f"{place}/{digest}", aside / name)
        except FileNotFoundError:
            return False  # the machine that wrote it died while it renewed it
        if sha256(aside / name) != digest:
            return False
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return True
