"""Training laid out over processes: every layout learns what one process does, and any resumes what another began.

Two ranks take seconds to start, so that all runs of two are made by few jobs: one of those that are tested by default,
one of the slow ones, and those that are killed.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gristmill.data.mix import MixConfig, mix
from gristmill.data.stage_types import silent as quiet
from gristmill.model.config import ModelConfig
from gristmill.model.launch import JobFailed, launch
from gristmill.model.pretrain import pretrain
from gristmill.model.stage_types import Progress, silent
from gristmill.model.training.config import LayoutConfig, OptimizerConfig, PretrainConfig, ScheduleConfig, SpikeConfig
from tests.model.in_process import jobs_here
from tests.model.several_runs import Stopped, stopping_at

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
ROUNDED = {p: CONFIG.model_copy(update={"precision": p}) for p in ("bfloat16", "fp8")}
MUON = CONFIG.model_copy(update={"optimizer": OptimizerConfig()})
LOGICAL = CONFIG.model_copy(update={"optimizer": OptimizerConfig(muon_matrices="logical")})
MODULES = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"num_nextn_predict_layers": 3})})
CLIPPED = CONFIG.model_copy(update={"optimizer": CONFIG.optimizer.model_copy(update={"gradient_clip": 0.5})})
HALVED = CONFIG.optimizer.model_copy(update={"moments": "bfloat16", "moment_rounding": "stochastic"})
STOCHASTIC = CONFIG.model_copy(update={"optimizer": HALVED})
ONE = LayoutConfig()


def wary(policy: str) -> PretrainConfig:
    """With a threshold that many a step exceeds, and an average of the weights."""
    spikes = SpikeConfig(policy=policy, threshold=0.5, window=16, at_most=100)  # type: ignore[arg-type]
    config = CONFIG.model_copy(update={"spikes": spikes, "ema_decay": 0.9, "schedule": ScheduleConfig(warmup_steps=20)})
    return config.model_copy(update={"optimizer": OptimizerConfig(muon_learning_rate=0.0, adam_learning_rate=1e-5)})


@dataclass(frozen=True)
class Asked:
    """A run of two ranks."""

    layout: LayoutConfig
    config: PretrainConfig = CONFIG
    stop_at: int | None = None


def zero(stage: int, **more: Any) -> LayoutConfig:
    return LayoutConfig(zero_stage=stage, **more)  # type: ignore[arg-type]


SHARED = {
    "experts2-zero2": zero(2, expert_parallel=2),
    "experts2": LayoutConfig(expert_parallel=2),
    "experts2-zero3-micro2": zero(3, expert_parallel=2, micro_batches=2),
    "sequence2": LayoutConfig(sequence_parallel=2),
    "experts2-sequence2-zero1-recomputed": zero(1, expert_parallel=2, sequence_parallel=2, recompute="full"),
}
BY_DEFAULT = {
    "zero0": Asked(zero(0)),
    "zero2": Asked(zero(2)),
    "zero3": Asked(zero(3)),
    "experts2-sequence2-zero1-recomputed": Asked(SHARED["experts2-sequence2-zero1-recomputed"]),
    "bfloat16": Asked(LayoutConfig(expert_parallel=2, sequence_parallel=2), ROUNDED["bfloat16"]),
    "modules3": Asked(LayoutConfig(sequence_parallel=2), MODULES),
    "clipped": Asked(zero(2, expert_parallel=2), CLIPPED),
    # These go on from where others stopped.
    "killed": Asked(zero(2)),
    "moved": Asked(zero(2, expert_parallel=2), stop_at=17),
}
FROM_TO = {  # None is one rank
    "zero1-to-3": (zero(1), zero(3)),
    "zero3-to-experts2": (zero(3), zero(2, expert_parallel=2)),
    "experts2-to-1": (LayoutConfig(expert_parallel=2), None),
}
MOVED = {f"{name}-{how}": config for name in FROM_TO for how, config in (("adamw", CONFIG), ("muon", MUON))}
SLOW = {
    "zero1": Asked(zero(1)),
    "logical": Asked(zero(2, expert_parallel=2), LOGICAL),
    "fp8": Asked(LayoutConfig(expert_parallel=2, sequence_parallel=2), ROUNDED["fp8"]),
    **{f"zero{stage}-muon": Asked(zero(stage), MUON) for stage in (1, 2, 3)},
    **{f"zero{stage}-stochastic": Asked(zero(stage), STOCHASTIC) for stage in (0, 1, 2, 3)},
    **{name: Asked(layout) for name, layout in SHARED.items() if name not in BY_DEFAULT},
    **{policy: Asked(zero(2, expert_parallel=2), wary(policy)) for policy in ("skip", "rollback")},
    "zero1-offload": Asked(zero(1, offload="optimizer")),
    "zero3-offload": Asked(zero(3, offload="parameters")),
}


@pytest.fixture(scope="module")
def corpus(lesson_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    mixture = tmp_path_factory.mktemp("mixture")
    asked = MixConfig(sequence_length=CONFIG.sequence_length, sequences=CONFIG.sequences)
    mix(asked, lesson_tokens, mixture, 0, workers=0, progress=quiet)
    return {"tokens": lesson_tokens, "mixture": mixture}


def job(corpus: dict[str, Path], out: Path, layout: LayoutConfig) -> None:
    """Two ranks and no other run."""
    out.mkdir(exist_ok=True)
    pretrain(CONFIG, **corpus, out=out, seed=0, threads=1, ranks=2, device="cpu", layout=layout, progress=silent)


def trained(
    corpus: dict[str, Path],
    out: Path,
    config: PretrainConfig = CONFIG,
    layout: LayoutConfig = ONE,
    progress: Progress = silent,
) -> None:
    """One rank, which is this process."""
    out.mkdir(exist_ok=True)
    with jobs_here():
        pretrain(config, **corpus, out=out, seed=0, threads=1, ranks=1, device="cpu", layout=layout, progress=progress)


def described(corpus: dict[str, Path], asked: Asked) -> dict[str, Any]:
    """The job of a run, as `pretrain` describes it."""
    folders = {kind: str(folder) for kind, folder in corpus.items()}
    told = {"config": asked.config.model_dump(mode="json"), "layout": asked.layout.model_dump(mode="json")}
    return {**folders, **told, "seed": 0}


def launched(entry: str, job: dict[str, Any], out: Path, layout: LayoutConfig = ONE) -> None:
    """A job of two ranks by a function of several_runs.py."""
    here = str(Path(__file__).parent)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", f"{here}:{os.environ.get('PYTHONPATH', '')}")
        launch(f"several_runs:{entry}", job, out, threads=1, device="cpu", progress=silent, ranks=2, layout=layout)


def trained_by_two(corpus: dict[str, Path], out: Path, asked: dict[str, Asked]) -> Path:
    """All these runs, each in the folder of its name."""
    jobs = {n: {"job": described(corpus, each), "stop_at": each.stop_at} for n, each in asked.items()}
    launched("run", {"runs": jobs}, out)
    return out


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "curves.jsonl").read_text().splitlines()]


def curve(out: Path, name: str = "main_loss") -> list[float]:
    return [row[name] for row in rows(out)]


def held_out(out: Path) -> list[float]:
    return [row["held_out_bpb"] for row in rows(out) if "held_out_bpb" in row]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Root mean square of the difference over that of the weights."""
    assert set(ours) == set(theirs)
    norm = sum(float((ours[n] - theirs[n]).double().square().sum()) for n in ours)
    return (norm / sum(float(t.double().square().sum()) for t in theirs.values())) ** 0.5


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return set(ours) == set(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)


