"""Checkpoints of a training run: everything it needs to go on, in pieces that any number of ranks can take up.

    checkpoint-00000200/
      rank-00000.safetensors  pieces of tensors, laid flat: "<kind>/<name>@<first number>"
      state.json              curves and whatever else the run keeps
      manifest.json           written last: step, size and hash of every file, whose checkpoint it is, and its own hash

Kinds are `parameter`, `buffer` (expert biases), the optimizer's moments, and what a run adds (`reference`, `average`).
The schedule, the data's position and all random numbers are functions of the step, so the step is their state. A folder
is called `.tmp` until its manifest is in it, and does not count. Nothing here is pickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gristmill.model.signs_of_life import unwatched
from gristmill.model.training.files import sha256, sync_and_rename, sync_folder, write_json

FORMAT = 2
KEPT = 2
MOST_MAPPED = 32 << 20  # bytes read of a file before it is mapped anew: pages that were read count as memory
MANIFEST, STATE = "manifest.json", "state.json"
NUMBERED = re.compile(r"-(\d{8,})$")  # the end of a published checkpoint's name
KEPT_FOLDER = "kept"  # beside work/: checkpoints that are kept for good
REQUIRED = ("step", "ranks", "owner", "files", "sha256")


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not as it was written, or is not of this run; the message names the last good one."""


class CheckpointWriter:
    """Saves in the background: `begin` copies and returns, `written` looks, and `publish` makes a checkpoint of it.

    Each rank writes its own file; the first publishes when every rank has written. `owner` describes whose checkpoints
    these are, so that another model's are refused.
    """

    def __init__(self, work: Path, owner: dict[str, Any], *, rank: int = 0, ranks: int = 1, keep: int = KEPT) -> None:
        self.work, self.owner, self.rank, self.ranks, self.keep = work, owner, rank, ranks, keep
        self.size = 0  # bytes that this rank saves
        self._step: int | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._removals: list[threading.Thread] = []
        self._not_removed: OSError | None = None

    @property
    def busy(self) -> bool:
        """Whether a save was begun and is not published yet."""
        return self._step is not None

    def begin(self, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any], *, settled: bool = False) -> float:
        """Copy what is to be saved, and write it from a thread; every rank calls this, with its own pieces.

        Returns the seconds that the copy took. What is `settled` nothing changes until it is written: on a CPU it needs
        no copy.

        Raises:
            RuntimeError: the save before it is not published yet.
        """
        if self.busy:
            raise RuntimeError(f"the checkpoint of step {self._step} is still being written: publish it first")
        began = time.perf_counter()
        copies = {key: tensor.detach().to("cpu", copy=not settled).reshape(-1) for key, tensor in tensors.items()}
        copied = time.perf_counter() - began
        self.size = sum(copy.nbytes for copy in copies.values())
        told = json.dumps(state, sort_keys=True) if self.rank == 0 else None
        self._step, self._failure = step, None
        self._thread = threading.Thread(target=self._write, args=(copies, told), name="checkpoint", daemon=True)
        self._thread.start()
        return copied

    def written(self) -> bool:
        """Whether this rank's part is on the disk.

        Raises:
            FloatingPointError: something to be saved is infinite or not a number.
            OSError: the disk is full, or will not be written.
        """
        if self._thread is not None and self._thread.is_alive():
            return False
        if self._failure is not None:
            raise self._failure
        return True

    def wait(self) -> None:
        """Until this rank's part is on the disk; raises as `written` does."""
        if self._thread is not None:
            self._thread.join()
        self.written()

    def publish(self) -> int | None:
        """Say that all ranks have written: the first makes the folder a checkpoint and removes old ones.

        Returns the step of what this rank has made a checkpoint.

        Raises:
            OSError: the disk is full, or will not be written; what was published before stays.
        """
        step, self._step, self._thread = self._step, None, None
        if step is None or self.rank:
            return None
        part, final = self._part(step), self.work / f"checkpoint-{step:08d}"
        names = [STATE, *(_file_of(rank) for rank in range(self.ranks))]
        files = {n: {"bytes": (part / n).stat().st_size, "sha256": self._hash(part / n)} for n in names}
        for left in {p.name for p in part.iterdir()} - {*names}:  # by an attempt that was killed
            (part / left).unlink()
        manifest = {"format": FORMAT, "step": step, "ranks": self.ranks, "owner": self.owner, "files": files}
        with said_if_full(part / MANIFEST):
            write_json(part / MANIFEST, {**manifest, "sha256": manifest_hash(manifest)})
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        sync_folder(self.work)
        self._remove_surplus()
        return step

    def _remove_surplus(self) -> None:
        self.close()
        aside: list[Path] = []
        for old in [p for p in checkpoints(self.work) if p.parent == self.work][: -self.keep]:
            aside.append(old.with_suffix(".tmp"))  # half removed it must not count
            shutil.rmtree(aside[-1], ignore_errors=True)
            old.rename(aside[-1])
        self.remove(aside)

    def remove(self, aside: list[Path]) -> None:
        """Remove folders by a thread: on some file systems that takes longer than the rest of a publication."""
        self._removals.append(threading.Thread(target=self._remove, args=(aside,), name="removal", daemon=True))
        self._removals[-1].start()

    def _remove(self, aside: list[Path]) -> None:
        for folder in aside:
            try:
                shutil.rmtree(folder)
            except FileNotFoundError:  # somebody else did
                pass
            except OSError as error:  # raised again by `close`, in the thread that trains
                self._not_removed = error

    def close(self) -> None:
        """Until what was to be removed is."""
        while self._removals:
            self._removals.pop().join()
        if self._not_removed is not None:
            raise self._not_removed

    def _hash(self, path: Path) -> str:
        told = path.with_suffix(".sha256")
        if not told.exists():
            return sha256(path)
        return told.read_text(encoding="ascii")

    def _part(self, step: int | None) -> Path:
        return self.work / f"checkpoint-{step:08d}.tmp"

    def _write(self, tensors: dict[str, Tensor], state: str | None) -> None:
        try:
            _refuse_not_finite(tensors)
            part = self._part(self._step)
            part.mkdir(parents=True, exist_ok=True)
            path = part / _file_of(self.rank)
            with said_if_full(path):
                save_file(tensors, path.with_suffix(".part"))
                sync_and_rename(path.with_suffix(".part"), path)
            with said_if_full(path.with_suffix(".sha256")):
                path.with_suffix(".sha256").write_text(sha256(path), encoding="ascii")
            if state is not None:
                with said_if_full(part / STATE):
                    (part / STATE).with_suffix(".part").write_text(state, encoding="utf-8")
                    sync_and_rename((part / STATE).with_suffix(".part"), part / STATE)
        except BaseException as error:  # raised again by `written`, in the thread that trains
            self._failure = error


