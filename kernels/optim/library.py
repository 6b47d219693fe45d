"""AdamW as an operation of torch.library, which writes parameters and moments; the numbers go in one by one."""

from __future__ import annotations

from torch import Tensor

from gristmill.kernels import optim as public
from gristmill.kernels.operations import operation
from gristmill.kernels.optim.reference import AdamW


def _fake(
    parameters: list[Tensor], gradients: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor],
    rate: float, step: int, decay: float, beta1: float, beta2: float, eps: float, coefficient: float,
) -> None:  # fmt: skip
    pass


@operation(_fake, mutates=("parameters", "exp_avg", "exp_avg_sq"))
def adamw(
    parameters: list[Tensor], gradients: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor],
    rate: float, step: int, decay: float, beta1: float, beta2: float, eps: float, coefficient: float,
) -> None:  # fmt: skip
    how = AdamW(rate, step, decay, beta1, beta2, eps, coefficient)
    public.adamw(parameters, gradients, exp_avg, exp_avg_sq, how)
