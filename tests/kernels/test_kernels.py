"""Each operation, forward and gradients, against its reference in float64: on the GPU where there is one, else on the
CPU, and the Triton code under its interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill import kernels
from gristmill.kernels.compiled import compiled
from gristmill.kernels.cross_entropy import linear_cross_entropy_mean, linear_log_probs
from gristmill.kernels.cross_entropy.reference import (
    linear_cross_entropy_mean_reference,
    linear_log_probs_and_entropy_reference,
)
from gristmill.kernels.grouped_gemm import grouped_gemm
from gristmill.kernels.grouped_gemm.native import SOURCE
from gristmill.kernels.grouped_gemm.reference import grouped_gemm_reference

INTERPRETED = os.environ.get("GRISTMILL_KERNELS") == "gpu"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
EXAMPLES = 4 if INTERPRETED else 10 if DEVICE == "cuda" else 40  # compiled anew for most shapes on a GPU


def close(got: Tensor, wanted: Tensor, size: Tensor, terms: int) -> None:
    """Number by number: a float32 sum of `terms` products errs by half a step for each of them, of the sum of their
    sizes; and the result is rounded to its dtype, by the interpreter cut off."""
    assert got.shape == wanted.shape
    rounded = (2**-7 if INTERPRETED else 2**-8) if got.dtype == torch.bfloat16 else 0.0
    allowed = (1 + rounded) * (terms + 2) * 2**-24 * size + rounded * wanted.abs() + 1e-30
    assert bool(((got.double() - wanted).abs() <= allowed).all())


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def draw_ids(seed: int, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def ends_at(*places: int) -> Tensor:
    return torch.tensor(places, device=DEVICE)


def both_ways(x: Tensor, w: Tensor, seen: Tensor, ends: Tensor) -> list[Tensor]:
    """The result and both gradients."""
    leaves = [t.detach().requires_grad_() for t in (x, w)]
    y = grouped_gemm(leaves[0], leaves[1], ends)
    return [y.detach(), *torch.autograd.grad(y, leaves, seen)]


def wanted_of(x: Tensor, w: Tensor, seen: Tensor, ends: Tensor) -> list[Tensor]:
    """The same by the reference in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, w)]
    y = grouped_gemm_reference(leaves[0], leaves[1], ends)
    return [y.detach(), *torch.autograd.grad(y, leaves, seen.double())]


def check_grouped(x: Tensor, w: Tensor, seen: Tensor, ends: Tensor) -> list[Tensor]:
    """Result and gradients against float64; a gradient in w is a sum over its group's rows, of which few may be many."""
    got, wanted = both_ways(x, w, seen, ends), wanted_of(x, w, seen, ends)
    sizes = wanted_of(x.abs(), w.abs(), seen.abs(), ends)
    most = max(ends.diff(prepend=ends.new_zeros(1)).tolist())
    for mine, theirs, size, terms in zip(got, wanted, sizes, (x.shape[1], w.shape[1], most), strict=True):
        assert mine.dtype == x.dtype
        close(mine, theirs, size, terms)
    return got


@pytest.mark.usefixtures("cpu_path")
@given(
    groups=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    inner=st.integers(1, 50),
    outer=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1.0, 1e4, 1e-4]),
    strided=st.sampled_from(["", "x", "w", "groups", "seen", "all"]),
)
@settings(max_examples=EXAMPLES, deadline=None)
def test_grouped_gemm(
    groups: list[int], inner: int, outer: int, dtype: torch.dtype, scale: float, strided: str
) -> None:
    rows, ends = sum(groups), torch.tensor(groups).cumsum(0).to(DEVICE)
    x, w, seen = draw(0, rows, inner) * scale, draw(1, len(groups), outer, inner), draw(2, rows, outer) * scale
    x, w, seen = (t.to(dtype) for t in (x, w, seen))
    x = x.t().contiguous().t() if strided in ("x", "all") else x
    w = w.mT.contiguous().mT if strided in ("w", "all") else w
    w = w.transpose(0, 1).contiguous().transpose(0, 1) if strided == "groups" else w
    seen = torch.stack((seen, seen), -1)[..., 0] if strided in ("seen", "all") else seen
    check_grouped(x, w, seen, ends)


