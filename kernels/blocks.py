"""Large tensors on a CPU whose memory is kept for the next of their size, instead of going back to the system.

Above 32 MiB glibc asks the system for memory at each allocation and gives it back at once, and the system hands it
out page by page, zeroed: a cost that shows where the gradient of a stack of experts has hundreds of megabytes. A step
asks for the same sizes again and again, so a block waits here from its tensor's end to the next.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections import defaultdict, deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEAST = 16 << 20  # bytes: smaller ones the allocator keeps by itself
MOST_FREE = 4 << 30  # bytes that wait, of all sizes; beyond them the block that is given back is let go
_free: defaultdict[int, deque[mmap.mmap]] = defaultdict(deque)


class _Block:
    """Memory under one tensor: numpy holds this object for it, and torch the array, until its last view is gone."""

    def __init__(self, numbers: int) -> None:
        size = numbers * 4
        try:
            self.memory = _free[size].pop()
        except IndexError:
            self.memory = mmap.mmap(-1, size)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self.memory.madvise(mmap.MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.__array_interface__: dict[str, Any] = {
            "shape": (numbers,), "typestr": "<f4", "version": 3, "data": (address, False),
        }  # fmt: skip

    def __del__(self) -> None:
        if waiting() + len(self.memory) <= MOST_FREE:
            _free[len(self.memory)].append(self.memory)


def waiting() -> int:
    """Bytes of the blocks that no tensor has."""
    return sum(size * len(blocks) for size, blocks in list(_free.items()))


def empty(*shape: int) -> Tensor:
    """A float32 tensor on the CPU whose numbers are not set."""
    numbers = math.prod(shape)
    if numbers * 4 < LEAST:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    return torch.from_numpy(np.asarray(_Block(numbers))).view(shape)
