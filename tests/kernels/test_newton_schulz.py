"""Newton–Schulz iterations against singular values in float64, of both paths of a CPU or on the GPU where there is one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gristmill import kernels
from gristmill.kernels.optim import orthogonalised
from gristmill.kernels.optim.reference import NEWTON_SCHULZ

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [
    (1, 1), (1, 9), (9, 1), (7, 5), (33, 40), (64, 64), (100, 300), (300, 100), (65, 290),
    (1, 24, 16), (3, 16, 24), (2, 2, 31, 17), (5, 130, 70),
]  # fmt: skip


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def wanted_of(matrices: Tensor, steps: int) -> Tensor:
    """U·f(S)·Vᵀ, f the polynomial that many times, of S over its root of squares."""
    a, b, c = NEWTON_SCHULZ
    u, s, vt = torch.linalg.svd(matrices.double(), full_matrices=False)
    s = s / (s.square().sum(-1, keepdim=True).sqrt() + 1e-7)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u * s[..., None, :] @ vt


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_singular_values_go_as_the_polynomial_says(shape: tuple[int, ...], steps: int) -> None:
    # A step rounds sums of at most 300 terms of rows and columns of norm about one, at random; its slope multiplies an
    # error by 3.4 at zero and by less than two in size in the band, where all but the first steps are.
    allowed = (steps + 1) * math.sqrt(max(shape[-2:])) * 2**-24 * 3.4
    given = draw(*shape)
    torch.testing.assert_close(orthogonalised(given, steps).double(), wanted_of(given, steps), rtol=0, atol=allowed)


@pytest.mark.usefixtures("cpu_path")
def test_matrices_of_all_sizes_come_out_alike() -> None:
    """An expert's small gradient, or a large one, whose squares float32 still holds."""
    one = draw(24, 40)
    stack = torch.stack([one, one * 1e-3, one * 1e15])
    made = orthogonalised(stack)
    torch.testing.assert_close(made[0], made[2], rtol=0, atol=1e-6)
    # The 1e-7 that is added to a norm of 1e-3 · √960 is 3e-6 of it, by which f's slope of up to 3.4⁵ moves the result
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=3e-6 * 3.4445**5)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (64, 64)])
def test_zeros_stay_and_what_is_no_number_fills_its_own_matrix(shape: tuple[int, int]) -> None:
    stack = torch.stack([draw(*shape) for _ in range(4)])
    clean = orthogonalised(stack)
    stack[1], stack[2, 3, 4], stack[3, 5, 1] = 0.0, math.nan, math.inf
    made = orthogonalised(stack)
    assert not made[1].any()
    assert made[2:].isnan().all()
    torch.testing.assert_close(made[0], clean[0], rtol=0, atol=1e-6)


def test_a_matrix_has_equal_bits_in_every_stack_and_by_any_number_of_threads(cpu_path: str) -> None:
    if cpu_path != "compiled" or DEVICE == "cuda":
        pytest.skip("torch's batched products choose their order by the stack")
    before = torch.get_num_threads()
    try:
        for shape in [(5, 150, 70), (3, 70, 300), (1, 200, 200), (4, 9, 13)]:
            stack, found = draw(*shape), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(orthogonalised(stack))
            assert all(torch.equal(each, found[0]) for each in found)
            assert all(torch.equal(orthogonalised(matrix), one) for matrix, one in zip(stack, found[0], strict=True))
    finally:
        torch.set_num_threads(before)


def test_strides_empty_stacks_other_dtypes_and_the_report(cpu_path: str) -> None:
    before = kernels.report().get("orthogonalised", {})
    given = draw(3, 20, 12)
    turned = given.mT.contiguous().mT
    torch.testing.assert_close(orthogonalised(turned), orthogonalised(given), rtol=0, atol=1e-6)
    here = "torch" if DEVICE == "cuda" else cpu_path
    assert kernels.report()["orthogonalised"][here] == before.get(here, 0) + 2
    for shape in [(0, 3, 4), (2, 0, 4), (2, 4, 0)]:
        assert orthogonalised(draw(*shape)).shape == shape
    exact = orthogonalised(given.double())
    assert exact.dtype == torch.float64
    # As above; a float64 sum of 20 terms rounds to 2⁻⁵³
    torch.testing.assert_close(exact, wanted_of(given, 5), rtol=0, atol=6 * math.sqrt(20) * 2**-53 * 3.4 * 4)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("shape", [(20, 12), (3, 16, 24), (64, 64)])
def test_in_bfloat16(shape: tuple[int, ...]) -> None:
    given = draw(*shape).bfloat16()
    made, wanted = orthogonalised(given), wanted_of(given, 5)
    assert made.dtype == torch.bfloat16
    # A step's products and sums are rounded to bfloat16, half a step of 2⁻⁸ at most and two thirds of that on the root
    # mean square, of terms that come to a + |b| + |c| at most; later steps, whose slopes are about one, pass it on.
    allowed = 5 * sum(map(abs, NEWTON_SCHULZ)) * 2**-9
    assert float((made.double() - wanted).norm()) <= allowed * float(wanted.norm())


def test_what_it_is_given_is_only_read(cpu_path: str) -> None:
    given = draw(4, 30, 20).requires_grad_()
    kept = given.detach().clone()
    assert not orthogonalised(given).requires_grad
    assert torch.equal(given, kept), cpu_path


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"matrices": torch.zeros(4)}, ValueError, "rank is 1; wanted 2 or more"),
        ({"matrices": torch.zeros(4, 4, dtype=torch.int64)}, TypeError, "dtype is torch.int64; wanted a floating"),
        ({"steps": -1}, ValueError, "steps is -1; wanted 0 or more"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        orthogonalised(**{"matrices": torch.zeros(4, 4), **change})
