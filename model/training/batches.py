"""What a step trains on, as a pure function of (seed, step): sequences of a mixture and packed conversations.

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

from gristmill.data.mixture import Mixture, Sequences
from gristmill.model.batch_sizes import BatchSizes
from gristmill.model.transformer import Batch

IGNORED = -100


@dataclass(frozen=True)
class TrainingBatch:
    """One rank's share of a step: inputs, targets one and two tokens ahead, and the weight of each position.

    Of a part of a sequence `next_target_BS` has the positions behind it as well: the targets of later MTP modules.
    `share` is this rank's part of the step's whole weight, times the ranks: a rank's loss is the mean over its own
    positions, and the mean of the ranks' losses times their shares is the mean over all positions of the step;
    `next_share` is the same for the targets two tokens ahead.
    """

    inputs: Batch
    target_BS: Tensor
    next_target_BS: Tensor | None
    weight_BS: Tensor
    share: float = 1.0
    next_share: float = 1.0


class Batches(Protocol):
    """Where a training loop gets its steps from."""

    def step(self, step: int, rank: int, ranks: int) -> TrainingBatch: ...

    def documents(self, step: int) -> list[str]:
        """What a step's sequences are made of, to be found again."""
        ...


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """A generator that is a pure function of `parts`: (seed, what for, index)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def torch_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of `parts`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def first_within(document_BS: Tensor) -> Tensor:
    """The place in its packed sequence where each position's document begins, (B, S): the first that it may see."""
    place = torch.arange(document_BS.shape[1], device=document_BS.device).expand_as(document_BS)
    starts = torch.ones_like(document_BS, dtype=torch.bool)
    starts[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
    return torch.where(starts, place, 0).cummax(1).values


def packed_inputs(token_BS: Tensor, document_BS: Tensor) -> Batch:
    """Documents of which each is on its own, one behind the other, with a number for each: positions restart."""
    first_BS = first_within(document_BS)
    return Batch(token_BS, torch.arange(token_BS.shape[1], device=token_BS.device) - first_BS, first_BS)


class TokenBatches:
    """Sequences of a mixture in its order: each step takes the positions that follow, shared out among the ranks."""

    def __init__(
        self, mixture: Mixture, split: str, *, sizes: BatchSizes, across_documents: bool, device: torch.device
    ) -> None:
        self.mixture, self.split, self.sizes = mixture, split, sizes
        self.device, self.across = device, across_documents

    def step(self, step: int, rank: int, ranks: int) -> TrainingBatch:
        positions, mine = self._positions(step), self._mine(step, rank, ranks)
        made = self.mixture.batch(positions[mine], self.split, across=self.across)
        later = self._positions(step + 1)[self._mine(step + 1, rank, ranks)]
        self.mixture.prefetch(later[later < self.mixture.orders[self.split].total], self.split)
        share, next_share = self._shares(positions, mine, ranks)
        return self._made(made, share, next_share)

    def at(self, positions: np.ndarray) -> TrainingBatch:
        """The sequences at these positions, whichever step reads them."""
        return self._made(self.mixture.batch(positions, self.split, across=self.across), 1.0, 1.0)

    def _made(self, made: Sequences, share: float, next_share: float) -> TrainingBatch:
        token_BS, target_BS, next_BS, document_BS = (
            torch.from_numpy(rows).to(self.device)
            for rows in (made.tokens, made.targets, made.next_targets, made.documents)
        )
        if self.across:
            inputs = Batch(token_BS, torch.arange(token_BS.shape[1], device=self.device).expand_as(token_BS), None)
        else:
            inputs = packed_inputs(token_BS, document_BS)
        return TrainingBatch(inputs, target_BS, next_BS, (target_BS != IGNORED).float(), share, next_share)

    def documents(self, step: int) -> list[str]:
        """`source/hash of the id` of each document in a step's sequences."""
        return self.mixture.documents(self._positions(step), self.split)

    def _positions(self, step: int) -> np.ndarray:
        return np.arange(self.sizes.first_position(step), self.sizes.first_position(step + 1))

    def _mine(self, step: int, rank: int, ranks: int) -> slice:
        """This rank's part of the positions of a step."""
        count = self.sizes.sequences(step) // ranks
        return slice(rank * count, (rank + 1) * count)

    def _shares(self, positions: np.ndarray, mine: slice, ranks: int) -> tuple[float, float]:
        """This rank's part of the targets one and two tokens ahead of the whole step, times the ranks."""
        if ranks == 1:
            return 1.0, 1.0
        counts = self.mixture.predictions(positions, self.split, across=self.across)
        one, two = (counts[mine].sum(0) * ranks / np.maximum(counts.sum(0), 1)).tolist()
        return one, two

    def bytes_per_target(self) -> np.ndarray:
        """Bytes of text that a target stands for, by source, for bits per byte; in float64.

        Where each document is on its own, its first token (bos) is no target.
        """
        shards, counted = self.mixture.shards, self.mixture.packing == "concatenate" and self.across
        rates = []
        for source in self.mixture.sources(self.split):
            entries = shards.entries(self.split, source)
            targets = sum(e.tokens - (0 if counted else e.documents) for e in entries)
            rates.append(shards.text_bytes(self.split, source) / targets)
        return np.array(rates)

    def text_bytes(self, positions: np.ndarray) -> float:
        """Bytes of text that the targets of these sequences stand for, by each source's bytes a target."""
        sources, _ = self.mixture.orders[self.split].locate(positions)
        return float((self.bytes_per_target()[sources] * self.predicted(positions)).sum())

    def predicted(self, positions: np.ndarray) -> np.ndarray:
        """How many targets each of these sequences has."""
        return self.mixture.predictions(positions, self.split, across=self.across)[:, 0]


def _plan(size: int, count: int, seed: int) -> np.ndarray:
    """The item at each of `count` places: a new permutation of all items each epoch."""
    epochs = -(-count // size)
    order = [numpy_generator(seed, "epoch", 0, e).permutation(size) for e in range(epochs)]
    return np.concatenate(order)[:count]


@dataclass(frozen=True)
class Conversation:
    """A prompt and the response to be learned, as tokens."""

    prompt: list[int]
    response: list[int]

    @property
    def positions(self) -> int:
        """What it takes of a sequence: its last token is a target alone."""
        return len(self.prompt) + len(self.response) - 1


class PackedConversations:
    """Conversations packed whole into sequences, loss on responses alone; the rest of a sequence is padding.

    Raises:
        ValueError: a conversation is longer than a sequence.
    """

    def __init__(self, conversations: list[Conversation], *, length: int, pad: int, device: torch.device) -> None:
        self.conversations, self.length, self.pad, self.device = conversations, length, pad, device
        self.packs = pack_whole([c.positions for c in conversations], length)

    def at(self, places: np.ndarray) -> TrainingBatch:
        """The sequences at these places among `packs`."""
        return self._made(places, 1.0)

    def predicted(self, places: np.ndarray) -> np.ndarray:
        """How many targets each of these sequences has: the tokens of its responses."""
        return np.array([sum(len(self.conversations[c].response) for c in self.packs[i]) for i in places])

    def _made(self, places: np.ndarray, share: float) -> TrainingBatch:
        rows = [self._row(self.packs[i]) for i in places]
        token, target, document = (torch.from_numpy(np.stack(part)).to(self.device) for part in zip(*rows, strict=True))
        inputs = packed_inputs(token, document)
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


class ConversationBatches(PackedConversations):
    """Packed conversations in the order of training: a new permutation of the sequences each epoch."""

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
        super().__init__(conversations, length=length, pad=pad, device=device)
        self.sequences = sequences
        self.plan = _plan(len(self.packs), sequences * steps, seed)

    def step(self, step: int, rank: int, ranks: int) -> TrainingBatch:
        first, count = step * self.sequences, self.sequences // ranks
        places = self.plan[first : first + self.sequences]
        responses, mine = self.predicted(places), slice(rank * count, (rank + 1) * count)
        return self._made(places[mine], float(responses[mine].sum() * ranks / responses.sum()))

    def documents(self, step: int) -> list[str]:
        """The numbers of a step's conversations."""
        places = self.plan[step * self.sequences : (step + 1) * self.sequences]
        return [f"conversation {index}" for i in places for index in self.packs[i]]


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
