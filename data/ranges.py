"""Arrays in files, local or remote, behind one interface: `array[a:b]` gives items a to b.

A local file is memory-mapped. A remote one (any fsspec address: `s3://`, `https://`, `memory://`) is read in ranges,
through a cache of bounded size that a background thread can fill ahead of time; on S3 every range is asked for under
the ETag that the folder was listed with, so that no file is read in part as it was and in part as it is.
numpy and the standard library alone; fsspec is imported for a remote address only.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 1 << 15  # bytes
GAP = 4  # blocks between two wanted ones that are fetched along: cheaper than another request
RUN = 128  # blocks of one request at most: 4 MiB
CACHE = 256 << 20  # bytes of blocks held by default
ATTEMPTS = 6  # at a range whose answer breaks off, 3 seconds in all


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
        s3 = {"s3", "s3a"} & {*([protocol] if isinstance(protocol := self.filesystem.protocol, str) else protocol)}
        self._etags = {n[len(self.root) :].lstrip("/"): i["ETag"] for n, i in found.items() if s3 and i.get("ETag")}
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
        """The blocks, those that lack on their way; each is fetched by the thread that asked first."""
        mine: dict[tuple[str, int], Future[bytes]] = {}
        try:
            with self._lock:
                missing = [key for key in keys if key not in self._blocks]
                for key in _with_gaps(missing):
                    if key not in self._blocks:
                        mine[key] = self._blocks[key] = Future()
                found = [self._blocks[key] for key in keys]
                for key in keys:
                    self._blocks.move_to_end(key)
            if mine:
                self._fetch(mine)
        except BaseException:  # an interrupt: no other thread may wait for what will not come
            self._fail(mine, RangeError(f"reading {self.url} was interrupted"))
            raise
        for future in found:
            future.result()
        with self._lock:
            while len(self._blocks) > max(self._most, len(keys)):
                self._blocks.popitem(last=False)
        return found

    def _fetch(self, missing: dict[tuple[str, int], Future[bytes]]) -> None:
        runs = _runs(sorted(missing))
        names = [run[0][0] for run in runs]
        starts = [run[0][1] * BLOCK for run in runs]
        ends = [min((run[-1][1] + 1) * BLOCK, self._sizes[run[0][0]]) for run in runs]
        try:
            parts = self._ranges(names, starts, ends)
        except Exception as error:
            parts = [error] * len(runs)
        for run, part, start, end in zip(runs, parts, starts, ends, strict=True):
            if isinstance(part, bytes) and len(part) == end - start:
                for i, key in enumerate(run):
                    missing[key].set_result(part[i * BLOCK : (i + 1) * BLOCK])
                continue
            why = f"{len(part)} bytes came" if isinstance(part, bytes) else part
            error = RangeError(
                f"bytes {start} to {end} of {self.name(run[0][0])} cannot be read ({why}): it changed while it was "
                f"read, or is out of reach; open it again"
            )
            self._fail({key: missing[key] for key in run}, error)

    def _fail(self, futures: dict[tuple[str, int], Future[bytes]], error: RangeError) -> None:
        """Those of these blocks that have not come cannot be had; whoever tries next asks again."""
        lacking = {key: future for key, future in futures.items() if not future.done()}
        with self._lock:
            for key in lacking:
                self._blocks.pop(key, None)
        for future in lacking.values():
            future.set_exception(error)

    def _ranges(self, names: list[str], starts: list[int], ends: list[int]) -> list[bytes | BaseException]:
        """All ranges, asked for at once; an error in the place of one that cannot be had."""
        if not self._etags:
            places = [f"{self.root}/{name}" for name in names]
            return self.filesystem.cat_ranges(places, starts, ends, on_error="return")
        from fsspec.asyn import sync

        parts: Any = sync(self.filesystem.loop, self._tagged_ranges, names, starts, ends)
        return parts

    async def _tagged_ranges(self, names: list[str], starts: list[int], ends: list[int]) -> list[bytes | BaseException]:
        wanted = zip(names, starts, ends, strict=True)
        return await asyncio.gather(*(self._tagged_range(*one) for one in wanted), return_exceptions=True)

    async def _tagged_range(self, name: str, start: int, end: int) -> bytes:
        from s3fs.core import S3_RETRYABLE_ERRORS

        bucket, key, _ = self.filesystem.split_path(f"{self.root}/{name}")
        asked = {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{end - 1}"}
        if name in self._etags:
            asked["IfMatch"] = self._etags[name]
        for attempt in range(ATTEMPTS):
            answer = await self.filesystem._call_s3("get_object", **asked)  # which asks again after a busy server
            try:
                async with answer["Body"] as body:
                    return await body.read()
            except S3_RETRYABLE_ERRORS:  # the connection broke off; whatever else went wrong is told at once
                if attempt + 1 == ATTEMPTS:
                    raise
                await asyncio.sleep(0.1 * 2**attempt)
        raise AssertionError("an attempt returns or raises")

    def close(self) -> None:
        """End the background thread; what it has not begun is dropped."""
        self._background.shutdown(wait=True, cancel_futures=True)


def _with_gaps(keys: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The blocks, and those in small gaps between them."""
    filled: list[tuple[str, int]] = []
    for path, number in sorted(keys):
        if filled and filled[-1][0] == path and 1 < number - filled[-1][1] <= GAP + 1:
            filled += [(path, between) for between in range(filled[-1][1] + 1, number)]
        filled.append((path, number))
    return filled


def _runs(keys: list[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    """Blocks that follow each other in a file, in runs of at most `RUN`."""
    runs: list[list[tuple[str, int]]] = []
    for path, number in keys:
        if runs and runs[-1][-1] == (path, number - 1) and len(runs[-1]) < RUN:
            runs[-1].append((path, number))
        else:
            runs.append([(path, number)])
    return runs


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
