"""Every operation called in every way: operands and gradients that lie otherwise, are empty or wanted one by one, other
default dtypes and devices, autocast, and numbers given as integers. Results are those of the plain call, or refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gristmill import kernels
from gristmill.kernels.compiled import compiled, needed
from gristmill.kernels.cross_entropy import linear_cross_entropy_mean, linear_log_probs_and_entropy
from gristmill.kernels.decoder_layers import MtpWeights, joined
from gristmill.kernels.fp8_gemm import (
    fp8_feed_forward,
    fp8_gemm,
    fp8_linear,
    quantise_blocks,
    quantise_columns,
    quantise_rows,
    swiglu_quantise,
)
from gristmill.kernels.grouped_gemm import grouped_gemm
from gristmill.kernels.likeliest import likeliest
from gristmill.kernels.linear import linear
from gristmill.kernels.mla_attention import attention, latent_attention
from gristmill.kernels.mla_decode import mla_decode
from gristmill.kernels.moe_mlp import moe_mlp
from gristmill.kernels.norm_rope import add_rms_norm, rms_norm, rotate, rotate_halves
from gristmill.kernels.optim import AdamW, adamw, orthogonalised
from gristmill.kernels.router import Choice, route
from gristmill.kernels.swiglu import swiglu

INTERPRETED = os.environ.get("GRISTMILL_KERNELS") == "gpu"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
TRITON = INTERPRETED or DEVICE == "cuda"
of_a_cpu = pytest.mark.skipif(TRITON, reason="of the paths of a CPU")
SLOW_THERE = [pytest.mark.slow] if INTERPRETED else []  # in the interpreter, which takes a minute for a CPU's seconds


def slow_there(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.slow(test) if INTERPRETED else test


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).to(DEVICE)


def whole(*numbers: int) -> Tensor:
    return torch.tensor(numbers, device=DEVICE)


def angles(*shape: int) -> list[Tensor]:
    return [draw(*shape).cos(), draw(*shape).sin()]


class Case(NamedTuple):
    """An operation, its operands, and how many of them have gradients: the first ones that are floating."""

    call: Callable[..., Any]
    operands: list[Tensor]
    graded: int = 0


def routed(*operands: Tensor, in_order: bool = False) -> Tensor:
    expert, experts = operands[3], len(operands[2])
    order = expert.flatten().argsort(stable=True) if in_order else None
    x, gate_up, down, expert, gate = operands
    return moe_mlp(x, expert, gate, gate_up, down, expert.flatten().bincount(minlength=experts), order)


def chosen(how: Choice) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *operands: tuple(route(*operands, how))


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, first: Tensor | None = None) -> Tensor:
    return attention(q, k, v, 0.5, mask, first)


def latent(q: Tensor, kv: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return latent_attention(q, kv, key, (cos, sin), 0.5)


def decoded(q: Tensor, kv: Tensor, cache: Tensor, start: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """With the cache as it lies behind it."""
    cos, sin, norm, up = others
    cache = torch.empty_strided(cache.shape, cache.stride(), dtype=cache.dtype, device=DEVICE).copy_(cache)
    return (*mla_decode(q, kv, cache, start, 9, (cos, sin), norm, 1e-6, up, 0.4, with_log=True), cache)


def packed_by(first: Tensor) -> Callable[..., Tensor]:
    return lambda q, k, v: attended(q, k, v, None, first)


EXPERT = whole(0, 1, 1, 2, 0, 2, 2, 1, 0, 1).view(5, 2)
SIDES = [draw(2, 5, 4, 6), draw(2, 5, 2, 6), draw(2, 5, 2, 3)]
STACKS = [draw(5, 4), draw(3, 6, 4), draw(3, 4, 3), EXPERT, draw(5, 2)]
PREDICTED = [draw(6, 5), draw(11, 5), whole(0, 10, 3, -1, 4, 3), draw(6).abs()]
CASES = {
    "linear": Case(linear, [draw(100, 7), draw(5, 7), draw(5)], 3),
    "linear, few rows": Case(linear, [draw(2, 3, 512), draw(300, 512)], 2),
    "rms_norm": Case(lambda x, w: rms_norm(x, w, 1e-6), [draw(3, 4, 6), draw(6)], 2),
    "add_rms_norm": Case(lambda x, y, w: add_rms_norm(x, y, w, 1e-6), [draw(3, 4, 6), draw(3, 4, 6, seed=1), draw(6)], 3),
    "rotate": Case(rotate, [draw(2, 3, 4, 6), *angles(2, 3, 1, 3)], 1),
    "rotate_halves": Case(rotate_halves, [draw(2, 3, 4, 6), *angles(2, 3, 4, 3)], 1),
    "swiglu": Case(swiglu, [draw(3, 4, 10)], 1),
    "grouped_gemm": Case(grouped_gemm, [draw(9, 7), draw(3, 5, 7), whole(2, 2, 9)], 2),
    "moe_mlp": Case(routed, STACKS, 4),
    "moe_mlp, in order": Case(partial(routed, in_order=True), STACKS, 4),
    "attention": Case(attended, SIDES, 3),
    "attention, masked": Case(attended, [*SIDES, draw(2, 5, 5) > -0.5], 3),
    "attention, packed": Case(packed_by(whole(0, 0, 2, 2, 2, 0, 1, 1, 3, 5).view(2, 5)), SIDES, 3),
    "latent_attention": Case(latent, [draw(2, 5, 3, 8), draw(2, 5, 3, 9), draw(2, 5, 4), *angles(2, 5, 2)], 3),
    "mla_decode": Case(
        decoded,
        [draw(2, 2, 3, 8), draw(2, 2, 9), draw(2, 9, 9), whole(3, 6), *angles(2, 2, 2), draw(5), draw(3, 7, 5)],
    ),
    "linear_cross_entropy_mean": Case(linear_cross_entropy_mean, PREDICTED, 2),
    "z_loss": Case(partial(linear_cross_entropy_mean, z_loss=0.1), PREDICTED, 2),
    "linear_log_probs": Case(linear_log_probs_and_entropy, [*PREDICTED[:2], whole(0, 10, 3, 1, 4, 3)], 2),
    "route": Case(chosen(Choice(2, groups=4, groups_allowed=2)), [draw(6, 5), draw(8, 5), draw(8)], 2),
    "route, many rows": Case(chosen(Choice(2, "softmax")), [draw(100, 5), draw(8, 5), draw(8)], 2),
    "likeliest": Case(likeliest, [draw(3, 4, 9)]),
    "orthogonalised": Case(orthogonalised, [draw(2, 6, 4)]),
    "quantise_rows": Case(quantise_rows, [draw(3, 256)]),
    "quantise_columns": Case(quantise_columns, [draw(3, 256), whole(1, 3)]),
    "quantise_blocks": Case(quantise_blocks, [draw(2, 128, 256)]),
    "swiglu_quantise": Case(swiglu_quantise, [draw(3, 512)]),
    "fp8_linear": Case(fp8_linear, [draw(3, 100), draw(60, 100)], 2),
    "fp8_feed_forward": Case(fp8_feed_forward, [draw(5, 10), draw(2, 8, 10), draw(2, 10, 4), whole(2, 5)], 3),
}  # fmt: skip
every = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=SLOW_THERE if name.startswith(("fp8", "moe")) else []) for name, case in CASES.items()],
    ids=CASES.keys(),
)


def as_it_is(x: Tensor) -> Tensor:
    return x


def behind_one(x: Tensor) -> Tensor:
    """At an address that is of one number, and of no vector."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def by_columns(x: Tensor) -> Tensor:
    return x if x.ndim < 2 else x.transpose(-1, -2).contiguous().transpose(-1, -2)


