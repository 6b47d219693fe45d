"""The softmax of a chunk of logits, its loss and its slope in Triton: two passes over a row, written in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _slope(
    logits_ptr, target_ptr, weight_ptr, loss_ptr, vocab, row_stride, inverse_temperature,
    WRITE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row: an online maximum and sum of exponentials, then weight/T · (softmax − onehot) in the logits' place."""
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * row_stride
    target = tl.load(target_ptr + row)
    highest, total = -float("inf"), 0.0
    for start in range(0, vocab, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = tl.load(base + v, mask=v < vocab, other=-float("inf")).to(tl.float32) * inverse_temperature
        above = tl.maximum(highest, tl.max(z, 0))
        total = total * tl.exp(highest - above) + tl.sum(tl.exp(z - above), 0)
        highest = above
    log_total = highest + tl.log(total)
    aimed = tl.load(base + target).to(tl.float32) * inverse_temperature
    tl.store(loss_ptr + row, log_total - aimed)
    if WRITE:
        weight = tl.load(weight_ptr + row).to(tl.float32) * inverse_temperature
        for start in range(0, vocab, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            z = tl.load(base + v, mask=v < vocab, other=0.0).to(tl.float32) * inverse_temperature
            p = tl.exp(z - log_total) - tl.where(v == target, 1.0, 0.0)
            tl.store(base + v, (p * weight).to(logits_ptr.dtype.element_ty), mask=v < vocab)


def softmax_loss(logits_RV: Tensor, target_R: Tensor, temperature: float) -> Tensor:
    """−log softmax(logits / temperature) at the targets, (R,) float32."""
    return _launch(logits_RV, target_R, target_R, temperature, write=False)


def softmax_slope_(logits_RV: Tensor, target_R: Tensor, weight_R: Tensor, temperature: float) -> Tensor:
    """The loss of `softmax_loss`; the logits become weight/temperature · (softmax − onehot), their gradient."""
    return _launch(logits_RV, target_R, weight_R, temperature, write=True)


def _launch(logits: Tensor, target: Tensor, weight: Tensor, temperature: float, write: bool) -> Tensor:
    target, weight = target.contiguous(), weight.contiguous()  # the kernel reads them by place
    loss = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        _slope[(logits.shape[0],)](
            logits, target, weight, loss, logits.shape[1], logits.stride(0), 1.0 / temperature,
            WRITE=write, BLOCK_V=BLOCK,
        )  # fmt: skip
    return loss
