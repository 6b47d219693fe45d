"""Latent attention over a cache, against plain attention over up-projected keys and values in float64."""

from __future__ import annotations

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


def case(batch: int, length: int, heads: int, sizes: tuple[int, int, int, int], places: int, seed: int = 0) -> dict:
    """Arguments whose queries and latents are parts of one tensor, as a fused projection gives them."""
    plain, turning, value, latent = sizes
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    query, kv = draw(batch, length, heads * (plain + turning) + latent + turning).split(
        [heads * (plain + turning), latent + turning], -1
    )
    angle = draw(batch, length, turning // 2)
    start = torch.randint(0, places - length + 1, (batch,), generator=generator)
    return {
        "q_BSHQ": query.unflatten(-1, (heads, -1)),
        "kv_BSY": kv,
        "cache_BPC": draw(batch, places + 3, latent + turning)[:, :places],
        "start_B": start,
        "reach": int(start.max()) + length,
        "rotary": (angle.cos(), angle.sin()),
        "norm_C": draw(latent),
        "eps": EPS,
        "up_HXC": draw(heads, plain + value, latent) * latent**-0.5,
        "scale": (plain + turning) ** -0.5,
    }


def wanted_of(given_: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The result and the cache, token by token: keys and values of every place made whole (V3 equations 1 to 10)."""
    q, kv, cache, norm, up, cos, sin = (
        t.double()
        for t in (*(given_[n] for n in ("q_BSHQ", "kv_BSY", "cache_BPC", "norm_C", "up_HXC")), *given_["rotary"])
    )
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
    return mla_decode(**{**given_, "cache_BPC": cache}), cache


@pytest.mark.usefixtures("cpu_path")
@given(
    batch=st.integers(1, 5),
    length=st.integers(1, 6),
    heads=st.integers(1, 9),
    sizes=st.tuples(st.integers(1, 20), st.sampled_from([2, 4, 8, 10]), st.integers(1, 20), st.integers(1, 90)),
    places=st.integers(6, 70),
)
@settings(max_examples=40, deadline=None)
def test_result_and_cache(batch: int, length: int, heads: int, sizes: tuple[int, int, int, int], places: int) -> None:
    given_ = case(batch, length, heads, sizes, places)
    (out, cache), (wanted, kept) = run(given_), wanted_of(given_)
    # Sums of at most 100 numbers near 1 in float32, behind a softmax whose scores are sums of as many: a score that is
    # off by 100 · 2⁻²⁴ · its size of at most about 50 moves a weight by as much, relative.
    torch.testing.assert_close(out.double(), wanted, rtol=3e-4, atol=3e-4)
    torch.testing.assert_close(cache.double(), kept, rtol=1e-5, atol=1e-5)
    behind = torch.arange(places) >= (given_["start_B"] + length)[:, None]
    before = torch.arange(places) < given_["start_B"][:, None]
    untouched = behind | before
    assert torch.equal(cache[untouched], given_["cache_BPC"][untouched])


def test_a_token_does_not_depend_on_the_others(cpu_path: str) -> None:
    if cpu_path != "compiled":
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


def test_what_runs(cpu_path: str) -> None:
    before = kernels.report().get("mla_decode", {})
    given_ = case(2, 1, 2, (4, 2, 4, 8), 9)
    run(given_)
    halves = {n: given_[n].bfloat16() for n in ("q_BSHQ", "kv_BSY", "cache_BPC", "norm_C", "up_HXC")}
    assert run({**given_, **halves})[0].dtype == torch.bfloat16
    after = kernels.report()["mla_decode"]
    ran = {path: after.get(path, 0) - before.get(path, 0) for path in ("compiled", "cpu")}
    assert ran == ({"compiled": 1, "cpu": 1} if cpu_path == "compiled" else {"compiled": 0, "cpu": 2})


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
        mla_decode(**{**case(2, 1, 2, (4, 2, 4, 8), 9), **change})
