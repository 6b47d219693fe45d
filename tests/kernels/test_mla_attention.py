"""Attention, forward and all gradients, against its reference in float64: on both paths of a CPU, or on the GPU, and the
Triton code under its interpreter."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gristmill import kernels
from gristmill.kernels.mla_attention import attention, latent_attention
from gristmill.kernels.mla_attention.reference import attention_reference, latent_attention_reference

INTERPRETED = os.environ.get("GRISTMILL_KERNELS") == "gpu"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
EXAMPLES = 4 if INTERPRETED else 40
LENGTHS = st.integers(1, 70) if INTERPRETED else st.one_of(st.integers(1, 70), st.sampled_from([192, 193, 230]))
EPS = torch.finfo(torch.float32).eps
Tensors = tuple[torch.Tensor, ...]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


HOW = ["causal", "documents", "holes", "first of documents", "first at random"]


def seen_by(how: str, batch: int, length: int) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """How attention is told what queries see, and the mask that says so: none (causal), documents as a mask and by the
    first key that each query sees, holes at random, or first keys at random. In the last two now and then a query sees
    nothing."""
    if how == "causal":
        return {}, None
    generator = torch.Generator().manual_seed(9)
    if how == "holes":
        mask_BSS = (torch.rand(batch, length, length, generator=generator) < 0.3).to(DEVICE)
        return {"mask_BSS": mask_BSS}, mask_BSS
    if how == "first at random":
        most_S = torch.arange(length) + 1 + length // 8
        first_BS = (torch.rand(batch, length, generator=generator) * most_S).int()
    else:
        document_BS = torch.randint(0, 4, (batch, length), generator=generator).sort(1).values
        first_BS = torch.searchsorted(document_BS, document_BS)
    keys = torch.arange(length)
    mask_BSS = torch.stack([(keys >= first[:, None]) & (keys <= q) for q, first in enumerate(first_BS.unbind(1))], 1)
    first_BS, mask_BSS = first_BS.to(DEVICE), mask_BSS.to(DEVICE)
    return {"mask_BSS": mask_BSS} if how == "documents" else {"first_BS": first_BS}, mask_BSS


def whole(batch: int, length: int, heads: int, groups: int, width: int, values: int) -> Tensors:
    """Queries, keys and values."""
    shapes = ((heads, width), (groups, width), (groups, values))
    return tuple(draw(i, batch, length, *shape) for i, shape in enumerate(shapes))


def projections(batch: int, length: int, heads: int, width: int, turning: int, values: int) -> tuple[Tensors, Tensors]:
    """What MLA's attention is differentiated in, and the angles' cosines and sines."""
    shapes = ((heads, width + turning), (heads, width + values), (turning,))
    angle = draw(8, batch, length, turning // 2)
    return tuple(draw(i, batch, length, *shape) for i, shape in enumerate(shapes)), (angle.cos(), angle.sin())


def both_ways(function: Any, given_: Tensors, seen: torch.Tensor) -> Tensors:
    """The result and the gradients."""
    leaves = [t.detach().requires_grad_() for t in given_]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, seen)


def close(got: Tensors, wanted: Tensors, seen: torch.Tensor, length: int, width: int) -> None:
    """A result and its gradients: sums of up to length + width terms of either sign, each rounded by at most eps / 2, so
    that errors grow with the root of their number. Gradients of scores are differences, of terms that are seen · values
    long: where these cancel, what is left of them is rounding of that size."""
    allowed = EPS / 2 * (length + width) ** 0.5
    for i, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        assert mine.shape == theirs.shape
        size = max(float(theirs.norm()), 0.0 if i == 0 else float(seen.norm()) * seen.shape[-1] ** 0.5)
        apart = float((mine.double() - theirs).norm())
        assert apart <= allowed * size, (i, apart, allowed * size)


def doubled(given_: Tensors) -> Tensors:
    return tuple(t.double() for t in given_)


@pytest.mark.usefixtures("cpu_path")
@given(
    batch=st.integers(1, 3),
    length=LENGTHS,
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    width=st.sampled_from([8, 9, 16, 31, 64, 192]),
    values=st.sampled_from([8, 11, 32, 128]),
    how=st.sampled_from(HOW),
    strided=st.booleans(),
)
@settings(max_examples=EXAMPLES, deadline=None)
def test_result_and_gradients(
    batch: int, length: int, groups: int, shared: int, width: int, values: int, how: str, strided: bool
) -> None:
    given_, (told, mask) = whole(batch, length, groups * shared, groups, width, values), seen_by(how, batch, length)
    seen = draw(4, batch, length, groups * shared, values)
    if strided:
        given_ = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in given_)
        seen = seen.mT.contiguous().mT
    scale = width**-0.5
    got = both_ways(lambda *x: attention(*x, scale, **told), given_, seen)
    wanted = both_ways(lambda *x: attention_reference(*x, scale, mask), doubled(given_), seen.double())
    close(got, wanted, seen, length, width)


@pytest.mark.usefixtures("cpu_path")
@given(
    batch=st.integers(1, 3),
    length=LENGTHS,
    heads=st.integers(1, 4),
    width=st.sampled_from([0, 8, 13, 16, 128]),
    turning=st.sampled_from([2, 8, 16, 64]),
    values=st.sampled_from([8, 11, 32, 128]),
    how=st.sampled_from(HOW),
)
@settings(max_examples=EXAMPLES, deadline=None)
def test_from_the_projections(
    batch: int, length: int, heads: int, width: int, turning: int, values: int, how: str
) -> None:
    given_, rotary = projections(batch, length, heads, width, turning, values)
    (told, mask), seen = seen_by(how, batch, length), draw(4, batch, length, heads, values)
    scale, exact = (width + turning) ** -0.5, (rotary[0].double(), rotary[1].double())
    got = both_ways(lambda *x: latent_attention(*x, rotary, scale, **told), given_, seen)
    wanted = both_ways(lambda *x: latent_attention_reference(*x, exact, scale, mask), doubled(given_), seen.double())
    close(got, wanted, seen, length, width + turning)


@pytest.mark.parametrize("how", HOW)
def test_gradcheck_of_the_references(how: str) -> None:
    told, _ = seen_by(how, 2, 5)
    leaves = [t.double().requires_grad_() for t in whole(2, 5, 4, 2, 3, 2)]
    assert torch.autograd.gradcheck(lambda *x: attention_reference(*x, 0.7, **told), leaves)
    given_, (cos, sin) = projections(2, 5, 2, 3, 4, 2)
    leaves, exact = [t.double().requires_grad_() for t in given_], (cos.double(), sin.double())
    assert torch.autograd.gradcheck(lambda *x: latent_attention_reference(*x, exact, 0.7, **told), leaves)


@pytest.mark.usefixtures("cpu_path")
def test_gradients_are_the_slopes_of_the_result() -> None:
    """By differences along a direction at random: a step of 1e-2 leaves an error of its square over the slope, and
    rounding of 1e-7 over the step."""
    given_, rotary = projections(2, 40, 3, 12, 8, 10)
    seen, way = draw(4, 2, 40, 3, 10), tuple(draw(20 + i, *t.shape) * 0.1 for i, t in enumerate(given_))
    _, *gradients = both_ways(lambda *x: latent_attention(*x, rotary, 0.2), given_, seen)

    def at(step: float) -> float:
        moved = (t + step * w for t, w in zip(given_, way, strict=True))
        return float((latent_attention(*moved, rotary, 0.2).double() * seen).sum())

    slope = sum(float((g.double() * w).sum()) for g, w in zip(gradients, way, strict=True))
    assert (at(1e-2) - at(-1e-2)) / 2e-2 == pytest.approx(slope, rel=2e-3)


@pytest.mark.usefixtures("cpu_path")
def test_a_query_that_sees_nothing_has_zeros() -> None:
    given_, seen = whole(2, 30, 2, 2, 8, 8), draw(4, 2, 30, 2, 8)
    mask = torch.ones(2, 30, 30, dtype=torch.bool, device=DEVICE).tril()
    mask[0, 7], mask[1, 12:24] = False, False
    out, grad_q, *others = both_ways(lambda *x: attention(*x, 0.3, mask), given_, seen)
    for rows in (out, grad_q):
        assert not rows[~mask.any(-1)].any()
        assert rows[mask.sum(-1) > 1].all()
    assert all(t.isfinite().all() for t in others)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize(("how", "dtype"), [("first of documents", torch.int64), ("first at random", torch.int32)])
def test_first_keys_give_the_bits_of_their_mask(how: str, dtype: torch.dtype) -> None:
    """On a GPU in 16 bits, where the code is ours; longer than some tiles are wide."""
    kind, length = torch.bfloat16 if DEVICE == "cuda" else torch.float32, 100 if INTERPRETED else 400
    given_, rotary = projections(2, length, 3, 16, 8, 16)
    (told, mask), seen = seen_by(how, 2, length), draw(4, 2, length, 3, 16).to(kind)
    given_, first = tuple(t.to(kind) for t in given_), told["first_BS"].to(dtype)
    assert mask is not None
    assert (how == "first at random") == (not mask.any(-1).all())  # some see nothing
    got = both_ways(lambda *x: latent_attention(*x, rotary, 0.2, first_BS=first), given_, seen)
    wanted = both_ways(lambda *x: latent_attention(*x, rotary, 0.2, mask_BSS=mask), given_, seen)
    assert all(map(torch.equal, got, wanted))
    assert not got[0][~mask.any(-1)].any()


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_reaches_the_queries_that_see_it(which: int) -> None:
    given_ = whole(2, 100, 2, 2, 8, 8)
    given_[which][1, 70, 0, 3] = float("nan")
    out, *gradients = both_ways(lambda *x: attention(*x, 0.3), given_, draw(4, 2, 100, 2, 8))
    reached = out.isnan().any(-1)
    assert reached[1, 70, 0]
    assert reached[1, 71:, 0].all() == (which > 0)
    assert not reached[0].any()
    assert not reached[:, :, 1].any()
    assert any(g[1].isnan().any() for g in gradients)
    assert not any(g[0].isnan().any() for g in gradients)


@pytest.mark.usefixtures("cpu_path")
def test_infinite_scores_are_no_numbers_and_infinite_values_stay() -> None:
    """On a GPU that is said of our own code alone, which is of 16 bits."""
    q, k, v = (t.bfloat16() if DEVICE == "cuda" else t for t in whole(1, 40, 1, 1, 8, 8))
    q[0, 20, 0, 0] = float("inf")
    v[0, 30, 0, 2] = float("inf")
    out = attention(q, k, v, 0.3)
    assert out[0, 20].isnan().all()
    assert (out[0, 30:, 0, 2] == float("inf")).all()
    assert out[0, 21:, 0, 3].isfinite().all()


@pytest.mark.usefixtures("cpu_path")
def test_large_scores_do_not_overflow() -> None:
    q, k, v = whole(1, 40, 1, 1, 8, 8)
    got, wanted = attention(1000 * q, k, v, 1.0), attention_reference(*doubled((1000 * q, k, v)), 1.0)
    assert float((got.double() - wanted).norm()) <= 8000 * EPS * float(wanted.norm())  # scores of thousands, to eps


def test_two_runs_give_equal_bits_and_threads_change_none(cpu_path: str) -> None:
    """On any number of threads where the source is ours: torch's own products are other sums on other numbers."""
    given_, rotary = projections(2, 90, 2, 16, 8, 16)
    seen, runs = draw(4, 2, 90, 2, 16), []
    threads = torch.get_num_threads()
    for count in (threads, threads, threads if cpu_path == "cpu" else 2):
        torch.set_num_threads(count)
        runs.append(both_ways(lambda *x: latent_attention(*x, rotary, 0.2), given_, seen))
    torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="a path of CPUs")
