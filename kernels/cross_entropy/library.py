"""The output head's cross-entropy and log-probabilities as operations of torch.library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gristmill.kernels import cross_entropy as public
from gristmill.kernels.cross_entropy.chunked import LinearLogProbs
from gristmill.kernels.cross_entropy.native import SOURCE, NativeLogProbs
from gristmill.kernels.dispatch import chosen
from gristmill.kernels.operations import Context, gradient, gradients_in_torch, operation, with_saved


def _mean_fake(
    x_TD: Tensor, w_VD: Tensor, target_T: Tensor, weight_T: Tensor, z_loss: float = 0.0, rounded: bool = False,
    graded: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    total = x_TD.new_empty((), dtype=torch.float32)
    grad_x, grad_w = (t.new_empty(t.shape if graded else (0,)) for t in (x_TD, w_VD))
    return total, grad_x, grad_w


@operation(_mean_fake)
def linear_cross_entropy_mean(
    x_TD: Tensor, w_VD: Tensor, target_T: Tensor, weight_T: Tensor, z_loss: float = 0.0, rounded: bool = False,
    graded: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum, and its gradients in x and w, which are made with it; empty where they are not asked for."""

    def mean(x_TD: Tensor, w_VD: Tensor) -> Tensor:
        return public.linear_cross_entropy_mean(x_TD, w_VD, target_T, weight_T, z_loss=z_loss, rounded=rounded)

    total, saved = with_saved(mean, (x_TD, w_VD), of=(0, 1) if graded else ())
    if not graded:
        return total, x_TD.new_empty(0), w_VD.new_empty(0)
    grad_x, grad_w = saved or gradients_in_torch(mean, (x_TD, w_VD), torch.ones_like(total))
    return total, grad_x.contiguous(), grad_w.contiguous()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _scaled(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """Unlike the Function's, into new tensors: a graph does not write to what it has saved."""
    made = (kept * grad if need else None for kept, need in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False))
    return *made, None, None, None, None, None


torch.library.register_autograd(linear_cross_entropy_mean, _scaled, setup_context=_keep)


def _log_probs_fake(x_TD: Tensor, w_VD: Tensor, target_T: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    log_p_T, entropy_T = (x_TD.new_empty(x_TD.shape[0], dtype=torch.float32) for _ in range(2))
    return log_p_T, entropy_T


@operation(_log_probs_fake)
def linear_log_probs_and_entropy(
    x_TD: Tensor, w_VD: Tensor, target_T: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    log_p_T, entropy_T = public.linear_log_probs_and_entropy(x_TD, w_VD, target_T, temperature)
    return log_p_T.contiguous(), entropy_T.contiguous()


@gradient(linear_log_probs_and_entropy, "x_TD", "w_VD")
def linear_log_probs_backward(
    needs: list[bool], grad: Tensor, x_TD: Tensor, w_VD: Tensor, target_T: Tensor, temperature: float
):
    implementation = chosen("linear_log_probs_backward", x_TD, SOURCE)
    if implementation == "reference":

        def again(x_TD: Tensor, w_VD: Tensor) -> Tensor:
            return public.linear_log_probs(x_TD, w_VD, target_T, temperature)

        return gradients_in_torch(again, (x_TD, w_VD), grad)
    function = NativeLogProbs if implementation == "compiled" else LinearLogProbs
    context = Context(x_TD, w_VD, target_T, temperature=temperature, implementation=implementation)
    return function.backward(context, grad, None)[:2]
