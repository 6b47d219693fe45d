"""All layers of a few tokens in one call, against plain torch in float64; tokens alone and with others, bit by bit."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from gristmill import kernels
from gristmill.kernels.decoder_layers import DecoderLayers, LayerWeights, MtpWeights, Shape, joined, runs
from gristmill.kernels.decoder_layers.reference import joined_reference, layers_reference
from gristmill.kernels.linear import LEAST_ROWS
from gristmill.kernels.router import Choice

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler"
)
VOCAB, PLACES = 37, 24
PLAIN = Shape(
    width=24, heads=3, plain=5, turning=4, value=6, latent=20, query_rank=0, experts=6, choice=Choice(2), eps=1e-6,
    latent_eps=1e-5, scale=0.3,
)  # fmt: skip
SHAPES = {
    "query latent": replace(PLAIN, query_rank=14),
    "groups": replace(PLAIN, experts=8, choice=Choice(3, groups=4, groups_allowed=2, scale=2.5)),
    "softmax, unnormalised": replace(PLAIN, choice=Choice(2, affinity="softmax", normalised=False)),
    "wide": replace(PLAIN, width=160, latent=96, turning=16, plain=32, value=40, heads=2),
}


def layer(n: Shape, seed: int, dense: bool, shared: bool) -> LayerWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 1)

    query, own = n.heads * (n.plain + n.turning), () if dense else (n.experts,)
    return LayerWeights(
        draw(n.width), draw((n.query_rank or query) + n.latent + n.turning, n.width),
        draw(n.query_rank) if n.query_rank else None, draw(query, n.query_rank) if n.query_rank else None,
        draw(n.latent), draw(n.heads, n.plain + n.value, n.latent), draw(n.width, n.heads * n.value), draw(n.width),
        draw(*own, 2 * 10, n.width), draw(*own, n.width, 10), None if dense else draw(n.experts, n.width),
        None if dense else draw(n.experts) * 0.1, draw(2 * 18, n.width) if shared else None,
        draw(n.width, 18) if shared else None,
    )  # fmt: skip


def double(weights: LayerWeights) -> LayerWeights:
    values = (getattr(weights, field.name) for field in fields(weights))
    return LayerWeights(*(value.double() if value is not None else None for value in values))


def case(n: Shape) -> tuple[DecoderLayers, dict[str, Any]]:
    layers = [layer(n, 0, True, False), layer(n, 1, False, True), layer(n, 2, False, False)]
    generator = torch.Generator().manual_seed(9)
    angle = torch.randn(PLACES + 2, n.turning // 2, generator=generator)
    head = torch.randn(n.width, generator=generator), torch.randn(VOCAB, n.width, generator=generator)
    cache = torch.randn(3, 4, PLACES, n.latent + n.turning, generator=generator)[:, :3]  # as of a batch made smaller
    given = {
        "x_BSD": torch.randn(3, 2, n.width, generator=generator),
        "start_B": torch.tensor([0, PLACES - 2, 7]),
        "cache_LBPC": cache,
    }
    return DecoderLayers(layers, n, (angle.cos(), angle.sin()), head), given


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_states_cache_and_logits(shape: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, given = case(SHAPES[shape])
    cache = given["cache_LBPC"].double()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    copies = 1 if threads == 1 else 15  # so many rows that of the wide shape the second thread is woken
    given["x_BSD"] = given["x_BSD"].repeat(1, copies, 1)[:, :PLACES]
    given["start_B"] = given["start_B"].clamp_max(PLACES - given["x_BSD"].shape[1])
    before = given["x_BSD"].clone()
    hidden_BSD, logits_BSV = made.through(**given)
    layers, turn = [double(weights) for weights in made.layers], tuple(t.double() for t in made.turn_SR)
    wanted = layers_reference(before.double(), given["start_B"], cache, layers, made.shape, turn)
    # chains of float32 sums of up to 160 terms over three layers
    torch.testing.assert_close(hidden_BSD.double(), wanted, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(given["cache_LBPC"].double(), cache, atol=2e-4, rtol=2e-4)
    norm, head = (tensor.double() for tensor in made.head)
    normed = torch.nn.functional.rms_norm(wanted, norm.shape, norm, made.shape.eps)
    assert logits_BSV is not None
    torch.testing.assert_close(logits_BSV.double(), normed @ head.t(), atol=2e-3, rtol=2e-4)
    assert torch.equal(given["x_BSD"], before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("page", [4, 8])
def test_pages_give_the_bits_of_slots(shape: str, page: int) -> None:
    """Pages in any order, of a cache with more of them; what the table says behind a row's last token is not read."""
    made, given = case(SHAPES[shape])
    slots_LBPC, count = given["cache_LBPC"].clone(), PLACES // page
    order = torch.randperm(3 * count + 2, generator=torch.Generator().manual_seed(3))[: 3 * count].view(3, count)
    pages = torch.full((3, 3 * count + 2, page, slots_LBPC.shape[-1]), torch.nan)
    pages[:, order] = slots_LBPC.view(3, 3, count, page, -1)
    table = order.clone()
    table[0, 1:] = -7
    hidden, logits = made.through(given["x_BSD"], given["start_B"], pages, table_BJ=table)
    wanted = made.through(given["x_BSD"], given["start_B"], slots_LBPC)
    assert torch.equal(hidden, wanted[0])
    assert logits is not None
    assert wanted[1] is not None
    assert torch.equal(logits, wanted[1])
    assert torch.equal(pages[:, order].view_as(slots_LBPC), slots_LBPC)
    for wrong in (-1, len(pages[0])):
        table[2, 1] = wrong
        before = pages.clone()
        with pytest.raises(ValueError, match=rf"in pages \[.*{wrong}.*\] of {len(pages[0])}"):
            made.through(given["x_BSD"], given["start_B"], pages, table_BJ=table)
        assert torch.equal(pages.nan_to_num(9.0), before.nan_to_num(9.0))  # nothing was written


