"""The logarithms of the sums of exponentials of latent decoding, against float64: they join results of several caches.

On the GPU where there is one, else on the CPU, and the Triton code under its interpreter.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from gristmill import kernels
from gristmill.kernels.mla_decode import mla_decode
from gristmill.kernels.norm_rope.reference import rms_norm_reference, rotate_reference

INTERPRETED = os.environ.get("GRISTMILL_KERNELS") == "gpu"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
BATCH, LENGTH, HEADS, PLAIN, TURNING, VALUE, LATENT, PLACES = 3, 2, 4, 16, 8, 16, 32, 160
PAGE = 16


def case(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Three rows of which one has but its new tokens, and one more places than a span of a GPU's programs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    angle = draw(BATCH, LENGTH, TURNING // 2).float()
    return {
        "q_BSHQ": draw(BATCH, LENGTH, HEADS, PLAIN + TURNING),
        "kv_BSY": draw(BATCH, LENGTH, LATENT + TURNING),
        "cache_BPC": draw(BATCH, PLACES, LATENT + TURNING),
        "start_B": torch.tensor([0, PLACES - LENGTH, 37], device=DEVICE),
        "reach": PLACES,
        "rotary": (angle.cos(), angle.sin()),
        "norm_C": draw(LATENT),
        "eps": 1e-6,
        "up_HXC": draw(HEADS, PLAIN + VALUE, LATENT) * LATENT**-0.5,
        "scale": 0.3,
    }


def paged(given: dict[str, Any]) -> dict[str, Any]:
    """The same places in pages that lie the other way round."""
    pool = given["cache_BPC"].unflatten(1, (-1, PAGE)).flatten(0, 1).flip(0).contiguous()
    table = torch.arange(len(pool)).flip(0).view(BATCH, -1)
    return {**given, "cache_BPC": pool, "table_BJ": table.to(DEVICE)}


def scores_of(given: dict[str, Any]) -> list[Tensor]:
    """Of each new token the scaled scores in float64, (H, places that it sees): V3 equations 1 to 8."""
    names = ("q_BSHQ", "kv_BSY", "cache_BPC", "norm_C", "up_HXC")
    q, kv, cache, norm, up, cos, sin = (t.double().cpu() for t in (*(given[n] for n in names), *given["rotary"]))
    cache, scores = cache.clone(), []
    for b, start in enumerate(given["start_B"].tolist()):
        for s in range(LENGTH):
            cache[b, start + s, :LATENT] = rms_norm_reference(kv[b, s, :LATENT], norm, given["eps"])
            cache[b, start + s, LATENT:] = rotate_reference(kv[b, s, LATENT:], cos[b, s], sin[b, s])
            seen = cache[b, : start + s + 1]
            keys = torch.einsum("hnc,pc->hpn", up[:, :PLAIN], seen[:, :LATENT])
            turned = rotate_reference(q[b, s, :, PLAIN:], cos[b, s], sin[b, s])
            scores.append(torch.einsum("hn,hpn->hp", q[b, s, :, :PLAIN], keys) + turned @ seen[:, LATENT:].t())
    return [score * given["scale"] for score in scores]


def logs_of(given: dict[str, Any]) -> Tensor:
    return torch.stack([score.logsumexp(-1) for score in scores_of(given)]).view(BATCH, LENGTH, HEADS)


def run(given: dict[str, Any], **how: bool) -> Any:
    return mla_decode(**{**given, "cache_BPC": given["cache_BPC"].clone()}, **how)


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("lying", [dict, paged], ids=["slots", "pages"])
def test_the_logarithms(lying: Any) -> None:
    given = case()
    out, log = run(lying(given), with_log=True)
    assert log.dtype == torch.float32
    # scores of up to 30 from sums of 40 products, in float32
    torch.testing.assert_close(log.double().cpu(), logs_of(given), rtol=0, atol=1e-4)
    assert out.equal(run(lying(given)))


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("lying", [dict, paged], ids=["slots", "pages"])
def test_the_logarithms_in_16_bits(lying: Any) -> None:
    given = case(torch.bfloat16)
    out, log = run(lying(given), with_log=True)
    assert log.dtype == torch.float32
    exact = logs_of(given)
    largest = max(float(score.abs().max()) for score in scores_of(given))
    # a score's rounding: of the query in the latent, of the new latents and keys, and in torch of the score itself
    assert float((log.double().cpu() - exact).abs().max()) <= 3 * 2**-8 * largest
    assert out.equal(run(lying(given)))


def test_the_reference_has_them_too() -> None:
    given = case()
    with kernels.use_reference():
        out, log = run(given, with_log=True)
        assert out.equal(run(given))
    torch.testing.assert_close(log.double().cpu(), logs_of(given), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("cpu_path")
def test_of_nothing() -> None:
    given = case()
    none = {name: given[name][:0] for name in ("q_BSHQ", "kv_BSY", "cache_BPC", "start_B")}
    out, log = run({**given, **none, "rotary": tuple(t[:0] for t in given["rotary"])}, with_log=True)
    assert out.shape == (0, LENGTH, HEADS * VALUE)
    assert log.shape == (0, LENGTH, HEADS)


@pytest.mark.skipif(INTERPRETED, reason="graphs are tested once")
@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("lying", [dict, paged], ids=["slots", "pages"])
def test_in_a_graph(lying: Any) -> None:
    torch._dynamo.reset()
    given = lying(case())
    cos, sin = given["rotary"]
    names = ("q_BSHQ", "kv_BSY", "cache_BPC", "start_B", "reach")
    unpaired = (*(given[name] for name in names), cos, sin, *(given[n] for n in ("norm_C", "eps", "up_HXC", "scale")))
    torch.library.opcheck(torch.ops.gristmill.mla_decode_with_log.default, (*unpaired, given.get("table_BJ")))
    ours, theirs = lying(case()), lying(case())
    graph = torch.compile(lambda: mla_decode(**ours, with_log=True), fullgraph=True, backend="aot_eager")
    for mine, other in zip(graph(), mla_decode(**theirs, with_log=True), strict=True):
        assert mine.equal(other)
    assert ours["cache_BPC"].equal(theirs["cache_BPC"])
