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

from gristmill.data.documents import atomic

MAGIC = b"GRMARR01"


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
        self._file = path.open("rb", buffering=0)
        self._map: mmap.mmap | None = None
        start = self._file.read(16)
        length = int.from_bytes(start[8:], "little")
        if start[:8] != MAGIC or length > os.fstat(self._file.fileno()).st_size:
            self._file.close()
            raise ValueError(f"{path} is not a file of arrays: make its stage again")
        self._header: dict[str, tuple[str, int, int]] = {
            name: (dtype, count, 16 + length + offset)
            for name, (dtype, count, offset) in json.loads(self._file.read(length)).items()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

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
            read_exactly(self._file.fileno(), made, offset + start * made.itemsize, self.path)
        return made

    def mapped(self, name: str) -> np.ndarray:
        """An array as a memory map, for look-ups here and there in it; it lives as long as it is referred to."""
        dtype, count, offset = self._header[name]
        if not count:
            return np.empty(0, dtype)
        if self._map is None:
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(self._map, dtype, count, offset)


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