IN_A_STEP, IN_A_SAVE = "work/checkpoint-00000004", "work/checkpoint-00000008.tmp"


def killed_when(out: Path, there: str) -> threading.Thread:
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
def two(corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of two ranks that are tested by default; one goes on from its kill, one from a single rank."""
    out = tmp_path_factory.mktemp("two")
    killed_job(corpus, out / "killed", BY_DEFAULT["killed"].layout, IN_A_SAVE)
    with pytest.raises(Stopped):
        trained(corpus, out / "moved", progress=stopping_at(9))
    return trained_by_two(corpus, out, BY_DEFAULT)


@pytest.fixture(scope="module")
def more(corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The other runs of two ranks."""
    return trained_by_two(corpus, tmp_path_factory.mktemp("more"), SLOW)


@pytest.fixture
def by_two(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """The run of two ranks of this name."""
    return lambda name: request.getfixturevalue("two" if name in BY_DEFAULT else "more") / name


def into_a_save(corpus: dict[str, Path], out: Path, layout: LayoutConfig) -> None:
    """As `job`, but it goes no further than the save of step 8, with which it waits."""
    launched("run_into_a_save", {"job": described(corpus, Asked(layout)), "unpublished": 8}, out, layout)


def killed_job(corpus: dict[str, Path], out: Path, layout: LayoutConfig, when: str) -> None:
    """Two ranks, of which the first is killed."""
    (out / "log").mkdir(parents=True)
    killer = killed_when(out, when)
    with pytest.raises(JobFailed, match="rank 0 was ended by signal 9"):
        into_a_save(corpus, out, layout) if when == IN_A_SAVE else job(corpus, out, layout)
    killer.join()
    if when == IN_A_SAVE:
        left = sorted(path.name for path in (out / "work").glob("checkpoint-*"))
        assert left == ["checkpoint-00000004", "checkpoint-00000008.tmp"]


# Two ranks add two halves of a gradient that one adds in one go, and sums of some hundred float32 numbers in another
# order are apart by a few of its 6e-8; AdamW makes a relative error of it for gradients near zero alone. Twenty steps
# carry that on, by less than tenfold.
LOSS, WEIGHTS, NORM = 2e-6, 1e-6, 1e-5
ByTwo = Callable[[str], Path]


slow = pytest.mark.slow


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=slow), 2, 3])
def test_ranks_learn_what_one_process_learns(stage: int, alone: Path, by_two: ByTwo) -> None:
    out = by_two(f"zero{stage}")
    assert curve(out) == pytest.approx(curve(alone), rel=LOSS)
    assert curve(out, "mtp_loss") == pytest.approx(curve(alone, "mtp_loss"), rel=LOSS)
    assert held_out(out) == pytest.approx(held_out(alone), rel=LOSS)
    assert curve(out, "grad_norm") == pytest.approx(curve(alone, "grad_norm"), rel=NORM)
    assert apart(weights(out), weights(alone)) < WEIGHTS