@pytest.mark.usefixtures("cpu_path")
def test_groups_of_several_blocks() -> None:
    """Rows, columns and terms of more than a block, beside few and none; the interpreter's are of 64, 64 and 32."""
    sizes, outer, inner = (
        ([0, 23, 70, 0, 1, 24, 140, 0], 140, 70) if INTERPRETED else ([0, 23, 300, 0, 1, 24, 590, 0], 530, 300)
    )
    x, w, seen = draw(30, sum(sizes), inner), draw(31, len(sizes), outer, inner), draw(32, sum(sizes), outer)
    *_, grad_w = check_grouped(x, w, seen, torch.tensor(sizes).cumsum(0).to(DEVICE))
    assert not grad_w[[0, 3, 7]].any()  # nobody's


def test_threads_change_no_bit_of_a_grouped_product(cpu_path: str) -> None:
    if cpu_path != "compiled" or INTERPRETED or DEVICE == "cuda":
        pytest.skip("torch's own products may cut sums by threads")
    sizes, threads, runs = [330, 0, 7, 24, 95], torch.get_num_threads(), []
    x, w = draw(33, sum(sizes), 70).requires_grad_(), draw(34, len(sizes), 600, 70).requires_grad_()
    try:
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            for rounded in (False, True):
                y = grouped_gemm(x, w, torch.tensor(sizes).cumsum(0), rounded=rounded)
                runs.append((y, *torch.autograd.grad(y.square().sum(), (x, w))))
    finally:
        torch.set_num_threads(threads)
    for first, other in zip(runs[:2] * 3, runs[2:], strict=True):
        assert all(map(torch.equal, first, other))


@pytest.mark.usefixtures("cpu_path")
def test_a_gradient_alone_is_that_of_both() -> None:
    ends = ends_at(2, 2, 7)
    x, w, seen = draw(35, 7, 5), draw(36, 3, 4, 5), draw(37, 7, 4)
    _, grad_x, grad_w = both_ways(x, w, seen, ends)
    for leaf, wanted in ((x, grad_x), (w, grad_w)):
        leaf.requires_grad_()
        alone = torch.autograd.grad(grouped_gemm(x, w, ends), leaf, seen)
        leaf.requires_grad_(False)
        assert alone[0].equal(wanted)


@pytest.mark.usefixtures("cpu_path")
def test_grouped_gemm_of_nothing_and_of_nan() -> None:
    w = draw(0, 3, 4, 5).requires_grad_()
    y = grouped_gemm(torch.zeros(0, 5, device=DEVICE), w, ends_at(0, 0, 0))
    assert y.shape == (0, 4)
    x = draw(1, 6, 5)
    x[1, 2] = float("nan")
    y = grouped_gemm(x, w, ends_at(2, 2, 6))
    assert y[1].isnan().all()  # passed on to its row
    assert not y[[0, 2, 3, 4, 5]].isnan().any()  # and to no other
    assert grouped_gemm(x, w, ends_at(2, 2, 6)).nan_to_num().equal(y.nan_to_num())


@pytest.mark.usefixtures("cpu_path")
def test_targets_and_ends_may_be_a_column_of_something() -> None:
    x, w = draw(20, 9, 16), draw(21, 33, 16)
    pairs = draw_ids(22, 0, 33, 9, 2)
    assert linear_log_probs(x, w, pairs[:, 1], 1.0).equal(linear_log_probs(x, w, pairs[:, 1].contiguous(), 1.0))
    ends = torch.tensor([[0, 2], [0, 2], [0, 9]], device=DEVICE)[:, 1]
    experts = draw(23, 3, 8, 16)
    assert grouped_gemm(x, experts, ends).equal(grouped_gemm(x, experts, ends.contiguous()))


