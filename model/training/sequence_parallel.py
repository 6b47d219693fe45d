"""Sequence (context) parallelism: each rank of a group holds S/P consecutive positions of the same sequences.

All but two things of a model happen at one position: attention, and the balance loss of whole sequences. Attention is
Ulysses' (arXiv 2309.14509): queries go from (own positions, all heads) to (all positions, own heads) by all-to-all and
the results back. Keys and values of MLA travel as their latent, which is gathered once for all heads and expanded for
the own heads alone: `kv_lora_rank + qk_rope_head_dim` numbers a token instead of two for each head and its width.

A rank's parameters are whole, and their gradients are averaged over all ranks as in data parallelism: with
`split_sequence`'s shares that is the gradient of the mean over all positions.

What queries see stays whole on every rank: `first_BS`, one number a position. Nothing of (S, S) is made except where
torch's own attention runs, which takes a mask (kernels/README.md).

Shapes as in model/transformer.py, and P ranks of the group, s = S/P own positions, h = H/P own heads.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gristmill.kernels.mla_attention import attention
from gristmill.kernels.norm_rope import rotate
from gristmill.model.training.batches import TrainingBatch
from gristmill.model.training.collectives import exchange_rows, gather_parts, sum_parts
from gristmill.model.transformer import (
    Block,
    GroupedQueryAttention,
    MixtureOfExperts,
    MultiHeadLatentAttention,
    Transformer,
)


def split_sequence(batch: TrainingBatch, rank: int, size: int) -> TrainingBatch:
    """Part `rank` of `size` of a batch's positions, with its share of the weights; what queries see stays whole.

    Targets two tokens ahead go on behind the part, to the end of the sequence: MTP modules behind the first predict
    tokens that are the next rank's.

    The shares are those of a step over `size` times as many ranks: the mean over all of them of loss times share is
    the mean over all positions of the step.

    Raises:
        ValueError: the length does not divide into so many parts.
    """
    length = batch.target_BS.shape[1]
    if length % size:
        raise ValueError(f"sequence_length {length} does not divide among {size} ranks: choose a multiple of {size}")
    own = slice(rank * (length // size), (rank + 1) * (length // size))
    inputs = replace(batch.inputs, token_BS=batch.inputs.token_BS[:, own], position_BS=batch.inputs.position_BS[:, own])
    next_target_BS = batch.next_target_BS
    share = batch.share * size * _fraction(batch.weight_BS, batch.target_BS, own)
    made = TrainingBatch(inputs, batch.target_BS[:, own], None, batch.weight_BS[:, own], share)
    if next_target_BS is None:
        return made
    next_share = batch.next_share * size * _fraction(batch.weight_BS, next_target_BS, own)
    return replace(made, next_target_BS=next_target_BS[:, own.start :], next_share=next_share)


def _fraction(weight_BS: Tensor, target_BS: Tensor, own: slice) -> float:
    """The own positions' part of the weight of all targets; nothing where there is none."""
    counted_BS = weight_BS.double() * (target_BS >= 0)
    part, whole = torch.stack((counted_BS[:, own].sum(), counted_BS.sum())).tolist()
    return part / whole if whole else 0.0


def shard_sequences(model: Transformer, group: ProcessGroup) -> None:
    """Let attention and balance loss work on sequences whose positions are split over the group.

    From then on `hidden`, `forward` and `losses` take parts of batches (`split_sequence`), on every rank of the group
    at once; decoding takes whole sequences as before. In a group of one nothing changes.

    Raises:
        ValueError: the heads do not divide among the ranks.
    """
    heads, size = model.config.num_attention_heads, group.size()
    if size == 1:
        return
    if heads % size:
        raise ValueError(f"num_attention_heads {heads} does not divide among {size} ranks: choose a divisor of it")
    for block in [m for m in model.modules() if isinstance(m, Block)]:
        attention = block.self_attn
        if isinstance(attention, MultiHeadLatentAttention):
            block.self_attn = SequenceParallelLatentAttention(attention, group)
        else:
            block.self_attn = SequenceParallelGroupedAttention(attention, group)
        if isinstance(block.mlp, MixtureOfExperts):
            block.mlp = SequenceParallelMixture(block.mlp, group)


