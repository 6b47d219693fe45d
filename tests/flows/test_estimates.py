"""What a plan says of stages that never ran, and how it scales what an earlier run took."""

from __future__ import annotations

from pathlib import Path

import pytest

from gristmill.flows.estimates import of_pretraining, of_reinforcement, parameters
from gristmill.flows.plan import Plan, PlanResult
from gristmill.flows.r1 import r1
from gristmill.flows.recipe import load_recipe
from gristmill.flows.runners import Plain
from gristmill.flows.stage import Artifact, Estimate, stage
from gristmill.flows.store import Store
from gristmill.model.config import ModelConfig
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
