"""What `bench --tune` tries of causal attention: forward and both gradients, in two parts as MLA has it, and in one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.kernels.mla_attention.gpu import FORWARD, OF_KEYS, OF_QUERIES, Sides, Tiles, attend, gradients_
from gristmill.kernels.tune import Search, Sizes


@dataclass(frozen=True)
class Shape:
    """Sequences, their positions, heads, and a head's numbers: of both parts of its keys, and of its values."""

    batch: int
    length: int
    heads: int
    width: int
    turning: int
    values: int


DEEPSEEK = Shape(2, 4096, 16, 128, 64, 128)  # the 16B model's heads
SMALL = Shape(1, 130, 1, 32, 16, 32)

# Queries, keys, warps, buffers; others spill registers by the kilobyte or do not fit.
_FORWARD = [Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 4), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 3), Tiles(64, 32, 4, 3)]
_OF_QUERIES = [Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 3), Tiles(64, 128, 8, 2)]
_OF_KEYS = [Tiles(64, 64, 8, 2), Tiles(32, 128, 8, 2), Tiles(32, 64, 4, 2), Tiles(64, 64, 4, 2)]
SIZES: dict[str, Sizes] = {
    f"attention.{kernel}.{parts}": sizes
    for parts in ("two_parts", "one_part")
    for kernel, sizes in {
        "forward": (FORWARD, _FORWARD),
        "of_queries": (OF_QUERIES, _OF_QUERIES),
        "of_keys": (OF_KEYS, _OF_KEYS),
    }.items()
}


def searches(device: str, shape: Shape = DEEPSEEK) -> Iterator[Search]:
    """A gradient is timed with the other one beside it, in its usual tiles."""
    yield from _of_parts(device, shape, "two_parts", shape.turning)
    yield from _of_parts(device, shape, "one_part", 0)


def _of_parts(device: str, shape: Shape, parts: str, turning: int) -> Iterator[Search]:
    heads = shape.heads

    def drawn(*sizes: int) -> Tensor:
        numbers = torch.randn(shape.batch, shape.length, *sizes, device=device, dtype=torch.bfloat16)
        return numbers.transpose(1, 2)

    def made(shared: int) -> Sides:
        whole = drawn(heads, shape.width), drawn(heads, shape.width), drawn(heads, shape.values)
        return Sides(*whole, *((drawn(heads, turning), drawn(shared, turning)) if turning else (None, None)))

    sides, into, grad = made(1), made(heads), drawn(heads, shape.values)
    scale = (shape.width + turning) ** -0.5
    out, log = attend(sides, scale, None)

    def both(of_queries: Tiles | None, of_keys: Tiles | None, *kept: Tensor | None) -> list[Tensor]:
        gradients_(into, sides, out, log, grad, scale, None, of_queries, of_keys)
        return [tensor for tensor in kept if tensor is not None]

    name = f"attention.forward.{parts}"
    yield Search(name, *SIZES[name], lambda tiles: [*attend(sides, scale, None, tiles)])
    name = f"attention.of_queries.{parts}"
    yield Search(name, *SIZES[name], lambda tiles: both(tiles, OF_KEYS, into.q, into.q_second))
    name = f"attention.of_keys.{parts}"
    yield Search(name, *SIZES[name], lambda tiles: both(OF_QUERIES, tiles, into.k, into.v, into.k_second))
