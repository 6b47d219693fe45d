"""The gate of a mixture of experts: its choices against a plain loop, numbers and gradients against float64; on the GPU
where there is one, else on the CPU, and the Triton code under its interpreter."""

from __future__ import annotations

import math
import os
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gristmill import kernels
from gristmill.kernels.compiled import compiled, needed
from gristmill.kernels.router import SOURCE, Choice, numbers_of, route
from gristmill.kernels.router.reference import allowed, highest, route_reference

INTERPRETED = os.environ.get("GRISTMILL_KERNELS") == "gpu"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
TRITON = INTERPRETED or DEVICE == "cuda"
EXAMPLES = 10 if INTERPRETED else 12 if DEVICE == "cuda" else 60  # compiled anew for most sizes on a GPU


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@st.composite
def cases(draw_) -> tuple[int, int, int, Choice]:
    groups = draw_(st.sampled_from([1, 1, 2, 4]))
    experts = groups * draw_(st.integers(2, 20))
    allowed = draw_(st.integers(1, groups))
    how = Choice(
        chosen=draw_(st.integers(1, min(8, experts // groups * allowed))),
        affinity=draw_(st.sampled_from(["sigmoid", "softmax"])),
        groups=groups,
        groups_allowed=allowed,
        normalised=draw_(st.booleans()),
        scale=draw_(st.sampled_from([1.0, 2.5])),
    )
    return draw_(st.sampled_from([1, 7, 95, 200])), experts, draw_(st.integers(1, 70)), how


def chosen_by_hand(biased: list[float], how: Choice) -> list[int]:
    """Equation 16, and the groups of section 2.1.2, for one token's biased affinities."""
    size, count = len(biased) // how.groups, 2 if how.affinity == "sigmoid" else 1
    members = [range(g * size, (g + 1) * size) for g in range(how.groups)]
    score = [sum(sorted((biased[e] for e in group), reverse=True)[:count]) for group in members]
    best = sorted(range(how.groups), key=lambda g: -score[g])[: how.groups_allowed]
    free = [e for g in sorted(best) for e in members[g]] if how.groups > 1 else range(len(biased))
    return sorted(free, key=lambda e: -biased[e])[: how.chosen]


def assert_sorted(expert: torch.Tensor, load: torch.Tensor, order: torch.Tensor, ends: torch.Tensor) -> None:
    """What follows from the choices alone."""
    counts = torch.bincount(expert.flatten(), minlength=len(load))
    assert load.equal(counts)
    assert ends.equal(counts.cumsum(0))
    assert order.equal(expert.flatten().argsort(stable=True))


@pytest.mark.usefixtures("cpu_path")
def test_recomputation_that_keeps_products_changes_nothing() -> None:
    """What a product gave is given again, so nothing may be written into it."""

    def policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        kept = operation is torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    x, weight, bias = draw(0, 9, 12), draw(1, 8, 12), draw(2, 8) * 0.1
    seen_gate, seen_score = draw(3, 9, 3), draw(4, 9, 8)

    def gradients(contexts: Any) -> tuple[torch.Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, weight)]

        def loss(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            _, gate, score, *_ = route(a, w, bias, Choice(3))
            return (gate * seen_gate).sum() + (score * seen_score).sum()

        out = loss(*leaves) if contexts is None else checkpoint(loss, *leaves, use_reentrant=False, context_fn=contexts)
        return torch.autograd.grad(out, leaves)

    plain, again = gradients(None), gradients(partial(create_selective_checkpoint_contexts, policy))
    assert all(map(torch.equal, plain, again))


ULP, HALF = 2**-24, 2**-8  # half a step of float32, and of bfloat16


def exact_scores(x: torch.Tensor, weight: torch.Tensor, how: Choice) -> tuple[torch.Tensor, torch.Tensor]:
    """Affinities in float64, and how far float32's may be from them: as a share of each, twice what a logit is off by.
    A logit in float32 is a sum of `width` products; one in bfloat16 is torch's, and is taken from there."""
    whole = x.dtype == torch.float32
    logit = x.double() @ weight.double().t() if whole else torch.nn.functional.linear(x, weight).double()
    size = x.double().abs() @ weight.double().abs().t() if whole else logit.abs()
    off = ((x.shape[1] if whole else 0) + 4) * ULP * size.amax(1, keepdim=True)
    score = logit.sigmoid() if how.affinity == "sigmoid" else logit.softmax(-1)
    return score, 2 * off + (len(weight) + 16) * ULP + (0.0 if whole else HALF)


def exact_slopes(
    score: torch.Tensor, expert: torch.Tensor, grad_gate: torch.Tensor, grad_score: torch.Tensor, how: Choice
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient in the logits of these affinities, in float64, and what its terms come to without their signs."""
    own = score.gather(1, expert)
    total = own.sum(1, keepdim=True) + 1e-20 if how.normalised else torch.ones_like(own[:, :1])
    made = []
    for sign in (-1, 1):
        gate, seen = (grad_gate, grad_score) if sign < 0 else (grad_gate.abs(), grad_score.abs())
        along = (gate * own).sum(1, keepdim=True) / total if how.normalised else 0.0
        slope = seen.scatter_add(1, expert, how.scale * (gate + sign * along) / total)
        if how.affinity == "sigmoid":
            made.append(slope * score * (1 - score))
        else:
            made.append(score * (slope + sign * (slope * score).sum(1, keepdim=True)))
    return made[0], made[1]


@pytest.mark.usefixtures("cpu_path")
@given(
    case=cases(), size=st.sampled_from([1.0, 40.0]), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    strided=st.sampled_from(["", "x", "weight"]),
)  # fmt: skip
@settings(max_examples=EXAMPLES, deadline=None)
def test_choices_numbers_and_gradients(
    case: tuple[int, int, int, Choice], size: float, dtype: torch.dtype, strided: str
) -> None:
    tokens, experts, width, how = case
    x, weight = (draw(0, tokens, width) * size).to(dtype), (draw(1, experts, width) * width**-0.5).to(dtype)
    x = x.t().contiguous().t() if strided == "x" else x
    weight = weight.t().contiguous().t() if strided == "weight" else weight
    bias, leaves = draw(2, experts) * 0.1, [x.requires_grad_(), weight.requires_grad_()]
    expert, gate, score, load, order, ends = route(*leaves, bias, how)
    x, weight, rounded = x.detach(), weight.detach(), HALF if dtype == torch.bfloat16 else 0.0
    exact, off = exact_scores(x, weight, how)
    assert gate.dtype == score.dtype == dtype
    assert bool(((score.detach().double() - exact).abs() <= off * exact + 1e-37).all())
    # The choice is that of the affinities as they came out, to the last bit
    assert expert.tolist() == [chosen_by_hand(row, how) for row in (score + bias).tolist()]
    assert_sorted(expert, load, order, ends)
    own = score.detach().double()  # what follows is of these
    wanted = own.gather(1, expert)
    wanted = wanted / (wanted.sum(-1, keepdim=True) + 1e-20) if how.normalised else wanted
    # A sum and two operations, in bfloat16 three roundings and a fourth of the affinity's scale
    allowed = (how.chosen + 8) * ULP + 4 * rounded
    torch.testing.assert_close(gate.detach().double(), wanted * how.scale, rtol=allowed, atol=1e-30)
    seen = draw(3, tokens, how.chosen).to(dtype), draw(4, tokens, experts).to(dtype)
    got = torch.autograd.grad((gate, score), leaves, seen)
    slope, terms = exact_slopes(own, expert, seen[0].double(), seen[1].double(), how)
    # Sums over the chosen and over all; in bfloat16 eight operations round one after the other
    off = terms * ((how.chosen + experts + 32) * ULP + 8 * rounded)
    assert_products(got, slope, off, x, weight, rounded)


def assert_products(
    got: tuple[torch.Tensor, ...], slope: torch.Tensor, off: torch.Tensor, x: torch.Tensor, weight: torch.Tensor,
    rounded: float = 0.0,
) -> None:  # fmt: skip
    """Gradients of x and the weight, from those of the logits in float64 and how far float32's may be from them."""
    for mine, by, its_off, other in ((got[0], slope, off, weight), (got[1], slope.t(), off.t(), x)):
        other, wanted = other.double(), by @ other.double()
        allowed = (its_off + (by.shape[1] + 2) * ULP * by.abs()) @ other.abs() + 1e-25
        assert bool(((mine.double() - wanted).abs() <= allowed + rounded * (wanted.abs() + allowed)).all())


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("affinity", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    ("tokens", "experts", "width", "how"),
    [
        (1, 40, 3, {"chosen": 1}),
        (7, 9, 130, {"chosen": 2, "normalised": False, "scale": 2.5}),
        (95, 32, 256, {"chosen": 4, "scale": 2.5}),
        (300, 64, 257, {"chosen": 4, "groups": 8, "groups_allowed": 4}),
        (129, 300, 70, {"chosen": 8, "normalised": False}),
    ],
)
def test_gradients_of_gates_alone(affinity: Any, tokens: int, experts: int, width: int, how: dict[str, Any]) -> None:
    """Few of many experts, some of which nobody chooses, and one that nearly all tokens do. That a term may be off for
    each expert is more than a path takes which leaves out zeros; its bits are held to the other's below."""
    x, weight, choice = draw(0, tokens, width), draw(1, experts, width) * width**-0.5, Choice(affinity=affinity, **how)
    bias, seen = draw(2, experts) * 0.1, draw(3, tokens, choice.chosen)
    bias[experts // 2] = 10.0
    leaves = x.requires_grad_(), weight.requires_grad_()
    routes = route(*leaves, bias, choice)
    got = torch.autograd.grad(routes.gate_TK, leaves, seen)
    own = routes.score_TE.detach().double()
    slope, terms = exact_slopes(own, routes.expert_TK, seen.double(), torch.zeros_like(own), choice)
    off = terms * (choice.chosen + experts + 32) * ULP
    assert_products(got, slope, off, x.detach(), weight.detach())
    assert (routes.load_E == 0).any()
    assert not got[1][routes.load_E == 0].any() or affinity == "softmax"
    of_x, of_weight = (torch.autograd.grad(route(*leaves, bias, choice).gate_TK, leaf, seen)[0] for leaf in leaves)
    assert of_x.equal(got[0])
    assert of_weight.equal(got[1])


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize(
    ("spoilt", "value"),
    [(what, value) for what in ("x", "gradient", "weight") for value in (math.nan, math.inf, -math.inf)]
    + [("weight of nobody", math.inf), ("weight of nobody", -math.inf)],  # one that is no number everybody chooses
)
def test_gradients_are_no_numbers_where_the_specification_has_none(spoilt: str, value: float) -> None:
    x, weight, bias, seen = draw(0, 130, 8), draw(1, 24, 8), torch.zeros(24, device=DEVICE), draw(2, 130, 3)
    if spoilt == "x":
        x[40, 2] = value
    elif spoilt == "gradient":
        seen[40, 2] = value
    else:
        weight[5, 2] = value
    if spoilt == "weight of nobody":
        x[:, 2] = -1.0 if value > 0 else 1.0
        bias[5] = -10.0
    leaves = x.requires_grad_(), weight.requires_grad_()
    got, wanted = (
        torch.autograd.grad(way(*leaves, bias, Choice(3)).gate_TK, leaves, seen) for way in (route, route_reference)
    )
    got, wanted = list(got), list(wanted)
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.isfinite().equal(theirs.isfinite())
    assert not all(grad.isfinite().all() for grad in wanted)


@pytest.mark.skipif(TRITON or compiled(SOURCE) is None, reason="of the compiled code")
@pytest.mark.parametrize(
    ("spoilt", "left_out"),
    [("", True), ("far out", True), ("weight", False), ("x", False), ("few experts", False), ("score", False)],
)
def test_zeros_are_left_out_where_all_is_finite(spoilt: str, left_out: bool) -> None:
    """Then the slopes of the chosen logits are written one behind the other, and no others."""
    tokens, experts, width, chosen = 50, 7 if spoilt == "few experts" else 16, 20, 2
    x, weight, seen = draw(0, tokens, width), draw(1, experts, width), draw(2, tokens, chosen)
    how = Choice(chosen)
    if spoilt == "far out":
        x[3] *= 1e3
    if spoilt == "weight":
        weight[5, 2] = math.inf
    if spoilt == "x":
        x[3, 2] = math.inf
    routes = route(x, weight, torch.zeros(experts), how)
    assert bool((routes.score_TE == 1).any()) == (spoilt in ("far out", "weight", "x"))
    slope, grads = torch.full((tokens, experts), math.nan), (torch.empty_like(x), torch.empty_like(weight))
    kept = routes.score_TE, routes.expert_TK, routes.order_M, routes.ends_E
    of_score = torch.zeros(tokens, experts) if spoilt == "score" else None
    needed(SOURCE)("route_backward", x, weight, *kept, seen, of_score, slope, *grads, *numbers_of(x, weight, how))
    assert bool(slope.flatten()[tokens * chosen :].isnan().all()) == left_out
    assert all(grad.isfinite().all() for grad in grads) == (spoilt not in ("weight", "x"))


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("affinity", ["sigmoid", "softmax"])
def test_what_is_no_number_is_chosen_before_infinity(affinity: Any, groups: int) -> None:
    x, weight, bias = draw(0, 120, 5), draw(1, 44, 5), draw(2, 44)
    bias[::6], bias[1::7] = math.inf, math.nan
    how = Choice(9, affinity, groups, min(groups, 3))
    routes = route(x, weight, bias, how)
    choice = routes.score_TE + bias
    assert choice.gather(1, routes.expert_TK)[:, 0].isnan().all()
    if groups > 1:
        choice = choice.masked_fill(~allowed(choice, how), -math.inf)
    assert routes.expert_TK.equal(highest(choice, 9))
    assert_sorted(routes.expert_TK, routes.load_E, routes.order_M, routes.ends_E)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("tokens", [3, 200])
def test_of_equal_experts_the_first_are_chosen(tokens: int) -> None:
    x, weight = torch.zeros(tokens, 4, device=DEVICE), draw(0, 12, 4)
    how = Choice(chosen=3, groups=4, groups_allowed=2)
    expert, *_ = route(x, weight, torch.zeros(12, device=DEVICE), how)
    assert expert.tolist() == [[0, 1, 2]] * tokens


def test_both_paths_of_a_cpu_choose_alike(cpu_path: str) -> None:
    x, weight, bias = draw(0, 512, 32), draw(1, 16, 32), draw(2, 16) * 0.1
    how = Choice(chosen=4, groups=4, groups_allowed=2)
    before = kernels.report().get("router", {})
    got, wanted = route(x, weight, bias, how), route_reference(x, weight, bias, how)
    here = "gpu" if TRITON else cpu_path
    assert kernels.report()["router"][here] == before.get(here, 0) + 1
    assert float((got[0] == wanted[0]).double().mean()) > 0.999  # affinities a rounding apart may change places
    torch.testing.assert_close(got[2], wanted[2], rtol=0, atol=32 * 2**-24 * 8)


@pytest.mark.usefixtures("cpu_path")
def test_what_is_no_number_is_passed_on_and_stays_in_its_row() -> None:
    x, weight = draw(0, 150, 8), draw(1, 6, 8)
    x[40] = math.nan
    expert, gate, score, *_ = route(x, weight, torch.zeros(6, device=DEVICE), Choice(chosen=2))
    assert gate[40].isnan().all()
    assert score[40].isnan().all()
    others = [i for i in range(150) if i != 40]
    assert gate[others].isfinite().all()
    assert int(expert.min()) >= 0
    assert int(expert.max()) < 6


@pytest.mark.skipif(not TRITON, reason="of the GPU's code")
@pytest.mark.parametrize("affinity", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    ("experts", "groups", "groups_allowed", "chosen"),
    [(1, 1, 1, 1), (7, 1, 1, 7), (6, 3, 2, 3), (256, 8, 4, 8), (300, 15, 3, 16), (512, 16, 16, 16)],
)
def test_triton_sorts_as_the_reference_does(
    affinity: Any, experts: int, groups: int, groups_allowed: int, chosen: int
) -> None:
    """Whole numbers, of which many are equal; and biases and affinities that are infinite or no numbers."""
    how = Choice(chosen, affinity, groups, groups_allowed)
    x, weight, bias = (draw(seed, *shape).round() for seed, shape in enumerate([(70, 4), (experts, 4), (experts,)]))
    for spoilt in (False, True):
        if spoilt:
            bias[::5], bias[1::7], bias[3::11] = -math.inf, math.nan, math.inf
            x[3], x[4], x[5] = math.nan, 1e38, -1e38
        expert, gate, score, load, order, ends = route(x, weight, bias, how)
        choice = score + bias
        if groups > 1:
            choice = choice.masked_fill(~allowed(choice, how), -math.inf)
        assert expert.equal(highest(choice, chosen))
        assert_sorted(expert, load, order, ends)
        wanted = score.gather(1, expert)
        wanted = wanted / (wanted.sum(-1, keepdim=True) + 1e-20)
        torch.testing.assert_close(gate, wanted, rtol=1e-5, atol=0, equal_nan=True)  # a sum of 16 and a quotient


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("tokens", [1, 128, 129, 700])
def test_rows_are_sorted_by_expert_over_all_blocks(tokens: int) -> None:
    """More rows than a program sorts, more experts than it counts at once, and one that nearly all tokens choose."""
    x, weight, bias = draw(0, tokens, 6), draw(1, 300, 6), torch.zeros(300, device=DEVICE)
    bias[7] = 10.0
    routes = route(x, weight, bias, Choice(3))
    assert int(routes.load_E[7]) == tokens
    assert_sorted(routes.expert_TK, routes.load_E, routes.order_M, routes.ends_E)


@pytest.mark.skipif(not TRITON, reason="of the GPU's code")
def test_no_tokens_and_other_dtypes() -> None:
    x, weight, bias = draw(0, 0, 5).requires_grad_(), draw(1, 6, 5).requires_grad_(), torch.zeros(6, device=DEVICE)
    expert, gate, score, load, order, ends = route(x, weight, bias, Choice(2))
    assert (expert.shape, gate.shape, score.shape, load.tolist()) == ((0, 2), (0, 2), (0, 6), [0] * 6)
    assert (order.tolist(), ends.tolist()) == ([], [0] * 6)
    of_x, of_weight = torch.autograd.grad(gate.sum() + score.sum(), (x, weight))
    assert of_x.shape == (0, 5)
    assert not of_weight.any()
    before = kernels.report()["router"].get("torch", 0)
    given_ = draw(2, 3, 5).double(), weight.detach().double(), bias, Choice(2)
    assert all(a.equal(b) for a, b in zip(route(*given_), route_reference(*given_), strict=True))
    assert kernels.report()["router"]["torch"] == before + 1


@pytest.mark.usefixtures("cpu_path")
def test_two_runs_give_equal_bits() -> None:
    x, weight, bias = draw(0, 300, 16).requires_grad_(), draw(1, 24, 16).requires_grad_(), draw(2, 24)
    of_gate, of_score, how = draw(3, 300, 4), draw(4, 300, 24), Choice(4, groups=4, groups_allowed=2)

    def both_ways() -> list[torch.Tensor]:
        routes = route(x, weight, bias, how)
        gate, score = routes.gate_TK, routes.score_TE
        return [*routes, *torch.autograd.grad((gate, score), (x, weight), (of_gate, of_score))]

    assert all(a.equal(b) for a, b in zip(both_ways(), both_ways(), strict=True))
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")  # nothing waits for the host
        try:
            both_ways()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_threads_change_no_bit_of_the_gates_gradients(cpu_path: str) -> None:
    if cpu_path != "compiled" or TRITON:
        pytest.skip("torch's own products may cut sums by threads")
    x, weight, bias = draw(0, 300, 150).requires_grad_(), draw(1, 24, 150).requires_grad_(), draw(2, 24)
    seen, threads, runs = draw(3, 300, 4), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            gate = route(x, weight, bias, Choice(4)).gate_TK
            runs.append((gate, *torch.autograd.grad(gate, (x, weight), seen)))
    finally:
        torch.set_num_threads(threads)
    assert all(a.equal(b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("asked", ["gate", "score"])
@pytest.mark.parametrize(
    ("tokens", "experts", "width", "chosen"),
    [(130, 8, 12, 3), (130, 8, 12, 2), (3, 12, 40, 1), (601, 16, 128, 4), (530, 32, 300, 4), (261, 300, 37, 8)],
)
def test_a_gradient_of_one_result_alone_is_that_with_zeros_for_the_other(
    asked: str, tokens: int, experts: int, width: int, chosen: int
) -> None:
    """Also where products leave out the zeros: of fewer and more rows, columns and terms than a block."""
    x, weight = draw(0, tokens, width).requires_grad_(), (draw(1, experts, width) * width**-0.5).requires_grad_()
    _, gate, score, *_ = route(x, weight, torch.zeros(experts, device=DEVICE), Choice(chosen))
    seen = {"gate": (draw(2, *gate.shape), 0 * score), "score": (0 * gate, draw(3, *score.shape))}[asked]
    both = torch.autograd.grad((gate, score), (x, weight), seen, retain_graph=True)
    alone = {"gate": (gate, seen[0]), "score": (score, seen[1])}[asked]
    assert all(map(torch.equal, torch.autograd.grad(alone[0], (x, weight), alone[1]), both))


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("affinity", ["sigmoid", "softmax"])
def test_ties_and_what_is_infinite_among_biases_are_chosen_as_by_hand(affinity: Any, groups: int) -> None:
    """Whole numbers, of which many are equal, in groups that are no vectors' size."""
    x, weight, bias = draw(0, 120, 5).round(), draw(1, 44, 5).round(), draw(2, 44).round()
    bias[::9], bias[1::13] = -math.inf, math.inf
    how = Choice(5, affinity, groups, min(groups, 3))
    expert, _, score, load, order, ends = route(x, weight, bias, how)
    assert expert.tolist() == [chosen_by_hand(row, how) for row in (score + bias).tolist()]
    assert_sorted(expert, load, order, ends)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x_TD": torch.zeros(4)}, ValueError, "rank of x_TD is 1; wanted 2"),
        ({"x_TD": torch.zeros(4, 3)}, ValueError, "width of x_TD is 3; wanted 5"),
        ({"x_TD": torch.zeros(4, 5).double()}, TypeError, "dtype of x_TD is torch.float64; wanted torch.float32"),
        ({"bias_E": torch.zeros(5)}, ValueError, r"shape of bias_E is \(5,\); wanted \(6,\)"),
        ({"how": Choice(2, groups=4)}, ValueError, "groups is 4; wanted a divisor of 6 experts"),
        ({"how": Choice(2, groups=6)}, ValueError, "experts a group is 1; wanted >= 2"),
        ({"how": Choice(2, groups=3, groups_allowed=4)}, ValueError, "groups allowed is 4; wanted 1 to groups"),
        ({"how": Choice(5, groups=3, groups_allowed=2)}, ValueError, "experts chosen is 5; wanted 1 to 4"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given_ = {"x_TD": torch.zeros(4, 5), "weight_ED": torch.zeros(6, 5), "bias_E": torch.zeros(6), "how": Choice(2)}
    with pytest.raises(error, match=message):
        route(**{**given_, **change})