def by_the_first(x: Tensor) -> Tensor:
    """The first dimension innermost but one: rows whole, but not in order."""
    return x if x.ndim < 3 else x.transpose(0, -2).contiguous().transpose(0, -2)


def of_pairs(x: Tensor) -> Tensor:
    return torch.stack((x, x), -1)[..., 0]


def of_a_wider_one(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (1, 2))[..., 1:-2] if x.ndim else x


LAYOUTS = [
    of_pairs,
    *(pytest.param(lie, marks=SLOW_THERE) for lie in (behind_one, by_columns, by_the_first, of_a_wider_one)),
]


def results_of(
    case: Case, operands: list[Tensor], lie: Callable[[Tensor], Tensor] = as_it_is, *, of: Any = None
) -> list:
    """Results, and the gradients in the operands that have any, or in those `of` these places."""
    places = [i for i, x in enumerate(operands) if x.is_floating_point()][: case.graded] if of is None else of
    operands = [x.detach().requires_grad_(i in places) for i, x in enumerate(operands)]
    made = case.call(*operands)
    results = [made] if isinstance(made, Tensor) else list(made)
    return results + gradients_of(results, [operands[i] for i in places], lie)


def gradients_of(
    results: list[Tensor], leaves: list[Tensor], lie: Callable[[Tensor], Tensor] = as_it_is
) -> list[Tensor]:
    out = [r for r in results if r.requires_grad]
    return list(torch.autograd.grad(out, leaves, [lie(draw(*r.shape).to(r.dtype)) for r in out])) if leaves else []


