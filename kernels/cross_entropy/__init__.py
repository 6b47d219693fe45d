"""The output head and its cross-entropy as one operation, without ever holding the logits."""

from __future__ import annotations

from torch import Tensor

from gristmill.kernels.cross_entropy import library, native
from gristmill.kernels.cross_entropy.chunked import LinearCrossEntropyMean, LinearLogProbs
from gristmill.kernels.cross_entropy.reference import (
    linear_cross_entropy_mean_reference,
    linear_log_probs_and_entropy_reference,
)
from gristmill.kernels.dispatch import INTEGERS, chosen, in_own_dtypes, readable, require, require_device, require_dtype
from gristmill.kernels.operations import graded

__all__ = ["linear_cross_entropy_mean", "linear_log_probs", "linear_log_probs_and_entropy"]


@in_own_dtypes
def linear_cross_entropy_mean(
    x_TD: Tensor, w_VD: Tensor, target_T: Tensor, weight_T: Tensor, *, z_loss: float = 0.0, rounded: bool = False
) -> Tensor:
    """Σ weight · cross-entropy of the logits x·wᵀ, a float32 scalar, differentiable in x and w, once.

    `z_loss` times (log Σ exp)² of the logits is added to each row's, which keeps them from drifting (PaLM, arXiv
    2204.02311, section 5).

    Args:
        x_TD: hidden states, (T, D).
        w_VD: the head's matrix, (V, D).
        target_T: token ids, integers, (T,); a negative one leaves its row out.
        weight_T: weight of each row, (T,), of any floating dtype; for a mean they sum to one.
        rounded: whether products take their operands rounded to bfloat16, as in `linear`; for a CPU.

    Raises:
        TypeError: x, w or the weights are not floating, x and w differ in dtype, or targets are no integers.
        ValueError: the shapes or devices do not fit, z_loss is negative, or (on a CPU; on a GPU where
            GRISTMILL_KERNELS_CHECK=1) a target is not in the vocabulary.
        RuntimeError: (of the backward pass) its gradients were taken before.
    """
    name = "linear_cross_entropy_mean"
    _check(name, x_TD, w_VD, target_T)
    require(weight_T.shape == x_TD.shape[:1], ValueError, f"{name}: shape of weight_T", weight_T.shape, x_TD.shape[:1])
    require(weight_T.is_floating_point(), TypeError, f"{name}: weight_T", weight_T.dtype, "a floating dtype")
    require_device(name, "x_TD", x_TD, weight_T=weight_T)
    target_T = target_T.long()
    require(z_loss >= 0, ValueError, f"{name}: z_loss", z_loss, "0 or more")
    implementation = chosen(name, x_TD, native.SOURCE, traceable=False)
    if implementation == "reference":
        return linear_cross_entropy_mean_reference(x_TD, w_VD, target_T, weight_T, z_loss=z_loss, rounded=rounded)
    if implementation == "compiled":
        return native.linear_cross_entropy_mean(x_TD, w_VD, target_T, weight_T, z_loss, rounded)
    if implementation == "operation":
        needed = graded(x_TD, w_VD)
        return library.linear_cross_entropy_mean(x_TD, w_VD, target_T, weight_T, z_loss, rounded, needed)[0]
    return LinearCrossEntropyMean.apply(x_TD, w_VD, target_T, weight_T, z_loss, implementation, rounded)


def linear_log_probs(x_TD: Tensor, w_VD: Tensor, target_T: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(x·wᵀ / temperature) at the targets, (T,) float32, differentiable in x and w.

    Raises:
        TypeError, ValueError: as `linear_log_probs_and_entropy`.
    """
    return linear_log_probs_and_entropy(x_TD, w_VD, target_T, temperature)[0]


@in_own_dtypes
def linear_log_probs_and_entropy(
    x_TD: Tensor, w_VD: Tensor, target_T: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log p at the targets and −Σ p · log p, nats, where p = softmax(x·wᵀ / temperature): two of (T,) float32.

    The log-probabilities are differentiable in x and w; the entropies, which are there to be watched, are not.

    Raises:
        TypeError: x or w is not floating, they differ in dtype, or targets are no integers.
        ValueError: the shapes or devices do not fit, the temperature is not positive, or (on a CPU; on a GPU where
            GRISTMILL_KERNELS_CHECK=1) a target is not in the vocabulary.
    """
    _check("linear_log_probs", x_TD, w_VD, target_T)
    if readable(target_T) and target_T.numel():
        least = int(target_T.min())
        require(least >= 0, ValueError, "linear_log_probs: least of target_T", least, "a token id, 0 or more")
    target_T = target_T.long()
    require(temperature > 0, ValueError, "linear_log_probs: temperature", temperature, "more than 0")
    implementation = chosen("linear_log_probs", x_TD, native.SOURCE, traceable=False)
    if implementation == "reference":
        return linear_log_probs_and_entropy_reference(x_TD, w_VD, target_T, temperature)
    if implementation == "compiled":
        return native.NativeLogProbs.apply(x_TD, w_VD, target_T, temperature)
    if implementation == "operation":
        return library.linear_log_probs_and_entropy(x_TD, w_VD, target_T, temperature)
    return LinearLogProbs.apply(x_TD, w_VD, target_T, temperature, implementation)


def _check(operation: str, x: Tensor, w: Tensor, target: Tensor) -> None:
    require(x.is_floating_point(), TypeError, f"{operation}: x_TD", x.dtype, "a floating dtype")
    require(target.dtype in INTEGERS, TypeError, f"{operation}: target_T", target.dtype, "integers")
    require_dtype(operation, x.dtype, "x_TD", w_VD=w)
    require_device(operation, "x_TD", x, w_VD=w, target_T=target)
    ranks = x.ndim, w.ndim
    require(ranks == (2, 2), ValueError, f"{operation}: ranks of x_TD and w_VD", ranks, (2, 2))
    require(w.shape[1] == x.shape[1], ValueError, f"{operation}: inner size of w_VD", w.shape[1], x.shape[1])
    require(target.shape == x.shape[:1], ValueError, f"{operation}: shape of target_T", target.shape, x.shape[:1])
    if readable(target) and target.numel():
        most, rows = int(target.max()), w.shape[0]
        require(most < rows, ValueError, f"{operation}: largest of target_T", most, f"less than the {rows} of w_VD")
