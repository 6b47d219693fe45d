"""What DeepSpeed's ZeRO makes of the parameters: which numbers of which of them a rank updates, and in what tensor.

Stages 1 and 2 lay a group of parameters end to end and cut the whole into equal stretches, one a rank. Stage 3 cuts
every parameter into as many stretches, and lays a rank's own end to end. Stage 0 leaves whole parameters to each rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gristmill.model.training.optimizers import MuonAdamW, Piece

Pieces = dict[Tensor, tuple[Piece, ...]]


def tell_optimizer(optimizer: MuonAdamW, engine: Any, names: dict[Tensor, str]) -> None:
    """Tell the optimizer which pieces of which parameters the tensors hold that DeepSpeed gave it to update.

    `names` are those of the model's parameters; a parameter's shape is asked before ZeRO takes it apart
    (`ds_shape`, stage 3).
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return
    layout = _Stretches(engine.optimizer, names) if stage < 3 else _Slices(engine.optimizer, names)
    for group in optimizer.param_groups:
        group["pieces"] = {}
    for index, (tensor, pieces) in layout.held():
        optimizer.param_groups[index]["pieces"][tensor] = pieces
    optimizer.gather = layout.gather


class _Stretches:
    """Stages 1 and 2."""

    def __init__(self, zero: Any, names: dict[Tensor, str]) -> None:
        self.zero, self.names = zero, names
        self.starts: dict[str, int] = {}
        self.index = {tensor: i for i, tensor in enumerate(zero.single_partition_of_fp32_groups)}

    def held(self) -> list[tuple[int, tuple[Tensor, tuple[Piece, ...]]]]:
        found = []
        for i, tensor in enumerate(self.zero.single_partition_of_fp32_groups):
            first = dist.get_rank(self.zero.real_dp_process_group[i]) * tensor.numel()
            found.append((i, (tensor, tuple(self._pieces(i, first, first + tensor.numel())))))
        return found

    def _pieces(self, i: int, first: int, end: int) -> list[Piece]:
        pieces = []
        for parameter, at in zip(
            self.zero.round_robin_bit16_groups[i], self.zero.round_robin_bit16_offsets[i], strict=True
        ):
            name, size = self.names[parameter], parameter.numel()
            self.starts[name] = at
            a, b = max(first, at), min(end, at + size)
            if a < b:
                pieces.append(Piece(name, tuple(parameter.shape), a - at, b - at, a - first))
        return pieces

    def gather(self, tensor: Tensor, numbers: Tensor) -> Callable[[Piece], Tensor]:
        every = _from_all(numbers, self.zero.real_dp_process_group[self.index[tensor]]).view(-1)
        return lambda piece: _matrices(every[self.starts[piece.name] :], piece)


class _Slices:
    """Stage 3."""

    def __init__(self, zero: Any, names: dict[Tensor, str]) -> None:
        self.zero, self.names = zero, names
        self.width: dict[str, int] = {}

    def held(self) -> list[tuple[int, tuple[Tensor, tuple[Piece, ...]]]]:
        found = []
        for i, (tensor, parameters) in enumerate(
            zip(self.zero.fp32_partitioned_groups_flat, self.zero.fp16_groups, strict=True)
        ):
            pieces = [p for p in map(self._piece, parameters) if p.start < p.stop]
            found.append((self.zero.sub_group_to_group_id[i], (tensor, tuple(pieces))))
        return found

    def _piece(self, parameter: Any) -> Piece:
        name, shape = self.names[parameter], tuple(parameter.ds_shape)
        _, offset, width = self.zero.grad_position[self.zero.get_param_id(parameter)]
        self.width[name] = width
        first = dist.get_rank(self.zero.dp_process_group) * width
        size = math.prod(shape)
        return Piece(name, shape, min(first, size), min(first + width, size), offset)

    def gather(self, tensor: Tensor, numbers: Tensor) -> Callable[[Piece], Tensor]:
        every = _from_all(numbers, self.zero.dp_process_group)
        return lambda piece: _matrices(
            every[:, piece.offset : piece.offset + self.width[piece.name]].reshape(-1), piece
        )


def _from_all(numbers: Tensor, group: Any) -> Tensor:
    """The ranks' tensors of equal size, one a row, on the device that the ranks talk from: offloaded ones go there."""
    ranks = dist.get_world_size(group)
    if dist.get_backend(group) == "nccl":
        numbers = numbers.to(torch.device("cuda", torch.cuda.current_device()))
    every = numbers.new_empty(ranks * numbers.numel())
    dist.all_gather_into_tensor(every, numbers.contiguous().view(-1), group=group)
    return every.view(ranks, -1)


def _matrices(flat: Tensor, piece: Piece) -> Tensor:
    """Those matrices of a parameter, laid flat, that the piece touches."""
    rows, columns = piece.shape[-2:]
    first, end = piece.matrices
    return flat[first * rows * columns : end * rows * columns].view(-1, rows, columns)
