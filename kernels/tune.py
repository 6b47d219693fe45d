"""The search behind `bench --tune`: every candidate's time at DeepSeek's shapes, and the fastest into `tiles.json`.

A candidate that does not fit into the device is left out, and one whose result differs from the usual one's by more
than its rounding is refused: it would be a fault of the compiler's. What is tried of an operation lies beside its
kernels, in `search.py`: SIZES, the usual sizes and others of each kernel by its name in the file; and `searches`, which
draws its inputs at a shape, DEEPSEEK or, for the interpreter, SMALL.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gristmill.kernels.tiles import FILE, put
from gristmill.kernels.timing import Work, seconds, seconds_of_device

ROUNDING = 2.0**-7  # of results in bfloat16, and of what is rounded to it on the way; sums come in another order
PIECE = 1 << 26  # numbers that are copied at a time
SEARCHED = ("mla_attention", "grouped_gemm", "fp8_gemm", "mla_decode", "router", "cross_entropy", "optim")
"""Folders with a search; not imported before they are asked for, since their kernels are Triton's."""

Sizes = tuple[Any, list[Any]]  # the usual sizes of a kernel, and others


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Search:
    """A kernel by its name in the file, its usual sizes and others, and what computes its results with some sizes.

    Without sizes, None, it computes as in a run, with those that were found. `restore` puts back what it writes over
    of its inputs, and is not timed. A GPU times it from a graph, unless it sends tables from the host, which no graph
    takes.
    """

    kernel: str
    usual: Any
    others: list[Any]
    results: Callable[[Any], list[Tensor]]
    restore: Work = _nothing
    captured: bool = True


def search_of(folder: str) -> ModuleType:
    """The module with SIZES and `searches`."""
    return importlib.import_module(f"gristmill.kernels.{folder}.search")


def usual_sizes() -> dict[str, Any]:
    """What is searched for, by its name in the file: the sizes that run where nothing was found."""
    return {kernel: usual for folder in SEARCHED for kernel, (usual, _) in search_of(folder).SIZES.items()}


def tune(folders: list[str], device: str, file: Path = FILE) -> None:
    """Try the candidates of these folders' operations, say their times, and write the fastest into the file."""
    for folder in folders:
        for search in search_of(folder).searches(device):
            best = fastest(search, device)
            put(torch.cuda.get_device_name(), search.kernel, best, file)


def fastest(search: Search, device: str) -> Any:
    """The candidate with the least median time, of those that fit and are right."""
    wanted, fits = results_of(search, search.usual), []
    for sizes in dict.fromkeys([search.usual, *search.others]):
        reason = refusal(search, sizes, wanted)
        if reason is None:
            fits.append(sizes)
        else:
            print(f"{search.kernel:<28} {reason}: {_said(sizes)}", flush=True)
    search.restore()
    sides: list[Work] = [lambda sizes=sizes: search.results(sizes) for sizes in fits]
    times = seconds_of_device(sides) if search.captured and device == "cuda" else seconds(sides, device)
    for taken, sizes in sorted(zip(times, fits, strict=True), key=lambda pair: pair[0]):
        print(f"{search.kernel:<28} {taken * 1e3:9.3f} ms   {_said(sizes)}", flush=True)
    return min(zip(times, fits, strict=True), key=lambda pair: pair[0])[1]


def results_of(search: Search, sizes: Any) -> list[Tensor]:
    """Copies of the results with these sizes. Where they lay is blanked: the next candidate may be given the same
    memory, and what it leaves out would still be there."""
    search.restore()
    results = search.results(sizes)
    kept = [t.clone() for t in results]
    for t in results:
        t.fill_(float("nan") if t.is_floating_point() else -1)
    return kept


def refusal(search: Search, sizes: Any, wanted: list[Tensor]) -> str | None:
    """Why a candidate is not taken; none where it fits and gives what is wanted."""
    from triton.errors import TritonError
    from triton.runtime.errors import OutOfResources

    try:
        got = results_of(search, sizes)
    except OutOfResources:
        return "does not fit"
    except TritonError as error:  # of the compiler, which should not end a search
        return f"fails, {type(error).__name__} {error}"
    for mine, theirs in zip(got, wanted, strict=True):
        if theirs.is_floating_point():
            apart = distance(mine, theirs)
            if not apart <= ROUNDING:
                return f"refused, its result is {apart:.2g} apart"
        elif not torch.equal(mine, theirs):  # places and choices are not rounded
            return "refused, its result is not equal"
    return None


def distance(mine: Tensor, theirs: Tensor) -> float:
    """The norm of what two results differ by over that of the second; a part at a time, since copies may not fit."""
    pieces = zip(mine.reshape(-1).split(PIECE), theirs.reshape(-1).split(PIECE), strict=True)
    norms = [torch.stack([(a.float() - b.float()).norm(), b.float().norm()]) for a, b in pieces]
    of_both = torch.stack(norms).double().square().sum(0).sqrt()
    return float(of_both[0] / of_both[1])


def _said(sizes: Any) -> str:
    return ", ".join(f"{name} {number}" for name, number in asdict(sizes).items())
