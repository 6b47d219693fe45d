"""Products of variable-length groups of rows, each with its expert's weight (V3 section 2.1.2).

On a CPU in float32 `cpu.cpp` runs, a call a pass for all groups, with equal bits on any number of threads; of other
dtypes torch's products, group by group. On a GPU it is Triton's.
"""

from __future__ import annotations

from torch import Tensor

from gristmill.kernels.dispatch import chosen, in_own_dtypes, require, require_device, require_dtype, require_ranks
from gristmill.kernels.expert_rows import check_ends
from gristmill.kernels.grouped_gemm import library
from gristmill.kernels.grouped_gemm.cpu import GroupedGemm
from gristmill.kernels.grouped_gemm.native import SOURCE, NativeGroupedGemm
from gristmill.kernels.grouped_gemm.reference import grouped_gemm_reference

__all__ = ["grouped_gemm"]


@in_own_dtypes
def grouped_gemm(x_NK: Tensor, w_EMK: Tensor, ends_E: Tensor, *, rounded: bool = False) -> Tensor:
    """y (N, M) with y[rows of e] = x[rows of e] · w[e]ᵀ, differentiable in x and w (once on the compiled path).

    Args:
        x_NK: rows laid out group by group, (N, K).
        w_EMK: one matrix a group, (E, M, K), stored (out, in) as Hugging Face stores experts.
        ends_E: where each group's rows end, ascending, the last being N; integers, (E,).
        rounded: whether products take their operands rounded to bfloat16, as in `linear`; on a CPU alone.

    Raises:
        TypeError: x is not floating, w has another dtype, or the ends are no integers.
        ValueError: the shapes or devices do not fit, there are rows and no group, or (on a CPU; on a GPU where
            GRISTMILL_KERNELS_CHECK=1) the ends do not ascend to N; on a GPU, there are 2³⁰ rows or more, or rounding is
            asked for.
    """
    _check(x_NK, w_EMK, ends_E)
    implementation = chosen("grouped_gemm", x_NK, SOURCE, traceable=False)
    if implementation == "gpu":
        require(not rounded, ValueError, "grouped_gemm: rounded", rounded, "tensors in bfloat16 on a GPU")
        from gristmill.kernels.grouped_gemm.gpu import TritonGroupedGemm

        return TritonGroupedGemm.apply(x_NK, w_EMK, ends_E)
    if implementation == "compiled":
        return NativeGroupedGemm.apply(x_NK, w_EMK, ends_E, rounded)
    if implementation == "cpu":
        return GroupedGemm.apply(x_NK, w_EMK, ends_E, rounded)
    if implementation == "operation":
        return library.grouped_gemm(x_NK, w_EMK, ends_E, rounded)
    return grouped_gemm_reference(x_NK, w_EMK, ends_E, rounded=rounded)


def _check(x: Tensor, w: Tensor, ends: Tensor) -> None:
    require_ranks("grouped_gemm", x_NK=(x, 2), w_EMK=(w, 3))
    require(x.is_floating_point(), TypeError, "grouped_gemm: x_NK", x.dtype, "a floating dtype")
    require_dtype("grouped_gemm", x.dtype, "x_NK", w_EMK=w)
    require(w.shape[2] == x.shape[1], ValueError, "grouped_gemm: inner size of w_EMK", w.shape[2], x.shape[1])
    require_device("grouped_gemm", "x_NK", x, w_EMK=w)
    require(len(w) > 0 or not len(x), ValueError, "grouped_gemm: groups of w_EMK", 0, f"some, for {len(x)} rows")
    check_ends("grouped_gemm", ends, w.shape[0], "x_NK", x)
