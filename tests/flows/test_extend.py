"""Context extension in the pipeline: its phases as stages, and everything as it was where a recipe has none."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gristmill.data.shards import TokenShards
from gristmill.flows import stages
from gristmill.flows.cards import card_markdown
from gristmill.flows.errors import UsageError
from gristmill.flows.execution import Execution
from gristmill.flows.lineage import lineage
from gristmill.flows.plan import Plan, PlanResult
from gristmill.flows.r1 import extension, r1
from gristmill.flows.recipe import Recipe, load_recipe
from gristmill.flows.report import ReportConfig, make_report
from gristmill.flows.runners import Plain
from gristmill.flows.stage import Artifact
from gristmill.flows.stage import stage as declared
from gristmill.flows.store import Store
from gristmill.model.training.config import PretrainConfig
from gristmill.model.training.models import save_model
from gristmill.model.transformer import Transformer
from tests.flows.toys import Frozen, go

PHASE = {"steps": 2, "batch_sequences": 2, "held_out_sequences": 2, "evaluate_every": 2}
NEEDLE = {"depths": 2, "cases": 1, "digits": 2}
PHASES = json.dumps([
    {**PHASE, "sequence_length": 128, "needle": {**NEEDLE, "lengths": [128]}},
    {**PHASE, "sequence_length": 256, "needle": {**NEEDLE, "lengths": [128, 256]}},
])  # fmt: skip


def smoke(*more: str) -> Recipe:
    return load_recipe("smoke", list(more))


def planned(folder: Path, recipe: Recipe) -> PlanResult:
    return Plan(Store(folder)).run(r1, recipe)


def keys(plan: PlanResult) -> dict[str, str]:
    return {s.name: s.call.key for s in plan.stages}


def test_a_recipe_without_phases_asks_for_what_it_asked_before(tmp_path: Path) -> None:
    plan = planned(tmp_path, smoke())
    assert not [s.name for s in plan.stages if s.name.startswith(("extend", "mix_longer"))]
    for planned_stage in plan.stages:
        identity = planned_stage.call.identity
        assert "extend" not in json.dumps([identity["config"], identity["inputs"]])


def test_phases_change_the_keys_of_what_follows_alone(tmp_path: Path) -> None:
    before = keys(planned(tmp_path, smoke()))
    plan = planned(tmp_path, smoke(f"extend={PHASES}"))
    after = keys(plan)
    names = list(after)
    assert names[names.index("pretrain") + 1 :][:4] == ["mix_longer_1", "extend_1", "mix_longer_2", "extend_2"]
    changed = {name for name, key in before.items() if after[name] != key}
    assert changed == {"cold_start", "rl_zero", "rl", "evaluate", "export", "report"}
    assert plan.named("extend_2").call.inputs["model"].stage == "extend_1"
    for name in ("cold_start", "rl_zero"):
        assert plan.named(name).call.inputs["model"].stage == "extend_2"
    assert plan.named("evaluate").call.inputs["base"].stage == "extend_2"
    assert plan.named("report").call.inputs["pretrain"].stage == "pretrain"
    assert all(s.estimate.seconds for s in plan.stages if s.name.startswith(("extend", "mix_longer")))


def test_the_phases_of_a_recipe_know_the_contexts_before_them() -> None:
    recipe = smoke(f"extend={PHASES}")
    assert [(p.first_length, p.trained_length, p.sequence_length) for p in recipe.phases] == [
        (64, 64, 128),
        (64, 128, 256),
    ]
    assert [(m.sequence_length, m.sequences) for m in map(recipe.mixing_of, recipe.phases)] == [(128, 4), (256, 4)]
    assert recipe.mixing == smoke().mixing


def test_the_shipped_recipe_extends_twice(tmp_path: Path) -> None:
    recipe = load_recipe("long")
    assert [p.sequence_length for p in recipe.phases] == [1024, 2048]
    assert [p.needle_lengths for p in recipe.phases] == [[256, 512, 1024], [256, 512, 1024, 2048]]
    assert len(planned(tmp_path, recipe).stages) == 19


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("[{sequence_length: 64}]", r"extend\.0: sequence_length 64 is not longer than the 64 tokens"),
        (
            "[{sequence_length: 128}, {sequence_length: 128}]",
            r"extend\.1: sequence_length 128 is not longer than the 128",
        ),
        (
            "[{sequence_length: 128, rope_scaling: {factor: 1.5, original_max_position_embeddings: 64}}]",
            r"extend\.0: rope_scaling\.factor 1\.5 stretches 64 tokens to 96",
        ),
        ("[{sequence_length: 128, batch_sequences: 3}]", r"extend\.0: batch_sequences 3 does not divide"),
        ("[{sequence_length: 128, lenght: 3}]", r"extend\.0\.lenght is no field"),
    ],
)
def test_bad_phases_are_one_sentence(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        smoke(f"extend={setting}", "execution.ranks=2")
    assert len(str(caught.value).splitlines()) == 1


def test_longer_chains_of_thought_fit_the_extended_context() -> None:
    assert smoke(f"extend={PHASES}", "pretrain.model.max_position_embeddings=64", "cold_start.sequence_length=256")
    with pytest.raises(UsageError, match=r"cold_start\.sequence_length 300 is longer .*extend\.1\.sequence_length 256"):
        smoke(f"extend={PHASES}", "pretrain.model.max_position_embeddings=64", "cold_start.sequence_length=300")


def untrained(config: PretrainConfig, tokens: Path, out: Path) -> dict[str, Any]:
    """A base model that nothing has taught."""
    model = Transformer(config.model, TokenShards(tokens / "tokens").vocab_size)
    model.initialise(0)
    save_model(out / "model", model)
    return {}


base = declared("base", version=1)(untrained)


def short(recipe: Recipe) -> None:
    """The way to an extended model without the sieves and without pretraining."""
    tokens = stages.tokenize(recipe.tokenize, documents=stages.ingest(recipe.ingest, seed=0), seed=0)
    extension(recipe, tokens, base(recipe.pretrain, tokens=tokens))


@pytest.mark.slow
def test_two_phases_run_and_are_found_again(tmp_path: Path) -> None:
    recipe = smoke(
        "ingest.sources=[{type: lessons, name: lessons, kind: lessons, count: 300}]", "mix.weights={}",
        "tokenize.held_out=0.1", f"extend={PHASES}",
    )  # fmt: skip
    store = Store(tmp_path / "store")
    runner = Plain(store, Execution(workers=0, threads=1))
    record = runner.run(short, recipe)
    assert record["state"] == "completed"
    last = store.manifests("extend_2")[0]
    described = json.loads((store.folder("extend_2", last["key"]) / "model" / "config.json").read_text())
    assert described["rope_scaling"]["factor"] == 4.0
    assert described["max_position_embeddings"] == 512  # the base was declared for more than this phase trains
    assert last["ledger"]["flops"] == last["metrics"]["flops"] > 0
    above = [entry["stage"] for entry in lineage(store, last["key"])]
    assert set(above) == {"extend_2", "extend_1", "tokenize", "mix_longer_2", "base", "mix_longer_1", "ingest"}
    shown = card_markdown(last, store.folder("extend_2", last["key"]))
    assert "## Needles in a haystack" in shown
    assert "## Loss by position" in shown
    assert "## Speed" in shown
    assert "## Gradient" in shown
    assert shown.count("data:image/png") == 6  # maps, loss by position, experts, curves, speed, gradient
    assert Plan(store).run(short, recipe).cached


@pytest.mark.slow
def test_smoke_with_two_phases_runs_to_its_report(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert Plain(store, Execution(workers=1, threads=1)).run(r1, smoke(f"extend={PHASES}"))["state"] == "completed"
    page = next(store.local.glob("report/*/view/report.html")).read_text(encoding="utf-8")
    assert re.findall('class="name"[^>]*>([^<]*)<', page) == [
        "ingest", "dedup", "filter", "exam", "decontaminate", "tokenize", "mix", "problems", "pretrain", "extend 1",
        "extend 2", "cold start", "R1-Zero", "RL (R1)", "evaluate", "export",
    ]  # fmt: skip
    assert "Extend 2: contexts of 256 tokens" in page


# --- the report's page, of folders that a fixture writes


def _fixture() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_fixture", Path(__file__).with_name("report_fixture.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def phase_folder(folder: Path, name: str, model: str) -> Path:
    folder.mkdir()
    models = ("base", "yarn", "extended")
    needle = [
        {"model": m, "length": s, "depth": d, "retrieved": 0.5, "digits_in_front": 0.7, "bits": 3.0, "cases": 4}
        for m in models for s in (128, 256) for d in (0.0, 1.0)
    ]  # fmt: skip
    loss = [
        {"model": m, "start": s, "end": s + 64, "loss": 2.0, "targets": 9} for m in models for s in (0, 64, 128, 192)
    ]
    for file, rows in (("needle.jsonl", needle), ("loss_by_position.jsonl", loss)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest: dict[str, Any] = {
        "stage": name,
        "key": name,
        "metrics": {"sequence_length": 256, "tokens": 512},
        "config": {"sequence_length": 256, "first_length": 64, "trained_length": 128},
        "inputs": {"model": {"stage": model, "key": model}, "mixture": {"stage": "mix_longer_1", "key": "m"}},
        "files": [],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_the_report_shows_the_phases_where_there_are_some(tmp_path: Path) -> None:
    fixture = _fixture()
    folders = fixture.make_run(tmp_path / "run", steps=5, problems=6)
    phases = {
        "extend_1": phase_folder(tmp_path / "one", "extend_1", "pretrain"),
        "extend_2": phase_folder(tmp_path / "two", "extend_2", "extend_1"),
    }
    pages = []
    for number, more in enumerate(({}, phases)):
        out = tmp_path / f"out{number}"
        make_report(
            ReportConfig(), **folders, trimmed=folders["dedup"], out=out, **more, progress=lambda *_, **__: None
        )
        pages.append((out / "view" / "report.html").read_text(encoding="utf-8"))
    without, with_phases = pages
    assert "extend" not in without
    assert with_phases.count('class="name"') == without.count('class="name"') + 2
    assert "Extend 2: contexts of 256 tokens" in with_phases
    assert with_phases.count("needle-extend") > 0
    assert "trained_length" not in with_phases  # the recipe to run again says what a person would write
    found = json.loads((tmp_path / "out1" / "report.json").read_text())
    assert found["extension"]["extend_1"]["tokens"] == 512
    assert "extension" not in json.loads((tmp_path / "out0" / "report.json").read_text())


# --- inputs that a pipeline may leave out


def test_an_optional_input_is_in_the_key_where_it_is_given(tmp_path: Path) -> None:
    def one(config: Frozen, out: Path) -> dict[str, Any]:
        return {}

    def both(config: Frozen, first: Path, out: Path, second: Path | None = None) -> dict[str, Any]:
        return {"given": second is not None}

    first, last = declared("one", version=1)(one), declared("both", version=1)(both)
    store = Store(tmp_path / "store")
    go(store, pipeline=lambda recipe: last(Frozen(), first=first(Frozen())))

    def pipeline(recipe: Any) -> Artifact:
        made = first(Frozen())
        return last(Frozen(), first=made, second=made)

    go(store, pipeline=pipeline)
    assert {json.dumps(m["inputs"].keys() == {"first"}): m["metrics"]["given"] for m in store.manifests("both")} == {
        "true": False,
        "false": True,
    }
    with pytest.raises(TypeError, match=r"takes the inputs \['first', 'second'\], not \['second'\]"):
        go(store, pipeline=lambda recipe: last(Frozen(), second=first(Frozen())))

    def loose(config: Frozen, out: Path, second: str | None = None) -> dict[str, Any]:
        return {}

    with pytest.raises(TypeError, match="input 'second' is not annotated as Path"):
        declared("loose", version=1)(loose)
