"""AdamW and Muon's factor as operations of torch.library; settings go in number by number."""

from __future__ import annotations

from torch import Tensor

from gristmill.kernels import optim as public
from gristmill.kernels.operations import operation
from gristmill.kernels.optim.reference import AdamW
from gristmill.kernels.optim.rounding import Origin


def _adamw_fake(
    parameters: list[Tensor], gradients: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor],
    rate: float, step: int, decay: float, beta1: float, beta2: float, eps: float, coefficient: float,
    seed: int | None, streams: list[int], firsts: list[int],
) -> None:  # fmt: skip
    pass


@operation(_adamw_fake, mutates=("parameters", "exp_avg", "exp_avg_sq"))
def adamw(
    parameters: list[Tensor], gradients: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor],
    rate: float, step: int, decay: float, beta1: float, beta2: float, eps: float, coefficient: float,
    seed: int | None, streams: list[int], firsts: list[int],
) -> None:  # fmt: skip
    how = AdamW(rate, step, decay, beta1, beta2, eps, coefficient, seed)
    origins = None if seed is None else list(map(Origin, streams, firsts))
    public.adamw(parameters, gradients, exp_avg, exp_avg_sq, how, origins)


def _orthogonalised_fake(matrices: Tensor, steps: int = 5) -> Tensor:
    return matrices.new_empty(matrices.shape)


@operation(_orthogonalised_fake)
def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    return public.orthogonalised(matrices, steps).contiguous()


def _round_fake(
    exact: list[Tensor], rounded: list[Tensor], seed: int, step: int, streams: list[int], firsts: list[int]
) -> None:
    pass


@operation(_round_fake, mutates=("rounded",))
def round_stochastically(
    exact: list[Tensor], rounded: list[Tensor], seed: int, step: int, streams: list[int], firsts: list[int]
) -> None:
    public.round_stochastically(exact, rounded, seed, step, list(map(Origin, streams, firsts)))