def _file_of(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


@contextmanager
def said_if_full(path: Path) -> Iterator[None]:
    """Raise an OSError that names the file that cannot be written: a full disk's own names none."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter is what a full disk gives the tensors
        raise OSError(
            f"{path} cannot be written ({error}): is the disk full? Checkpoints that were published before it stay"
        ) from error


def manifest_hash(manifest: dict[str, Any]) -> str:
    """Of all that a manifest says but its own hash."""
    told = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _refuse_not_finite(tensors: dict[str, Tensor]) -> None:
    wrong = [key for key, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if wrong:
        raise FloatingPointError(
            f"{wrong[0]} (and {len(wrong) - 1} more) is not finite: lower the learning rates and run again"
        )


def checkpoints(work: Path) -> list[Path]:
    """Published checkpoints of a run, oldest first: in its work/, and those beside it that are kept for good.

    One that lies in both counts as that in work/.
    """
    found = (*(work.parent / KEPT_FOLDER).glob("step-*"), *work.glob("checkpoint-*"))
    named = ((NUMBERED.search(path.name), path) for path in found if (path / MANIFEST).exists())
    of_step = {int(match[1]): path for match, path in named if match}
    return [of_step[step] for step in sorted(of_step)]


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a published checkpoint; a stage's result has a manifest too."""
    return (folder / MANIFEST).exists() and (folder.name.startswith("checkpoint-") or (folder / STATE).exists())


class Checkpoint:
    """A published checkpoint, read by pieces; use it in a `with`.

    Args:
        owner: whose it must be, where that matters.
        trusted: take the files as they are, since this process has just written or checked them.
        alive: called now and then while files are hashed.

    Raises:
        DamagedCheckpoint: a file is missing, was cut or changed, the format is another one, or it is another's.
    """

    def __init__(
        self,
        folder: Path,
        *,
        owner: dict[str, Any] | None = None,
        trusted: bool = False,
        alive: Callable[[], None] = unwatched,
    ) -> None:
        self.folder, self._owner, self._alive = folder, owner, alive
        self._open: dict[str, Any] = {}
        self._mapped: Counter[str] = Counter()
        try:
            self.manifest = _read_manifest(folder)
        except (OSError, ValueError) as error:
            raise self._damaged(f"{MANIFEST} {error}") from error
        self.step = int(self.manifest["step"])
        wrong = _difference(self.manifest["owner"], owner)
        if wrong is None and not trusted:
            wrong = _first_wrong(folder, self.manifest["files"], alive)
        if wrong:
            raise self._damaged(wrong)
        self._where = self._index()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def _damaged(self, what: str) -> DamagedCheckpoint:
        beside = self.folder.parent
        work = beside.parent / "work" if beside.name == KEPT_FOLDER else beside
        others = (p for p in reversed(checkpoints(work)) if p != self.folder)
        good = next((p.name for p in others if _is_whole(p, self._owner, self._alive)), None)
        after = f"the last good one is {good}: " if good else "there is no other: "
        ahead = "go on from there" if good else "begin from the start"
        return DamagedCheckpoint(f"{self.folder}: {what}; {after}remove {self.folder.name} to {ahead}")

    def _index(self) -> dict[tuple[str, str], list[tuple[int, int, str, str]]]:
        """Of each kind and name its stretches: (first, end, file, key), ascending."""
        where: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}
        for file in self.manifest["files"]:
            if not file.endswith(".safetensors"):
                continue
            self._map(file)
            for key in self._open[file].keys():  # noqa: SIM118 (it is no dictionary)
                name, _, first = key.rpartition("@")
                kind, _, name = name.partition("/")
                size = self._open[file].get_slice(key).get_shape()[0]
                where.setdefault((kind, name), []).append((int(first), int(first) + size, file, key))
        return {name: sorted(stretches) for name, stretches in where.items()}

    def _map(self, file: str) -> None:
        """Map a file, anew where it was mapped: what was read of it until now may leave memory."""
        try:
            self._open[file] = safe_open(str(self.folder / file), framework="pt")
        except SafetensorError as error:
            raise self._damaged(f"{file} cannot be read ({error})") from error
        self._mapped[file] = 0

    def state(self) -> dict[str, Any]:
        """What the run kept beside tensors."""
        return json.loads((self.folder / STATE).read_text(encoding="utf-8"))

    def sizes(self) -> dict[str, Any]:
        """How many tensors of all kinds there are, their numbers, and the bytes of the files."""
        numbers = sum(end - first for stretches in self._where.values() for first, end, *_ in stretches)
        size = sum(told["bytes"] for told in self.manifest["files"].values())
        form = f"checkpoint of step {self.step} by {self.manifest['ranks']} ranks"
        return {"form": form, "tensors": len(self._where), "parameters": numbers, "bytes": size}

    def held(self) -> dict[tuple[str, str], int]:
        """Of each (kind, name) that is here how far its numbers reach."""
        return {name: max(end for _, end, *_ in stretches) for name, stretches in self._where.items()}

    def dtype(self, kind: str, name: str) -> torch.dtype:
        """The type that a tensor is saved in."""
        _, _, file, key = self._where[kind, name][0]
        return self._open[file].get_slice(key)[:0].dtype

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of a kind."""
        return sorted(name for found, name in self._where if found == kind)

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Numbers [start, stop) of a tensor that is laid flat, from whichever files hold them.

        Raises:
            DamagedCheckpoint: they are not all there.
        """
        found = self.find(kind, name, start, stop)
        if found is None:
            raise self._damaged(f"there is no {kind} {name}")
        return found

    def find(self, kind: str, name: str, start: int, stop: int) -> Tensor | None:
        """As `read`, or none where there is no such tensor.

        Raises:
            DamagedCheckpoint: some of the numbers are there and some are not.
        """
        stretches = self._where.get((kind, name))
        if stretches is None:
            return None
        parts, at = [], start
        for first, end, file, key in stretches:
            if first <= at < end and at < stop:
                upto = min(end, stop)
                parts.append(self._open[file].get_slice(key)[at - first : upto - first])
                at = upto
                self._mapped[file] += parts[-1].nbytes
                if self._mapped[file] >= MOST_MAPPED:
                    self._map(file)
        if at < stop:
            raise self._damaged(f"{kind} {name} lacks the numbers from {at} to {stop}")
        return torch.cat(parts) if len(parts) != 1 else parts[0]


