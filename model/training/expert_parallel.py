"""Expert parallelism: each rank of a group holds a part of the experts, and rows travel to them (V3 section 3.2.1).

It is put around a model that knows nothing of it: the gate stays whole on every rank and routes the rank's own tokens,
their rows go to the ranks of the chosen experts by all-to-all, through these, and back. No token is dropped.

The gradient that a backward pass leaves on a part of the experts is that of the SUM of the losses of its group, where
an ordinary parameter has that of its rank's loss alone. `reduce_expert_gradients` makes it one of the MEAN over all
ranks, which is what the mean of an ordinary parameter's gradients over all ranks is.

Shapes as in model/transformer.py, and

    P  ranks of the group      O  experts of this rank      A  rows that arrived here, each for one of them
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gristmill.kernels.expert_rows import places, rows_by_expert
from gristmill.kernels.router import Routes
from gristmill.model.training.collectives import exchange_rows
from gristmill.model.training.optimizers import Piece
from gristmill.model.transformer import Experts, Transformer


def shard_experts(model: Transformer, group: ProcessGroup) -> None:
    """Leave each rank of the group its part of every mixture's experts, in the order of the ranks.

    Names of parameters stay. In a group of one nothing changes.

    Raises:
        ValueError: the experts do not divide among the ranks.
    """
    experts, size = model.config.n_routed_experts, group.size()
    if experts % size:
        raise ValueError(f"n_routed_experts {experts} does not divide among {size} ranks: choose a divisor of it")
    if size > 1:
        for mixture in model.mixtures():
            mixture.register_module("experts", ShardedExperts(mixture.experts, group))


def expert_parameters(model: Transformer) -> dict[nn.Parameter, Piece]:
    """What `shard_experts` left here, and which numbers of the whole parameter each is."""
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, ShardedExperts):
            for name, parameter in module.named_parameters(prefix):
                start = module.group.rank() * parameter.numel()
                whole = (parameter.shape[0] * module.group.size(), *parameter.shape[1:])
                found[parameter] = Piece(name, whole, start, start + parameter.numel())
    return found


@torch.no_grad()
def reduce_expert_gradients(parts: Iterable[nn.Parameter], replicas: ProcessGroup) -> None:
    """Make these gradients those of the mean of all ranks' losses: divided by the ranks, and added over copies.

    `replicas` are the ranks that hold the same experts (`Groups.expert_replicas`).
    """
    ranks = dist.get_world_size()
    for parameter in parts:
        if parameter.grad is not None:
            parameter.grad.div_(ranks)
            if replicas.size() > 1:
                dist.all_reduce(parameter.grad, group=replicas)


class ShardedExperts(nn.Module):
    """This rank's experts, standing for all of them: what `Experts` computes, with rows sent to where theirs are."""

    def __init__(self, whole: Experts, group: ProcessGroup) -> None:
        super().__init__()
        self.group, self.product = group, whole.product
        self.gate_up_proj = _own_part(whole.gate_up_proj, group)
        self.down_proj = _own_part(whole.down_proj, group)

    def forward(self, x_TD: Tensor, to: Routes) -> Tensor:
        """As `Experts.forward`; every rank of the group must call it, with any number of tokens."""
        order_M, gate_TK, chosen = to.order_M, to.gate_TK, to.expert_TK.shape[1]  # by expert, and so by rank
        place_M = places(order_M)
        count_PO, send, receive = self._counts(to.load_E)
        arrived_AD = exchange_rows(_Laid.apply(x_TD, order_M, place_M, chosen), send, receive, self.group)
        # Rows lie rank by rank, those of a rank expert by expert; a stable sort keeps the order of the whole batch.
        own_O = torch.arange(count_PO.shape[1], device=x_TD.device)
        expert_A = own_O.repeat(count_PO.shape[0]).repeat_interleave(count_PO.reshape(-1), output_size=sum(receive))
        gate_A1 = gate_TK.new_ones(len(expert_A), 1)  # the gates wait at home
        stacks, load_O, order_A = (self.gate_up_proj, self.down_proj), count_PO.sum(0), rows_by_expert(expert_A)
        y_AD = self.product(arrived_AD, expert_A[:, None], gate_A1, *stacks, load_O, order_A)
        y_MD = exchange_rows(y_AD, receive, send, self.group)
        y_TKD = _Laid.apply(y_MD, place_M, order_M, 1).view(*gate_TK.shape, x_TD.shape[1])
        return torch.bmm(gate_TK[:, None].to(y_TKD.dtype), y_TKD)[:, 0]

    def _counts(self, load_E: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Rows that come from each rank for each expert here (P, O); rows sent to and received from each rank."""
        load_PO = load_E.view(self.group.size(), -1)
        count_PO = torch.empty_like(load_PO)
        dist.all_to_all_single(count_PO, load_PO, group=self.group)
        send, receive = torch.stack((load_PO, count_PO)).sum(-1).tolist()  # one wait for the device, not two
        return count_PO, send, receive


class _Laid(torch.autograd.Function):
    """Rows, each taken `chosen` times, in another order; the gradient gathers, so that nothing is added by a race."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, order_M: Tensor, place_M: Tensor, chosen: int) -> Tensor:
        ctx.save_for_backward(place_M)
        ctx.chosen = chosen
        return x_TD.index_select(0, order_M.div(chosen, rounding_mode="floor"))

    @staticmethod
    def backward(ctx, grad_MD: Tensor):
        (place_M,) = ctx.saved_tensors
        rows_MD = grad_MD.index_select(0, place_M)
        return rows_MD.unflatten(0, (-1, ctx.chosen)).sum(1), None, None, None


def _own_part(whole: nn.Parameter, group: ProcessGroup) -> nn.Parameter:
    count = whole.shape[0] // group.size()
    first = group.rank() * count
    return nn.Parameter(whole.detach()[first : first + count].clone(), requires_grad=whole.requires_grad)
