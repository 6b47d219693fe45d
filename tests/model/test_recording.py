"""What a training run tells while it goes on, and that telling it changes no byte of what the run makes."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gristmill.data.mix import MixConfig, mix
from gristmill.data.stage_types import silent as quiet
from gristmill.model.config import ModelConfig
from gristmill.model.costs import flops_per_token
from gristmill.model.pretrain import pretrain
from gristmill.model.stage_types import silent
from gristmill.model.training.config import LayoutConfig, PretrainConfig, ScheduleConfig
from gristmill.model.training.gradient_norms import GROUPS, GradientSquares, group_of, norms_by_group
from gristmill.model.training.loop import evenness
from gristmill.model.training.optimizers import Piece
from gristmill.model.training.recording import load_picture
from gristmill.model.training.throughput import measured_peak, peak_memory
from gristmill.model.transformer import Transformer
from tests.model.in_process import jobs_here

SMALL = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=16, intermediate_size=64, n_routed_experts=4, moe_intermediate_size=16,
)  # fmt: skip
CONFIG = PretrainConfig(
    model=SMALL, steps=6, sequence_length=32, batch_sequences=4, checkpoint_every=3, evaluate_every=3,
    held_out_sequences=4, schedule=ScheduleConfig(warmup_steps=2),
)  # fmt: skip
MIXTURES = 2  # the second layer's and the MTP module's
PLAIN = LayoutConfig()
# The squares of at most 1e5 float32 numbers, summed in another order and from other pieces: 1e-7 each, of one sign.
NORM = 1e-5


@pytest.fixture(scope="module")
def corpus(lesson_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    mixture = tmp_path_factory.mktemp("mixture")
    asked = MixConfig(sequence_length=CONFIG.sequence_length, sequences=CONFIG.sequences)
    mix(asked, lesson_tokens, mixture, 0, workers=0, progress=quiet)
    return {"tokens": lesson_tokens, "mixture": mixture}


def trained(corpus: dict[str, Path], out: Path, layout: LayoutConfig = PLAIN, ranks: int = 1) -> Path:
    out.mkdir()
    with nullcontext() if ranks > 1 else jobs_here():
        pretrain(
            CONFIG, **corpus, out=out, seed=0, threads=1, ranks=ranks, device="cpu", layout=layout, progress=silent
        )
    return out


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def content(out: Path) -> dict[str, str]:
    files = [p for p in sorted(out.rglob("*")) if p.is_file() and "log" not in p.relative_to(out).parts]
    return {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def run(corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(corpus, tmp_path_factory.mktemp("run") / "out")


@pytest.fixture(scope="module")
def watched(corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, two of whose steps are profiled."""
    return trained(corpus, tmp_path_factory.mktemp("watched") / "out", LayoutConfig(profile=(1, 4)))


def test_every_step_has_all_its_numbers(run: Path) -> None:
    told = rows(run / "curves.jsonl")
    losses = {"loss", "main_loss", "mtp_loss", "balance_loss"}
    loads = {"load_violation", "load_violation_max", "load_entropy"}
    for row in told:
        assert losses | loads | {"grad_norm", "learning_rate"} <= set(row)
        assert {f"grad_norm.{group}" for group in GROUPS} <= set(row)
        assert all(math.isfinite(value) for value in row.values())
        weighed = row["main_loss"] + SMALL.mtp_loss_weight * row["mtp_loss"] + row["balance_loss"]
        assert row["loss"] == pytest.approx(weighed, rel=1e-6)  # float32, with seven digits
        # α Σ f P of each mixture: α where either is even, and an f is at most the experts over those of a token.
        assert 0.9 < row["balance_loss"] / (SMALL.balance_loss_alpha * MIXTURES) <= 2
        assert row["load_violation"] <= row["load_violation_max"]
        assert 0 < row["load_entropy"] <= 1 + 1e-6
    assert [row["step"] for row in told if "held_out_bpb.lessons" in row] == [2, 5]


def squares(row: dict[str, Any]) -> float:
    return sum(value**2 for name, value in row.items() if name.startswith("grad_norm."))


def test_squares_of_groups_sum_up_to_the_whole(run: Path) -> None:
    for row in rows(run / "curves.jsonl"):
        assert squares(row) == pytest.approx(row["grad_norm"] ** 2, rel=NORM)


def test_log_holds_what_will_be_content(run: Path) -> None:
    live, written = rows(run / "log" / "curves.jsonl"), rows(run / "curves.jsonl")
    assert len(written) == CONFIG.steps
    for ours, theirs in zip(live, written, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)  # the content has seven digits
    assert rows(run / "log" / "expert_load.jsonl") == rows(run / "expert_load.jsonl")


