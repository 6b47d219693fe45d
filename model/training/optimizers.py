"""Muon for hidden matrices and AdamW for the rest, in one optimizer whose state has names.

A tensor that it updates is a parameter, or under ZeRO a flat stretch of several: `pieces` says which. AdamW needs no
more than that; Muon orthogonalises whole matrices, so the ranks hand each other their momenta (`gather`).

Muon: Keller Jordan et al., 2024, kellerjordan.github.io/posts/muon.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gristmill.kernels.optim import AdamW, Origin, adamw, orthogonalised, round_stochastically
from gristmill.model.training.config import OptimizerConfig
from gristmill.model.training.fused import FusedOf, as_stored

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """Numbers [start, stop) of a parameter that is laid flat, which lie at `offset` of the tensor that is updated."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    offset: int = 0

    def of(self, flat: Tensor) -> Tensor:
        """Its numbers, a view of the tensor."""
        return flat.view(-1)[self.offset : self.offset + self.stop - self.start]

    @property
    def origin(self) -> Origin:
        """What random numbers are its own, whatever stretches the parameter is cut into."""
        return Origin(_stream(self.name), self.start)

    @property
    def matrices(self) -> tuple[int, int]:
        """The first of a stack's matrices that it touches, and the one after the last."""
        size = math.prod(self.shape[-2:])
        return self.start // size, -(-self.stop // size)


