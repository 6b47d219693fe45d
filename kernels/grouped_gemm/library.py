"""The grouped product as an operation of torch.library."""

from __future__ import annotations

from torch import Tensor

from gristmill.kernels import grouped_gemm as public
from gristmill.kernels.dispatch import chosen
from gristmill.kernels.grouped_gemm.cpu import GroupedGemm
from gristmill.kernels.grouped_gemm.native import SOURCE, NativeGroupedGemm
from gristmill.kernels.grouped_gemm.reference import grouped_gemm_reference
from gristmill.kernels.linear.reference import nearest
from gristmill.kernels.operations import Context, gradient, gradients_in_torch, operation


def _fake(x_NK: Tensor, w_EMK: Tensor, ends_E: Tensor, rounded: bool = False) -> Tensor:
    return x_NK.new_empty(x_NK.shape[0], w_EMK.shape[1])


@operation(_fake)
def grouped_gemm(x_NK: Tensor, w_EMK: Tensor, ends_E: Tensor, rounded: bool = False) -> Tensor:
    return public.grouped_gemm(x_NK, w_EMK, ends_E, rounded=rounded)


@gradient(grouped_gemm, "x_NK", "w_EMK")
def grouped_gemm_backward(needs: list[bool], grad: Tensor, x_NK: Tensor, w_EMK: Tensor, ends_E: Tensor, rounded: bool):
    implementation = chosen("grouped_gemm_backward", x_NK, SOURCE)
    if implementation == "gpu":
        from gristmill.kernels.grouped_gemm.gpu import TritonGroupedGemm

        return TritonGroupedGemm.backward(Context(x_NK, w_EMK, ends_E.long().contiguous(), needs=needs), grad)[:2]
    if implementation == "compiled":
        saved = x_NK.contiguous(), w_EMK.contiguous(), ends_E.long().contiguous()
        return NativeGroupedGemm.backward(Context(*saved, needs=needs, rounded=int(rounded)), grad)[:2]
    if implementation == "cpu":
        saved = (nearest(x_NK), nearest(w_EMK)) if rounded else (x_NK, w_EMK)
        context = Context(*saved, needs=needs, bounds=[0, *ends_E.tolist()], rounded=rounded)
        return GroupedGemm.backward(context, grad)[:2]

    def again(x: Tensor, w: Tensor) -> Tensor:
        return grouped_gemm_reference(x, w, ends_E, rounded=rounded)

    return gradients_in_torch(again, [x_NK, w_EMK], grad)
