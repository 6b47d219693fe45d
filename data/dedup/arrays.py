"""Named arrays in one file, read by ranges: a worker takes the slice it needs and holds nothing else.

8 bytes   GRMARR01
8 bytes   length of the header, little-endian
header    JSON: {name: [dtype, count, offset of its first byte behind the header]}
arrays    little-endian, one after another
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
import orjson

from gristmill.data.documents import atomic

MAGIC = b"GRMARR01"
HEAD = 1 << 13  # bytes read at once, which hold most headers


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write one-dimensional arrays atomically."""
    header: dict[str, list[object]] = {}
    offset = 0
    for name, array in arrays.items():
        header[name] = [array.dtype.str, len(array), offset]
        offset += array.nbytes
    text = json.dumps(header).encode()
    with atomic(path) as part, part.open("wb") as file:
        file.write(MAGIC + len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).data.cast("B") if len(array) else b"")


class Arrays:
    """A file of arrays, open for reading; use it in a `with`.

    Raises:
        ValueError: the file is not one of arrays, or is cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # bare: a stage opens them by the thousand
        self._map: mmap.mmap | None = None
        try:
            self._header, self._begin = self._head()
        except BaseException:
            os.close(self._file)
            raise

    def _head(self) -> tuple[dict[str, tuple[str, int, int]], int]:
        """The header, and where the arrays begin."""
        start = os.pread(self._file, HEAD, 0)
        length = int.from_bytes(start[8:16], "little")
        if start[:8] != MAGIC or length > os.fstat(self._file).st_size:
            raise ValueError(f"{self.path} is not a file of arrays: make its stage again")
        header = start[16 : 16 + length] if length <= HEAD - 16 else os.pread(self._file, length, 16)
        return orjson.loads(header), 16 + length

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def count(self, name: str) -> int:
        """Entries of an array."""
        return self._header[name][1]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Entries [start, stop) of an array, or all."""
        dtype, count, offset = self._header[name]
        stop = count if stop is None else stop
        made = np.empty(max(0, stop - start), dtype)
        if len(made):
            read_exactly(self._file, made, self._begin + offset + start * made.itemsize, self.path)
        return made

    def mapped(self, name: str) -> np.ndarray:
        """An array as a memory map, for look-ups here and there in it; it lives as long as it is referred to."""
        dtype, count, offset = self._header[name]
        if not count:
            return np.empty(0, dtype)
        if self._map is None:
            self._map = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
        return np.frombuffer(self._map, dtype, count, self._begin + offset)


def read_exactly(descriptor: int, into: np.ndarray, offset: int, path: Path) -> None:
    """Fill an array from a place in a file.

    Raises:
        ValueError: the file ends before.
    """
    view = into.data.cast("B")
    while view:
        got = os.preadv(descriptor, [view], offset)
        if not got:
            raise ValueError(f"{path} ends at byte {offset}, before its arrays do: make its stage again")
        view, offset = view[got:], offset + got
