"""Context extension: what it makes of a configuration, its needles, and a job that is killed and resumed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor

from gristmill.data.mix import MixConfig, mix
from gristmill.data.mixture import Mixture
from gristmill.data.shards import BOS_ID, PAD_ID, TokenShards
from gristmill.data.stage_types import silent as quiet
from gristmill.model.config import ModelConfig, RotaryScalingConfig
from gristmill.model.extend import extend, extended
from gristmill.model.launch import JobFailed
from gristmill.model.needle import SENTENCE, WORDS, Needles, depths, predicted
from gristmill.model.stage_types import silent
from gristmill.model.training.batches import IGNORED, TokenBatches
from gristmill.model.training.config import ExtendConfig, LayoutConfig, NeedleConfig
from gristmill.model.training.extension import loss_by_position, run, with_config
from gristmill.model.training.models import load_model, save_model
from gristmill.model.transformer import Batch, Transformer, rotary_frequencies, score_scale
from tests.model.in_process import jobs_here

CPU = torch.device("cpu")
SMALL = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=16, intermediate_size=64, n_routed_experts=4, moe_intermediate_size=16,
    max_position_embeddings=64,
)  # fmt: skip
PHASE = ExtendConfig(
    first_length=64, trained_length=64, sequence_length=160, steps=6, batch_sequences=2, checkpoint_every=2,
    evaluate_every=3, held_out_sequences=2, needle=NeedleConfig(lengths=(96, 160), depths=3, cases=2, digits=3),
)  # fmt: skip


def phase(**more: Any) -> ExtendConfig:
    return ExtendConfig.model_validate({**PHASE.model_dump(), **more})


# --- what a phase makes of a configuration


def test_yarn_is_taken_over_from_the_lengths() -> None:
    longer = extended(SMALL, PHASE)
    assert longer.max_position_embeddings == 160
    assert longer.rope_scaling == RotaryScalingConfig(factor=2.5, original_max_position_embeddings=64)
    changed = {"rope_scaling": None, "max_position_embeddings": 64}
    assert longer.model_copy(update=changed) == SMALL
    # Fast pairs turn as they did, slow ones by the factor slower (YaRN, section 3.2); scores by (0.1·ln s + 1)².
    before, after = rotary_frequencies(SMALL), rotary_frequencies(longer)
    assert after[0] == before[0]
    assert float(after[-1]) == pytest.approx(float(before[-1]) / 2.5)
    assert score_scale(longer) == pytest.approx(score_scale(SMALL) * (0.1 * math.log(2.5) + 1) ** 2)


def test_v3s_two_phases_have_its_published_configuration() -> None:
    yarn = RotaryScalingConfig(factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1)
    model = ModelConfig(max_position_embeddings=4096)
    for trained, length in ((4096, 32_768), (32_768, 131_072)):
        asked = ExtendConfig(first_length=4096, trained_length=trained, sequence_length=length, rope_scaling=yarn)
        model = extended(model, asked)
        assert (model.rope_scaling, model.max_position_embeddings) == (yarn, length)


def test_a_second_phase_stretches_from_the_context_trained_first() -> None:
    again = extended(extended(SMALL, PHASE), phase(trained_length=160, sequence_length=320, needle={}))
    assert again.rope_scaling == RotaryScalingConfig(factor=5.0, original_max_position_embeddings=64)


def test_grouped_queries_scale_their_rotary_part_and_not_their_scores() -> None:
    grouped = ModelConfig(attention="gqa", max_position_embeddings=64)
    scaling = extended(grouped, PHASE).rope_scaling
    assert scaling is not None
    assert (scaling.mscale, scaling.mscale_all_dim) == (1.0, 0.0)


YARN = {"type": "yarn", "original_max_position_embeddings": 64, "factor": 2.5}
REFUSED: dict[str, tuple[ModelConfig, dict[str, Any], str]] = {
    "no longer": (SMALL, {"trained_length": 160}, "sequence_length 160 is not longer than the 160 tokens"),
    "factor": (SMALL, {"rope_scaling": {**YARN, "factor": 2}}, r"factor 2 stretches 64 tokens to 128.*at least 2\.5"),
    "another first context": (
        SMALL,
        {"rope_scaling": {"type": "yarn", "factor": 40}},
        "original_max_position_embeddings 4096 is not the 64 tokens",
    ),
    "not yarn": (SMALL, {"rope_scaling": {**YARN, "type": "llama3"}}, "rope_scaling.type is llama3"),
    "needles too long": (SMALL, {"needle": {"lengths": [96, 200]}}, "needle.lengths has 200, longer than"),
    "latent attention's setting": (
        ModelConfig(attention="gqa"),
        {"rope_scaling": YARN},
        "mscale_all_dim 1 scales the scores of latent attention alone, and the model's attention is gqa",
    ),
    "stretched otherwise before": (
        SMALL.model_copy(update={"rope_scaling": RotaryScalingConfig(type="llama3")}),
        {},
        "the base's rope_scaling is llama3 from 4096 tokens",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    model, more, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        extended(model, phase(**more))


# --- needles


@pytest.fixture(scope="module")
def tokens(lesson_tokens: Path) -> Path:
    return lesson_tokens


@pytest.fixture(scope="module")
def shards(tokens: Path) -> TokenShards:
    return TokenShards(tokens / "tokens")


@pytest.fixture(scope="module")
def tokenizer(tokens: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tokens / "tokenizer" / "tokenizer.json"))


@pytest.fixture(scope="module")
def needles(tokenizer: Tokenizer, shards: TokenShards) -> Needles:
    return Needles(tokenizer, shards, NeedleConfig(cases=30, digits=5), seed=0)


@settings(max_examples=40, deadline=None)
@given(length=st.integers(120, 900), depth=st.sampled_from(depths(NeedleConfig(depths=21))), number=st.integers(0, 99))
def test_a_needle_stands_at_its_depth_and_is_asked_for_at_the_end(
    needles: Needles, tokenizer: Tokenizer, length: int, depth: float, number: int
) -> None:
    case = needles.case(length, depth, number)
    again = needles.case(length, depth, number)
    assert np.array_equal(case.tokens, again.tokens)
    assert len(case.tokens) == length
    assert case.tokens[0] == BOS_ID
    assert (case.tokens[1:] > PAD_ID).all()  # one text: no document ends in it
    asked = tokenizer.decode(case.tokens.tolist()).rsplit("\n", 1)[1]
    word, digits = asked.removeprefix("The magic number of ").split(" is ")
    assert word in WORDS
    assert len(digits) == 5
    assert digits.isdigit()
    needle = tokenizer.encode(SENTENCE.format(word=word) + digits + ".\n", add_special_tokens=False).ids
    assert case.tokens[case.place : case.place + len(needle)].tolist() == needle
    question = len(tokenizer.encode(SENTENCE.format(word=word), add_special_tokens=False).ids) + 5
    room = length - 1 - len(needle) - question
    assert abs((case.place - 1) - depth * room) <= 0.5


def test_needles_are_not_all_alike(needles: Needles) -> None:
    made = {needles.case(200, 0.5, number).tokens.tobytes() for number in range(20)}
    assert len(made) == 20
    ends = {tuple(needles.case(200, 0.5, number).tokens[-5:].tolist()) for number in range(20)}
    assert len(ends) > 15  # of 100,000 numbers


def test_one_who_knows_scores_one_and_one_who_guesses_by_chance(needles: Needles) -> None:
    def knows(token_BS: Tensor, count: int) -> Tensor:
        return torch.nn.functional.one_hot(token_BS[:, -count:], 320) * 50.0

    generator = torch.Generator().manual_seed(0)

    def guesses(token_BS: Tensor, count: int) -> Tensor:
        return torch.randn(len(token_BS), count, 320, generator=generator) * 1e-3

    assert needles.score(knows, 200, 0.5, CPU) == pytest.approx((1.0, 1.0, 0.0), abs=1e-6)
    scores = np.array([needles.score(guesses, 200, depth, CPU) for depth in (0.0, 0.5, 1.0)])
    # 450 digits, each right with probability 0.1: four standard deviations are 0.057.
    assert abs(scores[:, 1].mean() - 0.1) < 0.057
    assert scores[:, 0].max() == 0
    assert scores[:, 2].mean() == pytest.approx(5 * math.log2(10), abs=0.01)  # nearly equal logits


def test_a_model_is_asked_for_the_digits_and_not_shown_them(needles: Needles) -> None:
    """The logits are those of a plain forward pass over all tokens, and the last digit has no part in them."""
    model = Transformer(SMALL, 320)
    model.initialise(1)
    token_BS = torch.from_numpy(needles.case(150, 0.3, 0).tokens)[None]
    whole = model(Batch(token_BS, torch.arange(150)[None]))
    # float32, logits of order one through two layers: some hundred units in the last place.
    torch.testing.assert_close(predicted(model, token_BS, 5), whole[:, -6:-1], rtol=1e-4, atol=1e-5)


def test_a_haystack_too_short_and_digits_without_tokens_are_refused(needles: Needles, shards: TokenShards) -> None:
    with pytest.raises(ValueError, match=r"a needle and its question take \d+ tokens, .* has 40: raise needle.lengths"):
        needles.case(40, 0.5, 0)
    from tokenizers import models

    with pytest.raises(ValueError, match="no token of its own for the digit 0"):
        Needles(Tokenizer(models.BPE()), shards, NeedleConfig(), 0)


# --- the job


def mixed(tokens: Path, config: ExtendConfig) -> Path:
    asked = MixConfig(sequence_length=config.sequence_length, sequences=config.steps * config.batch_sequences)
    out = tokens.parent / f"mixture-{asked.sequence_length}-{asked.sequences}"
    if not (out / "mixture.json").exists():
        out.mkdir()
        mix(asked, tokens, out, 0, workers=0, progress=quiet)
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base")
    model = Transformer(SMALL, 320)
    model.initialise(0)
    save_model(out / "model", model)
    return out


def lengthened(base: Path, tokens: Path, out: Path) -> dict[str, Any]:
    mixture = mixed(tokens, PHASE)
    return extend(
        PHASE, base, tokens, mixture, out, 0, threads=1, ranks=1, device="cpu", layout=LayoutConfig(), progress=silent
    )


@pytest.fixture(scope="module")
def made(base: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("extended")
    with jobs_here():
        return out, lengthened(base, tokens, out)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def content(out: Path) -> dict[str, str]:
    files = [p for p in sorted(out.rglob("*")) if p.is_file() and "log" not in p.relative_to(out).parts]
    return {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_model_is_saved_with_its_new_context(made, base: Path) -> None:
    out, metrics = made
    model = load_model(out / "model", CPU)
    assert model.config == extended(SMALL, PHASE)
    before = load_model(base / "model", CPU)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert len(model.mtp) == 1
    assert metrics["tokens"] == 6 * 2 * 160
    assert not (out / "work").exists()


def test_what_is_checked_before_and_after(made, base: Path, tokens: Path, tokenizer: Tokenizer, shards) -> None:
    out, metrics = made
    found = rows(out / "needle.jsonl")
    cells = [(r["model"], r["length"], r["depth"]) for r in found]
    assert cells == [(m, s, d) for m in ("base", "yarn", "extended") for s in (96, 160) for d in (0.0, 0.5, 1.0)]
    assert set(metrics["bits_beyond"]) == {"base", "yarn", "extended"}
    assert "bits_within" not in metrics  # no haystack is as short as the base's context
    # What stands there is what the saved model scores.
    model = load_model(out / "model", CPU)
    checked = Needles(tokenizer, shards, PHASE.needle, 0)
    scores = checked.score(lambda token_BS, count: predicted(model, token_BS, count), 160, 0.5, CPU)
    assert [found[-2][name] for name in ("retrieved", "digits_in_front", "bits")] == pytest.approx(scores, abs=1e-4)
    by_position = rows(out / "loss_by_position.jsonl")
    assert [r["start"] for r in by_position if r["model"] == "base"] == [10 * i for i in range(16)]
    assert metrics["loss_beyond"].keys() == {"base", "yarn", "extended"}
    assert rows(out / "curves.jsonl")[-1]["held_out_bpb"] == pytest.approx(metrics["held_out_bpb"], abs=1e-5)


def test_loss_by_position_sums_to_the_loss(base: Path, tokens: Path, shards: TokenShards) -> None:
    model = with_config(load_model(base / "model", CPU), extended(SMALL, PHASE))
    mixture = Mixture(mixed(tokens, PHASE), shards)
    for across in (True, False):
        batch = TokenBatches(mixture, "held_out", sizes=PHASE.batches, across_documents=across, device=CPU).step(
            1, 0, 1
        )
        total, count = loss_by_position(model, batch, [0, 5, 64, 160])
        logits_BSV = model(batch.inputs)
        whole = torch.nn.functional.cross_entropy(logits_BSV.detach().flatten(0, 1), batch.target_BS.flatten())
        assert float(total.sum() / count.sum()) == pytest.approx(float(whole), rel=1e-5)  # float32 sums of 320 terms
        counted = batch.inputs.position_BS[batch.target_BS != IGNORED]
        assert count.tolist() == [int(((counted >= a) & (counted < b)).sum()) for a, b in ((0, 5), (5, 64), (64, 160))]


@pytest.mark.slow
def test_killed_and_resumed_it_ends_in_the_same_bytes(made, base: Path, tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    out.mkdir()

    def kill() -> None:
        while not any((out / "work").glob("checkpoint-????????")):
            time.sleep(0.005)
        pid = json.loads((out / "log" / "starts.jsonl").read_text().splitlines()[0])["pid"]
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(JobFailed):
        lengthened(base, tokens, out)
    killer.join()
    assert {p.name for p in (out / "work").glob("checked-*.json")} == {"checked-base.json", "checked-yarn.json"}
    lengthened(base, tokens, out)
    assert content(out) == content(made[0])
    assert rows(out / "log" / "starts.jsonl")[-1]["from_step"] > 0


@pytest.mark.parametrize(
    ("asked", "mixture", "message"),
    [
        (PHASE, phase(sequence_length=128), "extend asks for sequence_length 160 .*made for 128"),
        (PHASE, phase(steps=7), "extend asks for sequences 12 .*made for 14"),
        (phase(trained_length=160), PHASE, "sequence_length 160 is not longer than the 160 tokens"),
    ],
)
def test_bad_input_is_refused_before_training(
    asked: ExtendConfig, mixture: ExtendConfig, message: str, base: Path, tokens: Path, tmp_path: Path
) -> None:
    job = {"config": asked.model_dump(), "model": base, "tokens": tokens, "mixture": mixed(tokens, mixture), "seed": 0}
    with pytest.raises(ValueError, match=message):
        run(job, tmp_path, CPU, silent)
    assert list(tmp_path.iterdir()) == []