def test_timings_say_how_fast_and_against_what(run: Path) -> None:
    told, peak = rows(run / "log" / "timings.jsonl"), json.loads((run / "log" / "peak.json").read_text())
    tokens = CONFIG.batch_sequences * CONFIG.sequence_length
    vocab = json.loads((run / "model" / "config.json").read_text())["vocab_size"]
    assert peak["flops_per_token"] == flops_per_token(SMALL, vocab, CONFIG.sequence_length, mtp=True)
    assert [row["step"] for row in told] == list(range(CONFIG.steps))
    for row in told:
        working = row["seconds"] - row["evaluating_seconds"] - row["saving_seconds"]
        assert 0 < row["data_seconds"] < working
        assert row["tokens"] == tokens
        assert row["tokens_per_second"] == pytest.approx(tokens / working, rel=1e-2)  # seconds are rounded
        used = row["tokens_per_second"] * peak["flops_per_token"] / peak["flops_per_second"]
        assert row["mfu"] == pytest.approx(used, abs=1e-5)  # to five digits
        assert row["memory_bytes"] > 50e6  # torch alone takes more
    assert all(row["evaluating_seconds"] > 1e-3 for row in told if row["step"] in (2, 5))


def test_timings_tell_the_copy_of_a_checkpoint_from_the_wait_for_it(run: Path) -> None:
    told = rows(run / "log" / "timings.jsonl")
    due = [(row["step"] + 1) % CONFIG.checkpoint_every == 0 or row["step"] + 1 == CONFIG.steps for row in told]
    assert any(due)
    assert not all(due)
    for row, saves in zip(told, due, strict=True):
        assert (row["copying_seconds"] > 0) == saves
        assert row["stalled_seconds"] >= 0
        parts = row["copying_seconds"] + row["stalled_seconds"]
        assert row["saving_seconds"] == pytest.approx(parts, abs=2e-5)  # each is rounded to five digits


def test_samples_are_of_each_check_and_repeat(run: Path, watched: Path) -> None:
    told = rows(run / "log" / "samples.jsonl")
    assert [row["step"] for row in told] == [2, 2, 5, 5]
    assert [row["prompt"] == "" for row in told] == [True, False] * 2  # nothing, and a held-out lesson
    assert all(row["text"] for row in told)
    assert told == rows(watched / "log" / "samples.jsonl")
    assert rows(run / "samples.jsonl") == told[2:]  # of the finished model


def test_event_file_has_the_same_numbers(run: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator(str(run / "log" / "tensorboard"))
    board.Reload()
    for name, tag in (("main_loss", "training/main_loss"), ("grad_norm.experts", "grad_norm/experts")):
        events = board.Scalars(tag)
        assert [event.step for event in events] == list(range(1, CONFIG.steps + 1))
        written = [row[name] for row in rows(run / "curves.jsonl")]
        assert [event.value for event in events] == pytest.approx(written, rel=1e-6)
    assert [event.step for event in board.Scalars("held_out_bpb/lessons")] == [3, 6]
    assert len(board.Scalars("speed/mfu")) == CONFIG.steps
    assert board.Tags()["images"] == ["expert_load"]
    assert any(tag.startswith("samples/0") for tag in board.Tags()["tensors"])


def test_profile_leaves_a_trace_and_changes_no_byte(run: Path, watched: Path) -> None:
    assert content(run) == content(watched)
    assert [p.name for p in sorted((watched / "log").glob("profile-*.gz"))] == [
        "profile-step-0001.json.gz",
        "profile-step-0004.json.gz",
    ]
    assert not list((run / "log").glob("profile-*"))
    trace = json.loads(gzip.decompress((watched / "log" / "profile-step-0004.json.gz").read_bytes()))
    assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])
    assert "aten::" in (watched / "log" / "profile-step-0004.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        LayoutConfig(),
        LayoutConfig(zero_stage=1),
        LayoutConfig(zero_stage=2, micro_batches=2),
        LayoutConfig(zero_stage=3),
        LayoutConfig(expert_parallel=2),
        LayoutConfig(zero_stage=1, expert_parallel=2),
        LayoutConfig(zero_stage=1, offload="optimizer"),
        LayoutConfig(sequence_parallel=2),
    ],
    ids=lambda layout: ",".join(f"{n}={v}" for n, v in layout.model_dump(exclude_defaults=True).items()) or "plain",
)
def test_groups_are_the_same_over_two_ranks(
    corpus: dict[str, Path], run: Path, tmp_path: Path, layout: LayoutConfig
) -> None:
    told = rows(trained(corpus, tmp_path / "out", layout, ranks=2) / "curves.jsonl")
    alone = rows(run / "curves.jsonl")[0]
    for row in told:
        assert squares(row) == pytest.approx(row["grad_norm"] ** 2, rel=NORM)
    for name in (name for name in alone if name.startswith("grad_norm")):
        assert told[0][name] == pytest.approx(alone[name], rel=1e-4), name  # two halves of a gradient, added
    assert [row["step"] for row in rows(tmp_path / "out" / "samples.jsonl")] == [CONFIG.steps - 1] * 2
    sampled = bool(rows(tmp_path / "out" / "log" / "samples.jsonl"))
    split = layout.zero_stage == 3 or max(layout.expert_parallel, layout.sequence_parallel) > 1
    assert sampled != split
    log = tmp_path / "out" / "log"
    assert (log / "output.log").read_text().count("no text is sampled") == split
    assert (log / "notes.json").exists() == split


