"""Continuous batching (Yu et al. 2022, Orca): a queue of requests over a fixed number of slots.

A response that is over leaves its slot to the next request at once. The newcomer's prompt is read but for its last
token, which goes through the model in the same step as the last tokens of the others. Memory is that of slots × length,
and for the newcomers of a step their prompts once more; these are read a portion of positions at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

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
    request: int
    speech: Speech | None
    length: int = 0


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

    def move_on(self) -> None:
        """To the next position; a row that is over stays where it is, within its slot."""
        alive = [response is not None for response in self.responses]
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
) -> Iterator[Piece]:
    """The responses to all requests, token by token as they come; those of different requests are mixed.

    Args:
        requests: taken from as slots become free; the order in which they come changes no response.
        slots: responses at once.
        length: places of a slot: those of a prompt and its response.

    Raises:
        ValueError: no slot; a length past the model's position limit; a request that is empty, or that does not fit the
            length with its response (when it is taken from the queue).
    """
    if slots < 1:
        raise ValueError(f"{slots} slots decode nothing: give at least one")
    check_length(model.config, length)
    decoder, waiting = Decoder(model), enumerate(requests)
    cache = decoder.cache(slots, length)
    zeros = torch.zeros(slots, dtype=torch.long, device=decoder.device)
    rows = _Rows(zeros, zeros.clone(), zeros.clone(), zeros.clone(), [None] * slots)
    while True:
        free = rows.free()
        coming = list(islice(waiting, len(free)))
        for number, request in coming:
            _check_request(number, request, sampling, length)
        places = free[: len(coming)]
        for row, (number, _) in zip(places, coming, strict=True):
            rows.responses[row] = _Response(number, Speech(wording) if wording else None)
        if coming:
            _admit(decoder, cache.latent_LBSC, rows, places, [request for _, request in coming], pad)
        speaking = [row for row, response in enumerate(rows.responses) if response is not None]
        if not speaking:
            return
        if len(coming) < len(free) and len(speaking) < COMPACT_SHARE * len(rows.responses):
            kept = torch.tensor(speaking, device=decoder.device)
            cache.keep(kept)
            rows.select(kept)
        _, logits_B1V = decoder.step(rows.token_B[:, None], rows.position_B, cache)
        rows.token_B, log_p_B = choose(logits_B1V[:, 0], sampling, rows.seed_B, rows.step_B)
        rows.step_B = rows.step_B + 1
        pieces = _pieces(rows, rows.token_B.tolist(), log_p_B.tolist(), sampling, eos)
        rows.move_on()
        yield from pieces


def check_length(config: ModelConfig, length: int) -> None:
    """Raise a ValueError where a prompt and its response of so many tokens pass the model's position limit."""
    if length > config.max_position_embeddings:
        raise ValueError(
            f"a prompt and its response of {length} tokens pass the position limit {config.max_position_embeddings}: "
            "lower max_new_tokens or raise max_position_embeddings"
        )


def _check_request(number: int, request: Request, sampling: Sampling, length: int) -> None:
    if not request.prompt:
        raise ValueError(f"request {number} has an empty prompt: give it a token to begin with")
    if len(request.prompt) + sampling.max_new_tokens > length:
        raise ValueError(
            f"request {number} has a prompt of {len(request.prompt)} tokens, which with {sampling.max_new_tokens} new "
            f"ones does not fit a slot of {length}: raise length or lower max_new_tokens"
        )


def _admit(
    decoder: Decoder, latent_LBSC: Tensor, rows: _Rows, places: list[int], requests: list[Request], pad: int
) -> None:
    """Read the newcomers' prompts, equal ones once, into their slots, but for the last tokens."""
    distinct = {tuple(request.prompt[:-1]): None for request in requests}
    number = {prompt: n for n, prompt in enumerate(distinct)}
    place_N = torch.tensor(places, device=decoder.device)
    longest = max(map(len, distinct))
    if longest:
        token_BS, _ = padded_prompts([list(prompt) for prompt in distinct], pad, decoder.device)
        own = decoder.cache(len(distinct), longest)
        start_N = torch.zeros(len(distinct), dtype=torch.long, device=decoder.device)
        for part in decoder.portions(longest, own):
            decoder.advance(token_BS[:, part], start_N + part.start, own)
        source_N = torch.tensor([number[tuple(r.prompt[:-1])] for r in requests], device=decoder.device)
        latent_LBSC[:, place_N, :longest] = own.latent_LBSC[:, source_N]
    for tensor_B, values in (
        (rows.token_B, [request.prompt[-1] for request in requests]),
        (rows.position_B, [len(request.prompt) - 1 for request in requests]),
        (rows.seed_B, [request.seed for request in requests]),
        (rows.step_B, [0] * len(requests)),
    ):
        tensor_B[place_N] = torch.tensor(values, device=decoder.device)


def _pieces(rows: _Rows, tokens: list[int], log_probs: list[float], sampling: Sampling, eos: int) -> list[Piece]:
    """What was said in a step; a response that is over gives its row up."""
    pieces = []
    for row, response in enumerate(rows.responses):
        if response is None:
            continue
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
