"""A needle in a haystack: a number stands somewhere in held-out text and is asked for behind it (Kamradt 2023).

    … haystack … ⏎ The magic number of river is 48213. ⏎ … haystack … ⏎ The magic number of river is 48213
                                                                                                   └ asked for ┘

The digits are single tokens, so one forward pass tells three things of a needle, each given the digits before it:
whether greedy decoding would give the number; how often the right digit is the likeliest of the ten (0.1 by chance);
and the surprise of the number among all numbers of as many digits, in bits (3.32 a digit for one who knows nothing).
The last two show in a small model long before the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from gristmill.data.shards import BOS_ID, PAD_ID, TokenShards
from gristmill.model.training.batches import numpy_generator
from gristmill.model.training.config import NeedleConfig
from gristmill.model.transformer import Batch, Transformer

# Logits (B, n, V) of the last n of these tokens (B, S), each given those before it.
Predict = Callable[[Tensor, int], Tensor]

WORDS = (
    "river", "stone", "garden", "winter", "copper", "window", "harbour", "lantern", "meadow", "orchard", "pepper",
    "saddle", "thunder", "velvet", "walnut", "anchor", "basket", "candle", "desert", "engine",
)  # fmt: skip
SENTENCE = "\nThe magic number of {word} is "
BATCH_TOKENS = 1 << 14  # of one forward pass


class Haystack:
    """Held-out text of a folder of token shards, as tokens without those that mark documents.

    Raises:
        ValueError: the shards hold out nothing.
    """

    def __init__(self, shards: TokenShards) -> None:
        streams = [shards.stream("held_out", source) for source in shards.streams("held_out")]
        self.streams = [stream for stream in streams if len(stream)]
        if not self.streams:
            raise ValueError(f"{shards.files} holds out no document to hide needles in: raise tokenize.held_out")

    def text(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """`count` tokens from a random place on, (count,) int64; a source is drawn by its size.

        Raises:
            ValueError: the held-out documents drawn are empty.
        """
        sizes = np.array([len(stream) for stream in self.streams], float)
        stream = self.streams[int(generator.choice(len(sizes), p=sizes / sizes.sum()))]
        at, parts, found, read = int(generator.integers(len(stream))), [], 0, 0
        while found < count:
            token_S, _ = stream.read(at, min(count, len(stream) - at))
            at, read = (at + len(token_S)) % len(stream), read + len(token_S)
            parts.append(token_S[token_S > PAD_ID])
            found += len(parts[-1])
            if not found and read >= len(stream):
                raise ValueError(f"stream {stream.name} holds no text to hide a needle in: leave its source out")
        return np.concatenate(parts)[:count]


@dataclass(frozen=True)
class Case:
    """Tokens (S,) int64 that end with the digits asked for; the needle stands at `place`."""

    tokens: np.ndarray
    place: int


class Needles:
    """Makes the cases of a check; each is a function of (seed, length, depth, number).

    Raises:
        ValueError: the tokenizer has no token of its own for each digit.
    """

    def __init__(self, tokenizer: Tokenizer, shards: TokenShards, config: NeedleConfig, seed: int) -> None:
        self.tokenizer, self.haystack, self.config, self.seed = tokenizer, Haystack(shards), config, seed
        ids = [tokenizer.token_to_id(str(digit)) for digit in range(10)]
        if None in ids:
            raise ValueError(
                f"the tokenizer has no token of its own for the digit {ids.index(None)}, by which needles are scored: "
                f"take one with single digits"
            )
        self.digit_ids = torch.tensor(ids)
        self.end = self._encoded(".\n")

    def _encoded(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def case(self, length: int, depth: float, number: int) -> Case:
        """A needle at `depth` (0 the beginning, 1 right before the question) of `length` tokens in all.

        Raises:
            ValueError: needle and question have no room in so few tokens.
        """
        generator = numpy_generator(self.seed, "needle", length, round(depth * 10_000), number)
        word = WORDS[int(generator.integers(len(WORDS)))]
        digits = self.digit_ids.numpy()[generator.integers(10, size=self.config.digits)]
        asked = np.concatenate([self._encoded(SENTENCE.format(word=word)), digits])
        needle = np.concatenate([asked, self.end])
        room = length - 1 - len(needle) - len(asked)
        if room < 0:
            raise ValueError(
                f"a needle and its question take {length - room} tokens, and a haystack of the needle check has "
                f"{length}: raise needle.lengths"
            )
        hay = self.haystack.text(room, generator)
        place = round(depth * room)
        tokens = np.concatenate([[BOS_ID], hay[:place], needle, hay[place:], asked])
        return Case(tokens, place + 1)

    def score(self, predict: Predict, length: int, depth: float, device: torch.device) -> tuple[float, float, float]:
        """Of the cases of one length and depth: numbers retrieved, right digits in front (shares), surprise in bits."""
        digits, ids = self.config.digits, self.digit_ids.to(device)
        cases = [self.case(length, depth, number).tokens for number in range(self.config.cases)]
        retrieved = in_front = bits = 0.0
        for tokens in _batches(cases, max(1, BATCH_TOKENS // length)):
            token_BS = torch.from_numpy(tokens).to(device)
            logits_BnV = predict(token_BS, digits).float()
            right_Bn = token_BS[:, -digits:]
            retrieved += float((logits_BnV.argmax(-1) == right_Bn).all(-1).sum())
            log_p_Bn10 = logits_BnV[..., ids].log_softmax(-1)
            place_Bn1 = (right_Bn[..., None] == ids).int().argmax(-1, keepdim=True)
            in_front += float((log_p_Bn10.argmax(-1, keepdim=True) == place_Bn1).sum()) / digits
            bits -= float(log_p_Bn10.gather(-1, place_Bn1).double().sum()) / np.log(2)
        count = len(cases)
        return retrieved / count, in_front / count, bits / count


def _batches(cases: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    return [np.stack(cases[first : first + size]) for first in range(0, len(cases), size)]


def depths(config: NeedleConfig) -> list[float]:
    """Evenly spaced places of a needle, from 0 to 1."""
    return [index / (config.depths - 1) for index in range(config.depths)]


@torch.no_grad()
def predicted(model: Transformer, token_BS: Tensor, count: int) -> Tensor:
    """Logits (B, count, V) of the last `count` tokens, each given all before it; a `Predict` of a model."""
    input_BS = token_BS[:, :-1]
    position_BS = torch.arange(input_BS.shape[1], device=input_BS.device).expand_as(input_BS)
    hidden_BSD = model.hidden(Batch(input_BS, position_BS))
    return model.lm_head(model.norm(hidden_BSD[:, -count:]))


def row(model: str, length: int, depth: float, scores: Sequence[float], cases: int) -> dict[str, Any]:
    """One line of needle.jsonl."""
    retrieved, in_front, bits = (round(float(value), 5) for value in scores)
    found = {"retrieved": retrieved, "digits_in_front": in_front, "bits": bits}
    return {"model": model, "length": length, "depth": round(depth, 4), **found, "cases": cases}