def test_what_is_kept_for_the_backward_pass(cpu_path: str) -> None:
    if cpu_path == "cpu":
        pytest.skip("torch keeps what it keeps")
    given_, rotary = projections(2, 40, 3, 12, 8, 10)
    given_, kept = tuple(t.requires_grad_() for t in given_), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        latent_attention(*given_, rotary, 0.2)
    theirs = {t.untyped_storage().data_ptr() for t in (*given_, *rotary)}
    beyond = sum(t.numel() for t in kept if t.untyped_storage().data_ptr() not in theirs)
    assert beyond == 2 * 40 * (3 * 10 + 3 + 3)  # the result, log-sums, and the keys that each query sees


def test_the_reference_on_demand_and_the_report(cpu_path: str) -> None:
    given_ = whole(2, 20, 4, 2, 8, 8)
    before = kernels.report().get("attention", {})
    with kernels.use_reference():
        wanted = attention(*given_, 0.3)
    close((attention(*given_, 0.3),), (wanted.double(),), wanted, 20, 8)
    after, here = kernels.report()["attention"], "gpu" if INTERPRETED else "torch" if DEVICE == "cuda" else cpu_path
    for how in ("reference", here):
        assert after[how] == before.get(how, 0) + 1


@pytest.mark.skipif(INTERPRETED, reason="a path of CPUs")
def test_other_dtypes_run_in_torch() -> None:
    before = kernels.report().get("attention", {}).get("cpu", 0)
    given_ = tuple(t.cpu().bfloat16() for t in whole(2, 20, 4, 2, 8, 8))
    got = attention(*given_, 0.3)
    assert got.dtype == torch.bfloat16
    assert kernels.report()["attention"]["cpu"] == before + 1
    wanted = attention_reference(*doubled(given_), 0.3)
    assert float((got.double() - wanted).norm()) <= 2 * 2**-8 * float(wanted.norm())  # weights and result are rounded


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="torch's operations on a CPU")
@given(
    batch=st.integers(1, 2), length=st.integers(1, 70), heads=st.integers(1, 3), shared=st.integers(1, 2),
    width=st.sampled_from([8, 13, 64]), turning=st.sampled_from([2, 16]), values=st.sampled_from([8, 11, 32]),
    how=st.sampled_from(HOW), scale=st.sampled_from([0.3, 2.0]),
)  # fmt: skip
@settings(max_examples=EXAMPLES, deadline=None)
def test_in_bfloat16_on_a_cpu(
    batch: int, length: int, heads: int, shared: int, width: int, turning: int, values: int, how: str, scale: float
) -> None:
    """Weights, slopes of scores, rotated parts and results are rounded, as by the code for GPUs below."""
    (told, mask), scale = seen_by(how, batch, length), scale / (width + turning) ** 0.5
    parts, rotary = projections(batch, length, heads, width, turning, values)
    exact, all_heads = (rotary[0].double(), rotary[1].double()), heads * shared
    latent, latent_reference = (
        partial(latent_attention, rotary=rotary),
        partial(latent_attention_reference, rotary=exact),
    )
    for function, reference, leaves, of in (
        (attention, attention_reference, whole(batch, length, all_heads, heads, width, values), all_heads),
        (latent, latent_reference, parts, heads),
    ):
        leaves, seen = tuple(t.bfloat16() for t in leaves), draw(4, batch, length, of, values).bfloat16()
        got = both_ways(lambda *x, f=function: f(*x, scale=scale, **told), leaves, seen)
        wanted = both_ways(lambda *x, f=reference: f(*x, scale=scale, mask_BSS=mask), doubled(leaves), seen.double())
        for i, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
            size = max(float(theirs.norm()), 0.0 if i == 0 else float(seen.norm()))
            assert mine.dtype == torch.bfloat16
            assert float((mine.double() - theirs).norm()) <= 4 * 2**-9 * size


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="code for GPUs")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("sizes", [(16, 16, 32), (128, 64, 128), (24, 8, 40)])
def test_in_bfloat16(sizes: tuple[int, int, int], how: str) -> None:
    """Weights, the slopes of scores, rotated parts and results are rounded to bfloat16, each by 2⁻⁹ at most; where
    gradients of scores cancel, what is left of them is of the size of their terms."""
    if INTERPRETED and sizes[0] == 128:
        pytest.skip("takes minutes under the interpreter")
    batch, length, heads = (2, 333, 4) if DEVICE == "cuda" else (1, 150, 2)
    given_, rotary = projections(batch, length, heads, *sizes)
    given_, seen = tuple(t.bfloat16() for t in given_), draw(4, batch, length, heads, sizes[2]).bfloat16()
    (told, mask), exact, scale = seen_by(how, batch, length), tuple(t.double() for t in rotary), sum(sizes[:2]) ** -0.5
    before = kernels.report().get("latent_attention", {}).get("gpu", 0)
    got = both_ways(lambda *x: latent_attention(*x, rotary, scale, **told), given_, seen)
    assert kernels.report()["latent_attention"]["gpu"] == before + 1
    wanted = both_ways(lambda *x: latent_attention_reference(*x, exact, scale, mask), doubled(given_), seen.double())
    for i, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        size = max(float(theirs.norm()), 0.0 if i == 0 else float(seen.norm()))
        assert mine.dtype == torch.bfloat16
        assert float((mine.double() - theirs).norm()) <= 4 * 2**-9 * size


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="code for GPUs")
@pytest.mark.parametrize("how", ["first of documents", "first at random"])
def test_tiles_that_are_seen_by_first_keys(how: str) -> None:
    """Of more keys than one program looks at; which tiles are seen whole, in part and not, from the mask."""
    from gristmill.kernels.mla_attention import gpu

    length, rows, keys = 1500, 64, 16
    told, mask = seen_by(how, 2, length)
    lists = gpu._lists(gpu._seen(None, told["first_BS"]), gpu.Tiles(rows, keys, 4, 2), draw(0, 1))
    assert mask is not None
    seen = torch.nn.functional.pad(mask.float(), (0, -length % keys, 0, -length % rows))
    there = torch.nn.functional.pad(torch.ones_like(mask, dtype=torch.float32), (0, 0, 0, -length % rows))
    sums = seen.unflatten(2, (-1, keys)).sum(3).unflatten(1, (-1, rows)).sum(2)
    whole = sums == there[:, :, :1].unflatten(1, (-1, rows)).sum(2) * keys
    assert torch.equal(lists.whole, whole.sum(-1).int())
    assert torch.equal(lists.part, ((sums > 0) & ~whole).sum(-1).int())
    kind = (sums > 0).int() + whole.int()
    assert (kind.gather(2, lists.tile.long()).diff(dim=-1) <= 0).all()
    assert kind.shape[-1] > gpu.TILES_AT_ONCE


@pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="code for GPUs")
def test_recomputation_can_keep_what_it_gave() -> None:
    given_, rotary = projections(1, 40, 2, 16, 8, 16)
    leaves, times = [t.bfloat16().requires_grad_() for t in given_], 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal times
            times += func is torch.ops.gristmill.attention_in_triton.default
            return func(*args, **(kwargs or {}))

    def attended(*x: torch.Tensor) -> torch.Tensor:
        return latent_attention(*x, rotary, 0.2).sin()

    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.gristmill.attention_in_triton.default])
    with Counting():
        out = checkpoint(attended, *leaves, use_reentrant=False, context_fn=contexts)
        got = torch.autograd.grad(out.sum(), leaves)
    assert times == 1
    assert all(map(torch.equal, got, torch.autograd.grad(attended(*leaves).sum(), leaves)))


Q, K, V = torch.ones(2, 6, 4, 8), torch.ones(2, 6, 2, 8), torch.ones(2, 6, 2, 5)
FIRST = torch.zeros(2, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q_BSHN": Q[0]}, ValueError, "attention: rank of q_BSHN is 3; wanted 4"),
        ({"q_BSHN": Q.long()}, TypeError, "q_BSHN is torch.int64; wanted a floating dtype"),
        ({"v_BSGW": V.double()}, TypeError, "v_BSGW is torch.float64; wanted the floating dtype of q_BSHN"),
        ({"k_BSGN": K[..., :7]}, ValueError, r"shape of k_BSGN is \(2, 6, 2, 7\); wanted \(2, 6, 2, 8\)"),
        ({"k_BSGN": K[:, :5]}, ValueError, r"shape of k_BSGN is \(2, 5, 2, 8\); wanted \(2, 6, 2, 8\)"),
        ({"v_BSGW": V[:, :, :1]}, ValueError, r"shape of v_BSGW is \(2, 6, 1, 5\); wanted \(2, 6, 2, 5\)"),
        ({"q_BSHN": Q[:, :, :3]}, ValueError, "heads of k_BSGN is 2; wanted a divisor of the 3 of q_BSHN"),
        ({"k_BSGN": K.to("meta")}, ValueError, "device of k_BSGN is meta; wanted that of the queries, cpu"),
        ({"mask_BSS": torch.ones(2, 6, 6)}, TypeError, "mask_BSS is torch.float32; wanted torch.bool"),
        ({"mask_BSS": torch.ones(6, 6).bool()}, ValueError, r"mask_BSS is \(6, 6\); wanted \(2, 6, 6\)"),
        ({"first_BS": torch.zeros(2, 6)}, TypeError, "first_BS is torch.float32; wanted torch.int32 or torch.int64"),
        ({"first_BS": FIRST[:, :5]}, ValueError, r"shape of first_BS is \(2, 5\); wanted \(2, 6\)"),
        ({"first_BS": FIRST.to("meta")}, ValueError, "device of first_BS is meta; wanted that of the queries, cpu"),
        ({"first_BS": FIRST - 1}, ValueError, "the least of first_BS is -1; wanted a place from 0 on"),
        (
            {"first_BS": FIRST, "mask_BSS": torch.ones(2, 6, 6).bool()},
            ValueError,
            "what queries see is given as mask_BSS and as first_BS; wanted one of the two",
        ),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention(**{"q_BSHN": Q, "k_BSGN": K, "v_BSGW": V, "scale": 0.3, **change})


KV, KEY, TURN = torch.ones(2, 6, 4, 9), torch.ones(2, 6, 4), torch.ones(2, 6, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kv_BSHX": KV[:, :, :2]}, ValueError, r"shape of kv_BSHX is \(2, 6, 2, 9\); wanted \(2, 6, 4, 9\)"),
        ({"kv_BSHX": KV[..., :4]}, ValueError, "width of kv_BSHX is 4; wanted more than the keys' 4"),
        ({"key_BSR": KEY[..., :3]}, ValueError, "width of key_BSR is 3; wanted an even number"),
        ({"key_BSR": torch.ones(2, 6, 10)}, ValueError, "width of key_BSR is 10; wanted at most that of q_BSHQ, 8"),
        ({"key_BSR": KEY.bfloat16()}, TypeError, "key_BSR is torch.bfloat16; wanted the floating dtype of q_BSHQ"),
        ({"rotary": (TURN, TURN[:1])}, ValueError, r"shape of the sines is \(1, 6, 2\); wanted \(2, 6, 2\)"),
        ({"rotary": (TURN.to("meta"), TURN)}, ValueError, "device of the cosines is meta; wanted that of"),
        ({"mask_BSS": torch.ones(2, 6, 5).bool()}, ValueError, r"shape of mask_BSS is \(2, 6, 5\); wanted \(2, 6, 6\)"),
        ({"first_BS": FIRST.short()}, TypeError, "first_BS is torch.int16; wanted torch.int32 or torch.int64"),
    ],
)
def test_bad_projections_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    fine = {"q_BSHQ": Q, "kv_BSHX": KV, "key_BSR": KEY, "rotary": (TURN, TURN), "scale": 0.3}
    with pytest.raises(error, match="latent_attention: " + message):
        latent_attention(**{**fine, **change})
