"""An exponential average of the weights, for an early estimate of what they will be worth after the decay."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


class WeightAverage:
    """The exponential average of tensors over the steps, in float32 (V3 section 3.2.3).

    The tensors are those that a rank updates and the expert biases, so that under ZeRO each rank averages its own part.
    The average lies on their device, where V3 keeps it in the memory of the CPU: 4 bytes a parameter.
    """

    def __init__(self, tensors: Iterable[Tensor], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.average = {tensor: tensor.detach().float().clone() for tensor in tensors}

    @torch.no_grad()
    def update(self) -> None:
        """Take the tensors as they are after a step.

        The n-th enters with (1 − decay) / (1 − decayⁿ): the average that starts from zero and is divided by the sum
        of its weights, as AdamW's moments are, so that the initial weights have no part in it.
        """
        self.updates += 1
        share = (1 - self.decay) / -math.expm1(self.updates * math.log(self.decay))
        torch._foreach_lerp_(list(self.average.values()), [tensor.float() for tensor in self.average], share)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the numbers of the tensors and of the average; twice is as before, in float32."""
        for tensor, average in self.average.items():
            kept = tensor.detach().clone()
            tensor.copy_(average)
            average.copy_(kept)