def alike(got: list[Tensor], wanted: list[Tensor]) -> None:
    """Sums of at most 512 numbers near one, in whatever order a library takes them by their strides."""
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        mine, theirs = (t.detach().float() if t.is_floating_point() else t for t in (mine, theirs))
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-4)


def to_the_bit(got: list[Tensor], wanted: list[Tensor]) -> None:
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.float().equal(theirs.float())


@every
@pytest.mark.parametrize("lie", LAYOUTS)
@pytest.mark.usefixtures("cpu_path")
def test_operands_and_gradients_lie_in_any_way(case: Case, lie: Callable[[Tensor], Tensor]) -> None:
    wanted = results_of(case, case.operands)
    for place, operand in enumerate(case.operands):
        assert lie(operand).equal(operand)
        operands = [*case.operands[:place], lie(operand), *case.operands[place + 1 :]]
        alike(results_of(case, operands), wanted)
    if case.graded:
        alike(results_of(case, case.operands, lie), wanted)


@every
@slow_there
@pytest.mark.usefixtures("cpu_path")
def test_one_number_stands_for_many(case: Case) -> None:
    """Operands that are repeated without memory, and a gradient as that of a sum is."""
    for place, operand in enumerate(case.operands):
        if not operand.is_floating_point() or (case.call is decoded and place == 2):  # a cache that is written
            continue
        for dim in range(operand.ndim):
            spread = operand.narrow(dim, 0, 1).expand(operand.shape)
            both = ([*case.operands[:place], x, *case.operands[place + 1 :]] for x in (spread, spread.contiguous()))
            alike(*(results_of(case, operands) for operands in both))
    one = torch.tensor(0.7, device=DEVICE)
    spread = results_of(case, case.operands, lambda x: one.to(x.dtype).expand(x.shape))
    alike(spread, results_of(case, case.operands, lambda x: torch.full_like(x, 0.7)))


@every
@pytest.mark.usefixtures("cpu_path")
def test_two_runs_and_each_gradient_alone_give_equal_bits(case: Case) -> None:
    wanted = results_of(case, case.operands)
    to_the_bit(results_of(case, case.operands), wanted)
    places = [i for i, x in enumerate(case.operands) if x.is_floating_point()][: case.graded]
    for number, place in enumerate(places):
        alone = results_of(case, case.operands, of=[place])
        to_the_bit(alone[-1:], [wanted[number - len(places)]])


@every
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.usefixtures("cpu_path")
def test_without_gradients(case: Case, mode: Callable[[], AbstractContextManager[None]]) -> None:
    wanted = results_of(case, case.operands)
    with mode():
        got = case.call(*(x.clone() for x in case.operands))
    results = [got] if isinstance(got, Tensor) else list(got)
    alike(results, wanted[: len(results)])


@every
@slow_there
@pytest.mark.usefixtures("cpu_path")
def test_what_is_the_default_does_not_matter(case: Case) -> None:
    """Of what results and tables are made has their own dtype and device, not those that others are made of."""
    if DEVICE == "cuda":
        pytest.skip("a GPU's own device")
    wanted, before = results_of(case, case.operands), torch.get_default_dtype()
    grads = [draw(*r.shape).to(r.dtype) for r in wanted if r.requires_grad]
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta") if not INTERPRETED else nullcontext():  # whose interpreter makes tensors of its own
            places = [i for i, x in enumerate(case.operands) if x.is_floating_point()][: case.graded]
            operands = [x.detach().requires_grad_(i in places) for i, x in enumerate(case.operands)]
            made = case.call(*operands)
            results = [made] if isinstance(made, Tensor) else list(made)
            if places:
                out = [r for r in results if r.requires_grad]
                results += torch.autograd.grad(out, [operands[i] for i in places], grads)
    finally:
        torch.set_default_dtype(before)
    to_the_bit(results, wanted)


