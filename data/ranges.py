"""Arrays in files, local or remote, behind one interface: `array[a:b]` gives items a to b.

A local file is memory-mapped. A remote one (any fsspec address: `s3://`, `https://`, `memory://`) is read in ranges,
through a cache of bounded size that a background thread can fill ahead of time. numpy and the standard library alone;
fsspec is imported for a remote address only.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 1 << 16  # bytes of a range: a sequence of 4,096 tokens and its neighbours
CACHE = 256 << 20  # bytes of blocks held by default
TOGETHER = 512  # blocks asked for in one go: 32 MiB, of which a file system fetches many at a time


class RangeError(ValueError):
    """A range that cannot be had, with the file and what to do."""


class LocalFiles:
    """Files below a local folder."""

    remote = False

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def name(self, path: str) -> str:
        """A file's whole name, for messages."""
        return str(self.root / path)

    def read(self, path: str) -> bytes:
        """A whole (small) file.

        Raises:
            FileNotFoundError: there is none.
        """
        return (self.root / path).read_bytes()

    def size(self, path: str) -> int | None:
        """Bytes of a file; None where there is none."""
        at = self.root / path
        return at.stat().st_size if at.is_file() else None

    def array(self, path: str, dtype: np.dtype[Any]) -> np.ndarray:
        """The file memory-mapped as items of `dtype`."""
        at = self.root / path
        return np.asarray(np.memmap(at, dtype, "r")) if at.stat().st_size else np.zeros(0, dtype)

    def load(self, wanted: Iterable[tuple[Any, int, int]]) -> None:
        """Nothing to fetch ahead: the operating system reads pages as they are touched."""

    def close(self) -> None:
        """Nothing to end."""


class RemoteFiles:
    """Files below a remote folder, read in blocks through a cache of at most `cache_bytes`.

    Threads may share it: a block in flight is fetched once and waited for by all who need it.
    """

    remote = True

    def __init__(self, url: str, cache_bytes: int = CACHE) -> None:
        import fsspec

        self.url = url.rstrip("/")
        self.filesystem, root = fsspec.core.url_to_fs(self.url)
        self.root = str(root).rstrip("/")
        found = self.filesystem.find(self.root, detail=True)
        self._sizes = {name[len(self.root) :].lstrip("/"): int(info["size"]) for name, info in found.items()}
        self._most = max(8, cache_bytes // BLOCK)
        self._blocks: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="prefetch")

    def __str__(self) -> str:
        return self.url

    def name(self, path: str) -> str:
        """A file's whole name, for messages."""
        return f"{self.url}/{path}"

    def read(self, path: str) -> bytes:
        """A whole (small) file.

        Raises:
            FileNotFoundError: there is none.
        """
        return self.filesystem.cat_file(f"{self.root}/{path}")

    def size(self, path: str) -> int | None:
        """Bytes of a file as the folder listed them when it was opened; None where there was none."""
        return self._sizes.get(path)

    def array(self, path: str, dtype: np.dtype[Any]) -> RemoteArray:
        """The file as items of `dtype`."""
        return RemoteArray(self, path, dtype, (self.size(path) or 0) // dtype.itemsize)

    def load(self, wanted: Iterable[tuple[RemoteArray, int, int]]) -> None:
        """Have the blocks of these (array, first item, end) in the cache; all that lack are asked for together.

        Raises:
            RangeError: a file gave fewer bytes than it had when the folder was opened.
        """
        keys = dict.fromkeys(key for array, start, end in wanted for key in array.blocks(start, end))
        self._futures(list(keys))

    def ahead(self, task: Any, *arguments: Any) -> None:
        """Run `task(*arguments)`, which loads what will be needed soon, in the background thread."""
        self._background.submit(task, *arguments)

    def block(self, path: str, number: int) -> bytes:
        """One block, from the cache or fetched."""
        return self._futures([(path, number)])[0].result()

    def _futures(self, keys: list[tuple[str, int]]) -> list[Future[bytes]]:
        mine: list[tuple[tuple[str, int], Future[bytes]]] = []
        found: list[Future[bytes]] = []
        with self._lock:
            for key in keys:
                future = self._blocks.get(key)
                if future is None:
                    future = self._blocks[key] = Future()
                    mine.append((key, future))
                else:
                    self._blocks.move_to_end(key)
                found.append(future)
        for start in range(0, len(mine), TOGETHER):
            self._fetch(mine[start : start + TOGETHER])
        for future in found:
            future.result()
        with self._lock:
            while len(self._blocks) > max(self._most, len(keys)):
                self._blocks.popitem(last=False)
        return found

    def _fetch(self, missing: list[tuple[tuple[str, int], Future[bytes]]]) -> None:
        paths = [f"{self.root}/{path}" for (path, _), _ in missing]
        starts = [number * BLOCK for (_, number), _ in missing]
        ends = [min(start + BLOCK, self._sizes[path]) for ((path, _), _), start in zip(missing, starts, strict=True)]
        try:
            parts = self.filesystem.cat_ranges(paths, starts, ends, on_error="return")
        except Exception as error:
            parts = [error] * len(missing)
        for ((path, number), future), part, start, end in zip(missing, parts, starts, ends, strict=True):
            if isinstance(part, bytes) and len(part) == end - start:
                future.set_result(part)
                continue
            with self._lock:
                self._blocks.pop((path, number), None)  # asked for again by whoever tries next
            why = part if isinstance(part, Exception) else f"{len(part)} bytes came"
            future.set_exception(
                RangeError(
                    f"bytes {start} to {end} of {self.name(path)} cannot be read ({why}): it changed while it was "
                    f"read, or is out of reach; open it again"
                )
            )

    def close(self) -> None:
        """End the background thread; what it has not begun is dropped."""
        self._background.shutdown(wait=True, cancel_futures=True)


class RemoteArray:
    """A remote file's items, by slices."""

    def __init__(self, files: RemoteFiles, path: str, dtype: np.dtype[Any], length: int) -> None:
        self.files, self.path, self.dtype, self.length = files, path, dtype, length

    def __len__(self) -> int:
        return self.length

    def blocks(self, start: int, end: int) -> list[tuple[str, int]]:
        """The blocks that items [start, end) lie in."""
        end, size = min(end, self.length), self.dtype.itemsize
        if start >= end:
            return []
        return [(self.path, number) for number in range(start * size // BLOCK, (end * size - 1) // BLOCK + 1)]

    def __getitem__(self, items: slice) -> np.ndarray:
        start, end, _ = items.indices(self.length)
        keys = self.blocks(start, end)
        if not keys:
            return np.zeros(0, self.dtype)
        data = b"".join(future.result() for future in self.files._futures(keys))
        skipped = start * self.dtype.itemsize - keys[0][1] * BLOCK
        return np.frombuffer(data, self.dtype, end - start, skipped)


Files = LocalFiles | RemoteFiles


def open_files(folder: Path | str) -> Files:
    """The files below a local folder (a path) or a remote one (an address with `://`)."""
    return RemoteFiles(folder) if isinstance(folder, str) and "://" in folder else LocalFiles(Path(folder))
