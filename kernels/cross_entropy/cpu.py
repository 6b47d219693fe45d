"""Linear and cross-entropy in chunks of rows: the logits of one chunk are all that is ever held."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_LOGITS = 1 << 20  # logits of a chunk: 4 MiB in float32, which stays in the cache


def chunk_rows(vocab_size: int) -> int:
    """Rows whose logits fit a chunk, at least 16."""
    return max(16, CHUNK_LOGITS // vocab_size)


class LinearCrossEntropyMean(torch.autograd.Function):
    """Σ weight · loss; the gradients are made in the forward pass, since the weights are known there."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, w_VD: Tensor, target_T: Tensor, weight_T: Tensor) -> Tensor:
        grad_x, grad_w = torch.empty_like(x_TD), torch.zeros_like(w_VD)
        total = torch.zeros((), dtype=torch.float32, device=x_TD.device)
        rows = chunk_rows(w_VD.shape[0])
        for a in range(0, x_TD.shape[0], rows):
            x = x_TD[a : a + rows]
            target, weight = target_T[a : a + rows, None], weight_T[a : a + rows].float()
            weight = weight * (target[:, 0] >= 0)
            target = target.clamp_min(0)
            log_p = (x @ w_VD.t()).float().log_softmax(-1)
            total -= (log_p.gather(1, target)[:, 0] * weight).sum()
            slope = log_p.exp_().mul_(weight[:, None])
            slope.scatter_add_(1, target, -weight[:, None])
            slope = slope.to(x_TD.dtype)
            torch.mm(slope, w_VD, out=grad_x[a : a + rows])
            grad_w.addmm_(slope.t(), x)
        ctx.save_for_backward(grad_x, grad_w)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad.to(grad_x.dtype), grad_w * grad.to(grad_w.dtype), None, None


class LinearLogProbs(torch.autograd.Function):
    """Log-probabilities of the targets; the backward pass computes a chunk's logits again."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, w_VD: Tensor, target_T: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(x_TD, w_VD, target_T)
        ctx.temperature = temperature
        out = torch.empty(x_TD.shape[0], dtype=torch.float32, device=x_TD.device)
        rows = chunk_rows(w_VD.shape[0])
        for a in range(0, x_TD.shape[0], rows):
            log_p = (x_TD[a : a + rows] @ w_VD.t()).float().div_(temperature).log_softmax(-1)
            out[a : a + rows] = log_p.gather(1, target_T[a : a + rows, None])[:, 0]
        return out

    @staticmethod
    def backward(ctx, grad_T: Tensor):
        x_TD, w_VD, target_T = ctx.saved_tensors
        grad_x, grad_w = torch.empty_like(x_TD), torch.zeros_like(w_VD)
        rows = chunk_rows(w_VD.shape[0])
        for a in range(0, x_TD.shape[0], rows):
            x, grad = x_TD[a : a + rows], grad_T[a : a + rows, None].float() / ctx.temperature
            p = (x @ w_VD.t()).float().div_(ctx.temperature).softmax(-1)
            slope = p.mul_(-grad)
            slope.scatter_add_(1, target_T[a : a + rows, None], grad)
            slope = slope.to(x_TD.dtype)
            torch.mm(slope, w_VD, out=grad_x[a : a + rows])
            grad_w.addmm_(slope.t(), x)
        return grad_x, grad_w, None, None
