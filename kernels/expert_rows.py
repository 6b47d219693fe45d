"""How rows are laid out expert by expert. M = T·K rows: row t·K + k is the k-th choice of token t."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from gristmill.kernels.dispatch import INTEGERS, readable, require, require_device


def rows_by_expert(expert_TK: Tensor) -> Tensor:
    """Rows in the order of their experts, those of one expert in the order of tokens, (M,)."""
    return expert_TK.reshape(-1).argsort(stable=True)


def places(order_M: Tensor) -> Tensor:
    """Where each row lies in that order: the inverse permutation, (M,)."""
    place_M = torch.empty_like(order_M)
    place_M[order_M] = torch.arange(len(order_M), device=order_M.device)
    return place_M


def check_ends(operation: str, ends_E: Tensor, groups: int, name: str, x_NK: Tensor) -> None:
    """The ends of so many groups are those of all rows of x, which is called `name`.

    Raises:
        TypeError: they are no integers.
        ValueError: shape or device do not fit, there are rows and no group, or (where numbers are looked at) they do
            not ascend to the number of rows.
    """
    rows = x_NK.shape[0]
    require(ends_E.shape == (groups,), ValueError, f"{operation}: shape of ends_E", ends_E.shape, (groups,))
    require(groups > 0 or not rows, ValueError, f"{operation}: groups", 0, f"some, for {rows} rows")
    last = check_ascent(operation, ends_E, name, x_NK)
    if last is not None:
        require(last == rows, ValueError, f"{operation}: last of ends_E", last, f"the {rows} rows of {name}")


def check_ascent(operation: str, ends_E: Tensor, name: str, x: Tensor) -> int | None:
    """The last of the ends, which ascend, where numbers are looked at.

    Raises:
        TypeError: they are no integers.
        ValueError: they are not in one dimension, on another device than x, or do not ascend.
    """
    require(ends_E.dtype in INTEGERS, TypeError, f"{operation}: ends_E", ends_E.dtype, "integers")
    require(ends_E.ndim == 1, ValueError, f"{operation}: rank of ends_E", ends_E.ndim, 1)
    require_device(operation, name, x, ends_E=ends_E)
    if not readable(ends_E) or not len(ends_E):
        return None
    ends = ends_E.tolist()
    ascending = ends[0] >= 0 and all(a <= b for a, b in pairwise(ends))
    require(ascending, ValueError, f"{operation}: ends_E", ends, "ascending ends")
    return ends[-1]


def check_order(order_M: Tensor, expert_TK: Tensor) -> None:
    """The rows are in the order of their experts, those of one expert in the order of tokens.

    Raises:
        ValueError: a number is that of no row, or the order is another.
    """
    rows = len(order_M)
    if not rows:
        return
    low, high = (int(bound) for bound in order_M.aminmax())
    within = low >= 0 and high < rows
    require(within, ValueError, "moe_mlp: range of order_M", (low, high), f"rows from 0 to {rows - 1}")
    # Sorted by expert and then by row, without a row that is there twice: so each is there
    ascending = (expert_TK.reshape(-1)[order_M].long() * rows + order_M).diff() > 0
    require(bool(ascending.all()), ValueError, "moe_mlp: order_M", "another", "that of the rows' experts, stable")
