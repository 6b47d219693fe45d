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
    q, kv, cache, norm, up, cos, sin = (t.double().cpu() for t in (*(given_[n] for n in HALVES), *given_["rotary"]))
    cache, latent, turning = cache.clone(), len(norm), cache.shape[2] - len(norm)
    plain, out = q.shape[3] - turning, []
    for b, start in enumerate(given_["start_B"].tolist()):
        for s in range(q.shape[1]):
            cache[b, start + s, :latent] = rms_norm_reference(kv[b, s, :latent], norm, EPS)
            cache[b, start + s, latent:] = rotate_reference(kv[b, s, latent:], cos[b, s], sin[b, s])
            seen = cache[b, : start + s + 1]
            keys_values = torch.einsum("hxc,pc->hpx", up, seen[:, :latent])
            key, value = keys_values.split([plain, up.shape[1] - plain], -1)
            turned = rotate_reference(q[b, s, :, plain:], cos[b, s], sin[b, s])
            score = torch.einsum("hn,hpn->hp", q[b, s, :, :plain], key) + turned @ seen[:, latent:].t()
            out.append(torch.einsum("hp,hpw->hw", (score * given_["scale"]).softmax(-1), value).flatten())
    return torch.stack(out).view(q.shape[0], q.shape[1], -1), cache


def run(given_: dict[str, Any]) -> tuple[Tensor, Tensor]:
    cache = given_["cache_BPC"].clone()
    out = mla_decode(**{**given_, "cache_BPC": cache})
    return out.cpu(), cache.cpu()


def halved(given_: dict[str, Any]) -> dict[str, Any]:
    return {**given_, **{name: given_[name].bfloat16() for name in HALVES}}


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
        ({"kv_BSY": torch.zeros(2, 1, 9)}, ValueError, "mla_decode"),
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
