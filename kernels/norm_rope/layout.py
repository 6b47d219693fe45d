"""How rows of operands lie: those that lie equally far apart are walked without a copy."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling


def in_rows(x: Tensor) -> tuple[Tensor, int]:
    """x, copied where its rows do not lie equally far apart, and how far they do."""
    if not x.is_contiguous() and x.stride(-1) == 1:
        distance = _distance(x.shape[:-1], x.stride()[:-1])
        if distance is not None:
            return x, distance
    return x.contiguous(), x.shape[-1]


def _distance(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """From one row to the next over these dimensions, where that is one number."""
    distance, span = 0, None
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if span is None:
            distance = stride
        elif stride != span:
            return None
        span = stride * size
    return distance


class Rows(NamedTuple):
    """What is turned: tokens of some heads; and how far tokens of x, heads of x and tokens of the angles lie apart."""

    tokens: int
    heads: int
    token_distance: int
    head_distance: int
    angle_distance: int


def rows_of(x: Tensor, cos: Tensor, sin: Tensor) -> Rows | None:
    """The rows, where operands lie so that they can be walked; angles are of each row, or of all heads of a token."""
    if cos.requires_grad or sin.requires_grad or not cos.dtype == sin.dtype == torch.float32:
        return None
    strides = cos.stride()
    walked = _walked if is_dynamo_compiling() else _rows  # a graph is captured of what is not a cache
    return walked(x.shape, x.stride(), cos.shape, strides) if sin.stride() == strides else None


def _walked(
    shape: tuple[int, ...], strides: tuple[int, ...], angle_shape: tuple[int, ...], angle_strides: tuple[int, ...]
) -> Rows | None:
    *leading, _ = shape
    heads, head_distance, dimensions = 1, 0, len(leading)
    if leading and angle_shape[:-1] == (*leading[:-1], 1):
        dimensions -= 1
        heads, head_distance = leading[-1], strides[dimensions]
    elif angle_shape[:-1] != tuple(leading):
        return None
    token_distance = _distance(shape[:dimensions], strides[:dimensions])
    angle_distance = _distance(angle_shape[:dimensions], angle_strides[:dimensions])
    if strides[-1] != 1 or angle_strides[-1] != 1 or token_distance is None or angle_distance is None:
        return None
    return Rows(math.prod(leading) // max(1, heads), heads, token_distance, head_distance, angle_distance)


_rows = functools.lru_cache(maxsize=256)(_walked)
