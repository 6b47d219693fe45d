"""What a plan says of stages that never ran, and how it scales what an earlier run took."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gristmill.flows.cli import app, guarded
from gristmill.flows.estimates import of_fine_tuning, of_pretraining, of_reinforcement, parameters
from gristmill.flows.plan import Plan, PlanResult
from gristmill.flows.r1 import r1
from gristmill.flows.recipe import load_recipe
from gristmill.flows.runners import Plain
from gristmill.flows.stage import Artifact, Estimate, stage
from gristmill.flows.store import Store
from gristmill.model.config import ModelConfig
from gristmill.model.training.memory import parameters_of
from gristmill.model.transformer import Transformer
from tests.flows import toys


def planned(store: Path, *settings: str) -> PlanResult:
    return Plan(Store(str(store))).run(r1, load_recipe("tiny", list(settings)))


def test_every_stage_of_an_empty_store_has_an_estimate(tmp_path: Path) -> None:
    plan = planned(tmp_path / "store")
    assert all(s.estimate.seconds and s.estimate.memory_bytes and s.estimate.disk_bytes for s in plan.stages)
    assert plan.seconds is not None
    assert 120 < plan.seconds < 2400  # minutes, not seconds or hours: `tiny` takes eight on two cores
    assert not (tmp_path / "store").exists()


def test_more_work_takes_more_time(tmp_path: Path) -> None:
    once, more = planned(tmp_path), planned(tmp_path, "rl.steps=100", "ingest.sources.2.count=120000")
    assert more.named("rl").seconds > 1.5 * once.named("rl").seconds
    assert more.named("rl_zero").seconds == once.named("rl_zero").seconds
    for name in ("ingest", "dedup", "filter", "decontaminate", "tokenize", "mix"):
        assert more.named(name).seconds > 1.5 * once.named(name).seconds


def test_a_dataset_of_unknown_size_is_not_guessed(tmp_path: Path) -> None:
    web = "{type: dataset, name: web, dataset: owner/name, revision: " + "a" * 40 + "}"
    plan = planned(tmp_path, f"ingest.sources=[{web}]", "mix.weights={}")
    assert plan.named("dedup").seconds is None
    assert plan.named("pretrain").seconds is not None
    assert plan.seconds is None


def test_more_processes_share_the_time() -> None:
    one = load_recipe("tiny", ["execution.device=cpu", "execution.threads=1"])
    eight = load_recipe("tiny", ["execution.device=cpu", "execution.threads=1", "execution.ranks=8"])
    for hook, config in ((of_pretraining, one.pretrain), (of_reinforcement, one.rl)):
        alone, shared = hook(config, one), hook(config, eight)
        assert alone.seconds is not None
        assert shared.seconds is not None
        assert shared.seconds < alone.seconds / 2


def test_an_accelerator_that_the_table_lacks_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("tiny", ["execution.device=auto"])
    monkeypatch.setattr("gristmill.flows.execution.accelerator", lambda: "Unheard-of 9000")
    found = of_pretraining(recipe.pretrain, recipe)
    assert found.seconds is None
    assert found.memory_bytes


def memory(name: str, *settings: str, device: str = "cpu") -> Estimate:
    asked = load_recipe("tiny", ["execution.threads=1", f"execution.hardware={device}", *settings])
    hook, config = {"pretrain": (of_pretraining, asked.pretrain), "cold_start": (of_fine_tuning, asked.cold_start),
                    "rl": (of_reinforcement, asked.rl)}[name]  # fmt: skip
    return hook(config, asked)


def held(name: str, *settings: str) -> int:
    """Bytes of a stage on an accelerator, where no process's own memory is among them."""
    found = memory(name, *settings, device="H100").device_bytes
    assert found is not None
    return found


WIDE = ("pretrain.model.hidden_size=1024", "pretrain.model.intermediate_size=4096")  # weights, not activations, decide
RANKS = (*WIDE, "execution.ranks=4")


@pytest.mark.parametrize(
    ("before", "setting"),
    [
        (RANKS, "execution.layout.zero_stage=1"),
        ((*RANKS, "execution.layout.zero_stage=1"), "execution.layout.zero_stage=2"),
        ((*RANKS, "execution.layout.zero_stage=2"), "execution.layout.zero_stage=3"),
        ((*RANKS, "execution.layout.zero_stage=1"), "execution.layout.offload=optimizer"),
        ((*RANKS, "execution.layout.zero_stage=3"), "execution.layout.offload=parameters"),
        ((*RANKS, "execution.layout.zero_stage=1"), "execution.ranks=8"),
        (RANKS, "execution.layout.expert_parallel=4"),
        (WIDE, "pretrain.optimizer.moments=bfloat16"),
        (WIDE, "pretrain.model.num_nextn_predict_layers=0"),
        (("pretrain.sequence_length=512",), "execution.layout.recompute=full"),
        (("pretrain.sequence_length=512",), "execution.layout.recompute=selective"),
        (("pretrain.sequence_length=512",), "execution.layout.micro_batches=4"),
        (("pretrain.ema_decay=0.9",), "pretrain.ema_decay=0"),
    ],
)
def test_each_setting_that_saves_memory_is_seen_to(before: tuple[str, ...], setting: str) -> None:
    assert held("pretrain", *before, setting) < held("pretrain", *before)


