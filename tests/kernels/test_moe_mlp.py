"""The routed experts, forward and all gradients, against their reference in float64: on the GPU where there is one, else
on the CPU, and the Triton code under its interpreter."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill import kernels
from gristmill.kernels.moe_mlp import moe_mlp
from gristmill.kernels.moe_mlp.reference import moe_mlp_reference

EPS = {torch.float32: 1.2e-7, torch.bfloat16: 7.8e-3}
INTERPRETED = os.environ.get("GRISTMILL_KERNELS") == "gpu"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
EXAMPLES = 3 if INTERPRETED else 10 if DEVICE == "cuda" else 30  # compiled anew for most shapes on a GPU
NAMES = ("x_TD", "gate_TK", "gate_up_E2FD", "down_EDF")


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def choices(how: str, tokens: int, experts: int, chosen: int) -> torch.Tensor:
    """Evenly at random, all to the last expert, or none to the experts between the first and the last."""
    if how == "one":
        return torch.full((tokens, chosen), experts - 1, device=DEVICE)
    even = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(5)).topk(chosen, sorted=False).indices
    return (even if how == "even" else even % 2 * (experts - 1)).to(DEVICE)


def case(
    tokens: int,
    experts: int,
    chosen: int,
    width: int,
    hidden: int,
    how: str = "even",
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    expert = choices(how, tokens, experts, chosen)
    return {
        "x_TD": draw(0, tokens, width, dtype=dtype),
        "expert_TK": expert,
        "gate_TK": draw(1, tokens, chosen),
        "gate_up_E2FD": draw(2, experts, 2 * hidden, width, dtype=dtype) * width**-0.5,
        "down_EDF": draw(3, experts, width, hidden, dtype=dtype) * hidden**-0.5,
        "load_E": expert.flatten().bincount(minlength=experts),
    }


def both_ways(given_: dict[str, torch.Tensor], seen: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The result and the four gradients."""
    leaves = {name: given_[name].detach().requires_grad_() for name in NAMES}
    out = moe_mlp(**{**given_, **leaves})
    return out.detach(), *torch.autograd.grad(out, list(leaves.values()), seen)


