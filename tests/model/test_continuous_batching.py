"""Continuous batching: the same tokens with any number of slots, in any order; stop strings; text as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gristmill.model import decoding
from gristmill.model.config import ModelConfig
from gristmill.model.continuous_batching import Piece, Request, stream
from gristmill.model.generate import Sample, Sampling, sample
from gristmill.model.stop_strings import Wording
from gristmill.model.transformer import Transformer

VOCAB, EOS, PAD = 24, 1, 2
SAMPLING = Sampling(20, temperature=1.1)


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(ModelConfig(initializer_range=0.1), VOCAB)
    model.initialise(0)
    return model.eval()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 30, (24,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def expected(model: Transformer, prompts: list[list[int]]) -> list[list[int]]:
    """Each prompt by itself."""
    alone = [sample(model, [prompt], [seed], SAMPLING, eos=EOS, pad=PAD) for seed, prompt in enumerate(prompts)]
    return [own.tokens for (own,) in alone]


def letters(tokens: list[int]) -> str:
    """Token t as the t-th letter, so that a stop string spans tokens."""
    return "".join(chr(ord("a") + token) for token in tokens)


def pairs(tokens: list[int]) -> str:
    """Token t as two letters, so that a stop string may end within one."""
    return "".join(chr(ord("a") + token) + chr(ord("A") + token) for token in tokens)


def test_lengths_differ(expected: list[list[int]]) -> None:
    """So that slots are taken over in the middle, by responses that end and by those that are cut."""
    assert len({len(tokens) for tokens in expected}) > 5
    assert max(map(len, expected)) == SAMPLING.max_new_tokens


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_tokens_do_not_depend_on_slots(
    slots: int, model: Transformer, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    made = sample(model, prompts, list(range(24)), SAMPLING, eos=EOS, pad=PAD, slots=slots)
    assert [own.tokens for own in made] == expected


class LargestMade(TorchDispatchMode):
    """How many numbers the largest tensor had that was made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            self.numbers = max(self.numbers, each.numel() if isinstance(each, torch.Tensor) else 0)
        return made


