"""More numbers than 31 bits count: rows that are refused, operands that reach as far in memory that is hardly touched,
stacks of matrices of which one is read, and the last program of a grid."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gristmill.kernels.cross_entropy import linear_cross_entropy_mean, linear_log_probs
from gristmill.kernels.fp8_gemm import (
    fp8_gemm,
    fp8_weight_gradient,
    quantise_blocks,
    quantise_columns,
    quantise_rows,
)
from gristmill.kernels.grouped_gemm import grouped_gemm
from gristmill.kernels.linear import few, linear, multiply
from gristmill.kernels.mla_attention import attention, latent_attention
from gristmill.kernels.mla_decode import mla_decode
from gristmill.kernels.moe_mlp import moe_mlp
from gristmill.kernels.norm_rope import add_rms_norm, rms_norm, rotate, rotate_halves
from gristmill.kernels.norm_rope.layout import in_rows
from gristmill.kernels.optim import AdamW, adamw
from gristmill.kernels.router import Choice, route
from gristmill.kernels.swiglu import swiglu

INTERPRETED = os.environ.get("GRISTMILL_KERNELS") == "gpu"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
TRITON = INTERPRETED or DEVICE == "cuda"
BEYOND = 2**31
NORESERVE = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE: more may be mapped than the machine has


@pytest.fixture(autouse=True)
def _watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter tells of overflows in 32 bits; and it does not copy the memory of operands onto itself."""
    if INTERPRETED:
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        monkeypatch.setattr(builder, "options", replace(builder.options, debug=True))
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def untouched(*shape: int, dtype: torch.dtype = torch.float32, read: bool = False) -> Tensor:
    """Zeros, whose memory a CPU takes page by page where something is written; if all is to be read, in large ones."""
    count = torch.Size(shape).numel()
    if DEVICE == "cuda":
        return torch.zeros(shape, dtype=dtype, device=DEVICE)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    if read and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def apart(tensor: Tensor, dim: int) -> Tensor:
    """The same numbers, those along `dim` so far apart that the last lie 2³¹ numbers behind the first. As much memory
    lies before these, where an offset that wrapped would point."""
    size, shape = tensor.shape[dim], list(tensor.shape)
    assert size > 2  # a distance of 2³¹ itself is no number of 32 bits, which all code would see
    gap = (BEYOND // (size - 1) + 63) // 64 * 64  # whole lines of a cache, as a copy engine wants it
    del shape[dim]
    strides = list(torch.empty(shape, device="meta").stride())
    strides.insert(dim, gap)
    reached = (size - 1) * gap + torch.Size(shape).numel()
    before = 0 if DEVICE == "cuda" else BEYOND  # a GPU's would be taken
    memory = untouched(before + reached, dtype=tensor.dtype)
    return memory.as_strided(tensor.shape, strides, before).copy_(tensor)


def both_ways(function: Callable[..., Any], leaves: list[Tensor], *seen: Tensor) -> list[Tensor]:
    """Results and gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    made = function(*leaves)
    results = list(made) if isinstance(made, tuple) else [made]
    return [*(r.detach() for r in results), *torch.autograd.grad(results, leaves, list(seen))]


def alike(got: list[Tensor], wanted: list[Tensor]) -> None:
    """Sums of at most 50 numbers near one, in whatever order a library takes them by their strides."""
    for mine, theirs in zip(got, wanted, strict=True):
        tolerance = 2**-6 if mine.dtype == torch.bfloat16 else 2**-18
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # on a GPU by plain loads, and by the copy engine
@pytest.mark.parametrize(("of_x", "of_w"), [(0, 0), (0, 1), (1, 2)])
def test_grouped_gemm(of_x: int, of_w: int, dtype: torch.dtype) -> None:
    x, w, seen = draw(0, 9, 8, dtype=dtype), draw(1, 3, 8, 8, dtype=dtype), draw(2, 9, 8, dtype=dtype)
    ends = torch.tensor([2, 2, 9], device=DEVICE)

    def product(x: Tensor, w: Tensor) -> Tensor:
        return grouped_gemm(x, w, ends)

    wanted = both_ways(product, [x, w], seen)
    alike(both_ways(product, [apart(x, of_x), apart(w, of_w)], apart(seen, of_x)), wanted)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize(("of_x", "of_w"), [(0, 0), (1, 1), (0, 2)])
def test_moe_mlp(of_x: int, of_w: int) -> None:
    x, gate, gate_up, down, seen = (
        draw(0, 5, 8),
        draw(1, 5, 2),
        draw(2, 3, 8, 8) / 3,
        draw(3, 3, 8, 4) / 3,
        draw(4, 5, 8),
    )
    expert = torch.tensor([[0, 2], [2, 1], [1, 2], [0, 1], [2, 0]], device=DEVICE)
    load = expert.flatten().bincount(minlength=3)

    def experts(x: Tensor, gate: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return moe_mlp(x, expert, gate, gate_up, down, load)

    wanted = both_ways(experts, [x, gate, gate_up, down], seen)
    leaves = [apart(x, of_x), gate, apart(gate_up, of_w), apart(down, of_w)]
    alike(both_ways(experts, leaves, apart(seen, of_x)), wanted)
    with torch.no_grad():
        alike([experts(*leaves)], wanted[:1])


@pytest.mark.skipif(not TRITON, reason="elsewhere it is torch's operations")
@pytest.mark.parametrize("dim", [0, 1])
def test_fp8(dim: int) -> None:
    x, w, ends = draw(0, 3, 384), draw(1, 3, 128, 384), torch.tensor([1, 2, 3], device=DEVICE)

    def same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
        assert all(a.float().equal(b.float()) for a, b in zip(got, wanted, strict=True))

    (q, scale), (w_q, w_scale), columns = quantise_rows(x), quantise_blocks(w), quantise_columns(x, ends)
    same(quantise_rows(apart(x, dim)), (q, scale))
    same(quantise_columns(apart(x, dim), ends), columns)
    same(quantise_blocks(apart(w, dim)), (w_q, w_scale))
    same(quantise_blocks(apart(w, 2)), (w_q, w_scale))
    product = fp8_gemm(q, scale, w_q[0], w_scale[0], torch.float32)
    assert fp8_gemm(apart(q, dim), apart(scale, dim), w_q[0], w_scale[0], torch.float32).equal(product)
    gradient = fp8_weight_gradient(*columns, *columns, ends)
    far = (apart(columns[0], dim), apart(columns[1], dim))
    assert fp8_weight_gradient(*far, *far, ends).equal(gradient)


@pytest.mark.usefixtures("cpu_path")
def test_norms() -> None:
    x, y, weight, seen, also = draw(0, 3, 40), draw(1, 3, 40), draw(2, 40), draw(3, 3, 40), draw(4, 3, 40)
    assert in_rows(apart(x, 0))[1] >= 2**30  # walked as it lies
    far = [apart(t, 0) for t in (x, y)]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, 1e-6)

    def added(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, y, weight, 1e-6)

    alike(both_ways(norm, [far[0], weight], apart(seen, 0)), both_ways(norm, [x, weight], seen))
    wanted = both_ways(added, [x, y, weight], also, seen)
    alike(both_ways(added, [*far, weight], apart(also, 0), apart(seen, 0)), wanted)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("operation", [rotate, rotate_halves])
@pytest.mark.parametrize("dim", [0, 1])
def test_rotations(operation: Callable[..., Tensor], dim: int) -> None:
    x, seen, angle = draw(0, 3, 3, 16), draw(1, 3, 3, 16), draw(2, 3, 1, 8)
    cos, sin = angle.cos(), angle.sin()
    wanted = both_ways(lambda x: operation(x, cos, sin), [x], seen)
    cos, sin = apart(cos, 0), apart(sin, 0)
    alike(both_ways(lambda x: operation(x, cos, sin), [apart(x, dim)], apart(seen, dim)), wanted)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_attention(dim: int) -> None:
    q, k, v, seen = draw(0, 3, 5, 6, 8), draw(1, 3, 5, 3, 8), draw(2, 3, 5, 3, 8), draw(3, 3, 5, 6, 8)
    wanted = both_ways(lambda *x: attention(*x, 0.3), [q, k, v], seen)
    alike(both_ways(lambda *x: attention(*x, 0.3), [apart(t, dim) for t in (q, k, v)], apart(seen, dim)), wanted)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_latent_attention(dim: int) -> None:
    q, kv, key, seen, angle = (
        draw(0, 3, 5, 3, 24),
        draw(1, 3, 5, 3, 24),
        draw(2, 3, 5, 16),
        draw(3, 3, 5, 3, 16),
        draw(4, 3, 5, 8),
    )
    rotary = angle.cos(), angle.sin()
    wanted = both_ways(lambda *x: latent_attention(*x, rotary, 0.2), [q, kv, key], seen)
    leaves = [apart(q, dim), apart(kv, dim), apart(key, min(dim, 1))]
    rotary = apart(rotary[0], min(dim, 1)), apart(rotary[1], min(dim, 1))
    alike(both_ways(lambda *x: latent_attention(*x, rotary, 0.2), leaves, apart(seen, dim)), wanted)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mla_decode(page: int | None, dtype: torch.dtype) -> None:
    plain, turning, value, latent, places = 8, 4, 8, 16, 32
    cache, angle = draw(2, 3, places, latent + turning, dtype=dtype), draw(5, 3, 1, turning // 2)
    q, kv = draw(0, 3, 1, 4, plain + turning, dtype=dtype), draw(1, 3, 1, latent + turning, dtype=dtype)
    table = None
    if page is not None:
        cache = cache.view(3 * places // page, page, -1)
        table = torch.tensor([[5, 0], [3, 4], [1, 2]], device=DEVICE)
    others = {
        "start_B": torch.tensor([30, 7, 20], device=DEVICE), "reach": 31, "rotary": (angle.cos(), angle.sin()),
        "norm_C": draw(3, latent, dtype=dtype), "eps": 1e-6, "scale": 0.3, "table_BJ": table,
        "up_HXC": draw(4, 4, plain + value, latent, dtype=dtype) * latent**-0.5,
    }  # fmt: skip
    far = apart(cache, 0)
    got = mla_decode(apart(q, 0), apart(kv, 0), far, **others)
    alike([got, far], [mla_decode(q, kv, cache, **others), cache])


@pytest.mark.skipif(INTERPRETED, reason="the products are torch's, and slow what follows them")
@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("dim", [0, 1])
def test_what_is_copied_before_it_is_read(dim: int) -> None:
    x, w, weight = draw(0, 120, 8), draw(1, 40, 8), torch.full((120,), 1 / 120, device=DEVICE)
    target, bias = torch.arange(120, device=DEVICE) % 40, torch.zeros(40, device=DEVICE)
    seen, both = draw(2, 120, 40), [x, w]
    far = [apart(t, dim) for t in both]
    for operation, grads in (
        (linear, [seen]),
        (lambda x, w: linear_cross_entropy_mean(x, w, target, weight), [torch.ones((), device=DEVICE)]),
        (lambda x, w: linear_log_probs(x, w, target), [seen[:, 0]]),
        (lambda x, w: tuple(route(x, w, bias, Choice(4))[1:3]), [seen[:, :4], seen]),
    ):
        alike(both_ways(operation, far, *grads), both_ways(operation, both, *grads))
    alike(both_ways(swiglu, [apart(x, dim)], apart(seen[:, :4], dim)), both_ways(swiglu, [x], seen[:, :4]))


@pytest.mark.parametrize("columns", [False, True])
def test_products_of_strides(cpu_path: str, columns: bool) -> None:
    """One stride of each side is 1, the other past what 32 bits hold."""
    if cpu_path != "compiled" or TRITON:
        pytest.skip("of the compiled code")
    a, b = draw(0, 40, 30), draw(1, 30, 50)
    far = (apart(a, 1), apart(b, 0)) if columns else (apart(a, 0), apart(b, 1))
    wanted, got = torch.empty(40, 50), torch.empty(40, 50)
    multiply(a, b, wanted)
    multiply(*far, got)
    assert got.equal(wanted)


@pytest.mark.skipif(TRITON, reason="on a GPU its memory would be taken")
@pytest.mark.parametrize("tokens", [5, 60])
def test_stacks_of_more_numbers(cpu_path: str, tokens: int) -> None:
    """All rows are the last expert's, behind 2³¹ numbers of those that nobody reads."""
    experts, width = 2**11 + 1, 1024
    w, gate_up = untouched(experts, width, width), untouched(experts, 2 * width, width)
    w[-1], gate_up[-1], x = draw(0, width, width) / 32, draw(1, 2 * width, width) / 32, draw(2, tokens, width)
    ends = torch.zeros(experts, dtype=torch.long)
    ends[-1] = tokens
    x.requires_grad_(cpu_path == "compiled")  # torch's path makes the gradient in w as well
    y, alone = grouped_gemm(x, w, ends), grouped_gemm(x, w[-1:], ends[-1:])
    seen, gate = draw(3, tokens, width), torch.ones(tokens, 1)
    near = {"rtol": 0, "atol": 1e-4}  # sums of 1,024 products, of deviation one
    torch.testing.assert_close(y, alone, **near)
    if x.requires_grad:
        got, wanted = (torch.autograd.grad(out, x, seen) for out in (y, alone))
        torch.testing.assert_close(got, wanted, **near)
    expert, zero = torch.full((tokens, 1), experts - 1), torch.zeros(tokens, 1, dtype=torch.long)
    load = torch.zeros(experts, dtype=torch.long)
    load[-1] = tokens
    for leaf in (x, x.detach()):  # as for gradients, and where matrices are read as they lie
        out = moe_mlp(leaf, expert, gate, gate_up, w, load)
        torch.testing.assert_close(out, moe_mlp(leaf, zero, gate, gate_up[-1:], w[-1:], load[-1:]), **near)


def test_a_head_of_more_numbers(cpu_path: str) -> None:
    if cpu_path != "compiled" or TRITON:
        pytest.skip("of the compiled code")
    vocab, width = 2**19 + 40, 4096
    x, head = draw(0, 2, width), untouched(vocab, width, read=True)
    head[-1], head[5] = x[0] / width, x[1] / width
    z, some = (x.double() @ head[[5, -1]].double().T), torch.tensor([5, vocab - 1])
    assert (few(x, head)[:, some].double() - z).abs().max() < 1e-5  # near one, of 4,096 terms
    wanted = (z - (z.exp().sum(1, keepdim=True) + vocab - 2).log()).diagonal()
    got = linear_log_probs(x, head, some).double()
    assert (got - wanted).abs().max() < 1e-4  # near −13, of sums of half a million ones


class LastProgram:
    """A kernel of whose grid the last program runs, alone."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        from triton.runtime.interpreter import interpreter_builder as builder

        whole = (*grid, 1, 1)[:3]

        def run(*arguments: Any, **constants: Any) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(builder, "set_grid_dim", lambda *_: vars(builder).update(grid_dim=whole))
                last = tuple(size - 1 for size in whole)
                patch.setattr(builder, "set_grid_idx", lambda *_: vars(builder).update(grid_idx=last))
                self.kernel[(1,)](*arguments, **constants)

        return run


def alone(monkeypatch: pytest.MonkeyPatch, module: Any, *kernels: str) -> None:
    for name in kernels:
        monkeypatch.setattr(module, name, LastProgram(getattr(module, name)))


ROWS, WIDTH = 2**20 + 1, 2048


def last_row(seed: int, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Rows of which the last alone is not zero, and that one by itself, (1, width)."""
    row, rows = draw(seed, 1, width, dtype=torch.bfloat16), untouched(ROWS, width, dtype=torch.bfloat16)
    rows[-1:] = row
    return rows, row


interpreted = pytest.mark.skipif(not INTERPRETED, reason="a program runs by itself in the interpreter")


@interpreted
def test_the_last_rows_of_norms_and_rotations(monkeypatch: pytest.MonkeyPatch) -> None:
    from gristmill.kernels.norm_rope import gpu

    (x, row), weight, angle = last_row(0), draw(1, WIDTH, dtype=torch.bfloat16), draw(2, 1, WIDTH // 2)
    cos, sin = angle.cos(), angle.sin()

    def made(x: Tensor) -> list[Tensor]:
        angles = cos.expand(len(x), -1), sin.expand(len(x), -1)
        results = rms_norm(x, weight, 1e-6), *add_rms_norm(x, x, weight, 1e-6), rotate(x, *angles)
        return [t[-1] for t in results]

    wanted = made(row)
    alone(monkeypatch, gpu, "_norm", "_add_norm", "_turn")
    alike(made(x), wanted)


@interpreted
def test_the_last_rows_of_activations_and_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    from gristmill.kernels.moe_mlp import gpu as experts
    from gristmill.kernels.swiglu import gpu

    def made(x: Tensor, grad: Tensor) -> list[Tensor]:
        gate, order = torch.full((len(x), 1), 0.5), torch.arange(len(x))
        results = [*both_ways(swiglu, [x], grad), experts._activated(x, gate, order)]
        total, slope = torch.empty_like(x), torch.empty_like(x)
        experts._sum(x, order, total)
        gates = experts._slopes_(x, gate, order, grad, slope)
        results += [total[:, -experts.BLOCK :], gates, slope, grad]  # a program's columns; grad becomes the activation
        return [t[-1] for t in results]

    (x, row), (grad, grad_row) = last_row(0), last_row(1, WIDTH // 2)
    wanted = made(row, grad_row)
    alone(monkeypatch, gpu, "_swiglu", "_swiglu_backward")
    alone(monkeypatch, experts, "_swiglu", "_swiglu_backward", "_sum_of_rows")
    alike(made(x, grad), wanted)


@interpreted
def test_the_last_rows_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    from gristmill.kernels.cross_entropy import gpu

    def made(logits: Tensor) -> list[Tensor]:
        target, weight = torch.full((len(logits),), 7), torch.ones(len(logits))
        results = [*gpu.softmax_loss(logits, target, 0.7), gpu.softmax_slope_(logits, target, weight, 0.7, 0.1), logits]
        return [t[-1] for t in results]

    logits, row = last_row(0)
    wanted = made(row)
    alone(monkeypatch, gpu, "_slope")
    alike(made(logits), wanted)


@interpreted
def test_the_last_numbers_of_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    from gristmill.kernels.optim import gpu

    few_, how = [draw(seed, 24, dtype=torch.bfloat16).abs() for seed in range(4)], AdamW(rate=0.1, step=3)
    many = [untouched(BEYOND + 24, dtype=torch.bfloat16) for _ in few_]
    for whole, last in zip(many, few_, strict=True):
        whole[-24:] = last
    adamw(*([t] for t in few_), how)
    alone(monkeypatch, gpu, "_update")
    adamw(*([t] for t in many), how)
    alike([t[-24:] for t in many], few_)


@interpreted
def test_the_last_tile_of_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from gristmill.kernels.grouped_gemm import gpu

    side, ends = 2**15, torch.tensor([1, 2, 3])
    grad, x = draw(0, 3, side), draw(1, 3, side)
    alone(monkeypatch, gpu, "_weight_gradient")
    monkeypatch.setattr(gpu, "_processors", lambda _: side * side)  # so that a program has one tile
    got = gpu.weight_gradient(grad, x, ends)[2, -32:, -32:]
    alike([got], [torch.outer(grad[2, -32:], x[2, -32:])])


@interpreted
def test_the_last_list_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that queries see, of so many sequences that these lists hold more numbers: each has its first tile alone."""
    from gristmill.kernels.mla_attention import gpu

    batch, length, width, tiles = 33, 2**17, 16, gpu.Tiles(16, 16, 4, 2)
    blocks = length // 16
    q, k, v, grad, *into = (untouched(batch, 1, length, width, dtype=torch.bfloat16) for _ in range(7))
    for tensor in (q, k, v, grad):
        tensor[-1] = 1.0
    lists = gpu.Lists(
        untouched(batch, blocks, blocks, dtype=torch.int32),
        torch.zeros(batch, blocks, dtype=torch.int32),
        torch.ones(batch, blocks, dtype=torch.int32),
    )
    monkeypatch.setattr(gpu, "_lists", lambda *_, **__: lists)
    alone(monkeypatch, gpu, "forward", "products", "gradient_of_queries", "gradient_of_keys")
    sides, seen = gpu.Sides(q, k, v, None, None), torch.zeros(batch, length, dtype=torch.int32)
    out, log = gpu.attend(sides, 0.25, seen, tiles)
    assert out[-1, 0, :16].eq(1).all()  # the block of queries whose turn is last
    torch.testing.assert_close(log[-1, 0, :16], 4 / torch.tensor(2.0).log() + torch.arange(1.0, 17).log2())
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)  # of the products, which another program writes
    gpu.gradients_(gpu.Sides(*into, None, None), sides, out, log, grad, 0.25, seen, tiles, tiles)
    # From 16 slopes of a weight, of which those times the result, another program's, were not taken off
    assert into[0][-1, 0, :16].sub(4).abs().max() <= 2**-6
    assert not into[0][-1, 0, 16:32].any()


MOST = 2**30  # rows of a group's descriptor in Triton


@pytest.mark.skipif(not TRITON, reason="a CPU has no bound")
def test_rows_that_are_too_many_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def many(x: Tensor) -> Tensor:
        return x.to(DEVICE).expand(MOST, *x.shape[1:])

    ends = torch.tensor([MOST], device=DEVICE)
    with pytest.raises(ValueError, match=f"grouped_gemm: rows of x_NK is {MOST}; wanted fewer than 2³⁰"):
        grouped_gemm(many(torch.ones(1, 1)), torch.ones(1, 1, 1, device=DEVICE), ends)
    (q, scale), (w, w_scale) = quantise_rows(draw(0, 1, 128)), quantise_blocks(draw(1, 1, 128, 128))
    with pytest.raises(ValueError, match=f"fp8_grouped_gemm: rows of x_NK is {MOST}; wanted fewer than 2³⁰"):
        fp8_gemm(many(q), many(scale), w[0], w_scale[0])
    monkeypatch.setattr("gristmill.kernels.moe_mlp._check_indices", lambda *_: None)  # as on a GPU
    expert, gate = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1)
    up, down = torch.ones(1, 2, 1, device=DEVICE), torch.ones(1, 1, 1, device=DEVICE)
    with pytest.raises(ValueError, match=f"moe_mlp: rows is {MOST}; wanted fewer than 2³⁰"):
        moe_mlp(many(gate), many(expert), many(gate), up, down, ends)
    from gristmill.kernels.norm_rope import gpu

    if INTERPRETED:
        alone(monkeypatch, gpu, "_norm", "_add_norm", "_turn")  # else what is not refused does not end
    x, weight = many(torch.ones(1, 2)), torch.ones(2, device=DEVICE)
    for name, function in {
        "rms_norm": lambda: rms_norm(x, weight, 1e-6),
        "add_rms_norm": lambda: add_rms_norm(x, x, weight, 1e-6),
        "rotate": lambda: rotate(x, x[:, :1], x[:, :1]),
    }.items():
        with pytest.raises(ValueError, match=f"{name}: rows of x is {MOST}; wanted fewer than 2³⁰"):
            function()
