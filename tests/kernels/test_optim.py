"""AdamW over many tensors against the paper's formula in float64, and against torch's own: on the GPU where there is one,
else on the CPU, and the Triton code under its interpreter."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill import kernels
from gristmill.kernels.optim import AdamW, adamw

INTERPRETED = os.environ.get("GRISTMILL_KERNELS") == "gpu"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
ON_TRITON = INTERPRETED or DEVICE == "cuda"
EXAMPLES = 8 if INTERPRETED else 40
LISTS = ("parameters", "gradients", "exp_avg", "exp_avg_sq")


def draw(shapes: list[tuple[int, ...]], moments: torch.dtype = torch.float32) -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(len(shapes))
    drawn = {name: [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes] for name in LISTS}
    drawn["exp_avg"] = [t.to(moments) for t in drawn["exp_avg"]]
    drawn["exp_avg_sq"] = [t.square().to(moments) for t in drawn["exp_avg_sq"]]
    return drawn


def wanted_of(given_: dict[str, list[torch.Tensor]], how: AdamW) -> dict[str, list[torch.Tensor]]:
    """Algorithm 2 of the paper, a tensor at a time in float64."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in LISTS}
    for p, g, m, v in zip(*(given_[name] for name in LISTS), strict=True):
        p, g, m, v = (t.double() for t in (p, g, m, v))
        g = g * how.coefficient
        m = how.beta1 * m + (1 - how.beta1) * g
        v = how.beta2 * v + (1 - how.beta2) * g * g
        step = (m / (1 - how.beta1**how.step)) / ((v / (1 - how.beta2**how.step)).sqrt() + how.eps)
        for name, tensor in zip(LISTS, (p - how.rate * how.decay * p - how.rate * step, g, m, v), strict=True):
            found[name].append(tensor)
    return found


@pytest.mark.usefixtures("cpu_path")
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=5),
    step=st.integers(1, 1000),
    decay=st.sampled_from([0.0, 0.1]),
    coefficient=st.sampled_from([1.0, 0.37]),
    moments=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=EXAMPLES, deadline=None)
def test_an_update(shapes, step: int, decay: float, coefficient: float, moments: torch.dtype) -> None:
    how = AdamW(rate=1e-2, step=step, decay=decay, coefficient=coefficient)
    given_ = draw(shapes, moments)
    wanted = wanted_of(given_, how)
    gradients = [t.clone() for t in given_["gradients"]]
    adamw(*(given_[name] for name in LISTS), how)
    assert all(map(torch.equal, given_["gradients"], gradients))  # only read
    # Ten float32 operations of 6e-8 each lie one behind the other; a bfloat16 moment is rounded to 2^-9 of itself, and
    # by the interpreter cut off.
    for name, tolerance in (("parameters", 1e-6), ("exp_avg", 1e-6), ("exp_avg_sq", 1e-6)):
        rounding = (
            (2**-7 if INTERPRETED else 2**-8) if moments == torch.bfloat16 and name != "parameters" else tolerance
        )
        for got, exact in zip(given_[name], wanted[name], strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=rounding, atol=tolerance)


@pytest.mark.usefixtures("cpu_path")
def test_many_steps_are_those_of_torch() -> None:
    shapes = [(33, 7), (130,), (3000 if INTERPRETED else 70_000,)]  # more than a program or a thread takes
    ours, theirs = draw(shapes), draw(shapes)
    moments = [[torch.zeros_like(p) for p in ours["parameters"]] for _ in range(2)]
    leaves = [p.requires_grad_() for p in theirs["parameters"]]
    peer = torch.optim.AdamW(leaves, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 21):
        gradients = [g / step for g in ours["gradients"]]
        adamw(ours["parameters"], gradients, *moments, AdamW(rate=1e-2, step=step, decay=0.1))
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        peer.step()
    for got, wanted in zip(ours["parameters"], leaves, strict=True):
        # In each of 20 steps ten roundings of a step of 1e-2, and two on each side of a parameter of at most 5
        allowed = 20 * (10 * 1e-2 + 2 * 2 * 5) * 2**-24
        torch.testing.assert_close(got, wanted.detach(), rtol=0, atol=allowed)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_what_is_no_number_stays_where_it_is(moments: torch.dtype) -> None:
    given_ = draw([(40,)], moments)
    given_["gradients"][0][3] = math.nan
    adamw(*(given_[name] for name in LISTS), AdamW(rate=1e-2, step=1))
    for name in ("parameters", "exp_avg", "exp_avg_sq"):
        assert given_[name][0].isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_two_runs_and_any_number_of_threads_give_equal_bits(moments: torch.dtype) -> None:
    threads, made = torch.get_num_threads(), []
    try:
        for count in (threads, threads, 3):
            torch.set_num_threads(count)
            given_ = draw([(7, 301), (3,), (1500 if INTERPRETED else 20_000,)], moments)
            for step in (1, 2):
                adamw(*(given_[name] for name in LISTS), AdamW(rate=1e-2, step=step, decay=0.1, coefficient=0.7))
            made.append([t for name in LISTS for t in given_[name]])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, made[0], made[1]))
    assert all(map(torch.equal, made[0], made[2]))