@pytest.mark.parametrize("torch_alone", [False, True])
def test_long_prompts_are_read_in_little_memory_as_the_same_tokens(
    torch_alone: bool, model: Transformer, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, 449 positions of 3 prompts and 4 heads have 2.4 million scores, which compiled attention does not hold."""
    monkeypatch.setattr("gristmill.kernels.compiled.TORCH_ALONE", torch_alone)
    long = [(prompt * 450)[:450] for prompt in prompts[:3]]

    def made() -> tuple[list[Sample], int]:
        with LargestMade() as largest:
            return sample(model, long, [0, 1, 2], Sampling(10), eos=EOS, pad=PAD), largest.numbers

    whole, most = made()
    monkeypatch.setattr(decoding, "PROMPT_SCORES", 100_000)
    portioned, least = made()
    assert [own.tokens for own in portioned] == [own.tokens for own in whole]
    scores = 3 * 449 * 4 * 449
    assert most == scores if torch_alone else most < scores / 3
    assert least == decoding.Decoder(model).cache(3, 460).latent_LBSC.numel()  # nothing is larger than the slots


@pytest.mark.parametrize("order_seed", [0, 1])
def test_tokens_do_not_depend_on_the_order(
    order_seed: int, model: Transformer, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    order = torch.randperm(24, generator=torch.Generator().manual_seed(order_seed)).tolist()
    made = sample(model, [prompts[i] for i in order], order, SAMPLING, eos=EOS, pad=PAD, slots=5)
    assert [own.tokens for own in made] == [expected[i] for i in order]


def test_a_free_slot_is_taken_at_once_and_no_earlier(model: Transformer, prompts: list[list[int]]) -> None:
    taken: list[int] = []

    def queue() -> Iterator[Request]:
        for number, prompt in enumerate(prompts):
            taken.append(number)
            yield Request(prompt, number)

    ended = 0
    for piece in stream(model, queue(), SAMPLING, slots=3, length=64, eos=EOS, pad=PAD):
        assert len(taken) <= 3 + ended
        ended += piece.end is not None
    assert ended == 24


def test_every_slot_speaks_in_every_step_while_requests_wait(model: Transformer, prompts: list[list[int]]) -> None:
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    speaker = [piece.request for piece in stream(model, requests, SAMPLING, slots=4, length=64, eos=EOS, pad=PAD)]
    full = speaker.index(23) // 4 * 4  # pieces before the step in which the last request comes in
    assert full > 100
    assert all(len(set(speaker[i : i + 4])) == 4 for i in range(0, full, 4))


def test_the_cache_is_no_larger_than_the_slots(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []
    begin = decoding.SlotCache.__init__

    def told(self: decoding.SlotCache, *given: object, **named: object) -> None:
        begin(self, *given, **named)  # type: ignore[arg-type]
        made.append(tuple(self.latent_LBSC.shape[1:3]))

    monkeypatch.setattr(decoding.SlotCache, "__init__", told)
    sample(model, [[5, 6, 7]] * 30, list(range(30)), Sampling(6), eos=EOS, pad=PAD, slots=4)
    assert made[0] == (4, 9)
    assert all(rows == 1 and length == 2 for rows, length in made[1:])  # equal prompts are read once


@pytest.mark.parametrize("reading", [letters, pairs])
@pytest.mark.parametrize("slots", [1, 7])
def test_text_is_cut_before_the_first_stop_string(
    reading, slots: int, model: Transformer, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    texts = [reading([t for t in tokens if t != EOS]) for tokens in expected]
    stop = (texts[0][3:6], texts[1][5:8], "?")
    made = sample(
        model, prompts, list(range(24)), SAMPLING, eos=EOS, pad=PAD, slots=slots, wording=Wording(reading, stop)
    )
    for own, text, tokens in zip(made, texts, expected, strict=True):
        places = [text.find(s) for s in stop if s in text]
        assert own.text == (text[: min(places)] if places else text)
        assert own.tokens == tokens[: len(own.tokens)]
        ends = "stop" if places else "eos" if tokens[-1] == EOS else "length"
        assert own.end == ends
        assert own.ended == (ends != "length")
        if not places:
            assert own.tokens == tokens
        elif reading is letters:  # it ends with the stop string's last token
            assert len(own.tokens) == min(text.find(s) + len(s) for s in stop if s in text)
    assert {own.end for own in made} == {"eos", "stop", "length"}


def test_pieces_join_to_the_samples(model: Transformer, prompts: list[list[int]]) -> None:
    wording = Wording(letters, ("ab", "q"))
    whole = sample(model, prompts, list(range(24)), SAMPLING, eos=EOS, pad=PAD, slots=6, wording=wording)
    joined = [Sample() for _ in prompts]
    over: set[int] = set()
    requests = (Request(prompt, seed) for seed, prompt in enumerate(prompts))
    piece: Piece
    for piece in stream(model, requests, SAMPLING, slots=6, length=64, eos=EOS, pad=PAD, wording=wording):
        assert piece.request not in over
        joined[piece.request].tokens.append(piece.token)
        joined[piece.request].text += piece.text
        if piece.end:
            over.add(piece.request)
            assert piece.end == whole[piece.request].end
    assert [own.tokens for own in joined] == [own.tokens for own in whole]
    assert [own.text for own in joined] == [own.text for own in whole]
    assert over == set(range(24))


def test_what_cannot_be_decoded_is_refused(model: Transformer) -> None:
    ask = Request([3, 4], 0)
    with pytest.raises(ValueError, match="0 slots"):
        next(stream(model, [ask], SAMPLING, slots=0, length=64, eos=EOS, pad=PAD))
    with pytest.raises(ValueError, match="position limit 512"):
        next(stream(model, [ask], SAMPLING, slots=1, length=513, eos=EOS, pad=PAD))
    with pytest.raises(ValueError, match="request 0 has an empty prompt"):
        next(stream(model, [Request([], 0)], SAMPLING, slots=1, length=64, eos=EOS, pad=PAD))
    with pytest.raises(ValueError, match="does not fit a slot of 21"):
        next(stream(model, [ask], SAMPLING, slots=1, length=21, eos=EOS, pad=PAD))
    assert sample(model, [], [], SAMPLING, eos=EOS, pad=PAD) == []
