"""Stochastic rounding by itself, of numbers that other code has computed; rounding.py says by which random numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gristmill.kernels.compiled import needed
from gristmill.kernels.dispatch import chosen, require
from gristmill.kernels.optim.rounding import WORD, Origin, round_reference

SOURCE = "optim/cpu.cpp"
TAKES = "contiguous tensors on one device"


@torch.no_grad()
def round_stochastically(
    exact: list[Tensor], rounded: list[Tensor], seed: int, step: int, origins: list[Origin]
) -> None:
    """Put float32 numbers down in bfloat16, stochastically as `adamw` does its first moments (rounding.py).

    Each number becomes one of the two bfloat16 numbers beside it, in the mean itself; which one is a function of the
    seed, the step and its place in the whole that its tensor's origin names, to the bit on every device. Infinities and
    what is not a number stay so.

    Args:
        exact: tensors in float32, only read.
        rounded: as many of the same shapes in bfloat16, which are written.
        seed: 0 to 2⁶³ − 1.
        step: 0 to 2³² − 1; another one for each time that a tensor is rounded.
        origins: of each tensor its stream, and the place of its first number in the whole.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: the lists differ in length, tensors in shape or device, or a number is out of its range.
    """
    if is_dynamo_compiling():
        places = [o.stream for o in origins], [o.first for o in origins]
        return torch.ops.gristmill.round_stochastically(exact, rounded, seed, step, *places)
    operation = "round_stochastically"
    require(len(rounded) == len(exact), ValueError, f"{operation}: length of rounded", len(rounded), len(exact))
    check_rounding(operation, seed, step, origins, len(exact))
    check_dtypes(operation, "exact", exact, torch.float32)
    check_dtypes(operation, "rounded", rounded, torch.bfloat16)
    for i, (numbers, kept) in enumerate(zip(exact, rounded, strict=True)):
        got, wanted = (kept.shape, kept.device), (numbers.shape, numbers.device)
        require(got == wanted, ValueError, f"{operation}: shape and device of rounded[{i}]", got, wanted)
    if not exact:
        return
    plain = len({t.device for t in exact}) == 1 and all(t.is_contiguous() for t in (*exact, *rounded))
    path = chosen(operation, exact[0], SOURCE if plain else None, triton=plain, takes=TAKES)
    if path == "gpu":
        from gristmill.kernels.optim.gpu import triton_round

        return triton_round(exact, rounded, seed, step, origins)
    if path != "compiled":
        return round_reference(exact, rounded, seed, step, origins)
    addresses = torch.tensor([[t.data_ptr() for t in tensors] for tensors in (exact, rounded)], device="cpu")
    counts = torch.tensor([t.numel() for t in exact], device="cpu")
    needed(SOURCE)("round_stochastically", addresses, counts, len(exact), table(origins), seed, step)


def table(origins: list[Origin]) -> Tensor:
    """Streams, and places of first numbers, (2, tensors)."""
    return torch.tensor([[o.stream for o in origins], [o.first for o in origins]], device="cpu")


def check_rounding(operation: str, seed: int, step: int, origins: list[Origin] | None, tensors: int) -> None:
    given = None if origins is None else len(origins)
    require(given == tensors, ValueError, f"{operation}: length of origins", given, f"{tensors}: a seed was given")
    require(0 <= seed < 2**63, ValueError, f"{operation}: seed", seed, "0 to 2⁶³ − 1")
    require(0 <= step <= WORD, ValueError, f"{operation}: step", step, "0 to 2³² − 1")
    for origin in origins or []:
        right = 0 <= origin.stream <= WORD and 0 <= origin.first < 2**62
        require(right, ValueError, f"{operation}: an origin", origin, "a stream of 32 bits, a place from 0 on")


def check_dtypes(operation: str, name: str, tensors: list[Tensor], dtype: torch.dtype) -> None:
    for i, tensor in enumerate(tensors):
        require(tensor.dtype == dtype, TypeError, f"{operation}: dtype of {name}[{i}]", tensor.dtype, f"{dtype}")