@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_gets_the_same_bits_alone(shape: str) -> None:
    made, given = case(SHAPES[shape])
    alone_LBPC = given["cache_LBPC"].clone()
    whole = made.through(**given)
    for row, place in ((0, 0), (0, 1), (2, 0), (2, 1)):
        one = slice(row, row + 1)
        start, cache = given["start_B"][one] + place, alone_LBPC[:, one]
        hidden, logits = made.through(given["x_BSD"][one, place : place + 1], start, cache)
        assert logits is not None
        assert whole[1] is not None
        assert torch.equal(hidden[0, 0], whole[0][row, place])
        assert torch.equal(logits[0, 0], whole[1][row, place])
    assert torch.equal(alone_LBPC[:, ::2], given["cache_LBPC"][:, ::2])


def test_one_token_of_each_row_is_asked_for() -> None:
    """Only the cache keeps something of the others."""
    made, given = case(PLAIN)
    one = DecoderLayers(made.layers[1:2], PLAIN, made.turn_SR, made.head)
    given["cache_LBPC"] = given["cache_LBPC"][:1]
    asked_given = {**given, "cache_LBPC": given["cache_LBPC"].clone()}
    asked_B = torch.tensor([1, 0, 1])
    hidden, logits = one.through(**given)
    asked, asked_logits = one.through(**asked_given, asked_B=asked_B)
    assert logits is not None
    assert asked_logits is not None
    row_B = torch.arange(3)
    assert torch.equal(asked[:, 0], hidden[row_B, asked_B])
    assert torch.equal(asked_logits[:, 0], logits[row_B, asked_B])
    assert torch.equal(asked_given["cache_LBPC"], given["cache_LBPC"])


