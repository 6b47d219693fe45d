"""Which implementation of an operation runs: chosen by device, counted, and said aloud where it is a fallback."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gristmill.kernels.compiled import compiled, may_compile

log = logging.getLogger("gristmill.kernels")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton looks once, too
_counts: Counter[tuple[str, str]] = Counter()
_reference = False  # of the whole process: on a GPU autograd has a thread of its own
_said: set[tuple[str, str]] = set()


def chosen(operation: str, x: Tensor, source: str | None = None, *, triton: bool = True, traceable: bool = True) -> str:
    """`gpu`, `compiled`, `cpu`, `torch` or `reference` for an operation on x; the choice is counted.

    `compiled` is of float32 alone, and where the operation's C++ `source` compiles; `cpu` is a path in torch.
    `torch` are torch's own operations on a GPU, where the operation has no code in `triton`, or none for such tensors.
    GRISTMILL_KERNELS=gpu with TRITON_INTERPRET=1 runs the GPU's code on a CPU, for its tests.

    Where torch.compile captures a graph it is `operation`: the operation of torch.library (operations.py) goes into the
    graph, and chooses, and is counted, whenever it runs. Where nothing of ours would run it is `torch`, whose
    operations are captured themselves, if they are `traceable`.
    """
    if is_dynamo_compiling():
        return _captured(x, source, triton, traceable)
    if _reference:
        picked = "reference"
    elif x.is_cuda or (INTERPRETED and os.environ.get("GRISTMILL_KERNELS") == "gpu"):
        picked = "gpu" if triton else "torch"
    elif x.device.type == "cpu":
        picked = "compiled" if source is not None and runs_compiled(x, source) else "cpu"
    else:
        picked = "reference"
        if (operation, x.device.type) not in _said:
            _said.add((operation, x.device.type))
            log.warning("%s has no implementation for device %s: the reference runs", operation, x.device.type)
    _counts[operation, picked] += 1
    return picked


def _captured(x: Tensor, source: str | None, triton: bool, traceable: bool) -> str:
    """What goes into a graph."""
    if x.is_cuda or (INTERPRETED and os.environ.get("GRISTMILL_KERNELS") == "gpu"):
        ours = triton
    else:
        ours = x.device.type == "cpu" and x.dtype == torch.float32 and source is not None and may_compile()
    return "operation" if ours or not traceable else "torch"


def readable(x: Tensor) -> bool:
    """Whether a check may look at its numbers: on a GPU, looking means waiting, and in a graph there are none yet."""
    return x.device.type == "cpu" and not is_dynamo_compiling()


def runs_compiled(x: Tensor, source: str) -> bool:
    """Whether an operation with this C++ source is compiled for such tensors: float32 on a CPU, with a compiler."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and compiled(source) is not None


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
    """Raise `error` naming the argument, what was given and what is wanted, unless the condition holds."""
    if not holds:
        raise error(f"{what} is {got}; wanted {wanted}")
