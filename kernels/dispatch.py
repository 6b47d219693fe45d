"""Which implementation of an operation runs: chosen by device, counted, and said aloud where it is a fallback."""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gristmill.kernels.compiled import compiled, may_compile

log = logging.getLogger("gristmill.kernels")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton looks once, too
CHECKED = os.environ.get("GRISTMILL_KERNELS_CHECK") == "1"  # numbers are looked at on a GPU too, which waits for it
INTEGERS = frozenset((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
_counts: Counter[tuple[str, str]] = Counter()
_reference = False  # of the whole process: on a GPU autograd has a thread of its own
_said: set[tuple[str, ...]] = set()
Given = ParamSpec("Given")
Result = TypeVar("Result")


def chosen(
    operation: str,
    x: Tensor,
    source: str | None = None,
    *,
    triton: bool | None = True,
    traceable: bool = True,
    takes: str = "",
) -> str:
    """`gpu`, `compiled`, `cpu`, `torch` or `reference` for an operation on x; the choice is counted.

    `compiled` is of float32 alone, and where the operation's C++ `source` compiles; `cpu` is a path in torch.
    `torch` are torch's own operations on a GPU, where the operation has no code in `triton` (none), or none for such
    tensors (false). GRISTMILL_KERNELS=gpu with TRITON_INTERPRET=1 runs the GPU's code on a CPU, for its tests.

    What falls back to them is logged once with its reason: where x has another dtype than the source; and where there
    is no code for such tensors, as `takes` says what tensors there is some for. Without it, it is no fallback.

    Where torch.compile captures a graph it is `operation`: the operation of torch.library (operations.py) goes into the
    graph, and chooses, and is counted, whenever it runs. Where nothing of ours would run it is `torch`, whose
    operations are captured themselves, if they are `traceable`.
    """
    if is_dynamo_compiling():
        return _captured(operation, x, source, triton, traceable, takes)
    if _reference:
        picked = "reference"
    elif _for_gpu(x):
        picked = "gpu" if triton else "torch"
        if takes and triton is False and x.numel():
            _fall_back(operation, x.device.type, x.dtype, takes)
    elif x.is_cpu:
        picked = "compiled" if source is not None and runs_compiled(x, source) else "cpu"
        if picked == "cpu" and x.numel() and (takes if source is None else x.dtype != torch.float32):
            _fall_back(operation, "cpu", x.dtype, "float32" if source is not None else takes)
    else:
        picked = "reference"
        kind = x.device.type
        _say((operation, kind), "%s has no implementation for device %s: the reference runs", operation, kind)
    _counts[operation, picked] += 1
    return picked


def _for_gpu(x: Tensor) -> bool:
    return x.is_cuda or (INTERPRETED and os.environ.get("GRISTMILL_KERNELS") == "gpu")


def _captured(
    operation: str, x: Tensor, source: str | None, triton: bool | None, traceable: bool, takes: str
) -> str:  # fmt: skip
    """What goes into a graph."""
    if _for_gpu(x):
        ours, falls = triton, takes if triton is False else ""
    else:
        here, right = x.device.type == "cpu", x.dtype == torch.float32
        ours = here and right and source is not None and may_compile()
        falls = "" if not here else takes if source is None else "" if right else "float32"
    if ours or not traceable:
        return "operation"
    if falls:
        _fall_back(operation, x.device.type, x.dtype, falls)
    return "torch"


def _fall_back(operation: str, device: str, dtype: torch.dtype, takes: str) -> None:
    """Say that torch's own operations run, and what tensors code of ours takes."""
    said = "%s runs in torch's own operations on %s, here of %s: code of ours takes %s"
    _say((operation, device, takes), said, operation, device, dtype, takes)


# Within a graph it is called as the graph is made, and is not in it. This is what torch.compiler.assume_constant_result
# does (2.11, 2.13), once it has loaded all of torch.compile, for a second and a half of every process.
_fall_back._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _say(key: tuple[str, ...], text: str, *details: Any) -> None:
    """Log it, once for each key."""
    if key not in _said:
        _said.add(key)
        log.warning(text, *details)


def in_own_dtypes(operation: Callable[Given, Result]) -> Callable[Given, Result]:
    """Keep autocast out of a public function: products of torch's in it would have another dtype than it says.

    Compiled code would take such for float32.
    """

    @functools.wraps(operation)
    def apart(*given: Given.args, **named: Given.kwargs) -> Result:
        if not torch._C._is_any_autocast_enabled():  # one look, for all kinds of devices
            return operation(*given, **named)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return operation(*given, **named)

    return apart


def readable(x: Tensor) -> bool:
    """Whether a check may look at its numbers: in a graph there are none yet, and on a GPU looking means waiting.

    There it is done with GRISTMILL_KERNELS_CHECK=1.
    """
    return not is_dynamo_compiling() and (_on_host(x) or (CHECKED and _for_gpu(x)))


def _on_host(x: Tensor) -> bool:
    return x.is_cpu


def runs_compiled(x: Tensor, source: str) -> bool:
    """Whether an operation with this C++ source is compiled for such tensors: float32 on a CPU, with a compiler."""
    return x.is_cpu and x.dtype == torch.float32 and compiled(source) is not None


@contextmanager
def use_reference() -> Iterator[None]:
    """Within it every operation of the process runs as its reference; of a captured graph, what is one in it.

    A graph's backward pass belongs within it as well, if its forward pass was: outside, its gradients are not finite.
    """
    global _reference
    before, _reference = _reference, True
    try:
        yield
    finally:
        _reference = before


def report() -> dict[str, dict[str, int]]:
    """How often each implementation of each operation ran in this process."""
    said: dict[str, dict[str, int]] = {}
    for (operation, picked), count in sorted(_counts.items()):
        said.setdefault(operation, {})[picked] = count
    return said


def require(holds: bool, error: type[Exception], what: str, got: Any, wanted: Any) -> None:
    """Raise `error` naming the argument, what was given and what is wanted, unless the condition holds.

    Whoever is called at every step passes what is there: a text or a tuple made of it costs more than the comparison.
    """
    if not holds:
        got, wanted = (tuple(said) if isinstance(said, torch.Size) else said for said in (got, wanted))
        raise error(f"{what} is {got}; wanted {wanted}")


def require_dtype(operation: str, dtype: torch.dtype, of: str, **tensors: Tensor | None) -> None:
    """Raise TypeError naming the first tensor that has another dtype, which is that of what is called `of`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{operation}: {name} is {tensor.dtype}; wanted the dtype of {of}, {dtype}")


def require_shapes(operation: str, **tensors: tuple[Tensor, tuple[int, ...]]) -> None:
    """Raise ValueError naming the first tensor that is not of the shape beside it."""
    for name, (tensor, shape) in tensors.items():
        if tensor.shape != shape:
            raise ValueError(f"{operation}: shape of {name} is {tuple(tensor.shape)}; wanted {shape}")


def require_ranks(operation: str, **tensors: tuple[Tensor, int]) -> None:
    """Raise ValueError naming the first tensor that has not as many dimensions as stand beside it."""
    for name, (tensor, rank) in tensors.items():
        if tensor.ndim != rank:
            raise ValueError(f"{operation}: rank of {name} is {tensor.ndim}; wanted {rank}")


def require_device(operation: str, name: str, of: Tensor, **tensors: Tensor | None) -> None:
    """Raise ValueError naming the first tensor that lies on another device than `of`, which is called `name`."""
    device = of.device
    for other, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{operation}: device of {other} is {tensor.device}; wanted that of {name}, {device}")
