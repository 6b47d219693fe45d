"""AdamW over many tensors in Triton: one launch for all tensors of equal dtypes, each number read and written once.

A program takes a chunk, neighbouring numbers of one tensor. Which, says a table on the device that depends on the
tensors' lengths alone; where the tensors lie says another, of a few kilobytes. Both are kept by what they say, so a
table can never be out of date, and travel from pinned memory, so that the host does not wait. All is computed in
float32 and rounded once, as it is put down: to nearest, or bfloat16 moments as rounding.py says.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from gristmill.kernels.optim.reference import AdamW
from gristmill.kernels.optim.rounding import Origin
from gristmill.kernels.tiles import tuned


@dataclass(frozen=True)
class Chunk:
    """Neighbouring numbers of a tensor that a program takes; warps."""

    numbers: int
    warps: int


CHUNK = Chunk(1024, 4)
ALIGNED = 16  # bytes; what a thread reads at once
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@triton.jit
def _pointers(address_ptr, first, ALIGNED: tl.constexpr, TYPE: tl.constexpr, CHUNK: tl.constexpr):
    """Those of a chunk's numbers in the tensor whose address lies at `address_ptr`."""
    numbers = tl.load(address_ptr).to(tl.pointer_type(TYPE)) + first + tl.arange(0, CHUNK)
    return tl.multiple_of(numbers, ALIGNED)


@triton.jit
def _drawn(place, seed, step, stream):
    """The four words of the numbers from place // 4 · 4 on (rounding.py)."""
    quad = place >> 2
    low, high = (quad & 0xFFFFFFFF).to(tl.uint32), (quad >> 32).to(tl.uint32)
    zero = low ^ low
    return tl.philox(seed, low, high, zero + step.to(tl.uint32), zero + stream.to(tl.uint32))


