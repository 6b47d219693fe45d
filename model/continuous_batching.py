"""Continuous batching (Yu et al. 2022, Orca): a queue of requests over a fixed number of slots.

A response that is over leaves its slot to the next request at once. The newcomer's prompt is read but for its last
token, which goes through the model in the same step as the last tokens of the others. Memory is that of slots × length,
and for the newcomers of a step their prompts once more; these are read a portion of positions at a time. Or it is that
of a number of places, in pages (cache.py) that responses take as they grow: the youngest then wait, laid aside in
the host's memory, while there are too few for all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gristmill.model.cache import PAGE, Cache, PagedCache, SlotCache, pages_of
from gristmill.model.config import ModelConfig
from gristmill.model.decoding import Decoder, padded_prompts
from gristmill.model.sampling import Sampling, choose
from gristmill.model.stop_strings import Speech, Wording
from gristmill.model.transformer import Transformer

COMPACT_SHARE = 0.75  # without requests in the queue, the batch shrinks when fewer than this share of its rows speak

End = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Request:
    """A prompt to go on from; the seed decides every draw of the response."""

    prompt: list[int]
    seed: int


@dataclass(frozen=True)
class Piece:
    """A token of the response to the request of this number, and what may be shown of the text since the last one.

    Attributes:
        log_prob: under the sampler, at its temperature.
        text: empty where no wording was given, and while it may yet turn out to belong to a stop string.
        end: on a response's last piece why it is over: its end token, a stop string, or as long as it may be.
    """

    request: int
    token: int
    log_prob: float
    text: str
    end: End | None


@dataclass
class _Response:
    """What is known of a response on the host; `places` of the cache hold what is said of it, but for a token."""

    request: int
    speech: Speech | None
    places: int
    length: int = 0


@dataclass
class _Aside:
    """A response that waits for pages, with all that its row had."""

    response: _Response
    row: list[int]
    latents: Tensor


@dataclass
class _Rows:
    """The batch: row b is slot b, with the token that it reads next, at its position, and the draw that comes then."""

    token_B: Tensor
    position_B: Tensor
    seed_B: Tensor
    step_B: Tensor
    responses: list[_Response | None] = field(default_factory=list)

    def free(self) -> list[int]:
        return [row for row, response in enumerate(self.responses) if response is None]

    def speaking(self) -> list[tuple[int, _Response]]:
        return [(row, response) for row, response in enumerate(self.responses) if response is not None]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.token_B, self.position_B, self.seed_B, self.step_B

    def move_on(self) -> None:
        """To the next position; a row that is over stays where it is, within its slot."""
        alive = [response is not None for response in self.responses]
        for _, response in self.speaking():
            response.places += 1
        self.position_B = self.position_B + (1 if all(alive) else torch.tensor(alive, device=self.position_B.device))

    def select(self, kept: Tensor) -> None:
        self.token_B, self.position_B = self.token_B[kept], self.position_B[kept]
        self.seed_B, self.step_B = self.seed_B[kept], self.step_B[kept]
        self.responses = [self.responses[row] for row in kept.tolist()]


@torch.no_grad()
def stream(
    model: Transformer,
    requests: Iterable[Request],
    sampling: Sampling,
    *,
    slots: int,
    length: int,
    eos: int,
    pad: int,
    wording: Wording | None = None,
    places: int | None = None,
) -> Iterator[Piece]:
    """The responses to all requests, token by token as they come; those of different requests are mixed.

    Args:
        requests: taken from as slots become free, with `places` one ahead; the order in which they come changes no
            response.
        slots: responses at once.
        length: places of a slot: those of a prompt and its response.
        places: of the cache, over all responses; none: those of the slots. It changes no response, but which wait.

    Raises:
        ValueError: no slot; a length past the model's position limit, or that `places` do not hold once; a request that
            is empty, or that does not fit the length with its response (when it is taken from the queue).
    """
    if slots < 1:
        raise ValueError(f"{slots} slots decode nothing: give at least one")
    check_length(model.config, length)
    if places is not None and pages_of(length) > places // PAGE:
        raise ValueError(
            f"{places} places are {places // PAGE} pages of {PAGE}, and a slot of {length} takes {pages_of(length)}: "
            "give more or lower length"
        )
    decoder = Decoder(model)
    queue = _Queue(requests, sampling, length)
    cache = decoder.cache(slots, length) if places is None else decoder.paged_cache(slots, length, places)
    zeros = torch.zeros(slots, dtype=torch.long, device=decoder.device)
    rows = _Rows(zeros, zeros.clone(), zeros.clone(), zeros.clone(), [None] * slots)
    while True:
        free = rows.free()
        if isinstance(cache, PagedCache):
            queue.resume(rows, free, cache)
        coming = queue.next(len(free), cache, len(rows.responses) - len(free))
        taken = free[: len(coming)]
        for row, (number, request) in zip(taken, coming, strict=True):
            speech = Speech(wording) if wording else None
            rows.responses[row] = _Response(number, speech, len(request.prompt) - 1)
        if coming:
            _admit(decoder, cache, rows, taken, [request for _, request in coming], pad)
        speaking = rows.speaking()
        if not speaking:
            return
        if queue.dry and len(speaking) < COMPACT_SHARE * len(rows.responses):
            kept = torch.tensor([row for row, _ in speaking], device=decoder.device)
            cache.keep(kept)
            rows.select(kept)
        if isinstance(cache, PagedCache):
            queue.make_room(rows, cache)
            pieces = _pieces(rows, *_speaking_said(decoder, cache, rows, sampling), sampling, eos)
        else:
            pieces = _pieces(rows, *_all_said(decoder, cache, rows, sampling), sampling, eos)
        rows.move_on()
        if isinstance(cache, PagedCache):
            for row in rows.free():
                cache.release(row)
        yield from pieces


def check_length(config: ModelConfig, length: int) -> None:
    """Raise a ValueError where a prompt and its response of so many tokens pass the model's position limit."""
    if length > config.max_position_embeddings:
        raise ValueError(
            f"a prompt and its response of {length} tokens pass the position limit {config.max_position_embeddings}: "
            "lower max_new_tokens or raise max_position_embeddings"
        )