@pytest.mark.parametrize("stage", [pytest.param(1, marks=slow), 2, 3])
def test_zero_changes_no_bit(stage: int, by_two: ByTwo) -> None:
    """Two ranks and nothing clipped: a sum of two numbers has one order, so who adds them up does not matter.

    A matrix that is used twice (the MTP module's embedding and head) has its whole gradient before the ranks' are added
    up, under ZeRO 3 too. What is clipped differs in its last bits: each stage sums the norm in another order.
    """
    assert equal(weights(by_two(f"zero{stage}")), weights(by_two("zero0")))


@slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_changes_no_bit_of_moments_rounded_at_random(stage: int, by_two: ByTwo) -> None:
    """Whatever stretch of a parameter a rank holds, and beside what."""
    assert equal(weights(by_two(f"zero{stage}-stochastic")), weights(by_two("zero0-stochastic")))
    assert not equal(weights(by_two("zero0-stochastic")), weights(by_two("zero0")))


def test_buffers_are_no_larger_than_the_model(by_two: ByTwo) -> None:
    """DeepSpeed's own are of two gigabytes, made and filled at every step."""
    told = [json.loads(line) for line in (by_two("zero2") / "log" / "timings.jsonl").read_text().splitlines()]
    assert max(row["memory_bytes"] for row in told) < 1.5e9  # most of it torch and DeepSpeed themselves


@slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_muon_orthogonalises_whole_matrices_under_zero(
    stage: int, by_two: ByTwo, corpus: dict[str, Path], tmp_path: Path
) -> None:
    """As one process does: parts of matrices, orthogonalised each by itself, are other updates altogether.

    Muon's update has the same size however small the gradient, so that rounding grows in the weights, about tenfold
    (measured: 1.1e-6). It does not in the losses (2.4e-7), of which each is a mean over 256 positions.
    """
    trained(corpus, tmp_path / "one", MUON)
    one, two = tmp_path / "one", by_two(f"zero{stage}-muon")
    assert curve(two) == pytest.approx(curve(one), rel=LOSS)
    assert curve(two, "mtp_loss") == pytest.approx(curve(one, "mtp_loss"), rel=LOSS)
    assert held_out(two) == pytest.approx(held_out(one), rel=LOSS)
    assert apart(weights(two), weights(one)) < 10 * WEIGHTS


@slow
def test_muon_takes_logical_matrices_apart_under_zero_and_shared_experts(
    by_two: ByTwo, alone_by_muon: Path, corpus: dict[str, Path], tmp_path: Path
) -> None:
    trained(corpus, tmp_path / "one", LOGICAL)
    assert curve(by_two("logical")) == pytest.approx(curve(tmp_path / "one"), rel=LOSS)
    assert apart(weights(by_two("logical")), weights(tmp_path / "one")) < 10 * WEIGHTS
    assert apart(weights(tmp_path / "one"), weights(alone_by_muon)) > 1000 * WEIGHTS


