"""How large the gradient is in each group of parameters: read where an optimizer takes it up, before it is clipped.

What a rank holds of a gradient depends on the layout; the squares of its pieces do not, and add up over the ranks. The
gradient itself is only read, so that a run learns the same bits whether it is looked at or not.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from gristmill.model.training.optimizers import Piece

GROUPS = ("embedding", "attention", "feed_forward", "experts", "gates", "norms", "head", "mtp")


def group_of(name: str) -> str:
    """The group of a parameter: `feed_forward` are dense and shared experts' FFNs, `mtp` all that MTP modules own."""
    if name.startswith("mtp."):
        return "mtp"
    if "embed_tokens" in name:
        return "embedding"
    if "lm_head" in name:
        return "head"
    if "norm" in name:
        return "norms"
    if ".self_attn." in name:
        return "attention"
    if ".mlp.gate." in name:
        return "gates"
    return "experts" if ".mlp.experts." in name else "feed_forward"


class GradientSquares:
    """Sums of squares by group, (len(GROUPS),) float64, of the pieces of a step's gradient that this rank holds."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def begin(self) -> None:
        """Forget the step before."""
        self.sums = None

    @torch.no_grad()
    def add(self, gradients: Iterable[tuple[Tensor, tuple[Piece, ...]]]) -> None:
        """Add gradients, each with the pieces that lie in it."""
        parts = [(piece.of(gradient.reshape(-1)), piece.name) for gradient, pieces in gradients for piece in pieces]
        if not parts:
            return
        norms = torch._foreach_norm([numbers for numbers, _ in parts], dtype=torch.float32)
        squares = torch.stack(norms).double().square()
        groups = torch.tensor([GROUPS.index(group_of(name)) for _, name in parts], device=squares.device)
        sums = squares.new_zeros(len(GROUPS)).index_add_(0, groups, squares)
        self.sums = sums if self.sums is None else self.sums + sums


def norms_by_group(
    held: Iterable[tuple[GradientSquares, int]], present: set[str], device: torch.device, ranks: int
) -> dict[str, float]:
    """`grad_norm.<group>` of the groups that are `present`, over all ranks, which all call this.

    Args:
        held: squares, each with the number of ranks on which the same numbers lie; a rank may hold none.
    """
    whole = torch.zeros(len(GROUPS), dtype=torch.float64, device=device)
    for squares, copies in held:
        if squares.sums is not None:
            whole += squares.sums.to(device) / copies
    if ranks > 1:
        dist.all_reduce(whole)
    norms = dict(zip(GROUPS, whole.sqrt().tolist(), strict=True))
    return {f"grad_norm.{group}": norm for group, norm in norms.items() if group in present}
