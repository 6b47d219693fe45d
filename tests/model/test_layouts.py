"""Training laid out over processes: every layout learns what one process does, and any resumes what another began."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gristmill.data.mix import MixConfig, mix
from gristmill.data.stage_types import silent as quiet
from gristmill.model.config import ModelConfig
from gristmill.model.launch import JobFailed
from gristmill.model.pretrain import pretrain
from gristmill.model.stage_types import silent
from gristmill.model.training.config import LayoutConfig, OptimizerConfig, PretrainConfig, ScheduleConfig, SpikeConfig

CONFIG = PretrainConfig(
    model=ModelConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=16, intermediate_size=64, n_routed_experts=4, moe_intermediate_size=16,
    ),
    steps=20,
    sequence_length=32,
    batch_sequences=8,
    checkpoint_every=4,
    evaluate_every=10,
    held_out_sequences=4,
    schedule=ScheduleConfig(warmup_steps=4),
    # Norms are summed in another order by each layout: what is clipped by one differs in its last bits.
    optimizer=OptimizerConfig(muon_learning_rate=0.0, adam_learning_rate=1e-3, gradient_clip=1e3),
)  # fmt: skip
MUON = CONFIG.model_copy(update={"optimizer": OptimizerConfig()})
ONE = LayoutConfig()


@pytest.fixture(scope="module")
def corpus(lesson_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    mixture = tmp_path_factory.mktemp("mixture")
    asked = MixConfig(sequence_length=CONFIG.sequence_length, sequences=CONFIG.sequences)
    mix(asked, lesson_tokens, mixture, 0, workers=0, progress=quiet)
    return {"tokens": lesson_tokens, "mixture": mixture}


def trained(
    corpus: dict[str, Path], out: Path, config: PretrainConfig = CONFIG, *, ranks: int = 1, layout: LayoutConfig = ONE
) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return pretrain(
        config, **corpus, out=out, seed=0, threads=1, ranks=ranks, device="cpu", layout=layout, progress=silent
    )


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "curves.jsonl").read_text().splitlines()]


def curve(out: Path, name: str = "main_loss") -> list[float]:
    return [row[name] for row in rows(out)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Root mean square of the difference over that of the weights."""
    assert set(ours) == set(theirs)
    norm = sum(float((ours[n] - theirs[n]).double().square().sum()) for n in ours)
    return (norm / sum(float(t.double().square().sum()) for t in theirs.values())) ** 0.5


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return set(ours) == set(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)


