"""What is timed of the optimizers: AdamW's update and Muon's iteration, against torch's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from gristmill.kernels.optim import AdamW, Origin, adamw, orthogonalised
from gristmill.kernels.optim.reference import orthogonalised_reference
from gristmill.kernels.timing import Case, Goal, Work


def cases(device: str, _: torch.dtype) -> Iterator[Case]:
    """Of parameters in float32; Muon's iteration on a CPU alone, since on a GPU it is torch's own."""
    yield from _adamw(device, 320, 1024 if device == "cuda" else 256)
    if device == "cpu":
        for size in [(32, 256, 256), (32, 512, 256), (1, 1024, 1024)]:
            yield _newton_schulz(device, *size)


def _adamw(device: str, matrices: int, size: int) -> Iterator[Case]:
    """Against torch.optim.AdamW in both of its settings."""
    shapes = [(32, size, size)] * (matrices // 32) + [(size, size)] * 32 + [(size,)] * 32
    ours = [[torch.randn(shape, device=device) for shape in shapes] for _ in range(4)]
    ours[3] = [t.square_() for t in ours[3]]

    def peer(*, fused: bool) -> Work:
        leaves = [p.clone().requires_grad_() for p in ours[0]]
        for leaf, gradient in zip(leaves, ours[1], strict=True):
            leaf.grad = gradient
        return torch.optim.AdamW(leaves, lr=1e-3, weight_decay=0.1, fused=fused, foreach=not fused).step

    numbers = sum(t.numel() for t in ours[0])
    peers = {"torch.optim.AdamW(fused)": peer(fused=True), "torch.optim.AdamW(foreach)": peer(fused=False)}
    goals = (Goal("speed", 1.5, tuple(peers)),) if device == "cpu" else ()
    p, g, m, v = ours
    step = partial(adamw, p, g, m, v, AdamW(rate=1e-3, step=10, decay=0.1))
    shape = f"{len(shapes)} tensors, {numbers / 1e6:.1f} M"
    yield Case("optim", shape, 12 * numbers, step, peers, goals, bytes=7 * 4 * numbers)  # the gradient is only read
    halves, origins = [[t.bfloat16() for t in each] for each in (m, v)], [Origin(i) for i in range(len(shapes))]
    peers = {f"{name}, moments in float32": work for name, work in peers.items()}
    for op, seed in (("optim, bfloat16", None), ("optim, stochastic", 0)):
        how = AdamW(rate=1e-3, step=10, decay=0.1, seed=seed)
        step = partial(adamw, p, g, *halves, how, origins)
        yield Case(op, shape, 12 * numbers, step, peers, bytes=(3 * 4 + 4 * 2) * numbers)


def _newton_schulz(device: str, matrices: int, rows: int, columns: int) -> Case:
    """Against torch's batched products; all of the symmetric ones' operations are counted."""
    stack, steps = torch.randn(matrices, rows, columns, device=device), 5
    least, most = sorted((rows, columns))
    flops = steps * matrices * (4 * least**2 * most + 2 * least**3)
    peers = {"torch, batched products": partial(orthogonalised_reference, stack, steps)}
    shape = f"{matrices} × {rows}×{columns}, {steps} steps"
    return Case("newton_schulz", shape, flops, partial(orthogonalised, stack, steps), peers)
