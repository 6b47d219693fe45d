"""Latent attention over a cache, against plain attention over up-projected keys and values in float64: on the GPU where
there is one, else on the CPU, and the Triton code under its interpreter."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gristmill import kernels
from gristmill.kernels.mla_decode import mla_decode
from gristmill.kernels.norm_rope.reference import rms_norm_reference, rotate_reference

EPS = 1e-6
INTERPRETED = os.environ.get("GRISTMILL_KERNELS") == "gpu"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
ON_TRITON = INTERPRETED or DEVICE == "cuda"
EXAMPLES = 4 if INTERPRETED else 10 if DEVICE == "cuda" else 40  # compiled anew for most shapes on a GPU
HALVES = ("q_BSHQ", "kv_BSY", "cache_BPC", "norm_C", "up_HXC")  # what has the queries' dtype


def case(
    batch: int, length: int, heads: int, sizes: tuple[int, int, int, int], places: int, device: str = DEVICE
) -> dict:
    """Arguments whose queries and latents are parts of one tensor, as a fused projection gives them."""
    plain, turning, value, latent = sizes
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    query, kv = draw(batch, length, heads * (plain + turning) + latent + turning).split(
        [heads * (plain + turning), latent + turning], -1
    )
    angle = draw(batch, length, turning // 2)
    start = torch.randint(0, places - length + 1, (batch,), generator=generator)
    return {
        "q_BSHQ": query.unflatten(-1, (heads, -1)),
        "kv_BSY": kv,
        "cache_BPC": draw(batch, places + 3, latent + turning)[:, :places],
        "start_B": start.to(device),
        "reach": int(start.max()) + length,
        "rotary": (angle.cos(), angle.sin()),
        "norm_C": draw(latent),
        "eps": EPS,
        "up_HXC": draw(heads, plain + value, latent) * latent**-0.5,
        "scale": (plain + turning) ** -0.5,
    }


def wanted_of(given_: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The result and the cache, token by token: keys and values of every place made whole (V3 equations 1 to 10)."""
    return wanted_and_terms(given_)[:2]


