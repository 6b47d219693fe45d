"""What `bench --tune` tries of the cross-entropy: how a row of logits is walked, for its loss and for its slope."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gristmill.kernels.cross_entropy.gpu import LOSS, SLOPE, Row, softmax_loss, softmax_slope_
from gristmill.kernels.tune import Search, Sizes


@dataclass(frozen=True)
class Shape:
    """Rows of a chunk, and columns."""

    rows: int
    columns: int


DEEPSEEK = Shape(768, 129_280)  # a chunk of 16,384 rows over V3's vocabulary
SMALL = Shape(2, 17_000)

_ROWS = [
    Row(*sizes)
    for sizes in (
        (1024, 8),
        (2048, 4),
        (2048, 8),
        (4096, 4),
        (4096, 8),
        (4096, 16),
        (8192, 8),
        (8192, 16),
        (16_384, 16),
    )
]
SIZES: dict[str, Sizes] = {"cross_entropy.loss": (LOSS, _ROWS), "cross_entropy.slope": (SLOPE, _ROWS)}


def searches(device: str, shape: Shape = DEEPSEEK) -> Iterator[Search]:
    """The slope takes the place of the logits."""
    logits = torch.randn(shape.rows, shape.columns, device=device, dtype=torch.bfloat16)
    target = torch.randint(shape.columns, (shape.rows,), device=device)
    name = "cross_entropy.loss"
    yield Search(name, *SIZES[name], lambda row: [*softmax_loss(logits, target, 1.0, row)])
    weight, walked = torch.ones(shape.rows, device=device), logits.clone()

    def slope(row: Row | None) -> list[Tensor]:
        return [softmax_slope_(walked, target, weight, 1.0, 1e-4, row), walked]

    name = "cross_entropy.slope"
    yield Search(name, *SIZES[name], slope, partial(walked.copy_, logits))