def test_moments_in_bfloat16_save_half_of_theirs() -> None:
    asked = load_recipe("tiny", list(WIDE))
    hidden = parameters_of(asked.pretrain.model, asked.tokenize.vocab_size, 1)
    adam = hidden.tables + hidden.vectors
    moments = 4 * (hidden.total - adam) + 8 * adam  # Muon keeps one, AdamW two
    saved = held("pretrain", *WIDE) - held("pretrain", *WIDE, "pretrain.optimizer.moments=bfloat16")
    assert saved == moments / 2


def test_each_rank_of_a_machine_has_memory_of_its_own() -> None:
    one, four = memory("pretrain"), memory("pretrain", "execution.ranks=4")
    assert one.device_bytes is None
    assert one.memory_bytes is not None
    assert four.memory_bytes is not None
    assert 2 * one.memory_bytes < four.memory_bytes < 4 * one.memory_bytes  # they share out the batch
    nodes = memory("pretrain", "execution.ranks=4", "execution.layout.nodes=2")
    assert 2 * (nodes.memory_bytes or 0) == four.memory_bytes


def test_fine_tuning_and_reinforcement_have_no_mtp_modules() -> None:
    for name in ("cold_start", "rl"):
        assert held(name) == held(name, "pretrain.model.num_nextn_predict_layers=0")
    assert held("rl", "rl.kl_weight=0.1") > held("rl")  # a reference model beside it
    assert held("rl", "execution.ranks=4") == held("rl")  # one process, whatever the ranks


def test_a_plan_says_what_lies_on_an_accelerator(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [f"--set={setting}" for setting in ("execution.hardware=H100", *RANKS)]
    lines = []
    for more in ("execution.layout.zero_stage=0", "execution.layout.zero_stage=2"):
        assert guarded(lambda more=more: app(["plan", "tiny", *settings, f"--set={more}"], standalone_mode=False)) == 0
        lines.append(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("pretrain ")))
    assert all(re.search(r"about [\d.]+ GB and [\d.]+ [GM]B a device", line) for line in lines)
    assert lines[0] != lines[1]


def test_an_earlier_run_is_scaled_from_the_layout_that_it_had(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))

    def hook(config: toys.Parts, recipe: Any) -> Estimate:
        return Estimate(1.0, recipe.execution.ranks * 1000, 1)

    write = stage("write", version=1, estimate=hook)(toys.write_parts)

    def pipeline(recipe: Any) -> Artifact:
        return write(toys.Parts(), seed=recipe.seed)

    one = load_recipe("smoke", ["execution.workers=0"])
    Plain(store, one.execution).run(pipeline, one)
    again = [load_recipe("smoke", [f"execution.ranks={ranks}", "seed=1"]) for ranks in (1, 4)]
    same, four = (Plan(store).run(pipeline, recipe).stages[0].estimate.memory_bytes for recipe in again)
    assert four == pytest.approx(4 * (same or 0), abs=4)


@pytest.mark.parametrize("rank", [None, 24])
def test_parameters_are_those_of_the_model(rank: int | None) -> None:
    config = ModelConfig(q_lora_rank=rank, num_nextn_predict_layers=0)
    model = Transformer(config, 1024)
    assert parameters(config, 1024, active=False) == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.01)


def test_an_earlier_run_is_scaled_by_the_stages_own_estimate(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))

    def hook(config: toys.Parts, recipe: toys.Toy) -> Estimate:
        return Estimate(float(config.parts), config.parts, config.parts)

    write = stage("write", version=1, estimate=hook)(toys.write_parts)

    def pipeline(recipe: toys.Toy) -> Artifact:
        return write(recipe.write, seed=recipe.seed)

    Plain(store).run(pipeline, toys.Toy(write=toys.Parts(parts=2)))
    same = Plan(store).run(pipeline, toys.Toy(write=toys.Parts(parts=2, text="b"))).stages[0].estimate
    thrice = Plan(store).run(pipeline, toys.Toy(write=toys.Parts(parts=6))).stages[0].estimate
    assert min(same.seconds or 0, same.memory_bytes or 0, same.disk_bytes or 0) > 0
    assert thrice.seconds == pytest.approx(3 * same.seconds)
    assert thrice.memory_bytes == pytest.approx(3 * same.memory_bytes, abs=3)
    assert thrice.disk_bytes == 3 * same.disk_bytes