def killed_when(out: Path, there: str, ranks: int) -> threading.Thread:
    """Kill the first rank as soon as something of this pattern is there; torchrun then ends the others."""

    def kill() -> None:
        while not any(out.glob(there)):
            time.sleep(0.001)
        starts = (out / "log" / "starts.jsonl").read_text().splitlines()
        os.kill(json.loads(starts[-1])["pid"], signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def alone(corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    trained(corpus, out)
    return out


@pytest.fixture(scope="module")
def undisturbed(corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Whole runs of two ranks, by ZeRO stage."""
    found: dict[int, Path] = {}

    def run(stage: int) -> Path:
        if stage not in found:
            found[stage] = tmp_path_factory.mktemp(f"stage{stage}") / "out"
            trained(corpus, found[stage], ranks=2, layout=LayoutConfig(zero_stage=stage))  # type: ignore[arg-type]
        return found[stage]

    return run


# Two ranks add two halves of a gradient that one adds in one go, and sums of some hundred float32 numbers in another
# order are apart by a few of its 6e-8; AdamW makes a relative error of it for gradients near zero alone. Twenty steps
# carry that on, by less than tenfold.
LOSS, WEIGHTS, NORM = 2e-6, 1e-6, 1e-5


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2)), 3])
def test_ranks_learn_what_one_process_learns(stage: int, alone: Path, undisturbed: Any) -> None:
    out = undisturbed(stage)
    assert curve(out) == pytest.approx(curve(alone), rel=LOSS)
    assert curve(out, "mtp_loss") == pytest.approx(curve(alone, "mtp_loss"), rel=LOSS)
    assert curve(out, "grad_norm") == pytest.approx(curve(alone, "grad_norm"), rel=NORM)
    assert apart(weights(out), weights(alone)) < WEIGHTS


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_changes_no_bit(stage: int, undisturbed: Any) -> None:
    """Two ranks and nothing clipped: a sum of two numbers has one order, so who adds them up does not matter."""
    assert equal(weights(undisturbed(stage)), weights(undisturbed(0)))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_muon_orthogonalises_whole_matrices_under_zero(stage: int, corpus: dict[str, Path], tmp_path: Path) -> None:
    layout = LayoutConfig(zero_stage=stage)  # type: ignore[arg-type]
    trained(corpus, tmp_path / "one", MUON)
    trained(corpus, tmp_path / "two", MUON, ranks=2, layout=layout)
    # Muon's update has the same size however small the gradient, so rounding grows to about a thousandth of the loss.
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=5e-3)


def test_recomputing_changes_no_bit(alone: Path, corpus: dict[str, Path], tmp_path: Path) -> None:
    trained(corpus, tmp_path / "full", layout=LayoutConfig(recompute="full"))
    assert equal(weights(tmp_path / "full"), weights(alone))


@pytest.mark.slow
def test_micro_batches_are_the_halves_that_ranks_have(
    corpus: dict[str, Path], tmp_path: Path, undisturbed: Any
) -> None:
    """And their gradients are added up alike; what is computed again is what was."""
    trained(corpus, tmp_path / "some", layout=LayoutConfig(recompute="selective", micro_batches=2))
    assert equal(weights(tmp_path / "some"), weights(undisturbed(0)))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(LayoutConfig(expert_parallel=2, zero_stage=2), marks=pytest.mark.slow),
        pytest.param(LayoutConfig(expert_parallel=2), marks=pytest.mark.slow),
        pytest.param(LayoutConfig(expert_parallel=2, zero_stage=3, micro_batches=2), marks=pytest.mark.slow),
        pytest.param(LayoutConfig(sequence_parallel=2), marks=pytest.mark.slow),
        LayoutConfig(expert_parallel=2, sequence_parallel=2, zero_stage=1, recompute="full"),
    ],
    ids=lambda layout: "-".join(f"{k}{v}" for k, v in layout.model_dump(exclude_defaults=True).items()),
)
def test_experts_and_sequences_are_shared_out(
    layout: LayoutConfig, alone: Path, corpus: dict[str, Path], tmp_path: Path
) -> None:
    trained(corpus, tmp_path / "out", ranks=2, layout=layout)
    assert curve(tmp_path / "out") == pytest.approx(curve(alone), rel=LOSS)
    assert curve(tmp_path / "out", "grad_norm") == pytest.approx(curve(alone, "grad_norm"), rel=NORM)
    held_out = [
        [row["held_out_bpb"] for row in rows(out) if "held_out_bpb" in row] for out in (tmp_path / "out", alone)
    ]
    assert held_out[0] == pytest.approx(held_out[1], rel=LOSS)
    assert apart(weights(tmp_path / "out"), weights(alone)) < WEIGHTS


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_layouts_leave_out_the_same_steps(policy: str, corpus: dict[str, Path], tmp_path: Path) -> None:
    """With a threshold that many a step exceeds, and an average of the weights."""
    spikes = SpikeConfig(policy=policy, threshold=0.5, window=16, at_most=100)  # type: ignore[arg-type]
    config = CONFIG.model_copy(update={"spikes": spikes, "ema_decay": 0.9, "schedule": ScheduleConfig(warmup_steps=20)})
    config = config.model_copy(update={"optimizer": OptimizerConfig(muon_learning_rate=0.0, adam_learning_rate=1e-5)})
    trained(corpus, tmp_path / "one", config)
    layout = LayoutConfig(zero_stage=2, expert_parallel=2)
    trained(corpus, tmp_path / "two", config, ranks=2, layout=layout)
    left = [[row["step"] for row in rows(tmp_path / name) if "spike" in row] for name in ("one", "two")]
    assert left[0] == left[1]
    assert left[0]
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=LOSS)
    assert apart(weights(tmp_path / "two"), weights(tmp_path / "one")) < WEIGHTS
    averages = [load_file(tmp_path / name / "model-ema" / "model.safetensors") for name in ("one", "two")]
    assert apart(*averages) < WEIGHTS


@pytest.mark.slow
def test_zero_and_muon_on_one_rank(alone: Path, corpus: dict[str, Path], tmp_path: Path) -> None:
    trained(corpus, tmp_path / "plain", MUON)
    trained(corpus, tmp_path / "zero", MUON, layout=LayoutConfig(zero_stage=1))
    assert curve(tmp_path / "zero") == pytest.approx(curve(tmp_path / "plain"), rel=5e-3)  # see below: Muon


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "what"), [(1, "optimizer"), (3, "parameters")])
def test_offload_changes_no_bit(
    stage: int, what: str, corpus: dict[str, Path], tmp_path: Path, undisturbed: Any
) -> None:
    layout = LayoutConfig(zero_stage=stage, offload=what)  # type: ignore[arg-type]
    trained(corpus, tmp_path / "out", ranks=2, layout=layout)
    assert equal(weights(tmp_path / "out"), weights(undisturbed(0)))


IN_A_STEP, IN_A_SAVE = "work/checkpoint-00000004", "work/checkpoint-00000008.tmp"


@pytest.mark.parametrize(
    ("stage", "when"),
    [
        pytest.param(stage, when, marks=[] if (stage, when) == (2, IN_A_SAVE) else [pytest.mark.slow])
        for stage in (1, 2, 3)
        for when in (IN_A_STEP, IN_A_SAVE)
    ],
)
def test_killed_it_goes_on_to_the_bit(
    stage: int, when: str, corpus: dict[str, Path], tmp_path: Path, undisturbed: Any
) -> None:
    out, layout = tmp_path / "out", LayoutConfig(zero_stage=stage)  # type: ignore[arg-type]
    (out / "log").mkdir(parents=True)
    killer = killed_when(out, when, 2)
    with pytest.raises(JobFailed):
        trained(corpus, out, ranks=2, layout=layout)
    killer.join()
    trained(corpus, out, ranks=2, layout=layout)
    starts = [json.loads(line)["from_step"] for line in (out / "log" / "starts.jsonl").read_text().splitlines()]
    assert starts[0] == 0
    assert starts[-1] >= 4
    assert equal(weights(out), weights(undisturbed(stage)))
    assert curve(out) == curve(undisturbed(stage))


def test_other_layouts_take_up_a_checkpoint(alone: Path, corpus: dict[str, Path], tmp_path: Path) -> None:
    """One rank, then two that share experts under ZeRO 2, then one again: every sequence is read once, and the losses are those of one."""
    out = tmp_path / "out"
    (out / "log").mkdir(parents=True)
    for ranks, layout, kill in (
        (1, ONE, "work/checkpoint-00000004"),
        (2, LayoutConfig(zero_stage=2, expert_parallel=2), "work/checkpoint-00000012"),
        (1, ONE, None),
    ):
        if kill is None:
            trained(corpus, out, ranks=ranks, layout=layout)
            continue
        killer = killed_when(out, kill, ranks)
        with pytest.raises(JobFailed):
            trained(corpus, out, ranks=ranks, layout=layout)
        killer.join()
    starts = [json.loads(line)["from_step"] for line in (out / "log" / "starts.jsonl").read_text().splitlines()]
    assert starts[0] == 0
    assert 4 <= starts[1] < 12 <= starts[2]
    assert curve(out) == pytest.approx(curve(alone), rel=LOSS)
    assert [json.loads(line)["step"] for line in (out / "curves.jsonl").read_text().splitlines()] == list(range(20))
