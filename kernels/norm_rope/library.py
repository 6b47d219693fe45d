"""RMSNorm and rotary embedding as operations of torch.library."""

from __future__ import annotations

import torch
from torch import Tensor

from gristmill.kernels import norm_rope as public
from gristmill.kernels.dispatch import chosen
from gristmill.kernels.norm_rope import native
from gristmill.kernels.norm_rope.layout import in_rows, rows_of
from gristmill.kernels.operations import Context, gradient, gradients_in_torch, not_made, operation, with_saved


def _norm_fake(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@operation(_norm_fake)
def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result, and each row's factor for the backward pass; minus infinity where that takes it from torch."""
    y, saved = with_saved(public.rms_norm, (x, weight_D, eps), of=(0, 1))
    return y, saved[-1] if saved else not_made(x.new_empty(x.shape[:-1], dtype=torch.float32))


@gradient(rms_norm, "x", "weight_D", kept=(1,))
def rms_norm_backward(needs: list[bool], grad: Tensor, scale: Tensor, x: Tensor, weight_D: Tensor, eps: float):
    implementation = chosen("rms_norm_backward", x, native.SOURCE, triton=public.fits_triton(x), takes=public.TAKES)
    rows, distance = in_rows(x)
    context = Context(rows, weight_D, scale, distance=distance)
    if implementation == "compiled":
        return native.NativeRMSNorm.backward(context, grad)[:2]
    if implementation == "gpu":
        from gristmill.kernels.norm_rope.gpu import TritonRMSNorm

        return TritonRMSNorm.backward(context, grad)[:2]
    return gradients_in_torch(lambda x, weight: public.rms_norm(x, weight, eps), [x, weight_D], grad)


def _add_norm_fake(x: Tensor, y: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@operation(_add_norm_fake)
def add_rms_norm(x: Tensor, y: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Both results, and each row's factor for the backward pass; minus infinity where that takes it from torch."""
    x, y, weight_D = (t.detach().requires_grad_() for t in (x, y, weight_D))
    with torch.enable_grad():
        total, normed = public.add_rms_norm(x, y, weight_D, eps)
    saved = getattr(normed.grad_fn, "saved_tensors", ())
    scale = saved[-1] if saved else not_made(x.new_empty(x.shape[:-1], dtype=torch.float32))
    return total.detach().contiguous(), normed.detach().contiguous(), scale


@gradient(add_rms_norm, "x", "y", "weight_D", results=(0, 1), kept=(0, 2))
def add_rms_norm_backward(
    needs: list[bool], grad_total: Tensor, grad_normed: Tensor, total: Tensor, scale: Tensor, x: Tensor, y: Tensor,
    weight_D: Tensor, eps: float,
):  # fmt: skip
    implementation = chosen("add_rms_norm_backward", x, native.SOURCE, triton=public.fits_triton(x), takes=public.TAKES)
    context = Context(total, weight_D, scale, dtype=y.dtype)
    if implementation == "compiled":
        grad_x, grad_y, grad_weight = native.NativeAddRMSNorm.backward(context, grad_total, grad_normed)[:3]
    elif implementation == "gpu":
        from gristmill.kernels.norm_rope.gpu import TritonAddRMSNorm

        grad_x, grad_y, grad_weight = TritonAddRMSNorm.backward(context, grad_total, grad_normed)[:3]
    else:

        def again(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return public.add_rms_norm(x, y, weight, eps)

        grad_x, grad_y, grad_weight = gradients_in_torch(again, [x, y, weight_D], (grad_total, grad_normed))
    assert grad_y is not None  # both results have a gradient here
    # x and y may share it, and an operation's results may not.
    return grad_x, grad_y.to(y.dtype, copy=True), grad_weight


def _rotate_fake(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, torch.promote_types(cos.dtype, sin.dtype)))


@operation(_rotate_fake)
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return public.rotate(x, cos.detach(), sin.detach()).contiguous()


@operation(_rotate_fake)
def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return public.rotate_halves(x, cos.detach(), sin.detach()).contiguous()


@gradient(rotate, "x")
def rotate_backward(needs: list[bool], grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor):
    return [_turned_back("rotate", grad, x, cos.detach(), sin.detach())]


@gradient(rotate_halves, "x")
def rotate_halves_backward(needs: list[bool], grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor):
    return [_turned_back("rotate_halves", grad, x, cos.detach(), sin.detach())]


def _turned_back(name: str, grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rows = rows_of(x, cos, sin)
    source, fits = (None, False) if rows is None else (native.SOURCE, public.fits_triton(x))
    implementation = chosen(f"{name}_backward", x, source, triton=fits, takes=public.TAKES_ANGLES)
    context = Context(cos, sin, rows=rows, interleaved=name == "rotate", dtype=x.dtype)
    if implementation == "compiled":
        return native.NativeRotate.backward(context, grad)[0]
    if implementation == "gpu":
        from gristmill.kernels.norm_rope.gpu import TritonRotate

        return TritonRotate.backward(context, grad)[0]
    turn = public.rotate if name == "rotate" else public.rotate_halves
    return gradients_in_torch(lambda x: turn(x, cos, sin), [x], grad)[0]
