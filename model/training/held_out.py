"""What a model makes of held-out text (its loss a token and a byte, of all and of each source) and conversations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from gristmill.model.training.batches import IGNORED, PackedConversations, TokenBatches, TrainingBatch
from gristmill.model.training.engine import Engine


class Sequences(Protocol):
    """Sequences that are read by their positions."""

    def at(self, positions: np.ndarray, /) -> TrainingBatch: ...


def own_nats(engine: Engine, sequences: Sequences, positions: np.ndarray, at_once: int) -> float:
    """Nats of this rank's part of these sequences, for `Engine.over_sequences` to add up.

    They are shared out among the data-parallel ranks, all of which call it: each reads `at_once` of its own.
    """
    place, nats = engine.place, 0.0
    for first in range(0, len(positions), at_once * place.data_parallel):
        some = positions[first : first + at_once * place.data_parallel]
        own = np.array_split(some, place.data_parallel)[place.data_rank(engine.rank)]
        # Ranks meet in each pass, so one that has no sequence reads another's, which does not count.
        batch = sequences.at(own if len(own) else some[:1])
        predicted = int((batch.target_BS != IGNORED).sum()) if len(own) else 0
        nats += engine.evaluate(batch) * predicted
    return nats


class HeldOutConversations:
    """Conversations that are not trained on, so many of their sequences read at once; there may be none."""

    def __init__(self, conversations: PackedConversations, at_once: int) -> None:
        self.conversations, self.at_once = conversations, at_once

    def loss(self, engine: Engine) -> dict[str, float]:
        """`held_out_loss` (nats a token of the responses), which all ranks ask for; nothing where none is held out."""
        positions = np.arange(len(self.conversations.packs))
        if not len(positions):
            return {}
        own = torch.tensor([own_nats(engine, self.conversations, positions, self.at_once)], dtype=torch.float64)
        tokens = int(self.conversations.predicted(positions).sum())
        return {"held_out_loss": float(engine.over_sequences(own)) / tokens}


class HeldOut:
    """The first so many held-out sequences of a mixture (in the shares of the training weights), source by source."""

    def __init__(self, batches: TokenBatches, sequences: int, at_once: int) -> None:
        self.batches, self.at_once = batches, at_once
        positions = np.arange(sequences)
        places, _ = batches.mixture.orders[batches.split].locate(positions)
        names = batches.mixture.sources(batches.split)
        self.positions = {names[source]: positions[places == source] for source in np.unique(places).tolist()}

    def parts(self) -> Iterator[tuple[str, TrainingBatch, float]]:
        """(source, a batch of its sequences, the bytes of text that its targets stand for)."""
        for source, positions in self.positions.items():
            for first in range(0, len(positions), self.at_once):
                some = positions[first : first + self.at_once]
                yield source, self.batches.at(some), self.batches.text_bytes(some)

    def loss(self, engine: Engine) -> dict[str, float]:
        """`held_out_loss` (nats a token), `held_out_bpb` (bits a byte), and the latter as `held_out_bpb.<source>`.

        All ranks call it, as `own_nats`.
        """
        parts = list(self.positions.values())
        nats = torch.tensor([own_nats(engine, self.batches, p, self.at_once) for p in parts], dtype=torch.float64)
        tokens = sum(int(self.batches.predicted(p).sum()) for p in parts)
        size = [self.batches.text_bytes(p) for p in parts]
        nats_by_source = engine.over_sequences(nats).tolist()
        whole = sum(nats_by_source)
        by_source = zip(self.positions, nats_by_source, size, strict=True)
        return {
            "held_out_loss": whole / tokens,
            "held_out_bpb": whole / math.log(2) / sum(size),
            **{f"held_out_bpb.{name}": own / math.log(2) / stood for name, own, stood in by_source if stood},
        }

    def unigram_bits_per_byte(self, train: TokenBatches, vocab_size: int) -> float:
        """What a model that knows only how often each token occurs would need on the same sequences.

        Frequencies are those of the training streams in their parts of the run, each count plus one.
        """
        share_V = np.zeros(vocab_size)
        for source, share in zip(train.mixture.sources(), train.mixture.shares(), strict=True):
            count_V = train.mixture.token_counts(source) + 1.0
            share_V += share * count_V / count_V.sum()
        surprise_V = torch.from_numpy(-np.log2(share_V))
        bits = text_bytes = 0.0
        for _, batch, size in self.parts():
            target_BS = batch.target_BS.cpu()
            bits += float(surprise_V[target_BS[target_BS != IGNORED]].sum())
            text_bytes += size
        return bits / text_bytes
