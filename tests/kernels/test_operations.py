"""The operations of torch.library: their schemas and shapes, graphs against what runs without them, and gradients.

`opcheck` runs an operation under modes of torch's that see whether it writes where it does not say, whether what it
says of shapes and layout holds, and whether it is right within AOTAutograd, with dynamic shapes too.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gristmill import kernels
from gristmill.kernels.compiled import compiled
from gristmill.kernels.cross_entropy import linear_cross_entropy_mean, linear_log_probs_and_entropy
from gristmill.kernels.fp8_gemm import (
    fp8_gemm,
    fp8_grouped_gemm,
    fp8_weight_gradient,
    quantise_blocks,
    quantise_columns,
    quantise_rows,
    swiglu_quantise,
)
from gristmill.kernels.fp8_gemm.linear import fp8_feed_forward, fp8_linear
from gristmill.kernels.grouped_gemm import grouped_gemm
from gristmill.kernels.likeliest import likeliest
from gristmill.kernels.linear import linear
from gristmill.kernels.mla_attention import attention, latent_attention, native
from gristmill.kernels.mla_decode import mla_decode
from gristmill.kernels.moe_mlp import moe_mlp
from gristmill.kernels.norm_rope import add_rms_norm, rms_norm, rotate, rotate_halves
from gristmill.kernels.norm_rope import native as native_norm
from gristmill.kernels.optim import AdamW, Origin, adamw, orthogonalised, round_stochastically
from gristmill.kernels.router import Choice, route
from gristmill.kernels.swiglu import swiglu

OPERATIONS = torch.ops.gristmill
INTERPRETED = os.environ.get("GRISTMILL_KERNELS") == "gpu"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
TRITON = INTERPRETED or DEVICE == "cuda"


class Case(NamedTuple):
    """A public function, its operation, arguments of both in a dtype, and which results of the operation they share."""

    public: Callable[..., Any]
    operation: Any
    arguments: Callable[[torch.dtype], tuple[Any, ...]]
    given: Callable[..., tuple[Any, ...]] = lambda *arguments: arguments  # the operation's arguments of the function's
    results: Callable[[Any], Any] = lambda results: results
    float32: bool = False  # results or sums, whatever goes in


def draw(*shape: int, dtype: torch.dtype = torch.float32, graded: bool = True) -> Tensor:
    """The same for the same shape."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    return numbers.to(DEVICE, dtype).requires_grad_(graded)


def whole(*numbers: int) -> Tensor:
    return torch.tensor(numbers, device=DEVICE)


def angles(*shape: int) -> tuple[Tensor, Tensor]:
    turned = draw(*shape, graded=False)
    return turned.cos(), turned.sin()


def routed(dtype: torch.dtype) -> tuple[Any, ...]:
    tokens, experts, chosen, width, hidden = 5, 3, 2, 4, 3
    expert = draw(tokens, experts, graded=False).topk(chosen).indices
    stacks = draw(experts, 2 * hidden, width, dtype=dtype), draw(experts, width, hidden, dtype=dtype)
    return (
        draw(tokens, width, dtype=dtype),
        expert,
        draw(tokens, chosen, dtype=dtype),
        *stacks,
        expert.flatten().bincount(),
    )


def sorted_(dtype: torch.dtype) -> tuple[Any, ...]:
    given = routed(dtype)
    return *given, given[1].flatten().argsort(stable=True)


def attended(dtype: torch.dtype) -> tuple[Any, ...]:
    return draw(2, 5, 4, 4, dtype=dtype), draw(2, 5, 2, 4, dtype=dtype), draw(2, 5, 2, 8, dtype=dtype), 0.5


def masked(dtype: torch.dtype) -> tuple[Any, ...]:
    return *attended(dtype), draw(2, 5, 5, graded=False) > -0.5


def packed(dtype: torch.dtype) -> tuple[Any, ...]:
    return *attended(dtype), None, torch.stack((whole(0, 0, 2, 2, 2), whole(0, 1, 1, 1, 4)))


def latent(dtype: torch.dtype) -> tuple[Any, ...]:
    return (
        draw(1, 4, 2, 8, dtype=dtype),
        draw(1, 4, 2, 12, dtype=dtype),
        draw(1, 4, 4, dtype=dtype),
        angles(1, 4, 2),
        0.5,
    )