def _all_said(
    decoder: Decoder, cache: Cache, rows: _Rows, sampling: Sampling
) -> tuple[dict[int, int], dict[int, float]]:
    """The next token of each row and its log-probability, of those that are over too."""
    _, logits_B1V = decoder.step(rows.token_B[:, None], rows.position_B, cache)
    rows.token_B, log_p_B = choose(logits_B1V[:, 0], sampling, rows.seed_B, rows.step_B)
    rows.step_B = rows.step_B + 1
    return dict(enumerate(rows.token_B.tolist())), dict(enumerate(log_p_B.tolist()))


def _speaking_said(
    decoder: Decoder, cache: PagedCache, rows: _Rows, sampling: Sampling
) -> tuple[dict[int, int], dict[int, float]]:
    """The same of the rows that speak alone, which with few pages may be few."""
    speaking = [row for row, _ in rows.speaking()]
    own = cache.part(speaking, max(response.places for _, response in rows.speaking()) + 1)
    row_N = torch.tensor(speaking, device=decoder.device)
    token_N, position_N, seed_N, step_N = (tensor_B[row_N] for tensor_B in rows.tensors())
    _, logits_N1V = decoder.step(token_N[:, None], position_N, own)
    token_N, log_p_N = choose(logits_N1V[:, 0], sampling, seed_N, step_N)
    rows.token_B = rows.token_B.index_copy(0, row_N, token_N)
    rows.step_B = rows.step_B + 1
    tokens, log_probs = token_N.tolist(), log_p_N.tolist()
    return dict(zip(speaking, tokens, strict=True)), dict(zip(speaking, log_probs, strict=True))


