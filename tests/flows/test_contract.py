"""The stage contract: keys, skips, plans, causes, damage, resume, locks; on toy stages."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from gristmill.flows.errors import StageFailed, UsageError
from gristmill.flows.execution import Execution
from gristmill.flows.identity import canonical, key_of
from gristmill.flows.inspection import verify_store
from gristmill.flows.lock import StoreLock
from gristmill.flows.manifest import identity_of
from gristmill.flows.runners import Plain, Plan
from gristmill.flows.stage import stage
from gristmill.flows.store import Store


class Numbers(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    count: int = Field(default=3, title="Count", description="How many.")


class Scale(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    factor: float = 2.0
    offset: float = 0.0


class Toy(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = "toy"
    seed: int = 0
    numbers: Numbers = Numbers()
    scale: Scale = Scale()
    total: Scale = Scale()


ran: list[str] = []


def make_numbers(config: Numbers, out: Path, seed: int) -> dict[str, Any]:
    ran.append("numbers")
    (out / "numbers.json").write_text(json.dumps([seed + i for i in range(config.count)]))
    return {"count": config.count}


def scale_numbers(config: Scale, numbers: Path, out: Path, *, workers: int, progress) -> dict[str, Any]:
    ran.append("scale")
    values = json.loads((numbers / "numbers.json").read_text())
    progress(1, 1, workers=workers)
    (out / "scaled.json").write_text(json.dumps([v * config.factor + config.offset for v in values]))
    (out / "log" / "when.txt").write_text(str(time.time()))
    return {"sum": sum(values)}


def add_up(config: Scale, scaled: Path, out: Path) -> dict[str, Any]:
    ran.append("total")
    (out / "total.json").write_text(json.dumps(sum(json.loads((scaled / "scaled.json").read_text()))))
    return {}


def pipeline_of(versions: tuple[int, int, int] = (1, 1, 1)):
    numbers = stage("numbers", version=versions[0])(make_numbers)
    scale = stage("scale", version=versions[1])(scale_numbers)
    total = stage("total", version=versions[2])(add_up)

    def toy(recipe: Toy):
        made = numbers(recipe.numbers, seed=recipe.seed)
        return total(recipe.total, scaled=scale(recipe.scale, numbers=made))

    return toy


@pytest.fixture
def store(tmp_path: Path) -> Store:
    ran.clear()
    return Store(tmp_path / "store")


def go(store: Store, recipe: Toy | None = None, versions=(1, 1, 1), **asked: Any) -> dict[str, Any]:
    ran.clear()
    execution = asked.pop("execution", Execution(workers=0))
    return Plain(store, execution).run(pipeline_of(versions), recipe or Toy(), **asked)


def reasons(store: Store, recipe: Toy, versions=(1, 1, 1)) -> dict[str, tuple[str, str]]:
    planned = Plan(store).run(pipeline_of(versions), recipe).stages
    return {s.call.stage.name: (s.state, s.reason) for s in planned}


def test_nothing_runs_twice(store: Store) -> None:
    go(store)
    assert ran == ["numbers", "scale", "total"]
    record = go(store)
    assert ran == []
    assert [e["state"] for e in record["stages"]] == ["cached"] * 3


def test_a_changed_field_reruns_its_stage_and_what_follows(store: Store) -> None:
    go(store)
    changed = Toy(scale=Scale(factor=3.0))
    assert reasons(store, changed) == {
        "numbers": ("cached", "its result is there"),
        "scale": ("run", "scale.factor 2.0 → 3.0"),
        "total": ("run", "input scaled changed (scale.factor 2.0 → 3.0)"),
    }
    go(store, changed)
    assert ran == ["scale", "total"]
    go(store)
    assert ran == []  # the first recipe's results are still there


def test_seed_version_and_removal_are_named(store: Store) -> None:
    go(store)
    assert reasons(store, Toy(seed=1))["numbers"] == ("run", "seed 0 → 1")
    assert reasons(store, Toy(), (1, 2, 1))["scale"] == ("run", "version 1 → 2")
    assert reasons(store, Toy(), (1, 2, 1))["numbers"][0] == "cached"
    go(store, versions=(1, 2, 1))
    assert ran == ["scale", "total"]


def test_the_nearest_earlier_run_explains(store: Store) -> None:
    go(store, Toy(scale=Scale(factor=2.0, offset=5.0)))
    go(store, Toy(scale=Scale(factor=9.0, offset=1.0)))
    assert reasons(store, Toy(scale=Scale(factor=9.0, offset=2.0)))["scale"] == ("run", "scale.offset 1.0 → 2.0")


def test_execution_changes_nothing(store: Store) -> None:
    go(store)
    go(store, execution=Execution(workers=2, threads=1, retries=3))
    assert ran == []


def test_sources_enter_the_key_and_are_named(store: Store, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one")
    read = stage("read", version=1, sources=lambda _: {"text": text.read_text()})(make_numbers)

    def toy(recipe: Toy):
        return read(recipe.numbers, seed=0)

    Plain(store, Execution(workers=0)).run(toy, Toy())
    text.write_text("two")
    assert Plan(store).run(toy, Toy()).named("read").reason == "source text changed"


def test_until_and_from(store: Store) -> None:
    go(store, until="scale")
    assert ran == ["numbers", "scale"]
    go(store, from_="scale")
    assert ran == ["scale", "total"]
    with pytest.raises(UsageError, match="--from names 'scael', which is no stage: did you mean 'scale'"):
        go(store, from_="scael")


def test_a_damaged_result_is_found_and_made_again(store: Store) -> None:
    go(store)
    manifest = store.manifests("scale")[0]
    file = store.folder("scale", manifest["key"]) / "scaled.json"
    file.write_bytes(file.read_bytes()[:-1] + b"}")
    assert verify_store(store)["bad"] == [f"scale/{manifest['key']}/scaled.json has other bytes than when it was made"]
    assert reasons(store, Toy())["scale"][0] == "damaged"
    go(store)
    assert ran == ["scale"]
    assert verify_store(store)["bad"] == []


def test_observations_are_no_content(store: Store) -> None:
    go(store)
    first = store.manifests("scale")[0]
    go(store, from_="scale")
    second = store.manifests("scale")[0]
    when = [[f["sha256"] for f in m["files"] if f["path"] == "log/when.txt"] for m in (first, second)]
    assert when[0] != when[1]
    assert first["content_hash"] == second["content_hash"]


def test_the_manifest_says_what_was_done(store: Store) -> None:
    go(store)
    manifest = store.manifests("scale")[0]
    assert manifest["config"] == {"factor": 2.0, "offset": 0.0}
    assert manifest["inputs"]["numbers"]["stage"] == "numbers"
    assert manifest["metrics"] == {"sum": 3}
    assert manifest["environment"]["workers"] == 0
    assert manifest["ledger"]["device_hours"] >= 0
    assert {f["path"]: f["content"] for f in manifest["files"]}["scaled.json"] is True
    assert "seconds" not in canonical(identity_of(manifest))


def test_a_failing_stage_says_how_to_resume(store: Store) -> None:
    def broken(config: Numbers, out: Path) -> dict[str, Any]:
        raise ValueError("the moon is full")

    failing = stage("failing", version=1)(broken)
    with pytest.raises(
        StageFailed, match=r"stage failing failed: the moon is full\. Its log is in .*failing.*log.*resume"
    ):
        Plain(store, Execution(workers=0)).run(lambda recipe: failing(recipe.numbers), Toy())
    assert store.runs()[-1]["state"] == "failed"
    assert Plan(store).run(lambda recipe: failing(recipe.numbers), Toy()).named("failing").state == "partial"


def test_retries(store: Store) -> None:
    tries = []

    def flaky(config: Numbers, out: Path) -> dict[str, Any]:
        tries.append(1)
        if len(tries) < 3:
            raise OSError("the line was busy")
        return {}

    calling = stage("calling", version=1)(flaky)
    Plain(store, Execution(workers=0, retries=2)).run(lambda recipe: calling(recipe.numbers), Toy())
    assert len(tries) == 3
    assert store.manifests("calling")[0]["attempts"] == 3


CODE = '''
from pathlib import Path
from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    count: int = 1


def work(config: Config, out: Path) -> dict:
    """What it does."""
    (out / "x").write_text("1")  # a comment
    return {}
'''


def load(path: Path, code: str) -> ModuleType:
    """The module as it stands now, under a name that fingerprints follow."""
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("drifting", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["drifting"] = module
    spec.loader.exec_module(module)
    return module


def test_a_comment_is_nothing_and_code_without_a_version_warns(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "drifting.py"

    def plan(code: str, run: bool = False, strict: bool = False):
        module = load(path, code)
        declared = stage("drift", version=1)(module.work)

        def pipeline(_: Toy):
            return declared(module.Config())

        if run:
            Plain(store, Execution(workers=0), strict=strict).run(pipeline, Toy())
        return Plan(store).run(pipeline, Toy())

    assert plan(CODE, run=True).warnings == []
    commented = CODE.replace("# a comment", "# another").replace("What it does.", "What it does now.")
    assert plan(commented).warnings == []
    assert plan(commented).cached
    drifted = plan(CODE.replace('"1"', '"2"'))
    assert drifted.cached
    assert "its code changed since its result was made" in drifted.warnings[0]
    with pytest.raises(UsageError, match="its code changed"):
        plan(CODE.replace('"1"', '"3"'), run=True, strict=True)


@given(st.fixed_dictionaries({"factor": st.floats(-10, 10), "offset": st.floats(-10, 10)}))
@settings(max_examples=50, deadline=None)
def test_keys_follow_values_and_nothing_else(values: dict[str, float]) -> None:
    declared = stage("scale", version=1)(scale_numbers)

    def key(config: Scale) -> str:
        return key_of({"stage": declared.name, "version": 1, "config": config.model_dump(mode="json")})

    one, other = Scale(**values), Scale(**dict(reversed(values.items())))
    assert key(one) == key(other)
    assert key(one) != key(Scale(factor=values["factor"] + 1, offset=values["offset"]))


def test_two_runs_at_once_and_a_stale_lock(store: Store, tmp_path: Path) -> None:
    program = textwrap.dedent(
        f"""
        import time
        from gristmill.flows.lock import StoreLock
        from gristmill.flows.store import Store
        with StoreLock(Store({str(store.local)!r})):
            print("held", flush=True)
            time.sleep(60)
        """
    )
    holder = subprocess.Popen([sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(UsageError, match=f"is in use by process {holder.pid} on .*: wait for it"):
            go(store)
        assert ran == []
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with StoreLock(store):  # the dead one's lock went with it
        pass


def test_bad_declarations_are_refused() -> None:
    class Loose(BaseModel):
        count: int = 1

    def loose(config: Loose, out: Path) -> dict[str, Any]:
        return {}

    def nowhere(config: Numbers) -> dict[str, Any]:
        return {}

    loose.__annotations__["config"] = Loose
    with pytest.raises(TypeError, match="Loose must be frozen and forbid extra fields"):
        stage("loose", version=1)(loose)
    with pytest.raises(TypeError, match="no parameter `out`"):
        stage("nowhere", version=1)(nowhere)
    with pytest.raises(RuntimeError, match="called outside a runner"):
        stage("numbers", version=1)(make_numbers)(Numbers(), seed=0)


def test_a_stage_in_under_twenty_lines(store: Store) -> None:
    """Declared once, it has a key, a skip, a manifest, a card and a form without a line more."""
    from gristmill.flows.cards import card_markdown

    # --- the new stage: 13 lines
    class Reverse(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")
        twice: bool = Field(default=False, title="Twice", description="Turn it round again.")

    def reverse(config: Reverse, numbers: Path, out: Path) -> dict[str, Any]:
        values = json.loads((numbers / "numbers.json").read_text())
        turned = values if config.twice else values[::-1]
        (out / "reversed.json").write_text(json.dumps(turned))
        (out / "samples.jsonl").write_text(json.dumps({"first": turned[0]}) + "\n")
        return {"values": len(turned)}

    reverse.__annotations__["config"] = Reverse
    reversed_ = stage(version=1)(reverse)
    # ---
    numbers = stage("numbers", version=1)(make_numbers)

    def pipeline(recipe: Toy):
        return reversed_(Reverse(), numbers=numbers(recipe.numbers, seed=0))

    Plain(store, Execution(workers=0)).run(pipeline, Toy())
    assert Plan(store).run(pipeline, Toy()).cached
    manifest = store.manifests("reverse")[0]
    assert manifest["metrics"] == {"values": 3}
    card = card_markdown(manifest, store.folder("reverse", manifest["key"]))
    assert "# Reverse" in card
    assert "reversed.json" in card
    assert reversed_.config_type.model_json_schema()["properties"]["twice"]["description"] == "Turn it round again."
