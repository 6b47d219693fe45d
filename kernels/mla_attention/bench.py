"""What is timed of attention in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gristmill.kernels.mla_attention import attention, latent_attention
from gristmill.kernels.mla_attention.sdpa import sdpa_attention, sdpa_latent_attention
from gristmill.kernels.timing import Case, Goal, both_ways, without_gradients

COPIES, FLASH, CHOSEN = "rotate, cat, scaled_dot_product", "torch, flash attention", "torch, as it chooses"


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """On a GPU at the 16B model's shape."""
    sizes = [(8, 256, 8, 16, 16, 32), (8, 256, 8, 32, 32, 64), (1, 1024, 4, 128, 64, 128)]
    for size in [(2, 4096, 16, 128, 64, 128)] if device == "cuda" else sizes:
        yield from _at(device, dtype, *size)


def _at(
    device: str, dtype: torch.dtype, batch: int, length: int, heads: int, width: int, turning: int, values: int
) -> Iterator[Case]:
    """Causal attention of MLA's projections against torch's own, with the copies that it needs; on a GPU also within
    documents, and at equal head widths, which flash attention takes."""
    shapes = ((heads, width + turning), (heads, width + values), (turning,))
    leaves = [torch.randn(batch, length, *shape, device=device, dtype=dtype) for shape in shapes]
    angle = torch.rand(batch, length, turning // 2, device=device)
    rotary, scale = (angle.cos(), angle.sin()), (width + turning) ** -0.5
    shape = f"{batch} × {length}, {heads} × {width}+{turning}/{values}"
    flops = batch * heads * length * (length + 1) * (width + turning + values)
    seen = torch.randn(batch, length, heads, values, device=device, dtype=dtype) if device == "cuda" else None
    ours = partial(latent_attention, rotary=rotary, scale=scale)
    theirs = partial(sdpa_latent_attention, rotary=rotary, scale=scale)
    yield from _cases("attention", shape, flops, leaves, seen, ours, {COPIES: theirs})
    if device != "cuda":
        return
    document = torch.arange(length, device=device) // (length // 4)
    mask = (document[:, None] == document).tril().expand(batch, length, length)
    ours = partial(ours, first_BS=(document * (length // 4)).expand(batch, length))
    theirs = partial(theirs, mask_BSS=mask)
    yield from _cases("attention, documents", shape, flops // 4, leaves, seen, ours, {COPIES: theirs})
    leaves = [torch.randn(batch, length, heads, width, device=device, dtype=dtype) for _ in range(3)]
    shape, flops = f"{batch} × {length}, {heads} × {width}/{width}", 2 * batch * heads * length * (length + 1) * width
    peers = {FLASH: partial(_flash_attention, scale=scale), CHOSEN: partial(sdpa_attention, scale=scale)}
    goals = (Goal("speed", 0.9, (FLASH,)),)
    yield from _cases("attention, equal", shape, flops, leaves, seen, partial(attention, scale=scale), peers, goals)


def _cases(
    op: str, shape: str, flops: int, leaves: list[Tensor], seen: Tensor | None, ours: Callable[..., Tensor],
    peers: dict[str, Callable[..., Tensor]], goals: tuple[Goal, ...] = (),
) -> Iterator[Case]:  # fmt: skip
    """Forward; and both ways, which is what training is and the goals are of."""
    given = {name: without_gradients(theirs, *leaves) for name, theirs in peers.items()}
    yield Case(f"{op} forward", shape, flops, without_gradients(ours, *leaves), given, captured=True)
    given = {name: both_ways(theirs, *leaves, seen=seen) for name, theirs in peers.items()}
    yield Case(op, shape, 7 * flops // 2, both_ways(ours, *leaves, seen=seen), given, goals, captured=True)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa_attention(q, k, v, scale)