def _first_wrong(folder: Path, files: dict[str, dict[str, Any]], alive: Callable[[], None]) -> str | None:
    for name, told in files.items():
        alive()
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != told["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, and {told['bytes']} were written"
        if sha256(path, alive) != told["sha256"]:
            return f"{name} has another hash than what was written"
    return None


def _read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest, as it was written.

    Raises:
        OSError, ValueError: what is wrong with it, to be said behind its name.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot be read ({error!r})") from error
    made = manifest.get("format") if isinstance(manifest, dict) else None
    if made != FORMAT:
        raise ValueError(f"has format {made}, and this version of Gristmill reads {FORMAT}")
    if lacking := [name for name in REQUIRED if name not in manifest]:
        raise ValueError(f"lacks {', '.join(lacking)}")
    if manifest["sha256"] != manifest_hash(manifest):
        raise ValueError("has another hash than what was written")
    return manifest


def _difference(own: dict[str, Any], owner: dict[str, Any] | None) -> str | None:
    """The first field in which a checkpoint's owner is not the one asked for, as words."""
    if owner is None:
        return None
    for field in sorted({*own, *owner}):
        if own.get(field) != owner.get(field):
            return f"it is of another model: {field} is {own.get(field)}, and this run's is {owner.get(field)}"
    return None


def _is_whole(folder: Path, owner: dict[str, Any] | None, alive: Callable[[], None]) -> bool:
    try:
        manifest = _read_manifest(folder)
    except (OSError, ValueError):
        return False
    return _difference(manifest["owner"], owner) is None and _first_wrong(folder, manifest["files"], alive) is None


def last_checkpoint(
    work: Path, owner: dict[str, Any], *, trusted: bool = False, alive: Callable[[], None] = unwatched
) -> Checkpoint | None:
    """The last published checkpoint, or none; as `Checkpoint`.

    Raises:
        DamagedCheckpoint: it is not as it was written, or is another model's.
    """
    found = checkpoints(work)
    if not found:
        return None
    return Checkpoint(found[-1], owner=owner, trusted=trusted, alive=alive)
