"""The search behind `bench --tune`: every candidate's time at DeepSeek's shapes, and the fastest into `tiles.json`.

A candidate that does not fit into the device is left out, and one whose result differs from the usual one's by more
than its rounding is refused: it would be a fault of the compiler's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gristmill.kernels.tiles import FILE, put
from gristmill.kernels.timing import Work, seconds, seconds_of_device

ROUNDING = 2.0**-7  # of results in bfloat16, and of what is rounded to it on the way; sums come in another order

# Candidates of attention: queries, keys, warps, buffers; others spill registers by the kilobyte or do not fit.
FORWARD = [(128, 128, 8, 2), (128, 64, 8, 4), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3)]
OF_QUERIES = [(128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2)]
OF_KEYS = [(64, 64, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2), (64, 64, 4, 2)]


@dataclass(frozen=True)
class Search:
    """A kernel by its name in the file, its usual sizes and others, and what computes its results with some sizes."""

    kernel: str
    usual: Any
    others: list[Any]
    results: Callable[[Any], list[Tensor]]


def _search(kernel: str, others: list[Any], results: Callable[[Any], list[Tensor]]) -> Search:
    return Search(kernel, usual_sizes()[kernel], others, results)


def usual_sizes() -> dict[str, Any]:
    """What is searched for, by its name in the file: the sizes that run where nothing was found."""
    from gristmill.kernels.grouped_gemm import gpu as grouped_gemm
    from gristmill.kernels.mla_attention import gpu as mla_attention

    usual: dict[str, Any] = {
        "grouped_gemm.product": grouped_gemm.PRODUCT,
        "grouped_gemm.gradient": grouped_gemm.GRADIENT,
        "grouped_gemm.short_gradient": grouped_gemm.SHORT_GRADIENT,
    }
    for parts in ("one_part", "two_parts"):
        usual[f"attention.forward.{parts}"] = mla_attention.FORWARD
        usual[f"attention.of_queries.{parts}"] = mla_attention.OF_QUERIES
        usual[f"attention.of_keys.{parts}"] = mla_attention.OF_KEYS
    return usual


def attention(device: str) -> Iterator[Search]:
    """Causal attention of the 16B model's heads, in two parts, and of heads of 128, in one; and all gradients."""
    yield from _attention(device, "two_parts", 64)
    yield from _attention(device, "one_part", 0)


def _attention(device: str, parts: str, turning: int) -> Iterator[Search]:
    from gristmill.kernels.mla_attention import gpu

    batch, length, heads, width, values = 2, 4096, 16, 128, 128

    def drawn(*shape: int) -> Tensor:
        return torch.randn(batch, length, *shape, device=device, dtype=torch.bfloat16).transpose(1, 2)

    def made(shared: int) -> list[Tensor | None]:
        whole = [drawn(heads, width), drawn(heads, width), drawn(heads, values)]
        return [*whole, drawn(heads, turning), drawn(shared, turning)] if turning else [*whole, None, None]

    sides, into = gpu.Sides(*made(1)), gpu.Sides(*made(heads))  # type: ignore[arg-type]
    scale, grad = (width + turning) ** -0.5, drawn(heads, values)
    out, log = gpu.attend(sides, scale, None)

    def both(of_queries: Any, of_keys: Any, kept: tuple[Tensor | None, ...]) -> list[Tensor]:
        gpu.gradients_(into, sides, out, log, grad, scale, None, of_queries, of_keys)
        return [tensor for tensor in kept if tensor is not None]

    tiles = [gpu.Tiles(*sizes) for sizes in FORWARD]
    yield _search(f"attention.forward.{parts}", tiles, lambda t: [gpu.attend(sides, scale, None, t)[0]])
    tiles, made_of = [gpu.Tiles(*sizes) for sizes in OF_QUERIES], (into.q, into.q_second)
    yield _search(f"attention.of_queries.{parts}", tiles, lambda t: both(t, gpu.OF_KEYS, made_of))
    tiles, made_of_keys = [gpu.Tiles(*sizes) for sizes in OF_KEYS], (into.k, into.v, into.k_second)
    yield _search(f"attention.of_keys.{parts}", tiles, lambda t: both(gpu.OF_QUERIES, t, made_of_keys))


def grouped(device: str) -> Iterator[Search]:
    """Products of DeepSeek-V3's experts, 32,768 tokens, and the gradient of long and of short groups."""
    from gristmill.kernels.grouped_gemm import gpu

    experts, inner, outer = 256, 7168, 2048
    w = torch.empty(experts, outer, inner, device=device, dtype=torch.bfloat16).normal_(0, inner**-0.5)

    def sides(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        x, grad = (torch.randn(rows * experts, n, device=device, dtype=torch.bfloat16) for n in (inner, outer))
        return x, grad, (torch.arange(experts, device=device) + 1) * rows

    x, grad, ends = sides(1024)
    tiles = [
        gpu.Tiles(*s) for s in ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (256, 128, 64, 8, 3))
    ]
    yield _search("grouped_gemm.product", tiles, lambda t: [gpu.product(x, w, ends, True, t)])
    tiles = [
        gpu.Tiles(*s)
        for s in ((256, 128, 32, 8, 4), (256, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 128, 64, 4, 3, 2))
    ]
    yield _search("grouped_gemm.gradient", tiles, lambda t: [gpu.weight_gradient(grad, x, ends, t)])
    x, grad, ends = sides(128)
    yield _search("grouped_gemm.short_gradient", tiles, lambda t: [gpu.weight_gradient(grad, x, ends, t)])


SEARCHES: dict[str, Callable[[str], Iterator[Search]]] = {"mla_attention": attention, "grouped_gemm": grouped}


def tune(folders: list[str], device: str, file: Path = FILE) -> None:
    """Try the candidates of these folders' operations, say their times, and write the fastest into the file."""
    for folder in folders:
        for search in SEARCHES[folder](device):
            best = fastest(search, device)
            put(torch.cuda.get_device_name(), search.kernel, best, file)


def fastest(search: Search, device: str) -> Any:
    """The candidate with the least median time, of those that fit and are right."""
    wanted = [t.clone() for t in search.results(search.usual)]
    fits = [sizes for sizes in dict.fromkeys([search.usual, *search.others]) if _is_right(search, sizes, wanted)]
    sides: list[Work] = [lambda sizes=sizes: search.results(sizes) for sizes in fits]
    times = seconds_of_device(sides) if device == "cuda" else seconds(sides, device)
    for taken, sizes in sorted(zip(times, fits, strict=True), key=lambda pair: pair[0]):
        print(f"{search.kernel:<28} {taken * 1e3:9.3f} ms   {_said(sizes)}", flush=True)
    return min(zip(times, fits, strict=True), key=lambda pair: pair[0])[1]


def _is_right(search: Search, sizes: Any, wanted: list[Tensor]) -> bool:
    from triton.runtime.errors import OutOfResources

    try:
        got = search.results(sizes)
    except OutOfResources:
        print(f"{search.kernel:<28} does not fit: {_said(sizes)}", flush=True)
        return False
    for mine, theirs in zip(got, wanted, strict=True):
        apart = float((mine.float() - theirs.float()).norm() / theirs.float().norm())
        if not apart <= ROUNDING:
            print(f"{search.kernel:<28} refused, its result is {apart:.2g} apart: {_said(sizes)}", flush=True)
            return False
    return True


def _said(sizes: Any) -> str:
    return ", ".join(f"{name} {number}" for name, number in asdict(sizes).items())
