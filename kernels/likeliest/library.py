"""The likeliest token as an operation of torch.library."""

from __future__ import annotations

import torch
from torch import Tensor

from gristmill.kernels import likeliest as public
from gristmill.kernels.operations import operation


def _fake(logits: Tensor) -> tuple[Tensor, Tensor]:
    shape = logits.shape[:-1]
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)


@operation(_fake)
def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    return public.likeliest(logits)
