"""Where results lie: a folder for each stage and key, finished when its manifest is there, on a disk or on S3.

    <store>/<stage>/<key>/manifest.json      written last; a folder without it is unfinished work
    <store>/runs/<run>.json                  what each run asked for and which stages it came to
    <store>/ledger.jsonl                     a line for each stage that was computed

A remote store is worked on in a local copy (`Store.local`): a stage's files are sent when it is done, manifest last,
and while it runs its unfinished work is kept as snapshots (`gristmill.flows.mirror`) for another machine to take up.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

from gristmill.flows.errors import StoreDamaged, UsageError
from gristmill.flows.identity import canonical
from gristmill.flows.manifest import (
    MANIFEST,
    Manifest,
    as_json,
    content_hash,
    is_content,
    is_unfinished,
    listed_files,
    parsed,
    sha256,
    sha256_of_all,
    write_json,
)
from gristmill.flows.mirror import BEFORE, SNAPSHOT, Mirror, Say, restore
from gristmill.flows.remote import Remote

LEDGER = "ledger.jsonl"
TRASH = ".trash"
SHOWN = (
    *("view/", "samples.jsonl", "curves.jsonl", "results.jsonl", "report.json", "log/timings.jsonl"),
    *("funnel.jsonl", "histograms.jsonl", "pairs.jsonl", "repeats.jsonl", "matches.jsonl", "compression.jsonl"),
    *("packing.jsonl", "sources.jsonl", "classifiers/", "fit.json", "rungs.jsonl"),
    *("needle.jsonl", "loss_by_position.jsonl", "spikes.jsonl", "expert_load.jsonl"),
)
KEY = re.compile(r"[0-9a-f]{16}")


class Store:
    """A store at a local path or an fsspec URI such as `s3://bucket/prefix`."""

    def __init__(self, where: str | Path, cache: Path | None = None) -> None:
        self.uri = str(where).removeprefix("file://")
        self.remote = "://" in self.uri
        if self.remote:
            self.uri = self.uri.rstrip("/")
            name = hashlib.sha256(self.uri.encode()).hexdigest()[:12]
            self.local = (cache or Path(".gristmill/cache")).absolute() / name
        else:
            self.local = Path(self.uri).expanduser().absolute()

    @cached_property
    def far(self) -> Remote:
        """The remote side of a remote store."""
        return Remote(self.uri)

    # --- reading -----------------------------------------------------------------------------------------------

    def folder(self, stage: str, key: str) -> Path:
        """The local folder of a result, whether it is there or not."""
        return self.local / stage / key

    def manifest(self, stage: str, key: str) -> Manifest | None:
        """The manifest of a finished result, or none. A remote store's is asked for anew each time.

        Raises:
            StoreDamaged: there is one and it cannot be read.
        """
        where = f"{stage}/{key}/{MANIFEST}"
        path = self.folder(stage, key) / MANIFEST
        if not self.remote:
            return parsed(path.read_bytes(), where) if path.exists() else None
        text = self.far.read(where)
        if text is None:
            path.unlink(missing_ok=True)
            return None
        manifest = parsed(text, where)
        if not path.exists() or path.read_bytes() != text:
            write_json(path, manifest)
        return manifest

    def manifests(self, stage: str) -> list[Manifest]:
        """Every readable finished result of a stage, oldest first."""
        found = []
        for key in self.keys(stage):
            try:
                manifest = self.manifest(stage, key)
            except StoreDamaged:
                continue  # `verify` names it; a plan can still compare with the others
            if manifest is not None:
                found.append(manifest)
        return sorted(found, key=lambda m: (m["started"], m["key"]))

    def stages(self) -> list[str]:
        """Names of the stages that have results or unfinished work here."""
        return [name for name in self._names("") if not name.startswith(".") and self.keys(name)]

    def keys(self, stage: str) -> list[str]:
        """Keys of a stage's results, finished or not."""
        return [name for name in self._names(stage) if KEY.fullmatch(name)]

    def find(self, key: str) -> Manifest | None:
        """The finished result of that key, whatever its stage."""
        for stage in self.stages():
            if key in self.keys(stage) and (manifest := self.manifest(stage, key)) is not None:
                return manifest
        return None

    def partial(self, stage: str, key: str) -> bool:
        """Whether unfinished work of this stage can be taken up."""
        folder = self.folder(stage, key)
        if folder.is_dir() and listed_files(folder):
            return True
        return self.remote and self.far.exists(f"{stage}/{key}.partial/{SNAPSHOT}")

    def runs(self) -> list[dict[str, Any]]:
        """Every run's record, oldest first."""
        found = []
        for name in self._names("runs"):
            text = self.far.read(f"runs/{name}") if self.remote else (self.local / "runs" / name).read_bytes()
            if name.endswith(".json") and text:
                found.append(json.loads(text))
        return sorted(found, key=lambda r: (r["started"], r["run"]))

    def ledger(self) -> list[dict[str, Any]]:
        """Every line of the ledger, oldest first; a line that a power cut left half-written is passed over."""
        text = self.far.read(LEDGER) if self.remote else None
        path = self.local / LEDGER
        if not self.remote and path.exists():
            text = path.read_bytes()
        lines = []
        for line in (text or b"").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
        return lines

    # --- checking ----------------------------------------------------------------------------------------------

    def damage(self, manifest: Manifest, *, deep: bool = True) -> list[str]:
        """What is wrong with a result's files: missing, too many, of another size, of another hash.

        `deep` reads every byte, over the network where the store is remote; without it names and sizes are compared.
        """
        stage, key = manifest["stage"], manifest["key"]
        name = f"{stage}/{key}"
        wrong = []
        if content_hash(manifest["files"], manifest["metrics"]) != manifest["content_hash"]:
            wrong.append(f"{name}/{MANIFEST} does not hash to its content_hash")
        there = self._sizes(stage, key)
        listed = {f["path"] for f in manifest["files"]}
        wrong += [f"{name}/{p} is not in its manifest" for p in sorted(set(there) - listed) if is_content(p)]
        whole = []
        for file in manifest["files"]:
            size = there.get(file["path"])
            if size is None:
                wrong.append(f"{name}/{file['path']} is missing")
            elif size != file["bytes"]:
                wrong.append(f"{name}/{file['path']} has {size} bytes, not {file['bytes']}")
            else:
                whole.append(file)
        return wrong + (self._changed(manifest, whole) if deep else [])

    def _sizes(self, stage: str, key: str) -> dict[str, int]:
        if self.remote:
            sizes = self.far.sizes(f"{stage}/{key}")
        else:
            folder = self.folder(stage, key)
            sizes = {name: (folder / name).stat().st_size for name in listed_files(folder)}
        return {name: size for name, size in sizes.items() if name != MANIFEST and not is_unfinished(name)}

    def _changed(self, manifest: Manifest, files: list[dict[str, Any]]) -> list[str]:
        """Sentences on those files whose bytes, where the store has them, are not those of the manifest."""
        name = f"{manifest['stage']}/{manifest['key']}"
        if self.remote:
            hashes = [self.far.sha256(f"{name}/{f['path']}") for f in files]
        else:
            hashes = sha256_of_all([self.local / name / f["path"] for f in files])
        return [
            f"{name}/{file['path']} has other bytes than when it was made"
            for file, digest in zip(files, hashes, strict=True)
            if digest != file["sha256"]
        ]

    def fetch(self, manifest: Manifest, *, shown_only: bool = False) -> list[str]:
        """Bring a result of a remote store into its local folder; what is wrong with it, if anything.

        What is there already is compared by hash, so that what another machine made anew is fetched again.
        `shown_only` takes no more than what people look at: samples, curves, timings and pages.
        """
        if not self.remote:
            return []
        chosen = [f for f in manifest["files"] if not shown_only or f["path"].startswith(SHOWN)]
        return [wrong for file in chosen if (wrong := self._fetched(manifest, file))]

    def file(self, manifest: Manifest, path: str) -> Path:
        """The local path of one file of a result; of a remote store it is fetched.

        Raises:
            StoreDamaged: it is missing, or has other bytes than when it was made (asked of a remote store alone).
        """
        local = self.folder(manifest["stage"], manifest["key"]) / path
        if self.remote:
            file = next(f for f in manifest["files"] if f["path"] == path)
            if wrong := self._fetched(manifest, file):
                raise StoreDamaged(wrong)
        elif not local.is_file():
            raise StoreDamaged(f"{manifest['stage']}/{manifest['key']}/{path} is missing")
        return local

    def _fetched(self, manifest: Manifest, file: dict[str, Any]) -> str:
        """Fetch a file that is not here as it should be; what is wrong with it then."""
        name = f"{manifest['stage']}/{manifest['key']}"
        path = self.local / name / file["path"]
        if path.is_file() and path.stat().st_size == file["bytes"] and sha256(path) == file["sha256"]:
            return ""
        try:
            self.far.get(f"{name}/{file['path']}", path)
        except FileNotFoundError:
            return f"{name}/{file['path']} is missing"
        return "" if sha256(path) == file["sha256"] else f"{name}/{file['path']} has other bytes than when it was made"

    def verify(self) -> dict[str, Any]:
        """Re-hash everything in the store.

        Returns:
            `stages`, the content hash of each finished stage of the latest run, by its name, with its key where the
            run has several of that name; `bad`, a sentence for each thing that
            is wrong anywhere in the store; `notes`, on results whose input was made again since with other bytes (same
            recipe, other rounding: another number of threads or ranks, another device); `run`, the latest run.
        """
        bad: list[str] = []
        hashes: dict[tuple[str, str], str] = {}
        notes: list[str] = []
        results: list[Manifest] = []
        for stage in self.stages():
            for key in self.keys(stage):
                try:
                    manifest = self.manifest(stage, key)
                except StoreDamaged as error:
                    bad.append(str(error))
                    continue
                if manifest is not None:
                    results.append(manifest)
                    hashes[stage, key] = manifest["content_hash"]
                    bad += self.damage(manifest)
        for manifest in results:
            for name, made_from in manifest["inputs"].items():
                now = hashes.get((made_from["stage"], made_from["key"]))
                if now is not None and now != made_from.get("content_hash", now):
                    notes.append(
                        f"{manifest['stage']}/{manifest['key']}: its input {name} was made again since with other bytes"
                    )
        runs = self.runs()
        latest = runs[-1] if runs else {"run": None, "stages": []}
        called = Counter(entry["stage"] for entry in latest["stages"])
        stages = {}
        for entry in latest["stages"]:
            if entry["state"] in ("cached", "completed"):
                name = f"{entry['stage']}/{entry['key']}"
                if (entry["stage"], entry["key"]) in hashes:
                    shown = entry["stage"] if called[entry["stage"]] == 1 else name
                    stages[shown] = hashes[entry["stage"], entry["key"]]
                elif not any(wrong.startswith(name) for wrong in bad):
                    bad.append(f"{name} of the latest run is no longer there")
        return {"run": latest["run"], "stages": stages, "bad": sorted(set(bad)), "notes": notes}

    def check_usable(self, needed_bytes: int = 0) -> None:
        """Refuse, before anything is written, a store that cannot take the run.

        Raises:
            UsageError: not writable, not enough room, no bucket or no credentials.
        """
        if self.remote:
            self.far.check()
        place = self.local
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise UsageError(f"store {self.uri!r}: {place} is a file, not a folder: name another place with --store")
        try:
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            raise UsageError(
                f"store {self.uri!r} is not writable ({place}: {error.strerror}): change its rights or name "
                f"another place with --store"
            ) from error
        free = shutil.disk_usage(place).free
        if free < needed_bytes:
            raise UsageError(
                f"store {self.uri!r} has {free / 1e6:.0f} MB free and the plan needs "
                f"{needed_bytes / 1e6:.0f} MB: make room or name another place with --store"
            )

    # --- writing -----------------------------------------------------------------------------------------------

    def prepare(self, stage: str, key: str, say: Say) -> Path:
        """The folder to work in, with whatever unfinished work there is, here or (of a remote store) elsewhere.

        Raises:
            StoreDamaged: there is some on the remote store, and none of it is whole.
        """
        folder = self.folder(stage, key)
        (folder / MANIFEST).unlink(missing_ok=True)
        if self.remote and not (folder.is_dir() and listed_files(folder)):
            restore(self.far, f"{stage}/{key}.partial", folder, say)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def discard(self, stage: str, key: str) -> None:
        """Remove a result or its unfinished work, so that it is made from the beginning.

        The folder goes at once, by a rename: a removal that is killed half-way leaves nothing to be taken for a start.
        """
        folder = self.folder(stage, key)
        if self.remote:
            for name in (f"{key}/{MANIFEST}", f"{key}.partial/{BEFORE}", f"{key}.partial/{SNAPSHOT}"):
                self.far.remove(f"{stage}/{name}")
        if folder.exists():
            trash = self.local / TRASH / uuid.uuid4().hex
            trash.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(trash)
        self.sweep()
        if self.remote:
            self.far.remove(f"{stage}/{key}")
            self.far.remove(f"{stage}/{key}.partial")

    def sweep(self) -> None:
        """Remove what `discard` set aside; the caller holds the store's lock."""
        if (self.local / TRASH).exists():
            shutil.rmtree(self.local / TRASH)

    def take_over(self, stage: str, old: str, new: str, paths: list[str]) -> None:
        """Give one result's files to another of the same stage: linked on a disk, copied by a remote store's server."""
        for path in paths:
            if self.remote:
                self.far.copy(f"{stage}/{old}/{path}", f"{stage}/{new}/{path}")
                continue
            to = self.folder(stage, new) / path
            to.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self.folder(stage, old) / path, to)
            except OSError:  # a file system without links
                shutil.copyfile(self.folder(stage, old) / path, to)

    def finish(self, manifest: Manifest, there: Collection[str] = ()) -> None:
        """Write the manifest, last and at once; a remote store gets the files first, but for those that are `there`.

        Raises:
            OSError: a file could not be sent whole; the result does not count then.
        """
        stage, key = manifest["stage"], manifest["key"]
        folder = self.folder(stage, key)
        if self.remote:
            for file in manifest["files"]:
                if file["path"] not in there:
                    self.far.put(folder / file["path"], f"{stage}/{key}/{file['path']}")
            self.far.write(f"{stage}/{key}/{MANIFEST}", as_json(manifest).encode())
        write_json(folder / MANIFEST, manifest)
        if self.remote:
            self.far.remove(f"{stage}/{key}.partial")

    def record_run(self, run: dict[str, Any]) -> None:
        """Write or renew the record of a run."""
        path = self.local / "runs" / f"{run['run']}.json"
        write_json(path, run)
        if self.remote:
            self.far.put(path, f"runs/{path.name}")

    def record_ledger(self, line: dict[str, Any]) -> None:
        """Append a line to the ledger, unless it has that start of that stage; the caller holds the store's lock."""
        same = ("stage", "key", "started")
        if any(all(known.get(name) == line[name] for name in same) for known in self.ledger()):
            return
        if self.remote:
            before = self.far.read(LEDGER) or b""
            self.far.write(LEDGER, before + canonical(line).encode() + b"\n")
            return
        path = self.local / LEDGER
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                file.write(b"\n")  # a power cut left half a line
            file.write(canonical(line).encode() + b"\n")

    def mirror(self, stage: str, key: str, say: Say) -> Mirror:
        """Keeps snapshots of a running stage on a remote store, and says what fails; a local one needs none."""
        return Mirror(self.far if self.remote else None, f"{stage}/{key}.partial", self.folder(stage, key), say)

    def _names(self, below: str) -> list[str]:
        if self.remote:
            return self.far.names(below)
        folder = self.local / below
        return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
