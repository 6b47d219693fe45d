"""The grouped product as an operation of torch.library."""

from __future__ import annotations

from torch import Tensor

from gristmill.kernels import grouped_gemm as public
from gristmill.kernels.dispatch import chosen
from gristmill.kernels.grouped_gemm.cpu import GroupedGemm
from gristmill.kernels.grouped_gemm.reference import grouped_gemm_reference
from gristmill.kernels.operations import Context, gradient, gradients_in_torch, operation


def _fake(x_NK: Tensor, w_EMK: Tensor, ends_E: Tensor) -> Tensor:
    return x_NK.new_empty(x_NK.shape[0], w_EMK.shape[1])


@operation(_fake)
def grouped_gemm(x_NK: Tensor, w_EMK: Tensor, ends_E: Tensor) -> Tensor:
    return public.grouped_gemm(x_NK, w_EMK, ends_E)


@gradient(grouped_gemm, "x_NK", "w_EMK")
def grouped_gemm_backward(needs: list[bool], grad: Tensor, x_NK: Tensor, w_EMK: Tensor, ends_E: Tensor):
    implementation = chosen("grouped_gemm_backward", x_NK)
    if implementation == "gpu":
        from gristmill.kernels.grouped_gemm.gpu import TritonGroupedGemm

        return TritonGroupedGemm.backward(Context(x_NK, w_EMK, ends_E.contiguous(), needs=needs), grad)[:2]
    if implementation == "cpu":
        return GroupedGemm.backward(Context(x_NK, w_EMK, bounds=[0, *ends_E.tolist()]), grad)[:2]
    return gradients_in_torch(lambda x, w: grouped_gemm_reference(x, w, ends_E), [x_NK, w_EMK], grad)
