"""Exchanges between the ranks of a group that autograd follows.

Each has its adjoint as gradient: after the backward passes of all ranks a parameter's gradients, added over the ranks
that hold a copy of it, are those of the SUM of the ranks' losses. What needs a gradient must need one on every rank of
the group, for the backward pass exchanges too.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def exchange_rows(x_ND: Tensor, send: list[int], receive: list[int], group: ProcessGroup) -> Tensor:
    """Rows to and from each rank of the group: the first `send[0]` go to its first, and so on.

    Args:
        x_ND: rows in the order of the ranks they go to, (sum of `send`, …).
        send: how many go to each rank.
        receive: how many come from each rank.

    Returns:
        The rows that came, in the order of the ranks they came from, (sum of `receive`, …).
    """
    return _ExchangeRows.apply(x_ND, send, receive, group)


def gather_parts(x: Tensor, group: ProcessGroup) -> Tensor:
    """The tensors of all ranks of the group, stacked in their order, (ranks, *x.shape)."""
    return _GatherParts.apply(x, group)


def sum_parts(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of x over the ranks of the group, on each of them."""
    return _SumParts.apply(x, group)


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, send: list[int], receive: list[int], group: ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchanged(x_ND, send, receive, group)

    @staticmethod
    def backward(ctx, grad_ND: Tensor):
        return _exchanged(grad_ND, ctx.receive, ctx.send, ctx.group), None, None, None


class _GatherParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty(group.size(), *x.shape)
        dist.all_gather(list(out), x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        own = grad.new_empty(grad.shape[1:])
        dist.reduce_scatter(own, list(grad.contiguous()), group=ctx.group)
        return own, None


class _SumParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _summed(grad, ctx.group), None


def _exchanged(x_ND: Tensor, send: list[int], receive: list[int], group: ProcessGroup) -> Tensor:
    out = x_ND.new_empty(sum(receive), *x_ND.shape[1:])
    dist.all_to_all_single(out, x_ND.contiguous(), receive, send, group=group)
    return out


def _summed(x: Tensor, group: ProcessGroup) -> Tensor:
    whole = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(whole, group=group)
    return whole