def wanted_and_terms(given_: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Also, number by number of the result, what its terms come to without their signs, and what the terms of the
    largest score that its weights are of do, (B, S, H·W)."""
    q, kv, cache, norm, up, cos, sin = (t.double().cpu() for t in (*(given_[n] for n in HALVES), *given_["rotary"]))
    cache, latent, turning = cache.clone(), len(norm), cache.shape[2] - len(norm)
    plain, out = q.shape[3] - turning, []
    up_key, up_value = up.split([plain, up.shape[1] - plain], 1)
    for b, start in enumerate(given_["start_B"].tolist()):
        for s in range(q.shape[1]):
            cache[b, start + s, :latent] = rms_norm_reference(kv[b, s, :latent], norm, EPS)
            cache[b, start + s, latent:] = rotate_reference(kv[b, s, latent:], cos[b, s], sin[b, s])
            seen, query = cache[b, : start + s + 1], q[b, s, :, :plain]
            turned = rotate_reference(q[b, s, :, plain:], cos[b, s], sin[b, s])
            made = []
            for sign in (lambda t: t, torch.abs):
                key = torch.einsum("hnc,pc->hpn", sign(up_key), sign(seen[:, :latent]))
                value = torch.einsum("hwc,pc->hpw", sign(up_value), sign(seen[:, :latent]))
                score = torch.einsum("hn,hpn->hp", sign(query), key) + sign(turned) @ sign(seen[:, latent:]).t()
                made.append((score * given_["scale"], value))
            (score, value), (score_terms, value_terms) = made
            weight, most = score.softmax(-1), score_terms.amax(1)[:, None].expand(-1, value.shape[2])
            out.append(
                [torch.einsum("hp,hpw->hw", weight, v).flatten() for v in (value, value_terms)] + [most.flatten()]
            )
    result, terms, most = (torch.stack(t).view(q.shape[0], q.shape[1], -1) for t in zip(*out, strict=True))
    return result, cache, terms, most


def run(given_: dict[str, Any]) -> tuple[Tensor, Tensor]:
    cache = given_["cache_BPC"].clone()
    out = mla_decode(**{**given_, "cache_BPC": cache})
    return out.cpu(), cache.cpu()


def halved(given_: dict[str, Any]) -> dict[str, Any]:
    return {**given_, **{name: given_[name].bfloat16() for name in HALVES}}


def paged(given_: dict[str, Any], page: int, dtype: torch.dtype = torch.int64, spare: int = 2) -> dict[str, Any]:
    """The same with the slots cut into pages that lie in any order, beside pages of NaN that are nobody's.

    A row has the pages that it needs; behind them its table names none, or one that is no number.
    """
    cache, needed = given_["cache_BPC"].cpu(), -(-(given_["start_B"].cpu() + given_["q_BSHQ"].shape[1]) // page)
    batch, places, width = cache.shape
    whole = torch.cat((cache, cache.new_zeros(batch, -places % page, width)), 1).unflatten(1, (-1, page))
    order = torch.randperm(int(needed.sum()) + spare, generator=torch.Generator().manual_seed(1))
    pool = torch.full((len(order), page, width), torch.nan, dtype=cache.dtype)
    table, taken = torch.where(torch.arange(batch)[:, None] % 2 == 0, -1, order[-1]).repeat(1, whole.shape[1]), 0
    for b, count in enumerate(needed.tolist()):
        table[b, :count] = order[taken : taken + count]
        pool[table[b, :count]] = whole[b, :count]
        taken += count
    return {**given_, "cache_BPC": pool.to(DEVICE), "table_BJ": table.to(DEVICE, dtype)}


def unpaged(pool: Tensor, given_: dict[str, Any], like: Tensor) -> Tensor:
    """Slots that hold what the rows' pages do, and else what `like` does."""
    slots, table, page = like.clone(), given_["table_BJ"].cpu(), pool.shape[1]
    for b, end in enumerate((given_["start_B"].cpu() + given_["q_BSHQ"].shape[1]).tolist()):
        slots[b, :end] = pool[table[b, : -(-end // page)].long()].flatten(0, 1)[:end]
    return slots


@given(
    batch=st.integers(1, 5), length=st.integers(1, 6), heads=st.integers(1, 9), page=st.sampled_from([1, 4, 16, 64]),
    sizes=st.tuples(st.integers(1, 20), st.sampled_from([2, 4, 8, 10]), st.integers(1, 20), st.integers(1, 90)),
    places=st.integers(6, 70), dtype=st.sampled_from([torch.int32, torch.int64]),
)  # fmt: skip
@settings(max_examples=EXAMPLES, deadline=None)
def test_pages_that_lie_anywhere(
    cpu_path: str, batch: int, length: int, heads: int, page: int, sizes: tuple[int, int, int, int], places: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    slots = case(batch, length, heads, sizes, places)
    given_ = paged(slots, page, dtype)
    (out, pool), (same, cache), (wanted, _) = run(given_), run(slots), wanted_of(slots)
    torch.testing.assert_close(out.double(), wanted, rtol=3e-4, atol=3e-4)  # as of slots
    kept = unpaged(pool, given_, slots["cache_BPC"].cpu())
    if (cpu_path == "compiled" and not ON_TRITON) or (
        ON_TRITON and page >= 16
    ):  # else torch, which may cut sums elsewhere
        assert out.equal(same)
        assert kept.equal(cache)
    torch.testing.assert_close(kept, cache, rtol=1e-5, atol=1e-5)
    row_of = torch.zeros(len(pool), page, dtype=torch.bool)  # where the tokens are
    for b, start in enumerate(slots["start_B"].tolist()):
        for place in range(start, start + length):
            row_of[given_["table_BJ"][b, place // page], place % page] = True
    assert torch.equal(pool[~row_of].nan_to_num(), given_["cache_BPC"].cpu()[~row_of].nan_to_num())


@pytest.mark.usefixtures("cpu_path")
def test_rows_share_the_pages_of_a_common_beginning() -> None:
    alone = case(2, 1, 4, (16, 16, 16, 64), 100)
    alone |= {"start_B": torch.tensor([64, 90], device=DEVICE), "reach": 91}
    alone["cache_BPC"][1, :64] = alone["cache_BPC"][0, :64]
    given_ = paged(alone, 32)
    given_["table_BJ"][1, :2] = given_["table_BJ"][0, :2]
    given_["cache_BPC"][given_["table_BJ"][0, 2], 1:] = torch.nan  # behind a row's token
    torch.testing.assert_close(run(given_)[0], run(alone)[0], rtol=1e-5, atol=1e-5)  # of two orders of sums


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize(("batch", "length", "heads", "places"), [(1, 1, 16, 1300), (3, 6, 8, 400)])
def test_many_pages_in_16_bits(batch: int, length: int, heads: int, places: int) -> None:
    """Rows of several spans, whose bounds are pages' too."""
    slots = halved(case(batch, length, heads, (16, 16, 16, 64), places))
    out, wanted = run(paged(slots, 64))[0], run(slots)[0]
    if ON_TRITON:
        assert out.equal(wanted)
    assert float((out - wanted).float().norm()) <= 2**-8 * float(wanted.float().norm())  # a rounding of each


@pytest.mark.usefixtures("cpu_path")
@given(
    batch=st.integers(1, 5),
    length=st.integers(1, 6),
    heads=st.integers(1, 9),
    sizes=st.tuples(st.integers(1, 20), st.sampled_from([2, 4, 8, 10]), st.integers(1, 20), st.integers(1, 90)),
    places=st.integers(6, 70),
)
@settings(max_examples=EXAMPLES, deadline=None)
def test_result_and_cache(batch: int, length: int, heads: int, sizes: tuple[int, int, int, int], places: int) -> None:
    given_ = case(batch, length, heads, sizes, places)
    (out, cache), (wanted, kept) = run(given_), wanted_of(given_)
    # Sums of at most 100 numbers near 1 in float32, behind a softmax whose scores are sums of as many: a score that is
    # off by 100 · 2⁻²⁴ · its size of at most about 50 moves a weight by as much, relative.
    torch.testing.assert_close(out.double(), wanted, rtol=3e-4, atol=3e-4)
    torch.testing.assert_close(cache.double(), kept, rtol=1e-5, atol=1e-5)
    start_B = given_["start_B"].cpu()
    untouched = (torch.arange(places) >= (start_B + length)[:, None]) | (torch.arange(places) < start_B[:, None])
    assert torch.equal(cache[untouched], given_["cache_BPC"].cpu()[untouched])


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize(
    ("batch", "length", "heads", "places"),
    [(1, 1, 16, 700), (3, 6, 8, 400), (40, 1, 3, 150)],
    ids=["a long row", "several tokens", "many rows"],
)
def test_many_places(batch: int, length: int, heads: int, places: int) -> None:
    """A row of several spans, blocks of queries of several tokens, and rows that are a program's alone."""
    given_ = case(batch, length, heads, (16, 16, 16, 64), places)
    (out, cache), (wanted, kept) = run(given_), wanted_of(given_)
    torch.testing.assert_close(out.double(), wanted, rtol=3e-4, atol=3e-4)  # as above
    torch.testing.assert_close(cache.double(), kept, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize(("batch", "heads", "places"), [(2, 16, 300), (40, 20, 40)])
def test_in_16_bits(batch: int, heads: int, places: int) -> None:
    given_ = halved(case(batch, 1, heads, (16, 16, 16, 64), places))
    (out, cache), (wanted, kept) = run(given_), wanted_of(given_)
    assert out.dtype == torch.bfloat16
    # Of 2⁻⁹ each: roundings of the latents, the queries, the scores (in torch), which are near 1, the weights, what is
    # mixed of them and the result. The interpreter cuts off: 2⁻⁸.
    allowed = 8 * (2**-8 if INTERPRETED else 2**-9)
    assert float((out.double() - wanted).norm()) <= allowed * float(wanted.norm())
    torch.testing.assert_close(cache.double(), kept, rtol=2**-7, atol=2**-7)


@pytest.mark.usefixtures("cpu_path")
@given(
    batch=st.integers(1, 4), length=st.integers(1, 4), heads=st.integers(1, 9), page=st.sampled_from([None, 4, 16]),
    sizes=st.tuples(st.integers(1, 20), st.sampled_from([2, 4, 10]), st.integers(1, 20), st.integers(1, 90)),
    places=st.integers(6, 50), large=st.sampled_from([1.0, 4.0]),
)  # fmt: skip
@settings(max_examples=EXAMPLES, deadline=None)
def test_number_by_number_in_16_bits(
    batch: int, length: int, heads: int, page: int | None, sizes: tuple[int, int, int, int], places: int, large: float
) -> None:
    given_ = case(batch, length, heads, sizes, places)
    given_ = halved({**given_, "q_BSHQ": given_["q_BSHQ"] * large})
    out, _ = run(given_ if page is None else paged(given_, page))
    wanted, _, terms, score_terms = wanted_and_terms(given_)
    # Half a step of bfloat16 each: a latent, a weight, what is mixed of them and the result; and of a score's terms
    # the absorbed query, the latent, the rotated part, the score and it scaled, which move every weight of its row,
    # twice, as a softmax has it. The interpreter cuts off: a whole step.
    allowed = (2**-7 if INTERPRETED else 2**-8) * (4 + 2 * 5 * score_terms) * terms
    assert out.dtype == torch.bfloat16
    assert bool(((out.double() - wanted).abs() <= allowed).all())


@pytest.mark.usefixtures("cpu_path")
def test_what_is_no_number_in_a_query_stays_in_its_head() -> None:
    given_ = case(2, 3, 4, (8, 4, 6, 16), 30)
    given_["q_BSHQ"][1, 2, 3, 5], given_["q_BSHQ"][0, 1, 0, 9] = torch.nan, torch.nan  # plain, and rotated
    out, cache = run(given_)
    spoilt = out.unflatten(-1, (4, 6)).isnan()
    assert spoilt.any(-1).nonzero().tolist() == [[0, 1, 0], [1, 2, 3]]
    assert spoilt.any(-1).equal(spoilt.all(-1))
    assert cache.isfinite().all()


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_equal_bits(dtype: torch.dtype) -> None:
    slots = case(2, 3, 6, (16, 16, 16, 64), 160)
    slots = slots if dtype == torch.float32 else halved(slots)
    for given_ in (slots, paged(slots, 16)):
        first, second = run(given_), run(given_)
        assert first[0].equal(second[0])
        assert first[1].nan_to_num().equal(second[1].nan_to_num())


def test_a_token_does_not_depend_on_the_others(cpu_path: str) -> None:
    if cpu_path != "compiled" or ON_TRITON:
        pytest.skip("torch's products may cut sums elsewhere")
    given_ = case(6, 1, 8, (16, 16, 32, 64), 50)
    whole, _ = run(given_)
    rows = {name: given_[name][2:4] for name in ("q_BSHQ", "kv_BSY", "cache_BPC", "start_B")}
    part = {**given_, **rows, "rotary": tuple(t[2:4] for t in given_["rotary"])}
    assert torch.equal(run(part)[0], whole[2:4])
    long = case(2, 7, 3, (8, 4, 10, 20), 40)
    at_once, cache = run(long)
    by_one, kept = [], long["cache_BPC"].clone()
    for s in range(7):
        one = {name: long[name][:, s : s + 1] for name in ("q_BSHQ", "kv_BSY")}
        rotary = tuple(t[:, s : s + 1].contiguous() for t in long["rotary"])
        step = {"start_B": long["start_B"] + s, "reach": long["reach"] - 6 + s, "cache_BPC": kept, "rotary": rotary}
        by_one.append(mla_decode(**{**long, **one, **step}))
    assert torch.equal(torch.cat(by_one, 1), at_once)
    assert torch.equal(kept, cache)


@pytest.mark.skipif(not ON_TRITON, reason="the other paths have no spans")
def test_how_far_other_rows_reach_does_not_matter() -> None:
    """Row 0 sees 100 places: alone in a span that is the whole of its places, and in one of several."""
    near = case(3, 1, 4, (16, 16, 16, 64), 1300)
    near |= {"start_B": torch.tensor([100, 3, 120], device=DEVICE), "reach": 121}
    far = {**near, "start_B": torch.tensor([100, 1299, 700], device=DEVICE), "reach": 1300}
    assert torch.equal(run(near)[0][0], run(far)[0][0])


@pytest.mark.skipif(not ON_TRITON, reason="the other paths do not give them")
@pytest.mark.parametrize("places", [60, 1300])
def test_logarithms_of_sums(places: int) -> None:
    from gristmill.kernels.mla_decode.gpu import attend

    given_ = case(2, 1, 4, (64, 16, 16, 64), places)  # whose queries have the latents' width
    query, cache, start_B = given_["q_BSHQ"][:, 0], given_["cache_BPC"], given_["start_B"]
    mixed, lse = attend(
        query[..., :64].transpose(0, 1).contiguous(), query[..., 64:].contiguous(), cache, start_B, given_["reach"], 0.1
    )
    score = 0.1 * torch.einsum("bhc,bpc->bhp", query.double(), cache.double())
    score = score.masked_fill(torch.arange(places, device=DEVICE) > start_B[:, None, None], -torch.inf)
    torch.testing.assert_close(lse.double(), score.logsumexp(-1), rtol=1e-5, atol=1e-5)
    wanted = torch.einsum("bhp,bpc->hbc", score.softmax(-1), cache[..., :64].double())
    torch.testing.assert_close(mixed.double(), wanted, rtol=3e-4, atol=3e-4)


def test_what_runs(cpu_path: str) -> None:
    before = kernels.report().get("mla_decode", {})
    given_ = case(2, 1, 2, (4, 2, 4, 8), 9)
    run(given_)
    run(halved(given_))
    run({**given_, "cache_BPC": given_["cache_BPC"].mT.contiguous().mT})
    after = kernels.report()["mla_decode"]
    ran = {path: count - before.get(path, 0) for path, count in after.items() if count > before.get(path, 0)}
    elsewhere = {"compiled": 1, "cpu": 2} if cpu_path == "compiled" else {"cpu": 3}
    assert ran == ({"gpu": 2, "torch": 1} if INTERPRETED else {"gpu": 1, "torch": 2} if ON_TRITON else elsewhere)


@pytest.mark.usefixtures("cpu_path")
def test_no_rows_at_all() -> None:
    given_ = case(2, 1, 2, (4, 2, 4, 8), 9)
    none = {name: given_[name][:0] for name in ("q_BSHQ", "kv_BSY", "cache_BPC", "start_B")}
    assert run({**given_, **none, "rotary": tuple(t[:0] for t in given_["rotary"])})[0].shape == (0, 1, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kv_BSY": torch.zeros(2, 1, 9)}, ValueError, r"shape of cache_BPC is \(2, 9, 10\); wanted \(2, 9, 9\)"),
        ({"kv_BSY": torch.zeros(2, 2, 10)}, ValueError, r"shape of kv_BSY is \(2, 2, 10\); wanted \(2, 1, 10\)"),
        ({"reach": 10}, ValueError, "reach is 10; wanted at most 9"),
        ({"start_B": torch.zeros(2, dtype=torch.int32)}, TypeError, r"start_B is torch\.int32"),
        ({"start_B": torch.zeros(3, dtype=torch.int64)}, ValueError, r"shape of start_B is \(3,\); wanted \(2,\)"),
        ({"start_B": torch.tensor([-1, 0])}, ValueError, r"places is \(-1, 0\); wanted from 0 to below reach"),
        ({"start_B": torch.tensor([0, 9]), "reach": 9}, ValueError, r"places is \(0, 9\); .*below reach, 9"),
        ({"norm_C": torch.ones(8).double()}, TypeError, r"norm_C is torch\.float64; wanted torch\.float32"),
        ({"up_HXC": torch.ones(3, 8, 8)}, ValueError, r"shape of up_HXC is \(3, 8, 8\)"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mla_decode(**{**case(2, 1, 2, (4, 2, 4, 8), 9, "cpu"), **change})


@pytest.mark.parametrize(
    ("page", "table", "error", "message"),
    [
        (4, torch.zeros(2), ValueError, r"rank of table_BJ is 1; wanted 2"),
        (4, torch.zeros(3, 3, dtype=torch.int64), ValueError, "rows of table_BJ is 3; wanted 2"),
        (4, torch.zeros(2, 3), TypeError, r"table_BJ is torch\.float32"),
        (3, torch.zeros(2, 3, dtype=torch.int64), ValueError, "places of a page is 3; wanted a power of two"),
        (4, torch.zeros(2, 2, dtype=torch.int64), ValueError, "reach is 9; wanted at most 8"),
        (
            4,
            torch.tensor([[0, 1, 2], [3, 4, 5]]),
            ValueError,
            r"pages of table_BJ is \(0, 5\); wanted from 0 to below 5",
        ),
        (4, torch.tensor([[0, 1, -1], [3, 4, 2]]), ValueError, r"pages of table_BJ is \(-1, 4\); wanted from 0"),
    ],
)
@pytest.mark.usefixtures("cpu_path")
def test_bad_tables_are_named(page: int, table: Tensor, error: type[Exception], message: str) -> None:
    given_ = case(2, 1, 2, (4, 2, 4, 8), 9, "cpu")
    given_ |= {"start_B": torch.tensor([8, 8]), "reach": 9, "cache_BPC": torch.zeros(5, page, 10)}
    with pytest.raises(error, match=message):
        mla_decode(**given_, table_BJ=table)


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_nothing_waits_for_the_host_on_a_gpu() -> None:
    given_ = halved(case(2, 1, 16, (16, 16, 16, 64), 700))
    first = mla_decode(**given_)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = mla_decode(**given_)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)
