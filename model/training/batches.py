"""What a step trains on, as a pure function of (seed, step): packed token streams and packed conversations.

Position in the run is a number and not a history: nothing here is advanced, so a resumed run reads what the
undisturbed one would have read.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gristmill.data.shards import TokenShards, TokenStream
from gristmill.model.transformer import Batch

IGNORED = -100


@dataclass(frozen=True)
class TrainingBatch:
    """One rank's share of a step: inputs, targets one and two tokens ahead, and the weight of each position.

    `share` is this rank's part of the step's whole weight, times the ranks: a rank's loss is the mean over its own
    positions, and the mean of the ranks' losses times their shares is the mean over all positions of the step.
    """

    inputs: Batch
    target_BS: Tensor
    next_target_BS: Tensor | None
    weight_BS: Tensor
    share: float = 1.0


class Batches(Protocol):
    """Where a training loop gets its steps from."""

    def step(self, step: int, rank: int, ranks: int) -> TrainingBatch: ...


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """A generator that is a pure function of `parts`: (seed, what for, index)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def torch_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of `parts`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def document_mask(document_BS: Tensor) -> Tensor:
    """True where a position may see an earlier one of its own document, (B, S, S)."""
    length = document_BS.shape[1]
    causal_SS = torch.ones(length, length, dtype=torch.bool, device=document_BS.device).tril()
    return (document_BS[:, :, None] == document_BS[:, None]) & causal_SS


