"""SwiGLU as an operation of torch.library."""

from __future__ import annotations

from torch import Tensor

from gristmill.kernels import swiglu as public
from gristmill.kernels.dispatch import chosen
from gristmill.kernels.operations import Context, gradient, gradients_in_torch, operation
from gristmill.kernels.swiglu.native import SOURCE, NativeSwiGLU


def _fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@operation(_fake)
def swiglu(gate_up: Tensor) -> Tensor:
    return public.swiglu(gate_up).contiguous()


@gradient(swiglu, "gate_up")
def swiglu_backward(needs: list[bool], grad: Tensor, gate_up: Tensor):
    implementation = chosen("swiglu_backward", gate_up, SOURCE, triton=public.fits_triton(gate_up), takes=public.TAKES)
    if implementation == "compiled":
        return [NativeSwiGLU.backward(Context(gate_up.contiguous()), grad)]
    if implementation == "gpu":
        from gristmill.kernels.swiglu.gpu import TritonSwiGLU

        return [TritonSwiGLU.backward(Context(gate_up.contiguous()), grad)]
    return gradients_in_torch(public.swiglu, [gate_up], grad)
