"""Batches of training: a function of the step alone, each sequence once, targets within documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gristmill.data.mixture import Mixture
from gristmill.data.shards import TokenShards
from gristmill.model.batch_sizes import BatchSizes
from gristmill.model.training.batches import IGNORED, TokenBatches, pack_whole
from gristmill.model.training.config import BatchRampConfig
from tests.model.test_training import CONFIG, mixed


@pytest.fixture(scope="module")
def tokens(lesson_tokens: Path) -> Path:
    return lesson_tokens


def batches(
    tokens: Path, seed: int = 0, across: bool = False, sizes: BatchSizes = CONFIG.batches, **more: Any
) -> TokenBatches:
    config = CONFIG.model_copy(update={"steps": 50})
    mixture = Mixture(mixed(tokens, config, seed, **more), TokenShards(tokens / "tokens"))
    return TokenBatches(mixture, "train", sizes=sizes, across_documents=across, device=torch.device("cpu"))


def test_batches_are_a_pure_function_of_the_step(tokens: Path) -> None:
    one, other = batches(tokens), batches(tokens)
    for step in (30, 2, 49):
        assert torch.equal(one.step(step, 0, 1).inputs.token_BS, other.step(step, 0, 1).inputs.token_BS)
    whole = one.step(7, 0, 1).inputs.token_BS
    halves = [one.step(7, rank, 2).inputs.token_BS for rank in range(2)]
    assert torch.equal(torch.cat(halves), whole)
    assert not torch.equal(whole, batches(tokens, seed=1).step(7, 0, 1).inputs.token_BS)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_growing_batch_reads_every_sequence_once_and_in_order(tokens: Path, ranks: int) -> None:
    ramp = BatchRampConfig(start_sequences=2, increment=2, tokens=32 * 40)
    sizes = BatchSizes(8, 32, ramp)
    even, growing = batches(tokens), batches(tokens, sizes=sizes)
    parts = [growing.step(step, rank, ranks).inputs.token_BS for step in range(25) for rank in range(ranks)]
    assert [len(p) * ranks for p in parts[::ranks]] == [sizes.sequences(step) for step in range(25)]
    read = torch.cat(parts)
    assert len(read) == sizes.first_position(25)
    assert torch.equal(read, torch.cat([even.step(step, 0, 1).inputs.token_BS for step in range(50)])[: len(read)])


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
@pytest.mark.parametrize("across", [False, True])
def test_targets_stay_in_their_document(tokens: Path, packing: str, across: bool) -> None:
    made = batches(tokens, packing=packing, across=across)
    for step in range(0, 50, 7):
        batch = made.step(step, 0, 1)
        token, target, after = batch.inputs.token_BS, batch.target_BS, batch.next_target_BS
        assert after is not None
        assert torch.equal(batch.weight_BS > 0, target >= 0)
        inside = (target[:, :-1] >= 0) & (token[:, 1:] == target[:, :-1])
        assert torch.equal(after[:, :-1][inside & (after[:, :-1] >= 0)], target[:, 1:][inside & (after[:, :-1] >= 0)])
        ends = token == 1  # the end of a document
        if packing == "best_fit" or not across:
            assert (target[ends] == IGNORED).all()  # nothing is learned of what follows it
            assert (target[token == 2] == IGNORED).all()  # nor of padding
            assert not (target == 0).any()
        else:
            assert (target[ends & (target >= 0)] == 0).all()  # it predicts the beginning of the next


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_shares_weigh_targets_alike(tokens: Path, packing: str) -> None:
    """With a rank's share, the mean over ranks of their means is the mean over all targets of the step."""
    made = batches(tokens, packing=packing)
    for step in (0, 13, 49):
        whole = made.step(step, 0, 1)
        assert (whole.share, whole.next_share) == (1.0, 1.0)
        for ranks in (2, 4):
            parts = [made.step(step, rank, ranks) for rank in range(ranks)]
            for share, name in (("share", "target_BS"), ("next_share", "next_target_BS")):
                counts = [int((getattr(p, name) >= 0).sum()) for p in parts]
                assert [getattr(p, share) for p in parts] == pytest.approx([c * ranks / sum(counts) for c in counts])
                assert sum(counts) == int((getattr(whole, name) >= 0).sum())


def test_packing_cuts_nothing() -> None:
    packs = pack_whole([5, 9, 3, 7, 2, 10], 10)
    assert sorted(i for p in packs for i in p) == list(range(6))
    assert all(sum([5, 9, 3, 7, 2, 10][i] for i in p) <= 10 for p in packs)
    with pytest.raises(ValueError, match="conversation 0 has 11 tokens and a sequence only 10"):
        pack_whole([11], 10)