def test_every_parameter_has_its_group() -> None:
    model = Transformer(SMALL.model_copy(update={"n_shared_experts": 1, "first_k_dense_replace": 1}), 64)
    found = {name: group_of(name) for name, _ in model.named_parameters()}
    assert set(found.values()) == set(GROUPS)
    expected = {
        "embed_tokens.weight": "embedding",
        "layers.0.self_attn.q_proj.weight": "attention",
        "layers.0.self_attn.kv_a_layernorm.weight": "norms",
        "layers.0.mlp.gate_up_proj.weight": "feed_forward",
        "layers.1.mlp.gate.weight": "gates",
        "layers.1.mlp.experts.down_proj": "experts",
        "layers.1.mlp.shared_experts.down_proj.weight": "feed_forward",
        "lm_head.weight": "head",
    }
    assert {name: found[name] for name in expected} == expected
    assert all(group == "mtp" for name, group in found.items() if name.startswith("mtp."))


@given(st.integers(0, 1000), st.integers(1, 9))
def test_pieces_of_a_flat_gradient_add_up(seed: int, cut: int) -> None:
    """As ZeRO cuts them: a parameter over two tensors, and one that lies behind another."""
    flat = torch.randn(20, generator=torch.Generator().manual_seed(seed))
    whole = {"lm_head.weight": flat[:10], "norm.weight": flat[10:]}
    first = (Piece("lm_head.weight", (10,), 0, cut),)
    second = (Piece("lm_head.weight", (10,), cut, 10), Piece("norm.weight", (10,), 0, 10, offset=10 - cut))
    held = [GradientSquares(), GradientSquares()]
    held[0].add([(flat[:cut], first), (flat[cut:], second)])
    held[1].add([(flat[:cut], first)])
    held[1].add([(flat[cut:], second)])
    for copies, own in ((1, held[:1]), (2, held)):
        found = norms_by_group([(part, copies) for part in own], {"head", "norms"}, torch.device("cpu"), 1)
        for group, numbers in zip(("head", "norms"), whole.values(), strict=True):
            # float32 norms of at most ten numbers
            assert found[f"grad_norm.{group}"] == pytest.approx(float(numbers.double().norm()), rel=1e-6)


def test_evenness_of_load() -> None:
    even, one, half = [0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]
    assert evenness(torch.tensor([even])) == {"load_violation": 0.0, "load_violation_max": 0.0, "load_entropy": 1.0}
    found = evenness(torch.tensor([even, one, half]))
    assert found["load_violation"] == pytest.approx((0 + 3 + 1) / 3)
    assert found["load_violation_max"] == pytest.approx(3)
    assert found["load_entropy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert evenness(torch.ones(2, 1))["load_entropy"] == 1.0


def test_picture_of_the_load_has_layers_below_each_other() -> None:
    loads = [{"layer": 1, "load": [1.0, 0.0]}, {"layer": 0, "load": [0.5, 0.5]}]
    picture = load_picture(loads)
    height, width = picture.shape
    assert {int(v) for v in picture[: height // 2].ravel()} == {127}
    assert {int(v) for v in picture[height // 2 :, : width // 2].ravel()} == {255}
    assert {int(v) for v in picture[height // 2 :, width // 2 :].ravel()} == {0}


def test_peak_is_a_rate_that_this_machine_can_have() -> None:
    peak = measured_peak(torch.device("cpu"), "fp8")
    assert "float32" in peak.product  # a CPU takes these products in float32
    half = measured_peak(torch.device("cpu"), "bfloat16")  # and these in what is faster there
    assert half.product.split()[0] in ("float32", "bfloat16")
    assert half.flops_per_second > 0.3 * peak.flops_per_second  # not by a product that nobody would take
    assert 1e7 < peak.flops_per_second < 1e14
    assert 50e6 < peak_memory(torch.device("cpu")) < 1e12