def test_what_a_module_begins_with() -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, embedding = torch.randn(2, 3, 5, 40, generator=generator)
    norms = torch.randn(3, 40, generator=generator)
    weights = MtpWeights(norms[0], norms[1], torch.randn(40, 80, generator=generator))
    got = joined(hidden, embedding, norms[2], weights, 1e-6)
    double = (t.double() for t in (hidden, embedding, norms[2], norms[0], norms[1], weights.join_DX))
    torch.testing.assert_close(got.double(), joined_reference(*double, 1e-6), atol=1e-4, rtol=1e-5)  # 80 terms
    with pytest.raises(ValueError, match="shape of hidden_BSD"):
        joined(hidden[:1], embedding, norms[2], weights, 1e-6)


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"start_B": torch.tensor([0, -1, 3])}, ValueError, "places"),
        ({"start_B": torch.tensor([0, PLACES - 1, 3])}, ValueError, "places"),
        ({"start_B": torch.tensor([0, 1, 3], dtype=torch.int32)}, TypeError, "places"),
        ({"start_B": torch.tensor([0, 1])}, ValueError, "x, start and cache"),
        ({"x_BSD": torch.zeros(3, 2, 25)}, ValueError, "x, start and cache"),
        ({"x_BSD": torch.zeros(3, 2, 24, dtype=torch.float64)}, TypeError, "x is"),
        ({"asked_B": torch.tensor([0, 0, 0])}, ValueError, "x, start and cache"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, Tensor], error: type[Exception], match: str) -> None:
    made, given = case(PLAIN)
    before = given["cache_LBPC"].clone()
    with pytest.raises(error, match=match):
        made.through(**{**given, **wrong})
    assert torch.equal(given["cache_LBPC"], before)


def test_a_token_that_no_row_has_is_refused() -> None:
    made, given = case(PLAIN)
    one = DecoderLayers(made.layers[:1], PLAIN, made.turn_SR, made.head)
    with pytest.raises(ValueError, match="places"):
        one.through(given["x_BSD"], given["start_B"], given["cache_LBPC"][:1], torch.tensor([0, 2, 0]))


@pytest.mark.parametrize("name", [field.name for field in fields(LayerWeights)])
def test_a_weight_of_another_size_is_refused(name: str) -> None:
    n = SHAPES["query latent"]
    right = layer(n, 0, False, True)
    angle, head = torch.zeros(4, 2), (torch.zeros(n.width), torch.zeros(VOCAB, n.width))
    weight = getattr(right, name)
    shown = {"down": "gate_up", "shared_down": "shared_gate_up"}.get(name, name)  # whose width is read off it
    wrong = replace(right, **{name: torch.zeros(*weight.shape[:-1], weight.shape[-1] + 1)})
    with pytest.raises(ValueError, match=f"shape of {shown} of layer 0"):
        DecoderLayers([wrong], n, (angle, angle), head)
    with pytest.raises(TypeError, match=f"{name} of layer 0"):
        DecoderLayers([replace(right, **{name: weight.double()})], n, (angle, angle), head)
    apart = torch.zeros(*weight.shape, 2)[..., 0]
    with pytest.raises(ValueError, match=f"{name} of layer 0"):
        DecoderLayers([replace(right, **{name: apart})], n, (angle, angle), head)


def test_angles_and_a_head_of_another_width_are_refused() -> None:
    made, _ = case(PLAIN)
    wide, (norm, head) = torch.zeros(PLACES, 3), made.head
    for turn, last, match in (
        ((wide, wide), (norm, head), "width of cosines"),
        (made.turn_SR, (norm[1:], head), "width of norm"),
        (made.turn_SR, (norm, head[:, 1:].contiguous()), "width of head"),
    ):
        with pytest.raises(ValueError, match=match):
            DecoderLayers(made.layers, PLAIN, turn, last)


def test_where_it_runs() -> None:
    x = torch.zeros(1)
    assert [runs(x, tokens) for tokens in (0, 1, LEAST_ROWS - 1, LEAST_ROWS)] == [False, True, True, False]
    assert not runs(x.bfloat16(), 1)
    with kernels.use_reference():
        assert not runs(x, 1)


def test_places_follow_the_rows() -> None:
    """One table for all layers: an address a weight, and two widths."""
    made, _ = case(PLAIN)
    rows = made._table.tolist()
    assert [row[14:] for row in rows] == [[10, 0], [10, 18], [10, 0]]
    assert all(a != b for a, b in pairwise(row[0] for row in rows))
