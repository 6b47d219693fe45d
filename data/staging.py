"""What datatrove's steps write appears under its name when it is whole, and not before.

A datatrove writer opens its file under the final name. If its process is killed, half a file lies there, and looks
like a short one: a reader of the folder takes it, and so does `MinhashDedupSignature(skip_existing_sigs=True)`, which
trusts files whose sizes agree. On a full disk a gzip writer even ends well, since the last block is written when the
file is forgotten, where Python only prints errors. Inside `staged_outputs`:

- a file on a local or network disk is written beside its folder (`/data/out/a.gz` in `/data/.out.unfinished/<token>/`,
  where no reader of the folder looks) and moved into place when its step closes it; a step that ends by an exception,
  and a process that is killed, leave nothing;
- an object in a store appears when it is closed; after an exception its upload is aborted instead;
- every layer of a file is closed in turn, so that a full disk is an error.

Files that steps open by other means than `datatrove.io.DataFolder` are as their steps make them.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from datatrove.io import DataFolder
from datatrove.utils.logging import logger
from fsspec.compression import compr
from fsspec.core import get_compression
from fsspec.spec import AbstractBufferedFile

TEXT = ("encoding", "errors", "newline")


class StagedFile:
    """A file being written: its layers (text, compression, raw), and where it goes when it is whole.

    Everything that is not about its end is the outermost layer's.
    """

    def __init__(self, layers: list[Any], raw: Any, publish: Callable[[], None], discard: Callable[[], None]) -> None:
        self._layers, self._raw = layers, raw
        self._publish, self._discard = publish, discard
        self._file = layers[-1]
        self.settled = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> StagedFile:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close every layer; the file appears, unless an exception is on its way: then it waits for `settle`."""
        if sys.exc_info()[0] is None:
            self.settle(whole=True)

    def settle(self, *, whole: bool) -> None:
        """Publish or discard; once."""
        if self.settled:
            return
        self.settled = True
        if not whole:
            self._discard()
            return
        for layer in reversed(self._layers):
            layer.close()
        self._publish()


class Staging:
    """The files that one task has opened for writing."""

    def __init__(self, task: str, attempt: str, apart: DataFolder | None = None) -> None:
        """`task` names the task among all that write to the same folders, `attempt` one run of it; both are file names.

        `apart` is a folder that is written to directly: the one with the task's log.
        """
        self.task, self.attempt, self.apart = task, attempt, apart
        self.files: list[StagedFile] = []
        self.roots: set[Path] = set()

    def open(self, plain: Callable[..., Any], folder: DataFolder, path: str, mode: str, **options: Any) -> Any:
        """What `DataFolder.open` would return; `plain` is that method."""
        if "w" not in mode or (self.apart is not None and _same(folder, self.apart)):
            return plain(folder, path, mode, **options)
        layers = {name: options.pop(name) for name in TEXT if name in options}
        compression = get_compression(path, options.pop("compression", None))
        opened = self._open_local(folder, path) if folder.is_local() else _open_object(plain, folder, path, options)
        if opened is None:
            return plain(folder, path, mode, compression=compression, **layers, **options)
        raw, publish, discard = opened
        stack = [raw]
        if compression is not None:
            stack.append(compr[compression](raw, mode="w"))
        if "b" not in mode:
            stack.append(io.TextIOWrapper(stack[-1], **layers))
        self.files.append(StagedFile(stack, raw, publish, discard))
        return self.files[-1]

    def _open_local(self, folder: DataFolder, path: str) -> tuple[Any, Callable[[], None], Callable[[], None]] | None:
        root = Path(str(folder.resolve_paths("")))
        final = Path(str(folder.resolve_paths(path)))
        root.mkdir(parents=True, exist_ok=True)
        inside = os.path.relpath(final, root)
        apart = root.parent == root or root.parent.stat().st_dev != root.stat().st_dev
        if apart or not os.access(root.parent, os.W_OK) or inside.startswith(".."):
            logger.warning(
                f"{root} has no place beside it on its disk: {path} is written where it goes, and is half a file if "
                "this process is killed"
            )
            return None
        beside = root.parent / f".{root.name}.unfinished"
        if beside not in self.roots:
            self.roots.add(beside)
            for left in beside.glob(f"{self.task}.*"):  # of an attempt that was killed
                shutil.rmtree(left, ignore_errors=True)
        # Under its own name: gzip writes that into the file.
        part = beside / f"{self.task}.{self.attempt}" / inside
        part.parent.mkdir(parents=True, exist_ok=True)
        raw = part.open("wb")

        def publish() -> None:
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(part, final)

        def discard() -> None:
            with suppress(OSError):  # a full disk; the file goes anyway
                raw.close()
            part.unlink(missing_ok=True)

        return raw, publish, discard

    def end(self, *, whole: bool) -> None:
        """After the last step: what is open still is closed, or discarded where the task failed."""
        try:
            for file in self.files:
                file.settle(whole=whole)
        finally:
            for file in self.files:
                file.settle(whole=False)
            for beside in self.roots:
                shutil.rmtree(beside / f"{self.task}.{self.attempt}", ignore_errors=True)
                with suppress(OSError):  # another task's files are there
                    beside.rmdir()


def _open_object(
    plain: Callable[..., Any], folder: DataFolder, path: str, options: dict[str, Any]
) -> tuple[Any, Callable[[], None], Callable[[], None]] | None:
    """An object in a store, where fsspec writes it in parts and can take them back."""
    raw = plain(folder, path, "wb", **options)
    if not isinstance(raw, AbstractBufferedFile):
        raw.close()
        return None

    def discard() -> None:
        raw.discard()
        raw.closed = True  # else it would be written when it is forgotten

    return raw, lambda: None, discard


def _same(one: DataFolder, other: DataFolder) -> bool:
    return one.is_local() == other.is_local() and one.resolve_paths("") == other.resolve_paths("")


@contextmanager
def staged_outputs(task: str, attempt: str, apart: DataFolder | None = None) -> Iterator[Staging]:
    """In this block, what this process opens through datatrove for writing appears when it is whole.

    One at a time in a process; the arguments are those of `Staging`.
    """
    staging = Staging(task, attempt, apart)
    plain = DataFolder.open

    def staged(folder: DataFolder, path: str, mode: str = "rb", *args: Any, **options: Any) -> Any:
        if args:
            return plain(folder, path, mode, *args, **options)
        return staging.open(plain, folder, path, mode, **options)

    DataFolder.open = staged  # type: ignore[method-assign]  # restored below
    try:
        yield staging
        staging.end(whole=True)
    except BaseException:
        staging.end(whole=False)
        raise
    finally:
        DataFolder.open = plain  # type: ignore[method-assign]
