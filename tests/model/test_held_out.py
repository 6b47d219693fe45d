"""Held-out checks: ranks share the sequences, and come to what one rank finds."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from gristmill.data.arithmetic import lesson
from gristmill.data.mix import MixConfig, mix
from gristmill.data.mixture import Mixture
from gristmill.data.shards import TokenShards
from gristmill.data.stage_types import silent
from gristmill.data.tokenize import TokenizeConfig, tokenize
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
    return held_out_of(lesson_tokens, mixture)


def held_out_of(tokens: Path, mixture: Path) -> HeldOut:
    batches = TokenBatches(
        Mixture(mixture, TokenShards(tokens / "tokens")), "held_out", sizes=BatchSizes(AT_ONCE, 32, None),
        across_documents=False, device=torch.device("cpu"),
    )  # fmt: skip
    return HeldOut(batches, SEQUENCES, AT_ONCE)


@pytest.fixture(scope="module")
def tokens_of_two(tmp_path_factory: pytest.TempPathFactory, laid_out: Callable[..., Path]) -> Path:
    """Tokens of lessons and tables of squares, of which a fifth is held out, with a mixture beside them."""
    folder = tmp_path_factory.mktemp("two")
    texts = {"lessons": lesson, "squares": lambda _, i: "\n".join(f"{n} × {n} = {n * n}" for n in range(i, i + 9))}
    rows = [
        {"text": text(0, i), "id": f"{source}/{i}", "metadata": {"source": source, "kind": source}}
        for source, text in texts.items()
        for i in range(100)
    ]
    tokens, mixture = folder / "tokens", folder / "mixture"
    for made in (tokens, mixture):
        made.mkdir()
    config = TokenizeConfig(vocab_size=320, sample_bytes=20_000, held_out=0.2)
    tokenize(config, laid_out(folder / "in", rows), tokens, 0, workers=0, progress=silent)
    mix(MixConfig(sequence_length=32, sequences=40), tokens, mixture, 0, workers=0, progress=silent)
    return tokens


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


def test_each_source_has_its_bits_a_byte_and_the_whole_is_their_mean(tokens_of_two: Path) -> None:
    """Weighed by bytes. Their number is that of the decoded text, shared out over the targets that its tokens give."""
    two = held_out_of(tokens_of_two, tokens_of_two.parent / "mixture")
    loss, mixture = found(two, Rank(0, Layout(1))), two.batches.mixture
    tokenizer = Tokenizer.from_file(str(tokens_of_two / "tokenizer" / "tokenizer.json"))
    batch = mixture.batch(np.arange(SEQUENCES), "held_out")
    nats, size, count = {}, {}, {}
    for number, source in enumerate(mixture.sources("held_out")):
        target = batch.targets[batch.sources == number]
        stream = np.fromfile(tokens_of_two / "tokens" / "held_out" / source / "00000.tokens", "<u2")
        text = tokenizer.decode(stream[stream > 1].tolist(), skip_special_tokens=False)  # without bos and eos
        count[source] = int((target != IGNORED).sum())
        nats[source] = float(target[target != IGNORED].sum())  # the loss of a target is its id: see `Rank`
        size[source] = len(text.encode()) * count[source] / int((stream != 0).sum())
    bits = {source: nats[source] / math.log(2) / size[source] for source in nats}
    wanted = {f"held_out_bpb.{source}": value for source, value in bits.items()}
    wanted |= {"held_out_loss": sum(nats.values()) / sum(count.values())}
    wanted |= {"held_out_bpb": sum(bits[source] * size[source] for source in bits) / sum(size.values())}
    assert loss == pytest.approx(wanted, rel=1e-14)  # as above
    assert set(bits) == {"lessons", "squares"}
    assert abs(bits["lessons"] - bits["squares"]) > 0.01 * loss["held_out_bpb"]


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
