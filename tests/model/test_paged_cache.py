"""A cache in pages: the same responses with few pages as with a slot for each, what waits, what is shared, what is free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gristmill.kernels.compiled import compiled
from gristmill.kernels.decoder_layers import SOURCE
from gristmill.model import cache as caches
from gristmill.model import continuous_batching
from gristmill.model.cache import PagedCache
from gristmill.model.config import ModelConfig
from gristmill.model.continuous_batching import Request, stream
from gristmill.model.decoding import Decoder
from gristmill.model.generate import Sample, Sampling, sample
from gristmill.model.stop_strings import Wording
from gristmill.model.transformer import Transformer

VOCAB, EOS, PAD, PAGE = 24, 1, 2, 4
SAMPLING = Sampling(20, temperature=1.1)
LENGTH = 60  # the longest prompt, 40, and its response
MODELS = {"mla": {}, "gqa": {"attention": "gqa", "num_key_value_heads": 2}}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Transformer:
    model = Transformer(ModelConfig(initializer_range=0.1, **MODELS[request.param]), VOCAB)
    model.initialise(0)
    return model.eval()


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (caches, continuous_batching):
        monkeypatch.setattr(module, "PAGE", PAGE)


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each time that a response was laid aside: the pages it had."""
    found: list[int] = []
    lay_aside = PagedCache.lay_aside

    def told(self: PagedCache, row: int) -> torch.Tensor:
        numbers = lay_aside(self, row)
        found.append(numbers.shape[1])
        return numbers

    monkeypatch.setattr(PagedCache, "lay_aside", told)
    return found


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[PagedCache]:
    found: list[PagedCache] = []
    paged_cache = Decoder.paged_cache

    def told(self: Decoder, rows: int, length: int, places: int) -> PagedCache:
        found.append(paged_cache(self, rows, length, places))
        return found[-1]

    monkeypatch.setattr(Decoder, "paged_cache", told)
    return found


def prompts() -> list[list[int]]:
    """Of 1 to 40 tokens, some of which begin alike, and some twice."""
    generator = torch.Generator().manual_seed(5)
    lengths = [1, 1, 40, 5, *torch.randint(1, 40, (14,), generator=generator).tolist()]
    drawn = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return [*drawn, *drawn[2:5], drawn[2][:20]]


def said(model: Transformer, **how: Any) -> list[Sample]:
    asked = prompts()
    return sample(model, asked, list(range(len(asked))), SAMPLING, eos=EOS, pad=PAD, **how)


@pytest.mark.parametrize("torch_alone", [False, True])
@pytest.mark.parametrize(
    ("places", "slots"), [(LENGTH, 6), (LENGTH + 3 * PAGE, 22), (3 * LENGTH, 5), (22 * LENGTH, None)]
)
def test_responses_do_not_depend_on_how_many_pages_there_are(
    places: int, slots: int | None, torch_alone: bool, model: Transformer, waited: list[int], made: list[PagedCache],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("gristmill.kernels.compiled.TORCH_ALONE", torch_alone)
    expected, found = said(model, slots=slots), said(model, slots=slots, places=places)
    assert [own.tokens for own in found] == [own.tokens for own in expected]
    assert [own.end for own in found] == [own.end for own in expected]
    of_found, of_expected = ([p for own in samples for p in own.log_probs] for samples in (found, expected))
    if slots is None and compiled(SOURCE) is not None and model.config.attention == "mla":
        assert of_found == of_expected  # wherever pages lie, where as many prompts are read at once
    # Others' prompts may go another way, by their number: float32 sums of up to 64 terms over four layers
    torch.testing.assert_close(torch.tensor(of_found), torch.tensor(of_expected), atol=1e-4, rtol=0)
    if places < 2 * LENGTH:
        assert waited
    if slots is None:
        assert not waited
    (cache,) = made
    assert cache.free == places // PAGE  # each page came back, and once
    assert sorted(cache._free) == list(range(1, places // PAGE + 1))


def test_what_may_become_a_stop_string_waits_with_its_response(model: Transformer, waited: list[int]) -> None:
    """Strings of three letters and four, so that some of a response's text is held back while it is laid aside."""
    wording = Wording(lambda tokens: "".join("abcd"[token % 4] for token in tokens), ("abc", "ddba", "cac"))
    expected, found = said(model, wording=wording), said(model, wording=wording, slots=6, places=LENGTH)
    assert waited
    assert {own.end for own in found} >= {"stop", "length"}
    assert [(own.tokens, own.text, own.end) for own in found] == [(own.tokens, own.text, own.end) for own in expected]


def test_requests_are_taken_as_pages_become_free(model: Transformer) -> None:
    taken: list[int] = []

    def queue() -> Iterator[Request]:
        for number in range(12):
            taken.append(number)
            yield Request([3 + number] * 30, number)

    over, most = 0, 0
    for piece in stream(model, queue(), SAMPLING, slots=12, length=50, eos=EOS, pad=PAD, places=100):
        most = max(most, len(taken) - over)
        over += piece.end is not None
    assert over == 12
    assert 2 <= most <= 4  # prompts of 8 pages each in 25, and one that was looked at


def test_copies_share_the_pages_that_their_prompt_fills(
    model: Transformer, made: list[PagedCache], waited: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    share, shared_places = PagedCache.share, []

    def told(self: PagedCache, source: int, row: int, places: int) -> None:
        shared_places.append(places)
        share(self, source, row, places)

    monkeypatch.setattr(PagedCache, "share", told)
    prompt, copies = [5, 6, 7] * 11, 8  # 32 places before the last token: 8 pages, and none that is not full
    apart = sample(model, [prompt] * copies, list(range(copies)), SAMPLING, eos=EOS, pad=PAD)
    pages = 8 + copies * 6  # 21 places of a response's own at most
    shared = sample(
        model, [prompt], list(range(copies)), SAMPLING, eos=EOS, pad=PAD, copies=copies, places=pages * PAGE
    )
    assert [own.tokens for own in shared] == [own.tokens for own in apart]
    assert made[0].free == pages
    assert shared_places == [32] * (copies - 1)
    assert not waited


def test_shared_pages_outlive_the_row_that_read_the_prompt(model: Transformer) -> None:
    cache = Decoder(model).paged_cache(3, 40, 40)
    cache.grow([0], [10])
    cache.latent_LBSC[:, cache.table_BJ[0, :3]] = torch.randn(
        cache.latent_LBSC.shape[0], 3, *cache.latent_LBSC.shape[2:]
    )
    before = cache.latent_LBSC[:, cache.table_BJ[0, :3]].clone()
    cache.share(0, 1, 10)
    assert cache.free == 10 - 3 - 1  # two full pages are both rows', the third was copied
    assert cache.table_BJ[0, :2].equal(cache.table_BJ[1, :2])
    assert cache.table_BJ[0, 2] != cache.table_BJ[1, 2]
    cache.release(0)
    assert cache.free == 10 - 3
    cache.grow([2], [28])
    assert not cache.free
    cache.latent_LBSC[:, cache.table_BJ[2, :7]] = 0
    assert cache.latent_LBSC[:, cache.table_BJ[1, :3]].equal(before)
    aside = cache.lay_aside(1)
    assert aside.equal(before.cpu())
    cache.keep(torch.tensor([2, 1]))
    cache.take_back(1, aside)
    assert cache.latent_LBSC[:, cache.table_BJ[1, :3]].equal(before)
    assert cache.table_BJ[0].bool().sum() == 7


def test_pages_that_do_not_hold_one_response_are_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match="59 places are 14 pages of 4, and a slot of 60 takes 15: give more or lower"):
        said(model, places=59)