def test_recomputing_changes_no_bit(alone: Path, corpus: dict[str, Path], tmp_path: Path) -> None:
    trained(corpus, tmp_path / "full", layout=LayoutConfig(recompute="full"))
    assert equal(weights(tmp_path / "full"), weights(alone))


def test_micro_batches_are_the_halves_that_ranks_have(corpus: dict[str, Path], tmp_path: Path, by_two: ByTwo) -> None:
    """And their gradients are added up alike; what is computed again is what was."""
    trained(corpus, tmp_path / "some", layout=LayoutConfig(recompute="selective", micro_batches=2))
    assert equal(weights(tmp_path / "some"), weights(by_two("zero2")))


@pytest.mark.parametrize("name", [n if n in BY_DEFAULT else pytest.param(n, marks=slow) for n in SHARED])
def test_experts_and_sequences_are_shared_out(name: str, alone: Path, by_two: ByTwo) -> None:
    out = by_two(name)
    assert curve(out) == pytest.approx(curve(alone), rel=LOSS)
    assert curve(out, "grad_norm") == pytest.approx(curve(alone, "grad_norm"), rel=NORM)
    assert held_out(out) == pytest.approx(held_out(alone), rel=LOSS)
    assert apart(weights(out), weights(alone)) < WEIGHTS


def test_modules_that_predict_further_ahead_have_their_targets_from_the_next_rank(
    by_two: ByTwo, corpus: dict[str, Path], tmp_path: Path
) -> None:
    trained(corpus, tmp_path / "one", MODULES)
    one, two = tmp_path / "one", by_two("modules3")
    assert curve(two) == pytest.approx(curve(one), rel=LOSS)
    assert curve(two, "mtp_loss") == pytest.approx(curve(one, "mtp_loss"), rel=LOSS)
    assert curve(two, "grad_norm") == pytest.approx(curve(one, "grad_norm"), rel=NORM)
    assert apart(weights(two), weights(one)) < WEIGHTS


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("fp8", marks=slow)])
def test_experts_and_sequences_are_shared_out_in_lower_precision(
    precision: str, by_two: ByTwo, corpus: dict[str, Path], tmp_path: Path
) -> None:
    """Ranks round sums and tiles elsewhere; a loss is a mean over 256 positions, whose errors cancel sixteenfold."""
    trained(corpus, tmp_path / "one", ROUNDED[precision])
    close = {"bfloat16": 2.0**-9, "fp8": 2.0**-4}[precision] / 16
    assert curve(by_two(precision)) == pytest.approx(curve(tmp_path / "one"), rel=close)
    assert held_out(by_two(precision)) == pytest.approx(held_out(tmp_path / "one"), rel=close)


def test_gradients_are_clipped_by_the_norm_of_all_ranks(
    alone: Path, by_two: ByTwo, corpus: dict[str, Path], tmp_path: Path
) -> None:
    """As one rank clips them, which test_engine.py holds against torch."""
    trained(corpus, tmp_path / "one", CLIPPED)
    one, two = tmp_path / "one", by_two("clipped")
    assert min(curve(one, "grad_norm")) > CLIPPED.optimizer.gradient_clip
    assert curve(two) == pytest.approx(curve(one), rel=LOSS)
    assert curve(two, "grad_norm") == pytest.approx(curve(one, "grad_norm"), rel=NORM)
    assert apart(weights(two), weights(one)) < WEIGHTS
    assert apart(weights(one), weights(alone)) > 100 * WEIGHTS  # clipping each step by another factor is no small thing


@slow
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_layouts_leave_out_the_same_steps(policy: str, by_two: ByTwo, corpus: dict[str, Path], tmp_path: Path) -> None:
    one, two = tmp_path / "one", by_two(policy)
    trained(corpus, one, wary(policy))
    left = [[row["step"] for row in rows(out) if "spike" in row] for out in (one, two)]
    assert left[0] == left[1]
    assert left[0]
    assert curve(two) == pytest.approx(curve(one), rel=LOSS)
    assert apart(weights(two), weights(one)) < WEIGHTS
    averages = [load_file(out / "model-ema" / "model.safetensors") for out in (one, two)]
    assert apart(*averages) < WEIGHTS


