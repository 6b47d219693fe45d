"""SwiGLU, forward and gradient, against its reference in float64: on each path of a CPU, or on the GPU, and the Triton
code under its interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill import kernels
from gristmill.kernels.swiglu import swiglu
from gristmill.kernels.swiglu.reference import swiglu_reference

INTERPRETED = os.environ.get("GRISTMILL_KERNELS") == "gpu"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
EXAMPLES = 5 if INTERPRETED else 40
EPS = torch.finfo(torch.float32).eps


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def both_ways(gate_up: Tensor, seen: Tensor) -> list[Tensor]:
    gate_up = gate_up.detach().requires_grad_()
    out = swiglu(gate_up)
    return [out.detach(), *torch.autograd.grad(out, gate_up, seen)]


def check(gate_up: Tensor, seen: Tensor, got: list[Tensor]) -> None:
    """Number by number. In float32 a sigmoid and what it is multiplied by err by 16 half steps at most, one less a
    sigmoid by some of one. In bfloat16 what is taken on the way and the result are rounded, in Triton the result
    alone, which its interpreter cuts off: by as much. Below e⁻⁸⁸ there is nothing."""
    rounded = 2 * 2**-8 if gate_up.dtype == torch.bfloat16 else 0.0
    gate, up, grad = *gate_up.double().chunk(2, -1), seen.double()
    s = gate.sigmoid()
    silu, by_gate = gate * s, s + gate * s * (1 - s)
    near = 16 * EPS / 2
    of_gate = (grad * up).abs() * (near * (s + silu.abs() * (1 - s)) + 8 * EPS / 2 * silu.abs())
    parts = [
        (silu * up, near * (silu * up).abs()),
        (grad * up * by_gate, of_gate),
        (grad * silu, near * (grad * silu).abs()),
    ]
    for mine, (wanted, off) in zip((got[0], *got[1].chunk(2, -1)), parts, strict=True):
        assert mine.shape == wanted.shape
        assert mine.dtype == gate_up.dtype
        off = off + 1e-36 * (1 + up.abs() + grad.abs() * (1 + up.abs()))
        terms = wanted.abs() + (grad * up * silu).abs() * (1 - s) * rounded  # what cancels was rounded before
        assert bool(((mine.double() - wanted).abs() <= off + rounded * (terms + off)).all())


@pytest.mark.usefixtures("cpu_path")
@given(
    rows=st.integers(0, 12) | st.just(30 if INTERPRETED else 300), hidden=st.integers(0, 70),
    size=st.sampled_from([0.1, 1.0, 40.0]), strided=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
@settings(max_examples=EXAMPLES, deadline=None)
def test_swiglu(rows: int, hidden: int, size: float, strided: bool, dtype: torch.dtype) -> None:
    gate_up, seen = (draw(0, rows, 2 * hidden, 2) * size).to(dtype), draw(1, rows, hidden, 2).to(dtype)
    gate_up, seen = (t[..., 0] if strided else t[..., 0].contiguous() for t in (gate_up, seen))
    got = both_ways(gate_up, seen)
    with torch.no_grad():
        assert swiglu(gate_up).equal(got[0])
    check(gate_up, seen, got)


@pytest.mark.usefixtures("cpu_path")
def test_the_ends_of_the_range() -> None:
    gate = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4, float("nan")], device=DEVICE)
    ones = torch.ones(8, device=DEVICE)
    out, grad = both_ways(torch.cat((gate, ones)), ones)
    assert out[:3].abs().max() < 1e-35
    assert out[3:7].equal(gate[3:7])
    assert grad[:7].tolist() == pytest.approx([0, 0, 0, 0.5, 1, 1, 1], abs=1e-30, rel=4 * EPS)
    assert out[7].isnan()
    assert grad[[7, 15]].isnan().all()
    assert not grad[[*range(7), *range(8, 15)]].isnan().any()


@pytest.mark.usefixtures("cpu_path")
def test_two_runs_give_equal_bits() -> None:
    gate_up, seen = draw(2, 200, 130), draw(3, 200, 65)
    assert all(map(torch.equal, both_ways(gate_up, seen), both_ways(gate_up, seen)))


@pytest.mark.usefixtures("cpu_path")
def test_other_dtypes_and_the_reference_on_demand() -> None:
    gate_up = draw(4, 3, 10)
    assert swiglu(gate_up.bfloat16()).dtype == torch.bfloat16
    with kernels.use_reference():
        assert swiglu(gate_up).equal(swiglu_reference(gate_up))


@pytest.mark.usefixtures("cpu_path")
def test_bad_arguments_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"swiglu: shape of gate_up is \(2, 5\); wanted a last dimension of two halves"
    ):
        swiglu(draw(5, 2, 5))
    with pytest.raises(TypeError, match=r"swiglu: gate_up is torch.int64; wanted a floating dtype"):
        swiglu(torch.ones(2, 4, dtype=torch.long))