@every
@pytest.mark.usefixtures("cpu_path")
def test_autocast_changes_nothing(case: Case) -> None:
    places = [i for i, x in enumerate(case.operands) if x.is_floating_point()][: case.graded]
    operands = [x.detach().requires_grad_(i in places) for i, x in enumerate(case.operands)]
    with torch.autocast(DEVICE, torch.bfloat16):
        made = case.call(*operands)
    results = [made] if isinstance(made, Tensor) else list(made)
    results += gradients_of(results, [operands[i] for i in places])
    to_the_bit(results, results_of(case, case.operands))


def sized(a: int, b: int, c: int) -> dict[str, Case]:
    """Operations of these sizes, each of which may be 0."""
    none = torch.zeros(a, dtype=torch.int64, device=DEVICE)
    rows, heads = draw(a, c, b), [draw(a, c, 2, b), draw(a, c, 1, b), draw(a, c, 1, c)]
    return {
        "linear": Case(linear, [draw(96 * a, b), draw(c, b)], 2),
        "linear, few rows": Case(linear, [draw(a, b), draw(c, b)], 2),
        "rms_norm": Case(lambda x, w: rms_norm(x, w, 1e-6), [rows, draw(b)], 2),
        "add_rms_norm": Case(lambda x, y, w: add_rms_norm(x, y, w, 1e-6), [rows, rows + 1, draw(b)], 3),
        "rotate": Case(rotate, [draw(a, c, 2 * b), *angles(a, 1, b)], 1),
        "rotate_halves": Case(rotate_halves, [draw(a, c, 2 * b), *angles(a, 1, b)], 1),
        "swiglu": Case(swiglu, [draw(a, c, 2 * b)], 1),
        "grouped_gemm": Case(grouped_gemm, [draw(a, b), draw(3, c, b), whole(0, a, a)], 2),
        "moe_mlp": Case(routed, [draw(a, b), draw(2, 2 * c, b), draw(2, b, c), none[:, None], draw(a, 1)], 4),
        "attention": Case(attended, heads, 3),
        "latent_attention": Case(
            latent, [draw(a, c, 2, b + 2), draw(a, c, 2, b + 3), draw(a, c, 2), *angles(a, c, 1)], 3
        ),
        "orthogonalised": Case(orthogonalised, [rows]),
        "fp8_linear": Case(fp8_linear, [draw(a, b), draw(c, b)], 2),
        "fp8_feed_forward": Case(fp8_feed_forward, [draw(a, b), draw(2, 2 * c, b), draw(2, b, c), whole(0, a)], 3),
        **({"likeliest": Case(likeliest, [draw(a, b, c)])} if c else {}),
        **({"route": Case(chosen(Choice(1)), [draw(100 * a, b), draw(c, b), draw(c)], 2)} if c else {}),
        **({"head": Case(linear_cross_entropy_mean, [draw(a, b), draw(c, b), none, draw(a)], 2)} if c or not a else {}),
        **({"log": Case(linear_log_probs_and_entropy, [draw(a, b), draw(c, b), none], 2)} if c or not a else {}),
    }


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("sizes", product((0, 1), repeat=3), ids=str)
def test_sizes_of_none_and_of_one(sizes: tuple[int, int, int]) -> None:
    for case in sized(*sizes).values():
        got = results_of(case, case.operands)
        with kernels.use_reference():
            alike(got, results_of(case, case.operands))


@of_a_cpu
def test_attention_without_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="latent_attention: heads of q_BSHQ is 0; wanted 1 or more"):
        latent(draw(1, 2, 0, 4), draw(1, 2, 0, 5), draw(1, 2, 2), *angles(1, 2, 1))


