"""Where results lie: a folder a stage and key, finished when its manifest is there, on a disk or on S3.

    <store>/<stage>/<key>/manifest.json      written last; a folder without it is unfinished work
    <store>/runs/<run>.json                  what each run asked for and which stages it came to
    <store>/ledger.jsonl                     a line for each stage that was computed

A remote store is worked on in a local copy (`Store.local`): a stage's files are sent when it is done, manifest last,
and, while it runs, finished parts are sent to `<stage>/<key>.partial/` so that another machine can take them up.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import fsspec

from gristmill.flows.errors import UsageError
from gristmill.flows.identity import canonical

MANIFEST = "manifest.json"
OBSERVATIONS = (
    "log/",
    "view/",
)  # written about a run, not by its recipe: hashed against damage, not as content
MIRROR_SECONDS = 5.0
CHUNK = 1 << 20


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def content_hash(files: list[dict[str, Any]], metrics: dict[str, Any]) -> str:
    """One hash of what a stage made: its content files and its metrics; no time, host or path is in it."""
    listed = sorted((f["path"], f["sha256"]) for f in files if f["content"])
    return hashlib.sha256(canonical([listed, metrics]).encode()).hexdigest()


def described_files(folder: Path) -> list[dict[str, Any]]:
    """Path, size and hash of every file in a stage's folder but its manifest."""
    paths = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return [
        {
            "path": path,
            "bytes": (folder / path).stat().st_size,
            "sha256": sha256(folder / path),
            "content": not path.startswith(OBSERVATIONS),
        }
        for path in paths
        if path != MANIFEST and not path.endswith(".tmp")
    ]