def predicted(dtype: torch.dtype) -> tuple[Any, ...]:
    return draw(5, 4, dtype=dtype), draw(7, 4, dtype=dtype), whole(0, 6, 3, 3, 1)


def unpaired(*arguments: Any) -> tuple[Any, ...]:
    """With cosines and sines one by one."""
    return tuple(x for one in arguments for x in (one if isinstance(one, tuple) else (one,)))


def numbered(*arguments: Any) -> tuple[Any, ...]:
    """With the numbers of the last one by one."""
    return *arguments[:-1], *dataclasses.astuple(arguments[-1])


def first(results: tuple[Tensor, ...]) -> Tensor:
    return results[0]


def of_route(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    gate, score, expert, *counted = results
    return expert, gate, score, *counted


def gates(*arguments: Any) -> Tensor:
    """Of `route` what alone has a gradient where no loss is made of the affinities."""
    return route(*arguments).gate_TK


def rotary(dtype: torch.dtype) -> tuple[Any, ...]:
    return draw(2, 3, 2, 6, dtype=dtype), *angles(2, 3, 1, 3)


def added(dtype: torch.dtype) -> tuple[Any, ...]:
    return (
        draw(2, 3, 5, dtype=dtype),
        draw(2, 3, 5, dtype=dtype).detach().mul_(2).requires_grad_(),
        draw(5, dtype=dtype),
        1e-6,
    )


def gate(how: Choice) -> Callable[[torch.dtype], tuple[Any, ...]]:
    return lambda dtype: (draw(5, 4, dtype=dtype), draw(8, 4, dtype=dtype), draw(8, graded=False), how)


GRADED = {
    "linear": Case(linear, OPERATIONS.linear.default, lambda dtype: (draw(3, 32, 4, dtype=dtype), draw(5, 4, dtype=dtype))),
    "rms_norm": Case(
        rms_norm, OPERATIONS.rms_norm.default, lambda dtype: (draw(2, 3, 5, dtype=dtype), draw(5, dtype=dtype), 1e-6),
        results=first,
    ),
    "add_rms_norm": Case(
        add_rms_norm, OPERATIONS.add_rms_norm.default,
        added,
        results=lambda results: results[:2],
    ),
    "rotate": Case(rotate, OPERATIONS.rotate.default, rotary),
    "rotate_halves": Case(rotate_halves, OPERATIONS.rotate_halves.default, rotary),
    "swiglu": Case(swiglu, OPERATIONS.swiglu.default, lambda dtype: (draw(2, 3, 6, dtype=dtype),)),
    "grouped_gemm": Case(
        grouped_gemm, OPERATIONS.grouped_gemm.default,
        lambda dtype: (draw(5, 4, dtype=dtype), draw(3, 2, 4, dtype=dtype), whole(2, 2, 5)), float32=TRITON,
    ),
    "moe_mlp": Case(moe_mlp, OPERATIONS.moe_mlp.default, routed, results=first, float32=TRITON),
    "moe_mlp, sorted": Case(moe_mlp, OPERATIONS.moe_mlp.default, sorted_, results=first, float32=TRITON),
    "attention": Case(attention, OPERATIONS.attention.default, attended, results=first),
    "attention, masked": Case(attention, OPERATIONS.attention.default, masked, results=first),
    "attention, packed": Case(attention, OPERATIONS.attention.default, packed, results=first),
    "latent_attention": Case(latent_attention, OPERATIONS.latent_attention.default, latent, unpaired, first),
    "linear_cross_entropy_mean": Case(
        linear_cross_entropy_mean, OPERATIONS.linear_cross_entropy_mean.default,
        lambda dtype: (*predicted(dtype), draw(5, graded=False).abs()), results=first, float32=True,
    ),
    "z_loss": Case(
        partial(linear_cross_entropy_mean, z_loss=0.1), OPERATIONS.linear_cross_entropy_mean.default,
        lambda dtype: (*predicted(dtype), draw(5, graded=False).abs()), lambda *given: (*given, 0.1), first, True,
    ),
    "linear_log_probs_and_entropy": Case(
        linear_log_probs_and_entropy, OPERATIONS.linear_log_probs_and_entropy.default,
        lambda dtype: (*predicted(dtype), 0.7), float32=True,
    ),
    "route": Case(route, OPERATIONS.route.default, gate(Choice(2, groups=4, groups_allowed=2)), numbered, of_route),
    "route, gates": Case(gates, OPERATIONS.route.default, gate(Choice(2)), numbered, first),
    "route, softmax": Case(
        route, OPERATIONS.route.default, gate(Choice(2, "softmax", normalised=False, scale=2.0)), numbered, of_route
    ),
}  # fmt: skip
CASES = pytest.mark.parametrize("case", GRADED.values(), ids=GRADED.keys())


@pytest.fixture(autouse=True)
def _own_graphs() -> None:
    """No test counts towards another's limit of recompilations."""
    torch._dynamo.reset()


@pytest.fixture(params=["compiled", "torch"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On both paths of a CPU; in the second, what is torch's alone is captured itself."""
    monkeypatch.setattr("gristmill.kernels.compiled.TORCH_ALONE", request.param == "torch")


def captured(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def listed(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def both_ways(function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
    """All results, and the gradients of the sum of their squares."""
    results = listed(function(*arguments))
    leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    total = sum(r.square().sum() for r in results if r.requires_grad)
    assert isinstance(total, Tensor)
    return [*(r.detach() for r in results), *torch.autograd.grad(total, leaves)]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        assert mine.float().equal(other.float())


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck_of_what_has_gradients(case: Case, dtype: torch.dtype) -> None:
    """In float32 of the compiled code, where there is a compiler, in float64 of torch's."""
    torch.library.opcheck(case.operation, case.given(*case.arguments(dtype)))


@CASES
@pytest.mark.usefixtures("_path")
def test_a_graph_gives_the_same_bits(case: Case) -> None:
    arguments, graph = case.arguments(torch.float32), captured(case.public)
    equal(both_ways(graph, arguments), both_ways(case.public, arguments))
    with torch.no_grad():
        equal(listed(graph(*arguments)), listed(case.public(*arguments)))


@CASES
def test_the_operation_gives_the_same_bits_by_itself(case: Case) -> None:
    arguments = case.arguments(torch.float32)

    def operation(*arguments: Any) -> Any:
        return case.results(case.operation(*case.given(*arguments)))

    equal(both_ways(operation, arguments), both_ways(case.public, arguments))
    with kernels.use_reference():
        wanted = both_ways(case.public, arguments)
        for mine, other in zip(both_ways(operation, arguments), wanted, strict=True):
            # the reference's own gradient, but from sums that torch may take in another order within an operation
            torch.testing.assert_close(mine, other)


@CASES
def test_gradients_are_those_of_differences(case: Case) -> None:
    arguments = case.arguments(torch.float64)

    def differentiable(*arguments: Any) -> tuple[Tensor, ...]:
        results = listed(case.results(case.operation(*case.given(*arguments))))
        return tuple(r for r in results if r.is_floating_point())

    # where it is float32, 1e-7 of it over a step of 1e-2 is 1e-5, and the step's own error about 1e-4
    how = {"eps": 1e-2, "atol": 1e-3, "rtol": 1e-3} if case.float32 else {}
    assert torch.autograd.gradcheck(differentiable, arguments, **how)
    assert torch.autograd.gradcheck(captured(differentiable), arguments, **how, fast_mode=True)


@pytest.mark.skipif(compiled(native.SOURCE) is None, reason="attention does not compile here")
def test_opcheck_of_what_recomputation_keeps() -> None:
    q, k, v, scale = (x.detach() if isinstance(x, Tensor) else x for x in attended(torch.float32))
    inputs, seen = native.of_whole(q.cpu(), k.cpu(), v.cpu(), None, None)
    torch.library.opcheck(OPERATIONS.attention_compiled.default, (*inputs, seen, scale))


@pytest.mark.skipif(not INTERPRETED, reason="float32 is for the interpreter")
def test_opcheck_of_what_recomputation_keeps_on_a_gpu() -> None:
    q, k, v, scale = (x.detach().transpose(1, 2) if isinstance(x, Tensor) else x for x in attended(torch.float32))
    torch.library.opcheck(OPERATIONS.attention_in_triton.default, (q, k, v, None, None, None, scale))


def test_products_of_rounded_operands_and_a_bias() -> None:
    arguments = draw(3, 32, 4), draw(5, 4), draw(5)

    def rounded(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return linear(x, w, bias, rounded=True)

    equal(both_ways(captured(rounded), arguments), both_ways(rounded, arguments))
    assert not rounded(*arguments).equal(linear(*arguments))


def test_what_a_graph_runs_is_counted_and_chosen_when_it_runs() -> None:
    graph, arguments = captured(grouped_gemm), GRADED["grouped_gemm"].arguments(torch.float32)
    graph(*arguments)
    before = kernels.report()["grouped_gemm"]
    graph(*arguments)
    with kernels.use_reference():
        graph(*arguments)
    after = kernels.report()["grouped_gemm"]
    ran = {how: count - before.get(how, 0) for how, count in after.items() if count > before.get(how, 0)}
    assert ran.pop("reference") == 1
    assert list(ran.values()) == [1]


def test_a_backward_pass_outside_of_the_reference_is_seen_to_be_wrong() -> None:
    """Its forward pass has not kept what it needs; in another thread, but within, it is right."""
    x, weight, eps = GRADED["rms_norm"].arguments(torch.float32)
    wanted = torch.autograd.grad(rms_norm(x, weight, eps).sum(), (x, weight))
    with kernels.use_reference():
        result = OPERATIONS.rms_norm(x, weight, eps)[0].sum()
        with ThreadPoolExecutor(1) as other:
            got = other.submit(torch.autograd.grad, result, (x, weight), retain_graph=True).result()
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    outside = torch.autograd.grad(result, (x, weight))
    if compiled(native_norm.SOURCE) is not None or TRITON:
        assert not any(grad.isfinite().any() for grad in outside)


def test_numbers_are_checked_when_a_graph_runs() -> None:
    graph, (x, w, _) = captured(grouped_gemm), GRADED["grouped_gemm"].arguments(torch.float32)
    graph(x, w, whole(2, 2, 5))
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="ascending ends"):
            graph(x, w, whole(3, 2, 5))


def quantised() -> tuple[Tensor, Tensor, Tensor]:
    return draw(6, 256, graded=False), draw(2, 128, 256, graded=False), whole(2, 6)


def test_opcheck_of_quantisation(monkeypatch: pytest.MonkeyPatch) -> None:
    allclose = torch.allclose  # with which opcheck looks for changed inputs; it does not take E4M3

    def wide(a: Tensor, b: Tensor, **how: Any) -> bool:
        return allclose(*(t.float() if t.dtype == torch.float8_e4m3fn else t for t in (a, b)), **how)

    monkeypatch.setattr(torch, "allclose", wide)
    x, w, ends = quantised()
    columns = quantise_columns(x, ends)
    for operation, arguments in {
        OPERATIONS.quantise_rows: (x,),
        OPERATIONS.swiglu_quantise: (x,),
        OPERATIONS.quantise_columns: (x, ends),
        OPERATIONS.quantise_blocks: (w,),
        OPERATIONS.fp8_grouped_gemm: (*quantise_rows(x), *quantise_blocks(w), ends, torch.float32),
        OPERATIONS.fp8_weight_gradient: (*columns, *columns, ends),
    }.items():
        torch.library.opcheck(operation.default, arguments)


def test_a_graph_of_fp8_gives_the_same_bits() -> None:
    def products(x: Tensor, w: Tensor, ends: Tensor) -> list[Tensor]:
        rows, (blocks, scales), columns = quantise_rows(x), quantise_blocks(w), quantise_columns(x, ends)
        plain, grouped = fp8_gemm(*rows, blocks[0], scales[0]), fp8_grouped_gemm(*rows, blocks, scales, ends)
        return [plain, grouped, fp8_weight_gradient(*columns, *columns, ends), *swiglu_quantise(x)]

    equal(captured(products)(*quantised()), products(*quantised()))
    matrix = draw(6, 100), draw(130, 100)
    equal(both_ways(captured(fp8_linear), matrix), both_ways(fp8_linear, matrix))
    experts = draw(6, 100), draw(2, 60, 100), draw(2, 100, 30), whole(2, 6)
    equal(both_ways(captured(fp8_feed_forward), experts), both_ways(fp8_feed_forward, experts))


def decoded(paged: bool) -> tuple[Any, ...]:
    """Of two rows, whose places lie in a slot each or in pages of four."""
    batch, length, heads, width, turning, value, latents, places = 2, 1, 3, 4, 4, 5, 8, 4 if paged else 6
    table = (torch.stack((whole(2, 0), whole(1, 3))),) if paged else ()
    return (
        draw(batch, length, heads, width + turning, graded=False), draw(batch, length, latents + turning, graded=False),
        draw(4 if paged else batch, places, latents + turning, graded=False), whole(1, 5), 6, angles(batch, length, turning // 2),
        draw(latents, graded=False), 1e-6, draw(heads, width + value, latents, graded=False), 0.5, *table,
    )  # fmt: skip


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("paged", [False, True])
def test_a_graph_that_writes_a_cache(paged: bool) -> None:
    torch.library.opcheck(OPERATIONS.mla_decode.default, unpaired(*decoded(paged)))
    ours, theirs = decoded(paged), decoded(paged)
    equal([captured(mla_decode)(*ours), ours[2]], [mla_decode(*theirs), theirs[2]])
    assert not ours[2].equal(decoded(paged)[2])


def stepped() -> list[list[Tensor]]:
    """Parameters, gradients and both moments."""
    return [[draw(5, graded=False).abs() + i, draw(3, 4, graded=False).abs() + i] for i in range(4)]


ORIGINS = [Origin(3), Origin(7, 2**33)]


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("seed", [None, 11])
def test_a_graph_that_writes_parameters_and_moments(seed: int | None) -> None:
    how, places = AdamW(1e-3, step=2, decay=0.1, seed=seed), ([o.stream for o in ORIGINS], [o.first for o in ORIGINS])

    def lists() -> list[list[Tensor]]:
        parameters, gradients, *moments = stepped()
        return [parameters, gradients, *([m.bfloat16() if seed else m for m in moment] for moment in moments)]

    torch.library.opcheck(OPERATIONS.adamw.default, (*lists(), *dataclasses.astuple(how), *places))
    ours, theirs = lists(), lists()
    captured(lambda *given: adamw(*given, how, ORIGINS))(*ours)
    adamw(*theirs, how, ORIGINS)
    for mine, other, before, written in zip(ours, theirs, lists(), (True, False, True, True), strict=True):
        equal(mine, other)
        assert all(m.equal(b) != written for m, b in zip(mine, before, strict=True))


def test_all_numbers_of_an_update_go_into_its_operation() -> None:
    arguments = [argument.name for argument in OPERATIONS.adamw.default._schema.arguments]
    assert arguments[4:-2] == [field.name for field in dataclasses.fields(AdamW)]


@pytest.mark.usefixtures("_path")
def test_a_graph_that_rounds_stochastically() -> None:
    exact = [draw(5, graded=False), draw(3, 4, graded=False)]
    ours, theirs, checked = ([torch.zeros_like(t, dtype=torch.bfloat16) for t in exact] for _ in range(3))
    places = [o.stream for o in ORIGINS], [o.first for o in ORIGINS]
    torch.library.opcheck(OPERATIONS.round_stochastically.default, (exact, checked, 5, 1, *places))
    captured(lambda: round_stochastically(exact, ours, 5, 1, ORIGINS))()
    round_stochastically(exact, theirs, 5, 1, ORIGINS)
    equal(ours, theirs)


@pytest.mark.usefixtures("_path")
def test_newton_schulz() -> None:
    matrices = draw(3, 6, 4, graded=False)
    torch.library.opcheck(OPERATIONS.orthogonalised.default, (matrices,))
    equal(listed(captured(orthogonalised)(matrices)), listed(orthogonalised(matrices)))


@pytest.mark.usefixtures("_path")
def test_the_likeliest_token() -> None:
    logits = draw(3, 7, graded=False)
    torch.library.opcheck(OPERATIONS.likeliest.default, (logits,))
    equal(listed(captured(likeliest)(logits)), listed(likeliest(logits)))