class _Queue:
    """Requests that wait for a slot, and responses that wait for pages of the cache."""

    def __init__(self, requests: Iterable[Request], sampling: Sampling, length: int) -> None:
        self.requests, self.sampling, self.length = enumerate(requests), sampling, length
        self.next_one: tuple[int, Request] | None = None
        self.dry = False
        self.aside: deque[_Aside] = deque()  # the oldest first

    def next(self, slots: int, cache: Cache, speaking: int) -> list[tuple[int, Request]]:
        """The next requests, as many as slots are free and, with those that speak, have a page to grow into."""
        coming: list[tuple[int, Request]] = []
        room, prompts = cache.free - speaking if isinstance(cache, PagedCache) else None, set()
        while len(coming) < slots and not self.aside and (found := self.next_one or next(self.requests, None)):
            self.next_one = found
            if room is not None:
                places = len(found[1].prompt)
                shared = (places - 1) // PAGE if tuple(found[1].prompt[:-1]) in prompts else 0
                room -= pages_of(places) - shared + 1
                if room < 0 and (coming or speaking):
                    break
            _check_request(*found, self.sampling, self.length)
            coming.append(found)
            prompts.add(tuple(found[1].prompt[:-1]))
            self.next_one = None
        self.dry = len(coming) < slots and self.next_one is None and not self.aside
        return coming

    def make_room(self, rows: _Rows, cache: PagedCache) -> None:
        """Give each row the page that its next token needs; where there are too few, the youngest are laid aside."""
        oldest = sorted(rows.speaking(), key=lambda at: at[1].request)
        while sum(cache.missing(row, response.places + 1) for row, response in oldest) > cache.free:
            row, response = oldest.pop()
            numbers = torch.stack(rows.tensors())[:, row].tolist()
            self.aside.appendleft(_Aside(response, numbers, cache.lay_aside(row)))
            rows.responses[row] = None
        cache.grow([row for row, _ in oldest], [response.places + 1 for _, response in oldest])

    def resume(self, rows: _Rows, free: list[int], cache: PagedCache) -> None:
        """Take back responses that were laid aside, as far as rows and pages are free; `free` loses their rows."""
        speaking = len(rows.speaking())
        while self.aside and free:
            first = self.aside[0]
            if speaking and first.latents.shape[1] + 1 + speaking > cache.free:
                return
            self.aside.popleft()
            row, speaking = free.pop(0), speaking + 1
            cache.take_back(row, first.latents)
            rows.responses[row] = first.response
            for tensor_B, number in zip(rows.tensors(), first.row, strict=True):
                tensor_B[row] = number


def _check_request(number: int, request: Request, sampling: Sampling, length: int) -> None:
    if not request.prompt:
        raise ValueError(f"request {number} has an empty prompt: give it a token to begin with")
    if len(request.prompt) + sampling.max_new_tokens > length:
        raise ValueError(
            f"request {number} has a prompt of {len(request.prompt)} tokens, which with {sampling.max_new_tokens} new "
            f"ones does not fit a slot of {length}: raise length or lower max_new_tokens"
        )


def _admit(
    decoder: Decoder, cache: SlotCache | PagedCache, rows: _Rows, taken: list[int], requests: list[Request], pad: int
) -> None:
    """Read the newcomers' prompts, equal ones once, into their rows, but for the last tokens."""
    first: dict[tuple[int, ...], int] = {}  # which newcomer reads a prompt
    for number, request in enumerate(requests):
        first.setdefault(tuple(request.prompt[:-1]), number)
    source = [first[tuple(request.prompt[:-1])] for request in requests]
    row_N = torch.tensor(taken, device=decoder.device)
    longest = max(map(len, first))
    if longest:
        if isinstance(cache, PagedCache):
            cache.grow([taken[n] for n in first.values()], [len(prompt) for prompt in first])
            own: Cache = cache.part([taken[n] for n in first.values()], longest)
        else:
            own = decoder.cache(len(first), longest)
        token_BS, _ = padded_prompts([list(prompt) for prompt in first], pad, decoder.device)
        start_N = torch.zeros(len(first), dtype=torch.long, device=decoder.device)
        for part in decoder.portions(longest, own):
            decoder.advance(token_BS[:, part], start_N + part.start, own)
        if isinstance(cache, PagedCache):
            for n, (row, request) in enumerate(zip(taken, requests, strict=True)):
                if source[n] != n:
                    cache.share(taken[source[n]], row, len(request.prompt) - 1)
        else:
            place = {n: place for place, n in enumerate(first.values())}
            source_N = torch.tensor([place[n] for n in source], device=decoder.device)
            cache.latent_LBSC[:, row_N, :longest] = own.latent_LBSC[:, source_N]
    values = ((r.prompt[-1], len(r.prompt) - 1, r.seed, 0) for r in requests)
    for tensor_B, numbers in zip(rows.tensors(), zip(*values, strict=True), strict=True):
        tensor_B[row_N] = torch.tensor(numbers, device=decoder.device)


def _pieces(
    rows: _Rows, tokens: dict[int, int], log_probs: dict[int, float], sampling: Sampling, eos: int
) -> list[Piece]:
    """What was said in a step; a response that is over gives its row up."""
    pieces = []
    for row, response in rows.speaking():
        token, speech, text = tokens[row], response.speech, ""
        response.length += 1
        end: End | None = "eos" if token == eos else None
        if speech is not None and end is None:
            text = speech.add(token)
            end = "stop" if speech.stopped else None
        if end is None and response.length == sampling.max_new_tokens:
            end = "length"
        if speech is not None and end is not None:
            text += speech.finish()
            end = "stop" if speech.stopped else end
        if end is not None:
            rows.responses[row] = None
        pieces.append(Piece(response.request, token, log_probs[row], text, end))
    return pieces
