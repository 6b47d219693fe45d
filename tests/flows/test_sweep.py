"""A sweep: rungs that are ordinary stages, a law that is tried on what it did not see, and refusals beforehand."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gristmill.flows.cards import card_markdown
from gristmill.flows.errors import UsageError
from gristmill.flows.plan import Plan
from gristmill.flows.r1 import r1
from gristmill.flows.recipe import load_recipe
from gristmill.flows.runners import Plain
from gristmill.flows.scaling import fit_ladder
from gristmill.flows.stage import Artifact, stage
from gristmill.flows.store import Store
from gristmill.flows.sweep import sweep
from gristmill.model.ladder import ScalingConfig
from tests.flows import toys
from tests.flows.toys import Frozen, Parts, Toy, write

COMMAND = [str(Path(sys.executable).with_name("gristmill")), "sweep", "smoke"]
SMALL = ["sweep.sizes=[16,24]", "sweep.hold_out=32", "sweep.steps=[2]"]


def count_folders(config: Frozen, first: Path, parts: list[Path], out: Path) -> dict[str, Any]:
    toys.ran.append("count")
    return {"order": ",".join(p.joinpath("part-0.txt").read_text() for p in [first, *parts])}


counted = stage("counted", version=1)(count_folders)


def several(recipe: Toy) -> Artifact:
    """Thirteen results of one stage, so that a list is longer than one digit's numbers."""
    made = [write(Parts(parts=1, text=f"{i}-"), seed=0) for i in range(13)]
    return counted(Frozen(), first=made[0], parts=made[1:])