class SequenceParallelLatentAttention(MultiHeadLatentAttention):
    """MLA over split positions."""

    def __init__(self, whole: MultiHeadLatentAttention, group: ProcessGroup) -> None:
        _take_over(self, whole)
        self.group = group

    def forward(self, x_BsD: Tensor, rotary: tuple[Tensor, Tensor], first_BS: Tensor | None) -> Tensor:
        c, own = self.config, self.config.num_attention_heads // self.group.size()
        q_BsHQ, latent_BsC, key_BsR = self.project(x_BsD)
        cos, sin = rotary
        q_BsHN, q_BsHR = q_BsHQ.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        q_BsHR = rotate(q_BsHR, cos[:, :, None], sin[:, :, None]).to(q_BsHN.dtype)
        key_BsR = rotate(key_BsR, cos, sin).to(q_BsHN.dtype)
        q_BSh = heads_of_all_positions(torch.cat((q_BsHN, q_BsHR), -1), self.group)
        # The latent's norm is float32; it travels as the product rounds it, which changes no number behind it.
        shared_BSC = all_positions(torch.cat((latent_BsC.to(q_BsHN.dtype), key_BsR), -1), self.group)
        latent_BSC, key_BSR = shared_BSC.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        up = self.kv_b_proj.weight.view(c.num_attention_heads, -1, c.kv_lora_rank)[_own_heads(own, self.group)]
        kv = self.kv_b_proj.product(latent_BSC, up.flatten(0, 1), None).unflatten(-1, (own, -1))
        k_BShN, v_BShW = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k_BSh = torch.cat((k_BShN, key_BSR[:, :, None].expand(*k_BShN.shape[:3], -1)), -1)
        out_BShW = _attended(q_BSh, k_BSh, v_BShW, first_BS, self.scale)
        return self.o_proj(positions_of_all_heads(out_BShW, self.group).flatten(2))


class SequenceParallelGroupedAttention(GroupedQueryAttention):
    """Grouped queries over split positions; fewer heads of keys and values than ranks are gathered on each."""

    def __init__(self, whole: GroupedQueryAttention, group: ProcessGroup) -> None:
        _take_over(self, whole)
        self.group = group

    def forward(self, x_BsD: Tensor, rotary: tuple[Tensor, Tensor], first_BS: Tensor | None) -> Tensor:
        q_BsHR, k_BsGR, v_BsGR = self.project(x_BsD, rotary)
        heads, both_BsG = q_BsHR.shape[2], torch.cat((k_BsGR, v_BsGR), -1)
        if self.groups % self.group.size() == 0:
            both_BSg = heads_of_all_positions(both_BsG, self.group)
        else:
            own = _own_heads(heads // self.group.size(), self.group)
            both_BSg = all_positions(both_BsG, self.group).repeat_interleave(heads // self.groups, 2)[:, :, own]
        k_BSgR, v_BSgR = both_BSg.chunk(2, -1)
        out_BShR = _attended(heads_of_all_positions(q_BsHR, self.group), k_BSgR, v_BSgR, first_BS, self.scale)
        return self.o_proj(positions_of_all_heads(out_BShR, self.group).flatten(2))


class SequenceParallelMixture(MixtureOfExperts):
    """A mixture whose balance loss is that of whole sequences, the same on every rank of the group."""

    def __init__(self, whole: MixtureOfExperts, group: ProcessGroup) -> None:
        _take_over(self, whole)
        self.group = group

    def balance_factors(self, score_TE: Tensor, expert_TK: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
        own = torch.stack(super().balance_factors(score_TE, expert_TK, sequences))
        f_BE, p_BE = sum_parts(own / self.group.size(), self.group)  # parts are equal: a mean of their means
        return f_BE, p_BE


def heads_of_all_positions(x_BsHX: Tensor, group: ProcessGroup) -> Tensor:
    """(B, s, H, X), own positions of all heads, to (B, S, h, X), all positions of the own heads."""
    size = group.size()
    x_PBshX = x_BsHX.unflatten(2, (size, -1)).permute(2, 0, 1, 3, 4)
    came_PBshX = exchange_rows(x_PBshX, [1] * size, [1] * size, group)
    return came_PBshX.transpose(0, 1).flatten(1, 2)


def positions_of_all_heads(x_BShX: Tensor, group: ProcessGroup) -> Tensor:
    """Back from (B, S, h, X) to (B, s, H, X)."""
    size = group.size()
    x_PBshX = x_BShX.unflatten(1, (size, -1)).transpose(0, 1)
    came_PBshX = exchange_rows(x_PBshX, [1] * size, [1] * size, group)
    return came_PBshX.permute(1, 2, 0, 3, 4).flatten(2, 3)


def all_positions(x_Bs: Tensor, group: ProcessGroup) -> Tensor:
    """(B, s, …) of each rank to (B, S, …) on all of them."""
    return gather_parts(x_Bs, group).transpose(0, 1).flatten(1, 2)


def _own_heads(own: int, group: ProcessGroup) -> slice:
    return slice(group.rank() * own, (group.rank() + 1) * own)


def _attended(q_BSh: Tensor, k_BSg: Tensor, v_BSg: Tensor, first_BS: Tensor | None, scale: float) -> Tensor:
    """Softmax attention of all positions, (B, S, h, W).

    Raises:
        ValueError: `first_BS` is of another length than the parts of all ranks together.
    """
    if first_BS is not None and first_BS.shape[1] != k_BSg.shape[1]:
        raise ValueError(
            f"first_BS is of {first_BS.shape[1]} positions and the ranks together hold {k_BSg.shape[1]}: give each "
            f"rank its part of the batch by split_sequence, and the whole of first_BS"
        )
    return attention(q_BSh, k_BSg, v_BSg, scale, first_BS=first_BS)


def _take_over(new: nn.Module, old: nn.Module) -> None:
    """Make `new` hold all that `old` holds: parameters under their names, buffers, sub-modules, settings."""
    nn.Module.__init__(new)
    new.__dict__.update(old.__dict__)
