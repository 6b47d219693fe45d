"""Held-out checks: ranks share the sequences, and come to what one rank finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gristmill.data.mix import MixConfig, mix
from gristmill.data.mixture import Mixture
from gristmill.data.shards import TokenShards
from gristmill.data.stage_types import silent
from gristmill.model.batch_sizes import BatchSizes
from gristmill.model.training.batches import IGNORED, TokenBatches, TrainingBatch
from gristmill.model.training.held_out import HeldOut
from gristmill.model.training.layout import Layout

SEQUENCES, AT_ONCE = 11, 3


class Rank:
    """Stands where a rank's engine would, with a loss of each target that anyone can say."""

    def __init__(self, rank: int, place: Layout, whole: Tensor | None = None) -> None:
        self.rank, self.place, self.whole = rank, place, whole
        self.passes: list[int] = []

    def evaluate(self, batch: TrainingBatch) -> float:
        self.passes.append(len(batch.target_BS))
        return float(batch.target_BS[batch.target_BS != IGNORED].double().mean())

    def over_sequences(self, own: Tensor) -> Tensor:
        self.own = own
        return own if self.whole is None else self.whole


@pytest.fixture(scope="module")
def held_out(lesson_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    mixture = tmp_path_factory.mktemp("mixture")
    mix(MixConfig(sequence_length=32, sequences=40), lesson_tokens, mixture, 0, workers=0, progress=silent)
    batches = TokenBatches(
        Mixture(mixture, TokenShards(lesson_tokens / "tokens")), "held_out", sizes=BatchSizes(AT_ONCE, 32, None),
        across_documents=False, device=torch.device("cpu"),
    )  # fmt: skip
    return HeldOut(batches, SEQUENCES, AT_ONCE)


def found(held_out: HeldOut, engine: Any) -> dict[str, float]:
    return held_out.loss(engine)


def test_one_rank_finds_the_mean_over_all_targets(held_out: HeldOut) -> None:
    target_BS = torch.cat([batch.target_BS for _, batch, _ in held_out.parts()])
    alone = Rank(0, Layout(1))
    loss = found(held_out, alone)
    # Means of parts in float64, weighed again: a few of its 2e-16.
    assert loss["held_out_loss"] == pytest.approx(float(target_BS[target_BS != IGNORED].double().mean()), rel=1e-14)
    assert loss["held_out_bpb"] == loss["held_out_bpb.lessons"]
    assert alone.passes == [3, 3, 3, 2]


@pytest.mark.parametrize("ranks", [2, 3, 4, 12])
@pytest.mark.parametrize("sequence", [1, 2])
def test_ranks_share_the_sequences_and_find_what_one_does(held_out: HeldOut, ranks: int, sequence: int) -> None:
    place = Layout(ranks * sequence, sequence_parallel=sequence)
    members = [Rank(rank, place) for rank in range(place.ranks)]
    for member in members:
        found(held_out, member)
    whole = torch.stack([member.own for member in members]).sum(0) / sequence
    assert len({len(member.passes) for member in members}) == 1  # ranks meet in each of them
    assert max(sum(member.passes) for member in members) <= -(-SEQUENCES // ranks) + 1
    alone = found(held_out, Rank(0, Layout(1)))
    for rank in (0, place.ranks - 1):
        shared = found(held_out, Rank(rank, place, whole))
        assert shared.keys() == alone.keys()
        assert np.allclose(list(shared.values()), list(alone.values()), rtol=1e-14, atol=0)  # as above