@of_a_cpu
@pytest.mark.skipif(compiled("optim/cpu.cpp") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("numbers", [{"beta1": 0, "beta2": 0}, {"rate": 1, "decay": 0}, {"eps": 1}], ids=str)
def test_an_update_by_whole_numbers(numbers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first of a process, by which the kinds of a compiled function's arguments are known."""
    runs = []
    for kind in (int, float):
        monkeypatch.setattr(needed("optim/cpu.cpp"), "_functions", {})
        lists = [[draw(9, seed=i).abs()] for i in range(4)]
        adamw(*lists, AdamW(**{"rate": 0.1, "step": 2, **{name: kind(n) for name, n in numbers.items()}}))
        runs.append([t for tensors in lists for t in tensors])
    to_the_bit(*runs)


@of_a_cpu
@pytest.mark.skipif(compiled("mla_attention/cpu.cpp") is None, reason="there is no C++ compiler")
def test_attention_by_a_whole_number(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for scale in (1, 1.0):
        monkeypatch.setattr(needed("mla_attention/cpu.cpp"), "_functions", {})
        runs.append(results_of(Case(lambda q, k, v, scale=scale: attention(q, k, v, scale), SIDES, 3), SIDES))
    to_the_bit(*runs)


def test_an_update_before_the_first_step_is_refused() -> None:
    lists = [[draw(3).abs()] for _ in range(4)]
    with pytest.raises(ValueError, match="adamw: step is 0; wanted 1 or more"):
        adamw(*lists, AdamW(0.1, 0))
    to_the_bit([t for tensors in lists for t in tensors], [draw(3).abs()] * 4)


@of_a_cpu
@pytest.mark.skipif(compiled("decoder_layers/cpu.cpp") is None, reason="there is no C++ compiler")
def test_an_mtp_modules_states_lie_in_any_way() -> None:
    hidden, embedding, norm, join = draw(2, 3, 4), draw(2, 3, 4, seed=1), draw(4), draw(4, 8)
    weights = MtpWeights(norm, norm, join)
    wanted = joined(hidden, embedding, norm, weights, 1e-6)
    for lie in (by_the_first, by_columns, of_pairs):
        assert joined(lie(hidden), lie(embedding), norm, weights, 1e-6).equal(wanted)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_ends_of_fewer_bits(dtype: torch.dtype) -> None:
    """Rounded up to whole tiles they would leave the range of their dtype."""
    x, w, ends = draw(120, 128), draw(2, 4, 128), whole(3, 120)
    to_the_bit(list(quantise_columns(x, ends.to(dtype))), list(quantise_columns(x, ends)))
    to_the_bit([grouped_gemm(x, w, ends.to(dtype))], [grouped_gemm(x, w, ends)])
    grouped = [fp8_feed_forward(x, draw(2, 8, 128), draw(2, 128, 4), e) for e in (ends, ends.to(dtype))]
    assert grouped[0].equal(grouped[1])


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_lies_behind_a_row_is_not_looked_at(dtype: torch.dtype) -> None:
    """Places that no token was put at yet may hold anything."""
    q, kv, cache, start, cos, sin, norm, up = CASES["mla_decode"].operands
    q, kv, cache, norm, up = (t.to(dtype) for t in (q, kv, cache, norm, up))
    results = []
    for behind in (0.0, float("nan"), float("inf")):
        spoilt = cache.clone()
        for row, place in enumerate(start.tolist()):
            spoilt[row, place + q.shape[1] :] = behind
        results.append(mla_decode(q, kv, spoilt, start, 9, (cos, sin), norm, 1e-6, up, 0.4))
    assert results[0].isfinite().all()
    to_the_bit(results[1:], results[:1] * 2)


def test_an_fp8_product_is_differentiable_once() -> None:
    x, w = draw(3, 100).requires_grad_(), draw(60, 100).requires_grad_()
    (grad,) = torch.autograd.grad(fp8_linear(x, w).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_an_fp8_product_in_integers_is_refused() -> None:
    (q, scale), (w, w_scale) = quantise_rows(draw(3, 128)), quantise_blocks(draw(1, 128, 128))
    with pytest.raises(TypeError, match=r"fp8_gemm: dtype is torch.int32; wanted a floating dtype"):
        fp8_gemm(q, scale, w[0], w_scale[0], torch.int32)
