"""An exponential average of the weights, for an early estimate of what they will be worth after the decay."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from gristmill.model.training.checkpoints import own_tensors
from gristmill.model.transformer import Transformer


class WeightAverage:
    """The exponential average of a model's weights and expert biases over the steps, in float32 (V3 section 3.2.3).

    `model` is a model of its own that holds the average. It lies on the device of the one it follows, where V3 keeps
    it in the memory of the CPU: 4 bytes a parameter.
    """

    def __init__(self, model: Transformer, decay: float) -> None:
        self.model = copy.deepcopy(model).float().requires_grad_(False).eval()
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: Transformer) -> None:
        """Take the weights as they are after a step.

        The n-th enters with (1 − decay) / (1 − decayⁿ): the average that starts from zero and is divided by the sum
        of its weights, as AdamW's moments are, so that the initial weights have no part in it.
        """
        self.updates += 1
        share = (1 - self.decay) / -math.expm1(self.updates * math.log(self.decay))
        mine, theirs = own_tensors(self.model), own_tensors(model)
        torch._foreach_lerp_(list(mine.values()), [theirs[name].float() for name in mine], share)

    def named_state(self) -> dict[str, Tensor]:
        """The average by the names of the model's tensors, for a checkpoint; the number of updates goes beside it."""
        return own_tensors(self.model)

    @torch.no_grad()
    def load_named_state(self, state: dict[str, Tensor], updates: int) -> None:
        """Take back what `named_state` gave.

        Raises:
            ValueError: the state holds other tensors than the model has.
        """
        mine = self.named_state()
        if state.keys() != mine.keys():
            raise ValueError(
                f"the averaged weights are of another model: missing {sorted(mine.keys() - state.keys())}, unexpected "
                f"{sorted(state.keys() - mine.keys())}"
            )
        for name, tensor in mine.items():
            tensor.copy_(state[name])
        self.updates = updates