@functools.cache
def _stream(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def whole(name: str, parameter: Tensor) -> Piece:
    """A parameter as one piece."""
    return Piece(name, tuple(parameter.shape), 0, parameter.numel())


Gather = Callable[[Tensor, Tensor], Callable[[Piece], Tensor]]
"""(updated tensor, numbers that lie as it does) to: of each of its pieces those matrices that the piece touches."""

Watch = Callable[[list[tuple[Tensor, tuple[Piece, ...]]]], None]
"""Is shown gradients as they are taken up, each with the pieces that lie in it; it only reads them."""


def update_scale(rows: int, columns: int) -> float:
    """What an orthogonal update is multiplied by, so that it changes outputs alike whatever the shape."""
    return max(1.0, rows / columns) ** 0.5


def _orthogonalised_by_shape(stacks: list[Tensor]) -> list[Tensor]:
    """Each of these stacks of matrices, those of a shape in one go."""
    of_shape: dict[torch.Size, list[int]] = {}
    for i, stack in enumerate(stacks):
        of_shape.setdefault(stack.shape[-2:], []).append(i)
    found = list(stacks)
    for members in of_shape.values():
        together = orthogonalised(torch.cat([stacks[i] for i in members]))
        for i, part in zip(members, together.split([len(stacks[i]) for i in members]), strict=True):
            found[i] = part
    return found


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Matrices between hidden states are Muon's; embeddings, the head, the gates' scores and norms are AdamW's."""
    return parameter.ndim >= 2 and not any(part in name for part in ("embed_tokens", "lm_head", ".gate.weight"))


class MuonAdamW(torch.optim.Optimizer):
    """Each step is announced (`begin_step`) and then taken (`step`), at once or, by ZeRO, group by group.

    Expert stacks (E, rows, columns) are orthogonalised matrix by matrix. `admit` is asked once a step, when the
    gradients are there: what to multiply them by (clipping), or none to leave the step out. Moments that are rounded
    stochastically are so by `seed` (0 to 2⁶³ − 1), the number of the step, and their places in parameters by name.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        config: OptimizerConfig,
        fused: FusedOf = as_stored,
        seed: int = 0,
    ) -> None:
        self.seed = seed if config.moment_rounding == "stochastic" else None
        self.config, self.fused, self.scale, self.steps_done = config, fused, 1.0, 0
        self.gather: Gather = _own_matrices
        self.admit: Callable[[], float | None] = lambda: 1.0
        self.watch: Watch = lambda gradients: None
        self._asked, self._coefficient = False, None
        muon, decayed, plain = {}, {}, {}
        for name, parameter in named:
            if parameter.requires_grad:
                if config.muon_learning_rate > 0 and is_hidden_matrix(name, parameter):
                    group = muon
                else:
                    group = decayed if parameter.ndim >= 2 else plain
                group[parameter] = (whole(name, parameter),)
        adam = {"kind": "adam", "lr": config.adam_learning_rate}
        groups = [
            {"pieces": muon, "kind": "muon", "decay": config.weight_decay, "lr": config.muon_learning_rate},
            {"pieces": decayed, **adam, "decay": config.weight_decay},
            {"pieces": plain, **adam, "decay": 0.0},
        ]
        super().__init__([{**g, "params": list(g["pieces"])} for g in groups if g["pieces"]], {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, without what keeps it out of graphs, which loads all of torch.compile, for two seconds."""
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, likewise."""
        inspect.unwrap(torch.optim.Optimizer.zero_grad)(self, set_to_none)

    def begin_step(self, scale: float) -> None:
        """The next calls of `step` are one step, with this factor (0 to 1) of the schedule on all rates."""
        self.scale, self._asked = scale, False

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        self.watch([(p.grad, g["pieces"][p]) for g in self.param_groups for p in g["params"] if p.grad is not None])
        if not self._asked:
            self._asked, self._coefficient = True, self.admit()
            self.steps_done += self._coefficient is not None
        if self._coefficient is None:
            return
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            rate = group["lr"] * self.scale
            if not parameters:
                continue
            if group["kind"] == "adam":
                self._adam(parameters, group["pieces"], rate, group["decay"])
                continue
            if self._coefficient != 1.0:
                torch._foreach_mul_([p.grad for p in parameters], self._coefficient)
            if group["decay"] and rate:
                torch._foreach_mul_(parameters, 1 - rate * group["decay"])
            self._muon(parameters, group["pieces"], rate)

    def _muon(self, parameters: list[Tensor], pieces: dict[Tensor, tuple[Piece, ...]], rate: float) -> None:
        held: list[tuple[Tensor, Piece, list[Tensor]]] = []
        for parameter in parameters:
            matrices = self.gather(parameter, self._nesterov(parameter, pieces[parameter]))
            for piece in pieces[parameter]:
                held.append((parameter, piece, self.fused(piece.name, piece.shape).apart(matrices(piece))))
        updates = iter(_orthogonalised_by_shape([stack for *_, stacks in held for stack in stacks]))
        for parameter, piece, stacks in held:
            rows, columns = piece.shape[-2:]
            scale, parts = update_scale(rows, columns), [next(updates) for _ in stacks]
            for part in parts:
                if (own_scale := update_scale(*part.shape[-2:])) != scale:
                    part.mul_(own_scale / scale)
            update = self.fused(piece.name, piece.shape).together(parts)
            skipped = piece.start - piece.matrices[0] * rows * columns
            own = update.reshape(-1)[skipped : skipped + piece.stop - piece.start]
            piece.of(parameter).add_(own.to(parameter.device), alpha=-rate * scale)

    def _nesterov(self, parameter: Tensor, pieces: tuple[Piece, ...]) -> Tensor:
        """The momentum after this gradient, a further step of it ahead."""
        momentum, gradient = self.config.momentum, parameter.grad
        assert gradient is not None
        buffer = self._moment(parameter, "momentum")
        if buffer.dtype == gradient.dtype:
            buffer.lerp_(gradient, 1 - momentum)
            return gradient.lerp(buffer, momentum)
        exact = buffer.to(gradient.dtype).lerp_(gradient, 1 - momentum)
        if self.seed is None:
            buffer.copy_(exact)
        else:
            kept, origins = [piece.of(buffer) for piece in pieces], [piece.origin for piece in pieces]
            round_stochastically([piece.of(exact) for piece in pieces], kept, self.seed, self.steps_done, origins)
        return gradient.lerp(exact, momentum)

    def _adam(
        self, parameters: list[Tensor], pieces: dict[Tensor, tuple[Piece, ...]], rate: float, decay: float
    ) -> None:
        assert self._coefficient is not None
        how = AdamW(
            rate=rate,
            step=self.steps_done,
            decay=decay,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            coefficient=self._coefficient,
            seed=self.seed,
        )
        gradients = [p.grad for p in parameters if p.grad is not None]
        first, second = ([self._moment(p, kind) for p in parameters] for kind in ADAM_MOMENTS)
        if self.seed is None:
            return adamw(parameters, gradients, first, second, how)

        def cut(tensors: list[Tensor]) -> list[Tensor]:
            return [piece.of(t) for p, t in zip(parameters, tensors, strict=True) for piece in pieces[p]]

        origins = [piece.origin for p in parameters for piece in pieces[p]]
        adamw(cut(parameters), cut(gradients), cut(first), cut(second), how, origins)

    def _moment(self, parameter: Tensor, kind: str) -> Tensor:
        state = self.state[parameter]
        if kind not in state:
            dtype = torch.bfloat16 if self.config.moments == "bfloat16" else parameter.dtype
            state[kind] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
        return state[kind]

    def pieces(self) -> Iterator[tuple[Tensor, Piece]]:
        """Every tensor that is updated, with each of its pieces."""
        for group in self.param_groups:
            for tensor, pieces in group["pieces"].items():
                for piece in pieces:
                    yield tensor, piece

    def moments(self) -> Iterator[tuple[str, Piece, Tensor]]:
        """(kind, piece, its numbers, a view) of every moment that is kept."""
        for tensor, piece in self.pieces():
            for kind, moment in self.state.get(tensor, {}).items():
                yield kind, piece, piece.of(moment)

    @torch.no_grad()
    def load_moments(self, read: Callable[[str, Piece], Tensor | None], steps_done: int) -> None:
        """Take the moments from `read(kind, piece)`, flat; none stands for zeros."""
        self.state.clear()
        for group in self.param_groups:
            kinds = ("momentum",) if group["kind"] == "muon" else ADAM_MOMENTS
            for tensor, pieces in group["pieces"].items():
                for kind, piece in ((kind, piece) for kind in kinds for piece in pieces):
                    found = read(kind, piece)
                    if found is not None:
                        piece.of(self._moment(tensor, kind)).copy_(found)
        self.steps_done = steps_done


def _own_matrices(parameter: Tensor, numbers: Tensor) -> Callable[[Piece], Tensor]:
    """A tensor that is one whole parameter holds its matrices already."""
    return lambda piece: numbers.reshape(-1, *piece.shape[-2:])
