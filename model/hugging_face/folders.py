"""Folders of safetensors, read and written a tensor at a time: no model is ever held whole.

model.safetensors                              or
model-00001-of-00002.safetensors, … and model.safetensors.index.json
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gristmill.model.hugging_face.fp8 import BLOCK, SCALES, dequantised

INDEX = "model.safetensors.index.json"
ONE = "model.safetensors"
SYNCED_BYTES = 512 << 20  # written before they are brought onto the disk, so that this does not take long at the end
DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}
STORED = {name: dtype for dtype, name in DTYPES.items()}
PART_NUMBERS = 1 << 24  # of a tensor that is looked at in parts


class Tensors(Protocol):
    """Named tensors that are read one by one, wherever they lie."""

    def names(self) -> set[str]:
        """All tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """The type in which a tensor is read."""
        ...

    def parts(self, name: str) -> Iterator[Tensor]:
        """A tensor as pieces along its first axis (`row_slices`)."""
        ...

    def read(self, name: str, dtype: torch.dtype | None = None, place: tuple[int | slice, ...] = ()) -> Tensor:
        """A tensor or the part of it at `place`."""
        ...


def row_slices(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of a tensor of that shape, at most PART_NUMBERS numbers at a time: the same ones whatever its type is."""
    rows = max(1, PART_NUMBERS // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0] if shape else 1, rows):
        yield slice(start, start + rows)


class TensorFolder:
    """The tensors of a folder, mapped and read one by one; use it in a `with`.

    Raises:
        ValueError: there is no model, its index names a file that is not there, or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where = self._index()
        self._open: dict[str, Any] = {}

    def _index(self) -> dict[str, str]:
        if (self.folder / INDEX).exists():
            try:
                index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
                where: dict[str, str] = dict(index["weight_map"])
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{self.folder / INDEX} is damaged ({error!r}): copy it again") from error
            lacking = sorted({file for file in where.values() if not (self.folder / file).exists()})
            if lacking:
                raise ValueError(f"{self.folder / INDEX} names files that are not there: {', '.join(lacking)}")
            return where
        if not (self.folder / ONE).exists():
            raise ValueError(f"{self.folder} holds neither {ONE} nor {INDEX}: give the folder of a model")
        with self._opened(self.folder / ONE) as file:
            return dict.fromkeys(file.keys(), ONE)

    @staticmethod
    def _opened(path: Path) -> Any:
        try:
            return safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}): copy it again") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def _slice(self, name: str) -> Any:
        file = self._where[name]
        if file not in self._open:
            self._open.clear()  # one map at a time: what was read of the last one may leave memory
            self._open[file] = self._opened(self.folder / file)
        try:
            return self._open[file].get_slice(name)
        except SafetensorError as error:
            raise ValueError(
                f"{self.folder / file} lacks {name}, which {INDEX} says it holds: copy it again"
            ) from error

    def names(self) -> set[str]:
        """All tensors, scales left out."""
        return {name for name in self._where if not name.endswith(SCALES)}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The type in which a tensor is read: bfloat16 where FP8 is stored.

        Raises:
            ValueError: it is stored in a type that no model here has.
        """
        stored = self._stored(name)
        return torch.bfloat16 if stored == torch.float8_e4m3fn else stored

    def _stored(self, name: str) -> torch.dtype:
        called = self._slice(name).get_dtype()
        if called not in STORED:
            raise ValueError(f"{name} of {self.folder} is stored as {called}, and {', '.join(STORED)} can be read")
        return STORED[called]

    def size(self, name: str) -> int:
        """Bytes of a tensor as it is stored, its scales included."""
        size = math.prod(self.shape(name)) * self._stored(name).itemsize
        return size + (4 * math.prod(self.shape(name + SCALES)) if name + SCALES in self._where else 0)

    def wrong_scales(self) -> list[str]:
        """What is wrong with the scales of FP8 weights and with types, from the files' headers alone."""
        wrong = []
        for name in sorted(self._where):
            if name.endswith(SCALES):
                if name.removesuffix(SCALES) not in self._where:
                    wrong.append(f"left over {name}")
                continue
            try:
                in_fp8 = self._stored(name) == torch.float8_e4m3fn
            except ValueError as error:
                wrong.append(str(error))
                continue
            if in_fp8:
                blocks = tuple(-(-size // BLOCK) for size in self.shape(name))
                if name + SCALES not in self._where:
                    wrong.append(f"missing {name + SCALES} {blocks}")
                elif self.shape(name + SCALES) != blocks:
                    wrong.append(f"{name + SCALES} is {self.shape(name + SCALES)}, expected {blocks}")
        return wrong

    def refuse_unless(self, wanted: Mapping[str, tuple[int, ...]], ignored: Set[str] = frozenset()) -> None:
        """Refuse the folder unless it holds these tensors of these shapes, and beside them only ignored ones.

        Raises:
            ValueError: tensors or scales are missing, left over or of another shape; all of them are listed.
        """
        names = self.names()
        wrong = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in names]
        wrong += [f"left over {name}" for name in sorted(names - wanted.keys() - ignored)]
        wrong += [
            f"{name} is {self.shape(name)}, expected {shape}"
            for name, shape in wanted.items()
            if name in names and self.shape(name) != shape
        ]
        wrong += self.wrong_scales()
        if wrong:
            raise ValueError(
                f"{self.folder} does not fit its config.json in {len(wrong)} tensors:\n  " + "\n  ".join(wrong)
            )

    def parts(self, name: str) -> Iterator[Tensor]:
        """A tensor as pieces along its first axis (`row_slices`); what is stored in FP8 is read whole for them."""
        shape = self.shape(name)
        whole = self.read(name) if self._stored(name) == torch.float8_e4m3fn or not shape else None
        for rows in row_slices(shape):
            yield self.read(name, None, (rows,)) if whole is None else whole[rows] if shape else whole

    def read(self, name: str, dtype: torch.dtype | None = None, place: tuple[int | slice, ...] = ()) -> Tensor:
        """A tensor or the part of it at `place`; FP8 weights are multiplied by their blocks' scales.

        Raises:
            ValueError: it is in FP8 and its scales are missing or of another shape.
        """
        part = self._slice(name)
        tensor = part[place] if place else part[...]
        if tensor.dtype == torch.float8_e4m3fn:
            if name + SCALES not in self._where:
                raise ValueError(f"{name} is in FP8, and its scales {name + SCALES} are missing")
            scales = self._slice(name + SCALES)[...]
            try:
                return dequantised(tensor, scales, dtype or torch.bfloat16)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return tensor if dtype is None else tensor.to(dtype)


@dataclass(frozen=True)
class Entry:
    """A tensor that will be written: its name, shape, type, and the parts it is made of, in the order of its rows."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterable[Tensor]]

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(folder: Path, entries: Iterable[Entry], shard_megabytes: int, log: Callable[[str], None]) -> int:
    """Write the entries in order into safetensors files of about this size; the number of files.

    One part of one tensor is in memory at a time. A folder without its index, or with a file still called `.part`, is
    not finished.
    """
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.size > shard_megabytes * 1_000_000:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.size
    names = (
        [ONE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    where: dict[str, str] = {}
    for shard, name in zip(shards, names, strict=True):
        _write_file(folder / name, shard)
        where |= dict.fromkeys((entry.name for entry in shard), name)
        log(name)
    if len(shards) > 1:
        total = sum(entry.size for shard in shards for entry in shard)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return len(shards)


def _write_file(path: Path, entries: list[Entry]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.size],
        }
        offset += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            since = 0
            for entry in entries:
                for written in _write_parts(file, entry):
                    since += written
                    if since >= SYNCED_BYTES:
                        _sync(file)
                        since = 0
            _sync(file)
    except OSError as error:  # a full disk's names no file
        raise OSError(f"{path} cannot be written ({error}): is the disk full?") from error
    os.replace(part, path)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write_parts(file: IO[bytes], entry: Entry) -> Iterator[int]:
    """Write a tensor; the bytes of each part behind it."""
    written = 0
    for part in entry.parts():
        data = part.detach().to("cpu", entry.dtype).contiguous()
        file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        written += data.nbytes
        yield data.nbytes
    if written != entry.size:
        raise ValueError(f"{entry.name} came to {written} bytes, and {entry.size} were announced")