def test_gradcheck() -> None:
    x, w = draw(11, 7, 5).double().requires_grad_(), draw(12, 3, 4, 5).double().requires_grad_()
    if not INTERPRETED and DEVICE == "cpu":  # Triton sums in float32
        assert torch.autograd.gradcheck(grouped_gemm, (x, w, ends_at(2, 2, 7)))


@pytest.mark.usefixtures("cpu_path")
def test_two_runs_give_equal_bits() -> None:
    x, w = draw(13, 90, 32).requires_grad_(), draw(14, 4, 48, 32).requires_grad_()
    ends = ends_at(30, 30, 60, 90)
    runs = []
    for _ in range(2):
        y = grouped_gemm(x, w, ends)
        runs.append((y, *torch.autograd.grad(y.square().sum(), (x, w))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.usefixtures("cpu_path")
def test_a_loss_gives_its_gradients_once() -> None:
    x, w = draw(27, 6, 5).requires_grad_(), draw(28, 9, 5).requires_grad_()
    target, weight = draw_ids(29, 0, 9, 6), torch.ones(6, device=DEVICE)
    loss = linear_cross_entropy_mean(x, w, target, weight)
    got = torch.autograd.grad(3 * loss, (x, w), retain_graph=True)
    with kernels.use_reference():
        wanted = torch.autograd.grad(3 * linear_cross_entropy_mean(x, w, target, weight), (x, w))
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)  # float32 sums of nine
    with pytest.raises(RuntimeError, match="kept only once"):
        torch.autograd.grad(loss, (x, w))


def test_references_on_demand_and_the_report() -> None:
    x, w, ends = draw(17, 6, 5), draw(18, 2, 4, 5), ends_at(2, 6)
    with kernels.use_reference():
        y = grouped_gemm(x, w, ends)
    torch.testing.assert_close(y, grouped_gemm(x, w, ends), rtol=1e-5, atol=1e-5)  # float32 sums of five
    counts = kernels.report()["grouped_gemm"]
    assert counts["reference"] >= 1
    ran = "gpu" if INTERPRETED or DEVICE == "cuda" else "compiled" if compiled(SOURCE) else "cpu"
    assert counts[ran] >= 1
    target, weight = torch.zeros(6, dtype=torch.long, device=DEVICE), torch.ones(6, device=DEVICE)
    head = w[0]
    with kernels.use_reference():
        assert torch.equal(
            linear_cross_entropy_mean(x, head, target, weight),
            linear_cross_entropy_mean_reference(x, head, target, weight),
        )
        assert torch.equal(
            linear_log_probs(x, head, target), linear_log_probs_and_entropy_reference(x, head, target, 1.0)[0]
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w": draw(0, 2, 4, 5).bfloat16()}, TypeError, "w_EMK is torch.bfloat16; wanted the dtype of x_NK"),
        ({"w": draw(0, 2, 4, 6)}, ValueError, "inner size of w_EMK is 6; wanted 5"),
        ({"w": draw(0, 2, 5)}, ValueError, "rank of w_EMK is 2; wanted 3"),
        ({"x": draw(0, 5)}, ValueError, "rank of x_NK is 1; wanted 2"),
        ({"ends": torch.tensor([4, 2])}, ValueError, r"ends_E is \[4, 2\]; wanted ascending"),
        ({"ends": torch.tensor([2, 5])}, ValueError, "last of ends_E is 5; wanted the 6 rows"),
        ({"ends": torch.tensor([6])}, ValueError, "shape of ends_E"),
        (
            {"w": draw(0, 0, 4, 5), "ends": torch.tensor([], dtype=torch.long)},
            ValueError,
            "groups of w_EMK is 0; wanted",
        ),
    ],
)
def test_bad_arguments_are_named(change: dict, error: type[Exception], message: str) -> None:
    """On the CPU, where the ends are looked at as well."""
    given_ = {"x": draw(0, 6, 5), "w": draw(0, 2, 4, 5), "ends": torch.tensor([2, 6])} | change
    with pytest.raises(error, match=message):
        grouped_gemm(given_["x"].cpu(), given_["w"].cpu(), given_["ends"].cpu())


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="of the GPU's code")
def test_a_gpu_rounds_by_its_dtype() -> None:
    with pytest.raises(ValueError, match="rounded is True; wanted tensors in bfloat16 on a GPU"):
        grouped_gemm(draw(0, 6, 5), draw(0, 2, 4, 5), ends_at(2, 6), rounded=True)


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="of the GPU's code")
def test_groups_read_by_the_copy_engine() -> None:
    """Shapes of whole 16 bytes in bfloat16: tiles, pieces and groups that are full, begun and empty; and NaN beside."""
    from gristmill.kernels.grouped_gemm.gpu import _fits_engine

    if not INTERPRETED and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("a GPU without the engine")
    counts = [0, 257, 1, 0, 640, 64, 130, 0]
    inner, outer = (264, 272) if INTERPRETED else (328, 520)  # whole and begun: steps of 64 terms, tiles of 256 columns
    x, w = draw(24, sum(counts), inner, dtype=torch.bfloat16), draw(25, len(counts), outer, inner, dtype=torch.bfloat16)
    seen, ends = draw(26, sum(counts), outer, dtype=torch.bfloat16), torch.tensor(counts).cumsum(0).to(DEVICE)
    assert _fits_engine(x, w, seen)
    assert not _fits_engine(x[:, 1:], w)
    assert not _fits_engine(x.float(), w.float())
    for spoilt in (False, True):
        x, w = x.detach(), w.detach()
        if spoilt:
            x[257], seen[257] = float("nan"), float("nan")  # the one row of its group
        got, wanted = both_ways(x, w, seen, ends), wanted_of(x, w, seen, ends)
        sizes = wanted_of(x.abs(), w.abs(), seen.abs(), ends)
        for mine, theirs, size, terms in zip(got, wanted, sizes, (inner, outer, max(counts)), strict=True):
            assert mine.isnan().equal(theirs.isnan())
            there = ~theirs.isnan()
            close(mine[there], theirs[there], size[there], terms)


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="of the GPU's code")
def test_tiles_of_three_parts_give_the_same_bits() -> None:
    """Each sum goes over as many terms at a time, in the same order; tiles end within groups, and groups within parts."""
    from gristmill.kernels.grouped_gemm import gpu

    ends = ends_at(0, 1, 193, 386, 386, 700, 764)
    x, seen = (draw(seed, 764, width, dtype=torch.bfloat16) for seed, width in ((31, 72), (32, 264)))
    w = draw(33, 7, 264, 72, dtype=torch.bfloat16)
    whole, parts = (
        [
            gpu.product(x, w, ends, True, tiles),
            gpu.product(seen, w, ends, False, tiles),
            gpu.weight_gradient(seen, x, ends, tiles),
        ]
        for tiles in (gpu.Tiles(64, 64, 32, 4, 2), gpu.Tiles(192, 64, 32, 4, 2))
    )
    assert all(a.equal(b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_the_logits_are_never_held_on_a_gpu() -> None:
    rows, vocab = 32_768, 65_536
    x, w = draw(15, rows, 64, dtype=torch.bfloat16), draw(16, vocab, 64, dtype=torch.bfloat16)
    x, w = x.requires_grad_(), w.requires_grad_()
    target = torch.zeros(rows, dtype=torch.long, device=DEVICE)
    weight = torch.full((rows,), 1 / rows, device=DEVICE)
    linear_cross_entropy_mean(x, w, target, weight).backward()  # the library's own room for products is taken once
    x.grad = w.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy_mean(x, w, target, weight).backward()
    gradients = (x.numel() + w.numel()) * x.element_size()
    assert torch.cuda.max_memory_allocated() - before - gradients < 0.05 * rows * vocab * x.element_size()
