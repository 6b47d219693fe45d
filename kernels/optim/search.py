"""What `bench --tune` tries of AdamW: how many numbers a program takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.kernels.optim.gpu import CHUNK, Chunk, triton_adamw
from gristmill.kernels.optim.reference import AdamW
from gristmill.kernels.tune import Search, Sizes


@dataclass(frozen=True)
class Shape:
    """Tensors, and the numbers of each."""

    tensors: int
    numbers: int


DEEPSEEK = Shape(16, 7168 * 2048)  # matrices of V3's experts
SMALL = Shape(2, 4500)

SIZES: dict[str, Sizes] = {
    "optim.adamw": (
        CHUNK,
        [Chunk(*sizes) for sizes in ((512, 4), (1024, 2), (1024, 8), (2048, 4), (2048, 8), (4096, 8), (4096, 16))],
    )
}


def searches(device: str, shape: Shape = DEEPSEEK) -> Iterator[Search]:
    """Everything in float32, updated where it lies."""

    def drawn() -> list[Tensor]:
        return [torch.randn(shape.numbers, device=device) for _ in range(shape.tensors)]

    p, g, m, v = drawn(), drawn(), drawn(), [t.square_() for t in drawn()]
    updated = [*p, *m, *v]
    kept = [t.clone() for t in updated]
    how = AdamW(rate=1e-3, step=10, decay=0.1)

    def results(chunk: Chunk | None) -> list[Tensor]:
        triton_adamw(p, g, m, v, how, [], chunk)
        return updated

    def restore() -> None:
        torch._foreach_copy_(updated, kept)

    yield Search("optim.adamw", *SIZES["optim.adamw"], results, restore, captured=False)