def wanted_of(given_: dict[str, torch.Tensor], seen: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same by the reference in float64."""
    leaves = {name: given_[name].detach().double().requires_grad_() for name in NAMES}
    out = moe_mlp_reference(expert_TK=given_["expert_TK"], **leaves)
    return out.detach(), *torch.autograd.grad(out, list(leaves.values()), seen.double())


def sizes_of(given_: dict[str, torch.Tensor], seen: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the sums come to if no term cancels another: rounding is of that size, however small the result is."""
    return wanted_of({name: t.abs() for name, t in given_.items()}, seen.abs())


def close(got: torch.Tensor, wanted: torch.Tensor, size: torch.Tensor, dtype: torch.dtype, terms: int) -> None:
    """Their distance over the length of the terms. Numbers pass three float32 sums of at most `terms`, each off by at
    most terms · eps; in bfloat16 eight roundings of eps / 2 lie one behind the other (pre-activation, silu, product,
    gate, output, and so backward)."""
    assert got.shape == wanted.shape
    allowed = 3 * terms * EPS[torch.float32] + (8 * EPS[dtype] / 2 if dtype == torch.bfloat16 else 0)
    apart = float((got.double() - wanted).norm())
    assert apart <= allowed * float(size.norm()), (apart, allowed * float(size.norm()))


@pytest.mark.usefixtures("cpu_path")
@given(
    tokens=st.integers(1, 60),
    experts=st.integers(2, 6),
    chosen=st.integers(1, 2),
    width=st.integers(1, 50),
    hidden=st.integers(1, 40),
    how=st.sampled_from(["even", "one", "ends"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    strided=st.sampled_from(["", "turned", "columns"]),
    scale=st.sampled_from([1.0, 30.0]),
)
@settings(max_examples=EXAMPLES, deadline=None)
def test_result_and_gradients(
    tokens: int, experts: int, chosen: int, width: int, hidden: int, how: str, dtype: torch.dtype, strided: str,
    scale: float,
) -> None:  # fmt: skip
    given_ = case(tokens, experts, chosen, width, hidden, how, dtype)
    given_["x_TD"], seen = given_["x_TD"] * scale, draw(4, tokens, width, dtype=dtype)
    if strided == "turned":
        given_ = {name: t.mT.contiguous().mT if t.ndim > 1 else t for name, t in given_.items()}
        seen = seen.t().contiguous().t()
    elif strided == "columns":
        given_ = {name: torch.stack((t, t), -1)[..., 0] for name, t in given_.items()}
        seen = torch.stack((seen, seen), -1)[..., 0]
    got, wanted = both_ways(given_, seen), wanted_of(given_, seen)
    assert got[0].dtype == dtype
    assert [g.dtype for g in got[1:]] == [given_[name].dtype for name in NAMES]
    for mine, theirs, size in zip(got, wanted, sizes_of(given_, seen), strict=True):
        # silu's slope moves by what a pre-activation is off by, which is a share of it
        close(mine, theirs, scale * size, dtype, max(width, hidden, tokens * chosen))


@pytest.mark.usefixtures("cpu_path")
@given(
    tokens=st.integers(1, 40),
    experts=st.integers(2, 12),
    chosen=st.integers(1, 2),
    width=st.integers(1, 70),
    hidden=st.integers(1, 40),
    how=st.sampled_from(["even", "one", "ends"]),
)
@settings(max_examples=EXAMPLES, deadline=None)
def test_without_gradients(tokens: int, experts: int, chosen: int, width: int, hidden: int, how: str) -> None:
    """Few rows an expert have a way of their own on a CPU; a token's result there does not depend on its neighbours."""
    given_ = case(tokens, experts, chosen, width, hidden, how)
    seen = torch.zeros(tokens, width, device=DEVICE)
    out = moe_mlp(**given_)
    close(out, wanted_of(given_, seen)[0], sizes_of(given_, seen)[0], torch.float32, width + hidden)
    with_gradients = moe_mlp(**{**given_, "x_TD": given_["x_TD"].clone().requires_grad_()}).detach()
    close(with_gradients, out.double(), sizes_of(given_, seen)[0], torch.float32, width + hidden)


def test_a_token_of_few_does_not_depend_on_the_others(cpu_path: str) -> None:
    if cpu_path != "compiled" or DEVICE != "cpu" or INTERPRETED:
        pytest.skip("elsewhere sums may be cut elsewhere")
    given_ = case(30, 8, 2, 67, 21)
    whole = moe_mlp(**given_)
    for rows in (1, 5, 18):
        part = {**given_, **{name: given_[name][3 : 3 + rows] for name in ("x_TD", "expert_TK", "gate_TK")}}
        part["load_E"] = part["expert_TK"].flatten().bincount(minlength=8)
        assert torch.equal(moe_mlp(**part), whole[3 : 3 + rows])


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize(("tokens", "how"), [(40, "even"), (3, "one"), (0, "even")])
def test_an_order_that_is_given_changes_no_bit(tokens: int, how: str) -> None:
    given_, seen = case(tokens, 6, 2, 9, 5, how), draw(4, tokens, 9)
    order = given_["expert_TK"].flatten().argsort(stable=True)
    apart = torch.stack((order, order), 1)[:, 0]  # as what lies in another tensor
    for known in (order, apart):
        assert all(map(torch.equal, both_ways({**given_, "order_M": known}, seen), both_ways(given_, seen)))


@pytest.mark.usefixtures("cpu_path")
def test_whole_tiles_for_the_copy_engine() -> None:
    """Rows of whole 16 bytes in bfloat16, more rows than a tile has, experts without any."""
    given_ = case(70, 3, 2, 64, 72, "one", torch.bfloat16)
    seen = draw(4, 70, 64, dtype=torch.bfloat16)
    sides = both_ways(given_, seen), wanted_of(given_, seen), sizes_of(given_, seen)
    for mine, theirs, size in zip(*sides, strict=True):
        close(mine, theirs, size, torch.bfloat16, 140)


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="Triton sums in float32")
@pytest.mark.parametrize("how", ["even", "one", "ends"])
def test_gradcheck(how: str) -> None:
    given_ = case(5, 4, 2, 3, 2, how)
    leaves = [given_[name].double().requires_grad_() for name in NAMES]

    def function(x: torch.Tensor, gate: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return moe_mlp(x, given_["expert_TK"], gate, gate_up, down, given_["load_E"])

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.usefixtures("cpu_path")
def test_experts_without_rows_have_zero_gradients() -> None:
    given_ = case(9, 4, 2, 5, 3, "one")
    *_, gate_up, down = both_ways(given_, draw(4, 9, 5))
    for gradient in (gate_up, down):
        assert not gradient[:3].any()
        assert gradient[3].any()


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize(("tokens", "chosen"), [(0, 2), (3, 0)])
def test_no_rows_at_all(tokens: int, chosen: int) -> None:
    given_ = case(tokens, 3, 0, 5, 4) | {"expert_TK": torch.zeros(tokens, chosen, dtype=torch.long, device=DEVICE)}
    given_["gate_TK"] = draw(1, tokens, chosen)
    for got in both_ways(given_, draw(4, tokens, 5)):
        assert not got.any()


@pytest.mark.usefixtures("cpu_path")
def test_nan_reaches_its_own_token_and_its_experts() -> None:
    given_ = case(12, 6, 2, 8, 4)
    given_["x_TD"][7, 3] = float("nan")
    out, grad_x, grad_gate, grad_gate_up, _ = both_ways(given_, draw(4, 12, 8))
    for rows in (out, grad_x, grad_gate):
        spoilt = rows.isnan().any(1)
        assert spoilt[7]
        assert int(spoilt.sum()) == 1
    met = grad_gate_up.isnan().flatten(1).any(1).nonzero()[:, 0]
    assert met.tolist() == sorted(given_["expert_TK"][7].tolist())


@pytest.mark.usefixtures("cpu_path")
def test_two_runs_give_equal_bits() -> None:
    given_, seen = case(90, 7, 3, 32, 24), draw(4, 90, 32)
    assert all(torch.equal(a, b) for a, b in zip(both_ways(given_, seen), both_ways(given_, seen), strict=True))


def test_what_is_kept_for_the_backward_pass(cpu_path: str) -> None:
    tokens, experts, chosen, width, hidden = 40, 4, 3, 24, 8
    given_ = case(tokens, experts, chosen, width, hidden)
    leaves = {name: given_[name].requires_grad_() for name in NAMES}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        moe_mlp(**{**given_, **leaves})
    theirs = {t.untyped_storage().data_ptr() for t in given_.values()}
    beyond = sum(t.numel() for t in kept if t.untyped_storage().data_ptr() not in theirs)
    ends = experts if INTERPRETED or DEVICE == "cuda" else experts + 1 if cpu_path == "compiled" else 0
    assert beyond == tokens * chosen * (2 * hidden + 1) + ends  # pre-activations, the order, and where experts end


@pytest.mark.usefixtures("cpu_path")
def test_a_second_pass_through_the_same_graph_gives_the_same_bits() -> None:
    """Though a GPU puts slopes where what was kept of the forward pass lay."""
    given_ = case(9, 4, 2, 24, 8)
    leaves = [given_[name].detach().requires_grad_() for name in NAMES]
    loss = (moe_mlp(**{**given_, **dict(zip(NAMES, leaves, strict=True))}) * draw(4, 9, 24)).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="of the code in Triton")
@pytest.mark.parametrize("width", [40, 48, 100])
def test_no_bit_depends_on_the_parts_of_the_columns(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the sums of a product's terms and of a token's rows do not cross."""
    from gristmill.kernels.moe_mlp import gpu

    given_, seen = case(20, 4, 3, width, 12), draw(4, 20, width)
    whole = both_ways(given_, seen)
    assert len(gpu._parts(width, gpu.PARTS_OF_GRADIENTS)) == 1
    monkeypatch.setattr(gpu, "WHOLE_COLUMNS", 8)
    assert len(gpu._parts(width, gpu.PARTS_OF_GRADIENTS)) > 2
    for a, b in zip(whole, both_ways(given_, seen), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("cpu_path")
def test_only_one_derivative_is_given() -> None:
    given_ = case(4, 3, 1, 5, 2)
    x = given_["x_TD"].requires_grad_()
    (gradient,) = torch.autograd.grad(moe_mlp(**given_).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_reference_on_demand_and_the_report(cpu_path: str) -> None:
    given_ = case(6, 3, 2, 5, 4)
    before = kernels.report().get("moe_mlp", {})
    with kernels.use_reference():
        wanted = moe_mlp(**given_)
    close(moe_mlp(**given_), wanted.double(), wanted.double(), torch.float32, 5)
    after, here = kernels.report()["moe_mlp"], "gpu" if INTERPRETED or DEVICE == "cuda" else cpu_path
    for how in ("reference", here):
        assert after[how] == before.get(how, 0) + 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x_TD": draw(0, 5)}, ValueError, "rank of x_TD is 1; wanted 2"),
        ({"down_EDF": draw(0, 3, 5, 4).bfloat16()}, TypeError, "down_EDF is torch.bfloat16; wanted the dtype of x_TD"),
        ({"down_EDF": draw(0, 3, 6, 4)}, ValueError, r"shape of down_EDF is \(3, 6, 4\); wanted \(3, 5, 4\)"),
        ({"gate_up_E2FD": draw(0, 3, 6, 5)}, ValueError, r"shape of gate_up_E2FD is \(3, 6, 5\); wanted \(3, 8, 5\)"),
        ({"gate_TK": draw(0, 6, 1)}, ValueError, r"shape of gate_TK is \(6, 1\); wanted \(6, 2\)"),
        ({"gate_TK": torch.ones(6, 2, dtype=torch.long)}, TypeError, "gate_TK is torch.int64; wanted a floating"),
        ({"expert_TK": draw(0, 6, 2)}, TypeError, "expert_TK is torch.float32; wanted integers"),
        ({"expert_TK": torch.full((7, 2), 1)}, ValueError, r"shape of expert_TK is \(7, 2\); wanted \(6, 2\)"),
        (
            {"expert_TK": torch.full((6, 2), 3)},
            ValueError,
            r"range of expert_TK is \(3, 3\); wanted experts from 0 to 2",
        ),
        ({"expert_TK": torch.full((6, 2), -1)}, ValueError, r"range of expert_TK is \(-1, -1\)"),
        ({"load_E": torch.tensor([12, 0])}, ValueError, r"shape of load_E is \(2,\); wanted \(3,\)"),
        ({"load_E": torch.tensor([12, 0, 0])}, ValueError, r"load_E is \[12, 0, 0\]; wanted the counts of expert_TK"),
        ({"load_E": torch.ones(3)}, TypeError, "load_E is torch.float32; wanted integers"),
        ({"load_E": torch.ones(3, dtype=torch.long, device="meta")}, ValueError, "device of load_E is meta"),
        ({"order_M": torch.arange(12.0)}, TypeError, "order_M is torch.float32; wanted torch.int64"),
        ({"order_M": torch.arange(6)}, ValueError, r"shape of order_M is \(6,\); wanted \(12,\)"),
        ({"order_M": torch.arange(12) + 1}, ValueError, r"range of order_M is \(1, 12\); wanted rows from 0 to 11"),
        ({"order_M": torch.arange(12).flip(0)}, ValueError, "order_M is another; wanted that of the rows' experts"),
        ({"order_M": torch.zeros(12, dtype=torch.long)}, ValueError, "order_M is another; wanted that of the rows'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """On the CPU, where indices are looked at as well."""
    given_ = {name: t.cpu() for name, t in case(6, 3, 2, 5, 4).items()}
    change = {name: t if t.device.type == "meta" else t.cpu() for name, t in change.items()}
    with pytest.raises(error, match=message):
        moe_mlp(**{**given_, **change})


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_nothing_waits_for_the_host_on_a_gpu() -> None:
    given_, seen = case(64, 8, 2, 64, 32, dtype=torch.bfloat16), draw(4, 64, 64, dtype=torch.bfloat16)
    first = both_ways(given_, seen)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = both_ways(given_, seen)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
