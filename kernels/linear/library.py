"""x·wᵀ as an operation of torch.library; a bias is added to it in the graph."""

from __future__ import annotations

from torch import Tensor

from gristmill.kernels import linear as public
from gristmill.kernels.dispatch import chosen
from gristmill.kernels.linear.reference import RoundedLinear
from gristmill.kernels.operations import Context, gradient, gradients_in_torch, operation


def _fake(x: Tensor, w_MK: Tensor, rounded: bool = False) -> Tensor:
    return x.new_empty(*x.shape[:-1], w_MK.shape[0])


@operation(_fake)
def linear(x: Tensor, w_MK: Tensor, rounded: bool = False) -> Tensor:
    return public.linear(x, w_MK, rounded=rounded).contiguous()


@gradient(linear, "x", "w_MK")
def linear_backward(needs: list[bool], grad: Tensor, x: Tensor, w_MK: Tensor, rounded: bool):
    many = public.has_many_rows(x)
    source, takes = public.SOURCE if many and public.fits_source(w_MK) else None, public.TAKES if many else ""
    if chosen("linear_backward", x, source, triton=None, takes=takes) == "compiled":
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        context = Context(rows, w_MK, needs=needs, shape=x.shape, rounded=rounded)
        return public.NativeLinear.backward(context, grad)[:2]
    if rounded:
        return RoundedLinear.backward(Context(x, w_MK, needs=needs), grad)
    return gradients_in_torch(public.linear, [x, w_MK], grad)