@triton.jit
def _words_of_quads(place, seed, step, stream, CHUNK: tl.constexpr):
    a, b, c, d = _drawn(place + 4 * tl.arange(0, CHUNK // 4).to(tl.int64), seed, step, stream)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (CHUNK,))


@triton.jit
def _words_one_by_one(place, seed, step, stream, CHUNK: tl.constexpr):
    own = place + tl.arange(0, CHUNK).to(tl.int64)
    a, b, c, d = _drawn(own, seed, step, stream)
    return tl.where(own % 4 == 0, a, tl.where(own % 4 == 1, b, tl.where(own % 4 == 2, c, d)))


@triton.jit
def _words(place, seed, step, stream, CHUNK: tl.constexpr):
    """The words of the CHUNK numbers from that place on."""
    if place % 4 == 0:  # both ways in functions of their own: a name has one shape in all branches of one
        word = _words_of_quads(place, seed, step, stream, CHUNK)
    else:
        word = _words_one_by_one(place, seed, step, stream, CHUNK)
    return word


@triton.jit
def _rounded(x, half):
    """In bfloat16: of the two numbers beside x the further one in size where what is cut off and `half` reach 2¹⁶."""
    upper = tl.where(x == x, (x.to(tl.uint32, bitcast=True) + half) >> 16, 0x7FC0)
    return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _step(
    p_ptr, g_ptr, m_ptr, v_ptr, here, coefficient, kept, beta1, rest1, beta2, rest2, eps, rate, unbiased, word,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """A chunk's numbers. `rest` is 1 − β, `kept` 1 − rate · decay; `rate` and `unbiased` correct m and v for t."""
    p = tl.load(p_ptr, mask=here, other=0.0).to(tl.float32)
    g = tl.load(g_ptr, mask=here, other=0.0).to(tl.float32) * coefficient
    m = tl.load(m_ptr, mask=here, other=0.0).to(tl.float32)
    v = tl.load(v_ptr, mask=here, other=0.0).to(tl.float32)
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    p = kept * p - rate * (m / (tl.sqrt(v * unbiased) + eps))
    if STOCHASTIC:
        m, v = _rounded(m, word & 0xFFFF), _rounded(v, word >> 16)
    tl.store(m_ptr, m.to(m_ptr.dtype.element_ty), mask=here)
    tl.store(v_ptr, v.to(v_ptr.dtype.element_ty), mask=here)
    tl.store(p_ptr, p.to(p_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["tensors", "seed", "step"])
def _update(
    address_ptr, chunk_ptr, tensors, coefficient, kept, beta1, rest1, beta2, rest2, eps, rate, unbiased, seed, step,
    ALIGNED: tl.constexpr, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """One chunk; P, G, M and V are the dtypes of the four lists."""
    entry = chunk_ptr + 3 * tl.program_id(0).to(tl.int64)
    tensor, chunk, numbers = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    addresses, first = address_ptr + tensor, chunk.to(tl.int64) * CHUNK
    p_ptr = _pointers(addresses, first, ALIGNED, P, CHUNK)
    g_ptr = _pointers(addresses + tensors, first, ALIGNED, G, CHUNK)
    m_ptr = _pointers(addresses + 2 * tensors, first, ALIGNED, M, CHUNK)
    v_ptr = _pointers(addresses + 3 * tensors, first, ALIGNED, V, CHUNK)
    if STOCHASTIC:
        stream, place = tl.load(addresses + 4 * tensors), tl.load(addresses + 5 * tensors) + first
        word = _words(place, seed, step, stream, CHUNK)
    else:
        word = 0
    if numbers == CHUNK:  # a bound that the compiler does not know would have threads read number by number
        here = tl.full((CHUNK,), True, tl.int1)
        _step(
            p_ptr, g_ptr, m_ptr, v_ptr, here, coefficient, kept, beta1, rest1, beta2, rest2, eps, rate, unbiased, word,
            STOCHASTIC,
        )  # fmt: skip
    else:
        here = tl.arange(0, CHUNK) < numbers
        _step(
            p_ptr, g_ptr, m_ptr, v_ptr, here, coefficient, kept, beta1, rest1, beta2, rest2, eps, rate, unbiased, word,
            STOCHASTIC,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tensors", "seed", "step"])
def _round(address_ptr, chunk_ptr, tensors, seed, step, CHUNK: tl.constexpr):
    """One chunk of the floats in the first list to the bfloat16 numbers in the second."""
    entry = chunk_ptr + 3 * tl.program_id(0).to(tl.int64)
    tensor, chunk, numbers = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    addresses, first = address_ptr + tensor, chunk.to(tl.int64) * CHUNK
    here = tl.arange(0, CHUNK) < numbers
    x = tl.load(_pointers(addresses, first, 1, tl.float32, CHUNK), mask=here, other=0.0)
    stream, place = tl.load(addresses + 2 * tensors), tl.load(addresses + 3 * tensors) + first
    x = _rounded(x, _words(place, seed, step, stream, CHUNK) & 0xFFFF)
    tl.store(_pointers(addresses + tensors, first, 1, tl.bfloat16, CHUNK), x, mask=here)


def triton_adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    how: AdamW,
    origins: list[Origin],
    chunk: Chunk | None = None,
) -> None:
    """See `adamw`; of contiguous tensors on one device, in the dtypes of TYPES."""
    chunk = chunk or tuned("optim.adamw", parameters[0].device, CHUNK)
    alike: dict[tuple[torch.dtype, ...], list[int]] = {}
    every = list(zip(parameters, gradients, exp_avg, exp_avg_sq, strict=True))
    for i, together in enumerate(every):
        alike.setdefault(tuple(t.dtype for t in together), []).append(i)
    for dtypes, members in alike.items():
        _launch(dtypes, [every[i] for i in members], how, [origins[i] for i in members] if origins else [], chunk)


def _launch(
    dtypes: tuple[torch.dtype, ...], group: list[tuple[Tensor, ...]], how: AdamW, origins: list[Origin], chunk: Chunk
) -> None:
    chunks, addresses = _tables(group, origins, chunk.numbers)
    if not len(chunks):
        return
    aligned = all(t.data_ptr() % ALIGNED == 0 for together in group for t in together)
    parameter, gradient, first, second = (TYPES[dtype] for dtype in dtypes)
    _update[(len(chunks),)](
        addresses, chunks, len(group),
        float(how.coefficient), 1.0 - how.rate * how.decay,
        float(how.beta1), 1.0 - how.beta1, float(how.beta2), 1.0 - how.beta2, float(how.eps),
        how.rate / (1.0 - how.beta1**how.step), 1.0 / (1.0 - how.beta2**how.step), how.seed or 0, how.step,
        ALIGNED=ALIGNED if aligned else 1, P=parameter, G=gradient, M=first, V=second, CHUNK=chunk.numbers,
        STOCHASTIC=how.seed is not None, num_warps=chunk.warps,
    )  # fmt: skip


def triton_round(exact: list[Tensor], rounded: list[Tensor], seed: int, step: int, origins: list[Origin]) -> None:
    """See `round_stochastically`; of contiguous tensors on one device."""
    chunks, addresses = _tables(list(zip(exact, rounded, strict=True)), origins, CHUNK.numbers)
    if len(chunks):
        _round[(len(chunks),)](
            addresses, chunks, len(exact), seed, step, CHUNK=CHUNK.numbers, num_warps=CHUNK.warps
        )  # fmt: skip


def _tables(group: list[tuple[Tensor, ...]], origins: list[Origin], numbers: int) -> tuple[Tensor, Tensor]:
    """Those of `_chunks` and `_addresses`."""
    device = group[0][0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    addresses = [t.data_ptr() for side in zip(*group, strict=True) for t in side]
    places = (*(o.stream for o in origins), *(o.first for o in origins))
    chunks = _chunks(tuple(p.numel() for p, *_ in group), numbers, device, stream)
    return chunks, _addresses((*addresses, *places), device, stream)


# The stream is part of what tables are kept by: another one would not wait for the copy.


@lru_cache(maxsize=64)
def _chunks(lengths: tuple[int, ...], most: int, device: torch.device, stream: int) -> Tensor:
    """Of each chunk its tensor, its number in it, and how many numbers it holds, at most so many: (chunks, 3)."""
    length = torch.tensor(lengths, device="cpu")
    count = (length + most - 1) // most
    chunks = sum(-(-n // most) for n in lengths)
    tensor = torch.arange(len(lengths), device="cpu").repeat_interleave(count, output_size=chunks)
    chunk = torch.arange(chunks, device="cpu") - (count.cumsum(0) - count)[tensor]
    numbers = (length[tensor] - chunk * most).clamp_(max=most)
    return _sent(torch.stack((tensor, chunk, numbers), 1).to(torch.int32), device)


@lru_cache(maxsize=64)
def _addresses(addresses: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """Where the tensors lie, list after list; with origins their streams and first places behind that."""
    return _sent(torch.tensor(addresses, device="cpu"), device)


def _sent(table: Tensor, device: torch.device) -> Tensor:
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