def test_a_stage_is_called_for_several_results_and_takes_a_list_in_order(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    record = Plain(store).run(several, Toy())
    manifest = store.manifest("counted", record["stages"][-1]["key"])
    assert manifest is not None
    assert manifest["metrics"]["order"] == ",".join(f"{i}-0/0" for i in range(13))
    assert list(manifest["inputs"]) == ["first", *[f"parts_{i:02d}" for i in range(12)]]
    assert [e["state"] for e in record["stages"]] == ["completed"] * 14
    again = Plain(store).run(several, Toy())
    assert {e["state"] for e in again["stages"]} == {"cached"}
    assert len(store.verify()["stages"]) == 14


def test_one_of_several_results_that_is_gone_is_made_again_alone(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    record = Plain(store).run(several, Toy())
    store.discard("write", record["stages"][3]["key"])
    states = [s.state for s in Plan(store).run(several, Toy()).stages]
    assert states == ["cached"] * 3 + ["run"] + ["cached"] * 10
    forced = Plan(store).run(several, Toy(), None, "counted")
    assert [s.state for s in forced.stages][-1] == "forced"


def test_rungs_are_pretrain_stages_of_the_recipes_corpus(tmp_path: Path) -> None:
    recipe = load_recipe("smoke", [*SMALL, "sweep.seeds=2", "sweep.steps=[2,5]"])
    plan = Plan(Store(str(tmp_path))).run(sweep, recipe)
    names = [s.name for s in plan.stages]
    assert names.count("pretrain") == 2 * 2 * 2 + 2
    assert names.count("mix") == 2  # one a budget, and none for the recipe's own run, which no rung is
    (law,) = [s.call for s in plan.stages if s.name == "scaling"]
    assert [n.rsplit("_", 1)[0] for n in law.inputs] == ["rungs"] * 4 + ["further"] * 4 + ["held_out"] * 2
    own = {s.call.key for s in Plan(Store(str(tmp_path))).run(r1, recipe).stages}
    shared = [s.name for s in plan.stages if s.call.key in own]
    assert shared == ["ingest", "dedup", "filter", "exam", "decontaminate", "tokenize"]
    assert all(s.estimate.seconds for s in plan.stages)


def test_the_recipes_own_run_is_a_rung_where_it_is_one(tmp_path: Path) -> None:
    """What `gristmill run` trained already is not trained again."""
    recipe = load_recipe("smoke", ["sweep.sizes=[16,32]", "sweep.hold_out=64", "sweep.steps=[12]"])
    store = Store(str(tmp_path))
    own = Plan(store).run(r1, recipe).named("pretrain").call
    rungs = [s.call for s in Plan(store).run(sweep, recipe).stages if s.name == "pretrain"]
    (same,) = [c for c in rungs if c.identity["config"]["model"]["hidden_size"] == 32]
    assert own.identity["inputs"] == same.identity["inputs"]
    rates = [c.identity["config"]["optimizer"]["adam_learning_rate"] for c in (own, same)]
    assert rates[0] == rates[1]
    assert own.key == same.key


def test_more_sizes_leave_the_others_as_they_are(tmp_path: Path) -> None:
    def keys(sizes: str) -> list[str]:
        recipe = load_recipe("smoke", [f"sweep.sizes={sizes}", "sweep.hold_out=64", "sweep.tokens_per_parameter=[3]"])
        return [s.call.key for s in Plan(Store(str(tmp_path))).run(sweep, recipe).stages if s.name == "pretrain"]

    assert set(keys("[16,24]")) < set(keys("[16,24,32]"))


def finished(folder: Path, width: int, flops: float, loss: float, seed: int = 0, ratio: float = 20.0) -> Path:
    """The folder of a `pretrain` stage that came to this loss, as far as the fit looks at it."""
    folder.mkdir(parents=True)
    active = int(math.sqrt(flops / 6 / ratio))
    manifest = {
        "stage": "pretrain",
        "key": folder.name,
        "seed": seed,
        "config": {"model": {"hidden_size": width, "num_hidden_layers": 2}, "steps": 10},
        "metrics": {
            "parameters": active,
            "active_parameters": active,
            "tokens": int(active * ratio),
            "flops": int(flops),
            "held_out_loss": loss,
            "held_out_bpb": loss / math.log(2) / 3.5,
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def law(flops: float) -> float:
    return 1.7 + 400 * flops**-0.15


def fitted(tmp_path: Path, count: int = 5, seeds: int = 1, noise: float = 0.0) -> tuple[dict[str, Any], dict[str, Any]]:
    signs = [1, -1, 1, -1, 1]
    rungs = [
        finished(tmp_path / f"r{i}-{s}", 32 * (i + 1), 1e12 * 3**i, law(1e12 * 3**i) * (1 + noise * signs[i - s]), s)
        for i in range(count)
        for s in range(seeds)
    ]
    ahead = [finished(tmp_path / "ahead", 999, 1e15, law(1e15))]
    out = tmp_path / "out"
    out.mkdir()
    metrics = fit_ladder(ScalingConfig(), rungs, [], ahead, out)
    return metrics, json.loads((out / "fit.json").read_text())


def test_the_law_is_tried_on_the_size_it_did_not_see(tmp_path: Path) -> None:
    metrics, fit = fitted(tmp_path)
    assert metrics["exponent"] == pytest.approx(0.15, abs=1e-4)
    assert abs(metrics["forecast_error_percent"]) < 1e-3
    largest = law(1e12 * 3**4)
    assert metrics["unchanged_error_percent"] == pytest.approx(100 * (largest / law(1e15) - 1), abs=1e-3)
    assert fit["surface"] is None
    assert (tmp_path / "out" / "view" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (tmp_path / "out" / "rungs.jsonl").read_text().splitlines()]
    assert [r["role"] for r in rows] == ["rung"] * 5 + ["held_out"]
    card = card_markdown({"stage": "scaling", "metrics": metrics}, tmp_path / "out")
    assert "Forecast at width 999" in card
    assert "data:image/png" in card


def test_what_the_rungs_do_not_identify_is_said(tmp_path: Path) -> None:
    _, few = fitted(tmp_path / "few", count=3)
    assert few["law"]["floor"] == 0
    assert "cannot be fitted; it is taken as 0" in few["notes"][0]
    _, noisy = fitted(tmp_path / "noisy", count=4, noise=0.005)
    assert "do not identify the irreducible loss" in noisy["notes"][0]


def test_three_seeds_give_an_interval(tmp_path: Path) -> None:
    _, fit = fitted(tmp_path, seeds=3, noise=0.002)
    low, high = fit["forecast"]["interval_by_seeds"]
    assert low < fit["forecast"]["loss"] < high
    assert not any("seeds" in note for note in fit["notes"])


def test_more_budgets_give_the_law_of_parameters_and_tokens(tmp_path: Path) -> None:
    def run(name: str, width: int, n: float, ratio: float) -> Path:
        loss = 1.69 + 406.4 * n**-0.34 + 410.7 * (n * ratio) ** -0.28
        return finished(tmp_path / name, width, 6 * n * n * ratio, loss, ratio=ratio)

    sizes = [1e6 * 3**i for i in range(5)]
    rungs = [run(f"a{i}", 32 * (i + 1), n, 20.0) for i, n in enumerate(sizes)]
    further = [run(f"b{i}", 32 * (i + 1), n, 5.0) for i, n in enumerate(sizes)]
    ahead = [run("ahead", 999, 1e9, 20.0)]
    out = tmp_path / "out"
    out.mkdir()
    fit_ladder(ScalingConfig(), rungs, further, ahead, out)
    surface = json.loads((out / "fit.json").read_text())["surface"]
    # Sizes are whole numbers in the manifests, which moves them by one in a million.
    assert surface["parameter_exponent"] == pytest.approx(0.34, rel=1e-3)
    assert surface["token_exponent"] == pytest.approx(0.28, rel=1e-3)
    assert abs(surface["error_percent"]) < 0.01
    best = surface["optimal"]
    assert best["flops_per_parameter_token"] == pytest.approx(6, rel=1e-3)
    assert 6 * best["active_parameters"] * best["tokens"] == pytest.approx(best["flops"], rel=1e-3)


def test_a_held_out_run_that_is_not_larger_is_refused(tmp_path: Path) -> None:
    rungs = [finished(tmp_path / str(i), 32, 10.0 ** (12 + i), 3.0 - i / 10) for i in range(2)]
    with pytest.raises(ValueError, match=r"no more than the largest rung.s 1e\+13"):
        fit_ladder(ScalingConfig(), rungs, [], [finished(tmp_path / "ahead", 64, 1e13, 2.8)], tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sizes", "32,48", "--hold-out", "48"], "hold_out 48 is not larger than the largest rung 48"),
        (["--sizes", "32"], "sweep.sizes is [32]"),
        (["--sizes", "32,50"], "no model is 50 wide"),
        (["--seeds", "0"], "sweep.seeds is 0"),
    ],
)
def test_bad_input_is_refused_with_exit_2_and_a_sentence(options: list[str], said: str, tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_budgets_that_come_to_the_same_run_and_ranks_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    place = Store(str(tmp_path))
    with pytest.raises(UsageError, match="choose budgets further apart"):
        Plan(place).run(sweep, load_recipe("smoke", ["sweep.tokens_per_parameter=[3,3.01]"]))
    uneven = ["sweep.batch_exponent=0.3", "execution.ranks=4", "sweep.tokens_per_parameter=[100]"]
    with pytest.raises(
        UsageError, match=r"the rung \d+ wide: batch_sequences \d+ does not divide among 4 data-parallel ranks"
    ):
        Plan(place).run(sweep, load_recipe("smoke", uneven))


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_and_comes_to_the_same(tmp_path: Path) -> None:
    settings = [word for setting in SMALL for word in ("--set", setting)]
    command = [*COMMAND, *settings, "--plain", "--store", str(tmp_path / "killed")]
    started = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    while len(list((tmp_path / "killed").glob("pretrain/*/manifest.json"))) < 2:
        assert started.poll() is None
        time.sleep(0.2)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.count("cached") >= 9  # six stages of the text, a mixture, two rungs
    assert "Forecast at width 32" in said
    quiet = Store(str(tmp_path / "quiet"))
    recipe = load_recipe("smoke", SMALL)
    Plain(quiet, recipe.execution).run(sweep, recipe)  # as many threads, so that sums are the same
    assert quiet.verify()["stages"] == Store(str(tmp_path / "killed")).verify()["stages"]