class Store:
    """A store at a local path or an fsspec URI such as `s3://bucket/prefix`."""

    def __init__(self, where: str | Path, cache: Path | None = None) -> None:
        self.uri = str(where)
        self.remote = "://" in self.uri and not self.uri.startswith("file://")
        if self.remote:
            self.uri = self.uri.rstrip("/")
            name = hashlib.sha256(self.uri.encode()).hexdigest()[:12]
            self.local = (cache or Path(".gristmill/cache")).absolute() / name
        else:
            self.local = Path(self.uri.removeprefix("file://")).absolute()

    # --- reading -----------------------------------------------------------------------------------------------

    def folder(self, stage: str, key: str) -> Path:
        return self.local / stage / key

    def manifest(self, stage: str, key: str) -> dict[str, Any] | None:
        """The manifest of a finished stage, or none."""
        path = self.folder(stage, key) / MANIFEST
        if not path.exists() and self.remote:
            self._get(f"{stage}/{key}/{MANIFEST}", path)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def manifests(self, stage: str) -> list[dict[str, Any]]:
        """Every finished result of a stage, oldest first."""
        keys = [key for key in self._names(stage) if "." not in key]  # a partial result is no result
        found = [m for key in keys if (m := self.manifest(stage, key)) is not None]
        return sorted(found, key=lambda m: m["started"])

    def stages(self) -> list[str]:
        """Names of the stages that have a folder."""
        return [name for name in self._names("") if name not in ("runs", "lock") and "." not in name]

    def partial(self, stage: str, key: str) -> bool:
        """Whether unfinished work of this stage can be taken up."""
        folder = self.folder(stage, key)
        if folder.exists() and any(p.is_file() for p in folder.rglob("*")):
            return True
        return self.remote and bool(self._names(f"{stage}/{key}.partial"))

    def damage(self, manifest: dict[str, Any]) -> list[str]:
        """What is wrong with a finished stage's files: missing, another size, another hash. Fetches remote ones."""
        folder, wrong = self.folder(manifest["stage"], manifest["key"]), []
        for file in manifest["files"]:
            path = folder / file["path"]
            if not path.exists() and self.remote:
                self._get(f"{manifest['stage']}/{manifest['key']}/{file['path']}", path)
            name = f"{manifest['stage']}/{manifest['key']}/{file['path']}"
            if not path.exists():
                wrong.append(f"{name} is missing")
            elif path.stat().st_size != file["bytes"]:
                wrong.append(f"{name} has {path.stat().st_size} bytes, not {file['bytes']}")
            elif sha256(path) != file["sha256"]:
                wrong.append(f"{name} has other bytes than when it was made")
        if content_hash(manifest["files"], manifest["metrics"]) != manifest["content_hash"]:
            wrong.append(f"{manifest['stage']}/{manifest['key']}/{MANIFEST} does not hash to its content_hash")
        return wrong

    def runs(self) -> list[dict[str, Any]]:
        """Every run, oldest first."""
        found = []
        for name in self._names("runs"):
            path = self.local / "runs" / name
            if not path.exists() and self.remote:
                self._get(f"runs/{name}", path)
            if path.suffix == ".json":
                found.append(json.loads(path.read_text(encoding="utf-8")))
        return sorted(found, key=lambda r: (r["started"], r["run"]))

    # --- writing -----------------------------------------------------------------------------------------------

    def check_usable(self, needed_bytes: int = 0) -> None:
        """Refuse, before anything is written, a store that cannot take the run.

        Raises:
            UsageError: not writable, not enough room, no bucket or no credentials.
        """
        if self.remote:
            self._check_remote()
        place = self.local
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise UsageError(f"store {self.uri!r} is a file, not a folder: name another place with --store")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UsageError(f"store {self.uri!r} is not writable ({place}): change its rights or name another place")
        free = shutil.disk_usage(place).free
        if free < needed_bytes:
            raise UsageError(
                f"store {self.uri!r} has {free / 1e6:.0f} MB free and the plan needs {needed_bytes / 1e6:.0f} MB: "
                f"make room or name another place with --store"
            )

    def _check_remote(self) -> None:
        try:
            filesystem, path = fsspec.core.url_to_fs(self.uri)
            filesystem.ls(path.split("/")[0])
        except (ImportError, ValueError) as error:
            raise UsageError(
                f"store {self.uri!r} cannot be opened ({error}): use a path or s3://bucket/prefix"
            ) from error
        except FileNotFoundError as error:
            raise UsageError(f"store {self.uri!r}: there is no such bucket: create it or correct the name") from error
        except Exception as error:  # botocore raises many kinds for missing or wrong credentials
            raise UsageError(
                f"store {self.uri!r} cannot be reached ({type(error).__name__}: {error}): set AWS_ACCESS_KEY_ID and "
                f"AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL for a server of your own"
            ) from error

    def prepare(self, stage: str, key: str) -> Path:
        """The folder to work in, with whatever unfinished work there is."""
        folder = self.folder(stage, key)
        if self.remote and not folder.exists():
            for path in self._files(f"{stage}/{key}.partial"):
                self._get(f"{stage}/{key}.partial/{path}", folder / path)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def discard(self, stage: str, key: str) -> None:
        """Remove a result or its unfinished work, so that it is made from the beginning."""
        folder = self.folder(stage, key)
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        if self.remote:
            filesystem, root = fsspec.core.url_to_fs(self.uri)
            for part in (f"{stage}/{key}/{MANIFEST}", f"{stage}/{key}", f"{stage}/{key}.partial"):
                if filesystem.exists(f"{root}/{part}"):
                    filesystem.rm(f"{root}/{part}", recursive=True)

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, last and at once; a remote store gets the files first."""
        stage, key = manifest["stage"], manifest["key"]
        folder = self.folder(stage, key)
        write_json(folder / MANIFEST, manifest)
        if self.remote:
            for file in [*manifest["files"], {"path": MANIFEST}]:
                self._put(folder / file["path"], f"{stage}/{key}/{file['path']}")
            filesystem, root = fsspec.core.url_to_fs(self.uri)
            if filesystem.exists(f"{root}/{stage}/{key}.partial"):
                filesystem.rm(f"{root}/{stage}/{key}.partial", recursive=True)

    def record_run(self, run: dict[str, Any]) -> None:
        path = self.local / "runs" / f"{run['run']}.json"
        write_json(path, run)
        if self.remote:
            self._put(path, f"runs/{path.name}")

    def record_ledger(self, line: dict[str, Any]) -> None:
        path = self.local / "ledger.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(canonical(line) + "\n")
        if self.remote:
            self._put(path, "ledger.jsonl")

    def mirror(self, stage: str, key: str) -> Mirror:
        """Keeps finished parts of a running stage on the remote store; a local store needs none."""
        return Mirror(self, stage, key)

    # --- the remote side ---------------------------------------------------------------------------------------

    def _names(self, below: str) -> list[str]:
        local = {p.name for p in (self.local / below).iterdir()} if (self.local / below).is_dir() else set()
        if not self.remote:
            return sorted(local)
        filesystem, root = fsspec.core.url_to_fs(self.uri)
        filesystem.invalidate_cache()
        place = f"{root}/{below}".rstrip("/")
        if not filesystem.exists(place):
            return []
        return sorted({entry.rstrip("/").rsplit("/", 1)[-1] for entry in filesystem.ls(place, detail=False)})

    def _files(self, below: str) -> list[str]:
        filesystem, root = fsspec.core.url_to_fs(self.uri)
        filesystem.invalidate_cache()
        place = f"{root}/{below}"
        return [f[len(place) + 1 :] for f in filesystem.find(place)] if filesystem.exists(place) else []

    def _get(self, remote: str, path: Path) -> None:
        filesystem, root = fsspec.core.url_to_fs(self.uri)
        part = path.with_name(f"{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(f"{root}/{remote}", str(part))
        except FileNotFoundError:
            return
        os.replace(part, path)

    def _put(self, path: Path, remote: str) -> None:
        filesystem, root = fsspec.core.url_to_fs(self.uri)
        filesystem.put_file(str(path), f"{root}/{remote}")


class Mirror:
    """A thread that sends finished files of a running stage to the remote store now and then."""

    def __init__(self, store: Store, stage: str, key: str) -> None:
        self.store, self.place = store, f"{stage}/{key}.partial"
        self.folder, self.over = store.folder(stage, key), threading.Event()
        self.sent: dict[str, tuple[int, int]] = {}
        self.thread = threading.Thread(target=self._run, daemon=True, name="store-mirror")

    def __enter__(self) -> Mirror:
        if self.store.remote:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        if self.thread.ident is not None:
            self.thread.join()

    def _run(self) -> None:
        while not self.over.wait(MIRROR_SECONDS):
            self.send()

    def send(self) -> None:
        """Send whole files that are new or changed; those in the making end in .tmp or .part, or lie in such."""
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if not path.is_file() or any(p.endswith((".tmp", ".part")) for p in name.split("/")):
                continue
            try:
                seen = (path.stat().st_size, path.stat().st_mtime_ns)
                if self.sent.get(name) != seen:
                    self.store._put(path, f"{self.place}/{name}")
                    self.sent[name] = seen
            except FileNotFoundError:
                continue  # the stage removed or renamed it meanwhile


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, written aside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.tmp")
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
