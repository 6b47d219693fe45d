"""Products of variable-length groups of rows, each with its expert's weight (V3 section 2.1.2).

On a CPU in float32 `cpu.cpp` runs, a call a pass for all groups, with equal bits on any number of threads; of other
dtypes torch's products, group by group. On a GPU it is Triton's.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from gristmill.kernels.dispatch import chosen, readable, require
from gristmill.kernels.grouped_gemm import library
from gristmill.kernels.grouped_gemm.cpu import GroupedGemm
from gristmill.kernels.grouped_gemm.native import SOURCE, NativeGroupedGemm
from gristmill.kernels.grouped_gemm.reference import grouped_gemm_reference

__all__ = ["grouped_gemm"]


def grouped_gemm(x_NK: Tensor, w_EMK: Tensor, ends_E: Tensor, *, rounded: bool = False) -> Tensor:
    """y (N, M) with y[rows of e] = x[rows of e] · w[e]ᵀ, differentiable in x and w (once on the compiled path).

    Args:
        x_NK: rows laid out group by group, (N, K).
        w_EMK: one matrix a group, (E, M, K), stored (out, in) as Hugging Face stores experts.
        ends_E: where each group's rows end, ascending, the last being N; integers, (E,).
        rounded: whether products take their operands rounded to bfloat16, as in `linear`; on a CPU alone.

    Raises:
        TypeError: x and w differ in dtype or device.
        ValueError: the shapes do not fit, there are rows and no group, the ends are on another device or (checked on a
            CPU) do not ascend to N; on a GPU, there are 2³⁰ rows or more, or rounding is asked for.
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
    require(x.dtype == w.dtype, TypeError, "grouped_gemm: w_EMK", w.dtype, f"the dtype of x_NK, {x.dtype}")
    require(x.device == w.device, TypeError, "grouped_gemm: w_EMK", w.device, f"the device of x_NK, {x.device}")
    require(x.ndim == 2, ValueError, "grouped_gemm: rank of x_NK", x.ndim, "2")
    require(w.ndim == 3, ValueError, "grouped_gemm: rank of w_EMK", w.ndim, "3")
    require(w.shape[2] == x.shape[1], ValueError, "grouped_gemm: inner size of w_EMK", w.shape[2], x.shape[1])
    require(
        ends.shape == (w.shape[0],),
        ValueError,
        "grouped_gemm: shape of ends_E",
        tuple(ends.shape),
        (w.shape[0],),
    )
    require(ends.device == x.device, ValueError, "grouped_gemm: device of ends_E", ends.device, f"{x.device}")
    require(bool(len(ends)) or not len(x), ValueError, "grouped_gemm: groups of w_EMK", 0, f"some, for {len(x)} rows")
    if readable(ends) and ends.numel():
        places = ends.tolist()
        ascending = places[0] >= 0 and all(a <= b for a, b in pairwise(places))
        require(ascending, ValueError, "grouped_gemm: ends_E", places, "ascending ends")
        rows = x.shape[0]
        require(places[-1] == rows, ValueError, "grouped_gemm: last of ends_E", places[-1], f"the {rows} rows of x_NK")
