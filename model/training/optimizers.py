"""Muon for hidden matrices and AdamW for everything else, as one optimizer whose state has names.

Muon: Keller Jordan et al., 2024, kellerjordan.github.io/posts/muon; the Newton–Schulz coefficients are theirs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gristmill.model.config import OptimizerConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ADAM_EPS = 1e-8


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """Newton–Schulz iteration towards U·Vᵀ of matrix = U·S·Vᵀ, for one matrix or a stack of them (…, rows, columns)."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Matrices between hidden states are Muon's; embeddings, the head, the gates' scores and norms are AdamW's."""
    return parameter.ndim >= 2 and not any(part in name for part in ("embed_tokens", "lm_head", ".gate.weight"))


class MuonAdamW(torch.optim.Optimizer):
    """One step updates Muon's and AdamW's parameters; `scale` (0 to 1) is the schedule's factor on both rates.

    Expert stacks (E, rows, columns) are orthogonalised matrix by matrix.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> None:
        self.config, self.scale = config, 1.0
        self.names: dict[Tensor, str] = {}
        muon, decayed, plain = [], [], []
        for name, parameter in named:
            if not parameter.requires_grad:
                continue
            self.names[parameter] = name
            if config.muon_learning_rate > 0 and is_hidden_matrix(name, parameter):
                muon.append(parameter)
            else:
                (decayed if parameter.ndim >= 2 else plain).append(parameter)
        groups = [
            {"params": muon, "kind": "muon", "decay": config.weight_decay, "lr": config.muon_learning_rate},
            {
                "params": decayed,
                "kind": "adam",
                "decay": config.weight_decay,
                "lr": config.adam_learning_rate,
            },
            {"params": plain, "kind": "adam", "decay": 0.0, "lr": config.adam_learning_rate},
        ]
        super().__init__([g for g in groups if g["params"]], {})
        self.steps_done = 0

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        self.steps_done += 1
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            rate = group["lr"] * self.scale
            if not parameters:
                continue
            if group["decay"] and rate:
                torch._foreach_mul_(parameters, 1 - rate * group["decay"])
            (self._muon if group["kind"] == "muon" else self._adam)(parameters, rate)

    def _muon(self, parameters: list[Tensor], rate: float) -> None:
        momentum = self.config.momentum
        stacks: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for parameter in parameters:
            assert parameter.grad is not None
            buffer = self._moment(parameter, "momentum")
            buffer.lerp_(parameter.grad, 1 - momentum)
            nesterov = parameter.grad.lerp(buffer, momentum)
            rows, columns = parameter.shape[-2:]
            stacks.setdefault((rows, columns), []).append((parameter, nesterov.reshape(-1, rows, columns)))
        for (rows, columns), members in stacks.items():
            update = orthogonalised(torch.cat([u for _, u in members]))
            size = max(1.0, rows / columns) ** 0.5
            for (parameter, own), part in zip(members, update.split([len(u) for _, u in members]), strict=True):
                assert len(own) == len(part)
                parameter.add_(part.reshape(parameter.shape), alpha=-rate * size)

    def _adam(self, parameters: list[Tensor], rate: float) -> None:
        beta1, beta2 = self.config.beta1, self.config.beta2
        gradients = [p.grad for p in parameters if p.grad is not None]
        first = [self._moment(p, "exp_avg") for p in parameters]
        second = [self._moment(p, "exp_avg_sq") for p in parameters]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        size = torch._foreach_sqrt(torch._foreach_div(second, 1 - beta2**self.steps_done))
        torch._foreach_add_(size, ADAM_EPS)
        torch._foreach_addcdiv_(parameters, first, size, -rate / (1 - beta1**self.steps_done))

    def _moment(self, parameter: Tensor, kind: str) -> Tensor:
        state = self.state[parameter]
        if kind not in state:
            state[kind] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        return state[kind]

    def named_state(self) -> dict[str, Tensor]:
        """Every moment as `name/kind`, for a checkpoint; `steps_done` goes beside it."""
        return {f"{self.names[p]}/{kind}": t for p, s in self.state.items() for kind, t in s.items()}

    def load_named_state(self, state: dict[str, Tensor], steps_done: int) -> None:
        """Take back what `named_state` gave.

        Raises:
            ValueError: the state names a parameter that is not there.
        """
        by_name = {name: parameter for parameter, name in self.names.items()}
        for key, value in state.items():
            name, kind = key.rsplit("/", 1)
            if name not in by_name:
                raise ValueError(
                    f"the optimizer state names {name!r}, which this model has not: another model's state?"
                )
            self.state[by_name[name]][kind] = value.clone()
        self.steps_done = steps_done
