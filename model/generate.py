"""Responses to prompts: all of them at the end (`sample`), or one as it is said (`stream_chat`).

Both decode by continuous batching, so that a sample depends on its prompt and seed alone, and not on who else is in the
batch or on how many slots there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from gristmill.model.chat import Chat
from gristmill.model.continuous_batching import End, Request, stream
from gristmill.model.sampling import Sampling
from gristmill.model.stop_strings import Wording
from gristmill.model.training.models import load_model
from gristmill.model.transformer import Transformer

__all__ = ["Sample", "Sampling", "load_chat", "sample", "stream_chat", "thought_tokens"]


@dataclass
class Sample:
    """A response: its tokens (an end token or those of a stop string included) and their log-probabilities.

    Attributes:
        log_probs: under the sampler, at its temperature.
        text: cut before a stop string; empty where no wording was given.
        end: why it is over: its end token, a stop string, or as long as it may be.
    """

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    text: str = ""
    end: End = "length"

    @property
    def ended(self) -> bool:
        """Whether the response came to an end by itself."""
        return self.end != "length"


def sample(
    model: Transformer,
    prompts: list[list[int]],
    seeds: list[int],
    sampling: Sampling,
    *,
    eos: int,
    pad: int,
    copies: int = 1,
    slots: int | None = None,
    places: int | None = None,
    wording: Wording | None = None,
) -> list[Sample]:
    """`copies` responses to each prompt, prompt by prompt; copies that begin together read their prompt once.

    Args:
        seeds: one for each response, `len(prompts) * copies` in all.
        slots: responses at once; none: all.
        places: of the cache, over all responses, each a token and `cache_width` numbers a layer; none: as many as the
            longest prompt and its response have, in each slot.
        wording: how tokens read as text, and the strings at which a response is over.

    Raises:
        ValueError: a prompt is empty, the seeds are too few or too many, or the longest prompt and its response pass
            the model's position limit or the places.
    """
    requests = [Request(prompt, seed) for prompt, seed in zip(_repeated(prompts, copies), seeds, strict=True)]
    made = [Sample() for _ in requests]
    length = max(map(len, prompts), default=0) + sampling.max_new_tokens
    slots = min(slots or len(requests), len(requests)) if requests else 1
    pieces = stream(
        model, requests, sampling, slots=slots, length=length, eos=eos, pad=pad, wording=wording, places=places
    )
    for piece in pieces:
        own = made[piece.request]
        own.tokens.append(piece.token)
        own.log_probs.append(piece.log_prob)
        own.text += piece.text
        own.end = piece.end or own.end
    return made


def _repeated(prompts: list[list[int]], copies: int) -> list[list[int]]:
    return [prompt for prompt in prompts for _ in range(copies)]


def thought_tokens(tokens: list[int], thought_end: int) -> int:
    """Tokens before the thought is closed; all of them where it never is."""
    return tokens.index(thought_end) if thought_end in tokens else len(tokens)


def load_chat(folder: Path, tokenizer: Path) -> tuple[Transformer, Chat]:
    """The model in `folder` (config.json, model.safetensors) and its tokenizer, to talk with.

    Raises:
        ValueError: a folder does not hold what it should.
    """
    return load_model(folder, torch.device("cpu"), mtp=False).eval(), Chat(tokenizer)


def stream_chat(
    model: Transformer,
    chat: Chat,
    question: str,
    sampling: Sampling,
    *,
    seed: int = 0,
    stop: tuple[str, ...] = (),
) -> Iterator[str]:
    """The response to `question`, piece by piece.

    It ends at any of the strings `stop`, of which none is said, and at the position limit at the latest.

    Raises:
        ValueError: the question leaves no room for a response, or a stop string is empty.
    """
    prompt = chat.prompt(question)
    room = model.config.max_position_embeddings - len(prompt)
    if room < 1:
        raise ValueError(f"the question has {len(prompt)} tokens, past the position limit: ask a shorter one")
    sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
    length = len(prompt) + sampling.max_new_tokens
    pieces = stream(
        model, [Request(prompt, seed)], sampling, slots=1, length=length, eos=chat.eos, pad=chat.pad,
        wording=Wording(chat.text, stop),
    )  # fmt: skip
    yield from (piece.text for piece in pieces if piece.text)
