"""The loss of a batch, as the module that an engine wraps."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gristmill.model.training.batches import TrainingBatch
from gristmill.model.transformer import Routing, Transformer, token_behind


class Objective(nn.Module):
    """Cross-entropy, the MTP modules' and the balance loss; while it is evaluated, the cross-entropy alone."""

    def __init__(self, model: Transformer, mtp_loss_weight: float) -> None:
        super().__init__()
        self.model, self.mtp_loss_weight, self.mtp_scale = model, mtp_loss_weight, 1.0
        self.routings: list[Routing] = []  # of the micro-batches since `begin_step`

    def begin_step(self, mtp_scale: float) -> None:
        """Take this factor on the MTP weight from here on; what the gates decided before is done with."""
        self.routings, self.mtp_scale = [], mtp_scale

    def forward(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        routing = Routing()
        next_target = batch.next_target_BS if self.mtp_loss_weight and self.training else None
        main, ahead = self.model.losses(batch.inputs, batch.target_BS, next_target, batch.weight_BS, routing)
        main = main * batch.share
        total, parts = main, {"main_loss": main.detach()}
        if ahead:
            shares = _shares_ahead(batch, len(ahead))
            mtp = torch.stack([loss * share for loss, share in zip(ahead, shares, strict=True)]).mean()
            total = total + self.mtp_loss_weight * self.mtp_scale * mtp
            parts["mtp_loss"] = mtp.detach()
        if routing.balance_loss:
            balance = torch.stack(routing.balance_loss).sum()
            total = total + balance
            parts["balance_loss"] = balance.detach()
        if self.training:
            self.routings.append(routing)
        return total, {"loss": total.detach(), **parts}

    def load_LE(self) -> Tensor | None:
        """Rows that each expert of each MoE block received on this rank since `begin_step`; none in a dense model."""
        if not self.routings or not self.routings[0].load_LE:
            return None
        return torch.stack([torch.stack(routing.load_LE) for routing in self.routings]).sum(0)


def _shares_ahead(batch: TrainingBatch, modules: int) -> list[float]:
    """This rank's part of the targets of each MTP module, times the ranks; as `TrainingBatch.share`."""
    ranks, length = dist.get_world_size(), batch.weight_BS.shape[1]
    shares, target_BS = [batch.next_share], batch.next_target_BS
    for _ in range(1, modules):
        assert target_BS is not None
        target_BS = token_behind(target_BS)
        own = (batch.weight_BS * (target_BS[:, :length] >= 0)).sum()
        whole = own.clone()
        if ranks > 1:
            dist.all_reduce(whole)
        shares.append(float(own) * ranks / max(float(whole), 1e-9))
    return shares