def test_zero_changes_no_bit_of_muon_on_one_rank(corpus: dict[str, Path], tmp_path: Path) -> None:
    """Nothing is clipped, and the matrices that ZeRO hands to Muon out of its flat buffers are those themselves."""
    unclipped = MUON.model_copy(update={"optimizer": OptimizerConfig(gradient_clip=1e3)})
    trained(corpus, tmp_path / "plain", unclipped)
    trained(corpus, tmp_path / "zero", unclipped, LayoutConfig(zero_stage=1))
    assert equal(weights(tmp_path / "zero"), weights(tmp_path / "plain"))
    assert curve(tmp_path / "zero") == curve(tmp_path / "plain")


@slow
@pytest.mark.parametrize("stage", [1, 3])
def test_offload_changes_no_bit(stage: int, by_two: ByTwo) -> None:
    assert equal(weights(by_two(f"zero{stage}-offload")), weights(by_two(f"zero{stage}")))


def steps_begun(out: Path) -> list[int]:
    """The step that each start of a run began with."""
    return [json.loads(line)["from_step"] for line in (out / "log" / "starts.jsonl").read_text().splitlines()]


def went_on_to_the_bit(out: Path, undisturbed: Path, when: str) -> None:
    first, again = steps_begun(out)
    assert first == 0
    assert again == 4 if when == IN_A_SAVE else again >= 4
    assert equal(weights(out), weights(undisturbed))
    assert curve(out) == curve(undisturbed)


def test_killed_it_goes_on_to_the_bit(by_two: ByTwo) -> None:
    went_on_to_the_bit(by_two("killed"), by_two("zero2"), IN_A_SAVE)


@slow
@pytest.mark.parametrize(
    ("stage", "when"), [(s, w) for s in (1, 2, 3) for w in (IN_A_STEP, IN_A_SAVE) if (s, w) != (2, IN_A_SAVE)]
)
def test_killed_under_other_stages_and_elsewhere_it_goes_on_to_the_bit(
    stage: int, when: str, by_two: ByTwo, corpus: dict[str, Path], tmp_path: Path
) -> None:
    layout = zero(stage)
    killed_job(corpus, tmp_path / "out", layout, when)
    job(corpus, tmp_path / "out", layout)
    went_on_to_the_bit(tmp_path / "out", by_two(f"zero{stage}"), when)


@pytest.fixture(scope="module")
def moved(corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of `MOVED`, each begun in one layout, stopped on its way, and taken up in another."""
    out, begun, ended = tmp_path_factory.mktemp("moved"), {}, {}
    for name, config in MOVED.items():
        first, second = FROM_TO[name.rpartition("-")[0]]
        begun[name] = Asked(first, config, stop_at=11)
        if second is not None:
            ended[name] = Asked(second, config)
    trained_by_two(corpus, out, begun)
    trained_by_two(corpus, out, ended)
    for name in set(begun) - set(ended):
        trained(corpus, out / name, MOVED[name])
    return out


@pytest.fixture(scope="module")
def alone_by_muon(corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("muon") / "out"
    trained(corpus, out, MUON)
    return out


@slow
@pytest.mark.parametrize("name", MOVED)
def test_a_checkpoint_of_any_stage_is_taken_up_by_another(
    name: str, moved: Path, alone: Path, alone_by_muon: Path
) -> None:
    """With its moments: Muon turns a relative error of the gradient's into one of the update's, tenfold or so."""
    muon, out = MOVED[name] is MUON, moved / name
    one = alone_by_muon if muon else alone
    starts = steps_begun(out)
    assert starts[0] == 0
    assert 4 <= starts[1] < 12
    assert curve(out) == pytest.approx(curve(one), rel=LOSS)
    assert apart(weights(out), weights(one)) < (10 * WEIGHTS if muon else WEIGHTS)
    assert [row["step"] for row in rows(out)] == list(range(20))


def test_other_layouts_take_up_a_checkpoint(alone: Path, by_two: ByTwo, corpus: dict[str, Path]) -> None:
    """One rank, then two that share experts under ZeRO 2, then one again: every sequence is read once, and the losses are those of one."""
    out = by_two("moved")
    trained(corpus, out)
    starts = steps_begun(out)
    assert starts[0] == 0
    assert 4 <= starts[1] < 12 <= starts[2]
    assert curve(out) == pytest.approx(curve(alone), rel=LOSS)
    assert [row["step"] for row in rows(out)] == list(range(20))