def test_strides_are_respected_and_the_report_says_what_ran(cpu_path: str) -> None:
    how = AdamW(rate=1e-2, step=3)
    ours = draw([(12, 10)])
    wanted = wanted_of(ours, how)
    before = kernels.report().get("adamw", {})
    adamw(*(ours[name] for name in LISTS), how)
    here = "gpu" if ON_TRITON else cpu_path
    assert kernels.report()["adamw"][here] == before.get(here, 0) + 1
    turned = {name: [t.t().contiguous().t() for t in tensors] for name, tensors in draw([(12, 10)]).items()}
    adamw(*(turned[name] for name in LISTS), how)
    there = "torch" if ON_TRITON else "cpu"
    assert kernels.report()["adamw"][there] == before.get(there, 0) + (2 if there == here else 1)
    torch.testing.assert_close(turned["parameters"][0].double(), wanted["parameters"][0], rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not ON_TRITON, reason="elsewhere torch's operations take them")
@pytest.mark.parametrize("offset", [0, 1])
def test_all_dtypes_that_triton_takes_in_one_call(offset: int) -> None:
    """Whole chunks and parts of one, in every combination of dtypes, at whole 16 bytes and beside them."""
    both, how = (torch.float32, torch.bfloat16), AdamW(rate=1e-2, step=5, decay=0.1, coefficient=0.5)
    dtypes = list(itertools.product(both, repeat=4))
    drawn = draw([(2048 + 40 * i + offset,) for i in range(len(dtypes))])
    given_ = {
        name: [t.to(dtype[side])[offset:] for t, dtype in zip(drawn[name], dtypes, strict=True)]
        for side, name in enumerate(LISTS)
    }
    wanted = wanted_of(given_, how)
    adamw(*(given_[name] for name in LISTS), how)
    for name in ("parameters", "exp_avg", "exp_avg_sq"):
        for got, exact in zip(given_[name], wanted[name], strict=True):
            # As above: computed in float32 whatever goes in, and rounded once.
            rounding = 1e-6 if got.dtype == torch.float32 else 2**-7 if INTERPRETED else 2**-8
            torch.testing.assert_close(got.double(), exact, rtol=rounding, atol=1e-6)


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_nothing_waits_for_the_host_on_a_gpu() -> None:
    """Also where gradients lie elsewhere than in the step before."""
    given_, how = draw([(70, 50), (3,)]), AdamW(rate=1e-2, step=2)
    adamw(*(given_[name] for name in LISTS), how)  # compiles
    moved = {**given_, "gradients": [g.clone() for g in given_["gradients"]]}
    wanted = wanted_of(moved, how)
    torch.cuda.set_sync_debug_mode("error")
    try:
        adamw(*(moved[name] for name in LISTS), how)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, exact in zip(moved["parameters"], wanted["parameters"], strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradients": []}, "length of gradients is 0; wanted 1"),
        ({"exp_avg": [torch.zeros(3)]}, r"shape and device of exp_avg\[0\] is \(\(3,\)"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    given_ = {**{name: [torch.zeros(4)] for name in LISTS}, **change}
    with pytest.raises(ValueError, match=message):
        adamw(*(given_[name] for name in LISTS), AdamW(rate=1e-2, step=1))