def positions_within(document_BS: Tensor) -> Tensor:
    """Positions that restart with each document of a packed sequence, (B, S)."""
    place = torch.arange(document_BS.shape[1], device=document_BS.device).expand_as(document_BS)
    starts = torch.ones_like(document_BS, dtype=torch.bool)
    starts[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
    return place - torch.where(starts, place, 0).cummax(1).values


class TokenBatches:
    """Sequences of a token stream mixture: each is `length` tokens and the two that follow."""

    def __init__(
        self,
        shards: TokenShards,
        split: str,
        mixture: dict[str, float],
        *,
        sequences: int,
        length: int,
        steps: int,
        seed: int,
        across_documents: bool,
        device: torch.device,
    ) -> None:
        self.length, self.sequences, self.device, self.across = length, sequences, device, across_documents
        self.streams = _streams(shards, split, mixture, length)
        sizes = np.array([(len(stream) - 2) // length for _, stream, _ in self.streams])
        weights = np.array([weight for _, _, weight in self.streams])
        self.plan = _plan(sizes, weights / weights.sum(), sequences * steps, seed)

    def step(self, step: int, rank: int, ranks: int) -> TrainingBatch:
        share = self.sequences // ranks
        first = step * self.sequences + rank * share
        return self._batch(range(first, first + share))

    def _batch(self, places: range) -> TrainingBatch:
        tokens, documents = [], []
        for place in places:
            source, index = self.plan[place]
            token, document = self.streams[source][1].read(int(index) * self.length, self.length + 2)
            tokens.append(token)
            documents.append(document)
        token_Bs = torch.from_numpy(np.stack(tokens)).long().to(self.device)
        document_BS = torch.from_numpy(np.stack(documents)[:, : self.length].astype(np.int64)).to(self.device)
        token_BS, target_BS, next_BS = (token_Bs[:, i : i + self.length].contiguous() for i in range(3))
        if self.across:
            place_BS = torch.arange(self.length, device=self.device).expand_as(token_BS)
            inputs = Batch(token_BS, place_BS, None)
        else:
            inputs = Batch(token_BS, positions_within(document_BS), document_mask(document_BS))
        return TrainingBatch(inputs, target_BS, next_BS, torch.ones_like(token_BS, dtype=torch.float32))

    def bytes_per_token(self) -> dict[str, float]:
        """Bytes of text a token, by source, for bits per byte."""
        return {name: stream.bytes / len(stream) for name, stream, _ in self.streams}


def _streams(
    shards: TokenShards, split: str, mixture: dict[str, float], length: int
) -> list[tuple[str, TokenStream, float]]:
    there = shards.streams(split)
    if split == "held_out":  # a small source may have nothing, or too little, to hold out: the others stand for it
        there = [name for name in there if len(shards.stream(split, name)) >= length + 2]
        mixture = {name: weight for name, weight in mixture.items() if name in there}
        if not there or (mixture and not any(mixture.values())):
            raise ValueError(
                f"no source holds out as many tokens as one sequence of {length} and the two after it: give more text, "
                f"raise tokenize.held_out or lower sequence_length"
            )
    unknown = sorted(set(mixture) - set(there))
    if unknown:
        raise ValueError(
            f"pretrain.mixture names {unknown[0]!r}, and the {split} shards have only {', '.join(there)}: correct it"
        )
    chosen = []
    for name in sorted(mixture) if mixture else there:
        stream = shards.stream(split, name)
        if len(stream) < length + 2:
            raise ValueError(
                f"the {split} stream {name!r} holds {len(stream)} tokens, fewer than one sequence of {length} and the "
                f"two after it: lower sequence_length or give the source more text"
            )
        weight = mixture[name] if mixture else float(len(stream))
        if weight > 0:
            chosen.append((name, stream, weight))
    return chosen


def _plan(sizes: np.ndarray, weights: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(source, sequence) of each place in the run: sources by weight, sequences by a new permutation each epoch."""
    source = numpy_generator(seed, "mixture").choice(len(sizes), size=count, p=weights)
    plan = np.empty((count, 2), dtype=np.int64)
    plan[:, 0] = source
    for s, size in enumerate(sizes):
        places = np.flatnonzero(source == s)
        epochs = -(-len(places) // size)
        order = [numpy_generator(seed, "epoch", s, e).permutation(size) for e in range(epochs)]
        plan[places, 1] = np.concatenate(order)[: len(places)] if order else []
    return plan


@dataclass(frozen=True)
class Conversation:
    """A prompt and the response to be learned, as tokens."""

    prompt: list[int]
    response: list[int]


class ConversationBatches:
    """Conversations packed whole into sequences, loss on responses alone; the rest of a sequence is padding."""

    def __init__(
        self,
        conversations: list[Conversation],
        *,
        sequences: int,
        length: int,
        steps: int,
        seed: int,
        pad: int,
        device: torch.device,
    ) -> None:
        self.conversations, self.sequences, self.length = conversations, sequences, length
        self.pad, self.device = pad, device
        self.packs = pack_whole([len(c.prompt) + len(c.response) - 1 for c in conversations], length)
        self.plan = _plan(np.array([len(self.packs)]), np.ones(1), sequences * steps, seed)[:, 1]

    def step(self, step: int, rank: int, ranks: int) -> TrainingBatch:
        first, count = step * self.sequences, self.sequences // ranks
        places = self.plan[first : first + self.sequences]
        responses = [sum(len(self.conversations[c].response) for c in self.packs[i]) for i in places]
        mine = slice(rank * count, (rank + 1) * count)
        share = sum(responses[mine]) * ranks / sum(responses)
        rows = [self._row(self.packs[i]) for i in places[mine]]
        token, target, document = (torch.from_numpy(np.stack(part)).to(self.device) for part in zip(*rows, strict=True))
        inputs = Batch(token, positions_within(document), document_mask(document))
        return TrainingBatch(inputs, target, None, (target != IGNORED).float(), share)

    def _row(self, pack: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        token = np.full(self.length, self.pad, dtype=np.int64)
        target = np.full(self.length, IGNORED, dtype=np.int64)
        document = np.full(self.length, len(pack), dtype=np.int64)
        at = 0
        for number, index in enumerate(pack):
            talk = self.conversations[index]
            whole = np.array(talk.prompt + talk.response, dtype=np.int64)
            end = at + len(whole) - 1
            token[at:end], document[at:end] = whole[:-1], number
            target[at + len(talk.prompt) - 1 : end] = whole[len(talk.prompt) :]
            at = end
        return token, target, document


def pack_whole(lengths: list[int], limit: int) -> list[list[int]]:
    """First-fit packing in the given order over the last open packs; no item is cut.

    Raises:
        ValueError: an item is longer than a sequence.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        if length > limit:
            raise ValueError(
                f"conversation {index} has {length} tokens and a sequence only {limit}: raise sequence_length"
            )
        for place in range(max(0, len(packs) - 64), len(packs)):
            if room[place] >= length:
                packs[place].append(index)
                room[place] -= length
                break
        else:
            packs.append([index])
            room.append(limit - length)
    return packs
