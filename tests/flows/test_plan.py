"""Plans: each state and each reason, --until and --from, drift, sources, estimates."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from gristmill.flows.cards import card_markdown
from gristmill.flows.errors import UsageError
from gristmill.flows.execution import Execution
from gristmill.flows.plan import Plan
from gristmill.flows.stage import Artifact, Estimate, stage
from gristmill.flows.store import Store
from tests.flows import toys
from tests.flows.toys import Frozen, Heard, Join, Parts, Source, Toy, count_characters, go, join_parts, ran, toy, write


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def states(store: Store, recipe: Toy | None = None, pipeline: Any = toy, **asked: Any) -> dict[str, tuple[str, str]]:
    return {s.name: (s.state, s.reason) for s in Plan(store).run(pipeline, recipe or Toy(), **asked).stages}


def test_a_fresh_store(store: Store) -> None:
    assert set(states(store).values()) == {("run", "never run in this store")}


def test_an_input_is_explained_by_its_own_cause_however_far_up(store: Store) -> None:
    go(store)
    changed = states(store, Toy(write=Parts(text="b")))
    assert changed["write"] == ("run", 'write.text "a" → "b"')
    assert changed["join"] == ("run", 'input parts changed (write.text "a" → "b")')
    assert changed["count"] == ("run", 'input joined changed (write.text "a" → "b")')
    assert states(store, Toy(seed=4))["count"] == ("run", "input joined changed (write seed 0 → 4)")


def test_a_version_reruns_its_stage_and_dependents(store: Store) -> None:
    go(store)
    newer = stage("join", version=2)(join_parts)

    def pipeline(recipe: Toy) -> Artifact:
        return toys.count(recipe.count, joined=newer(recipe.join, parts=write(recipe.write, seed=recipe.seed)))

    assert states(store, pipeline=pipeline) == {
        "write": ("cached", "its result is there"),
        "join": ("run", "version 1 → 2"),
        "count": ("run", "input joined changed (join version 1 → 2)"),
    }
    go(store, pipeline=pipeline)
    assert ran == ["join", "count"]


def test_execution_is_in_no_key(store: Store) -> None:
    go(store)
    go(store, execution=Execution(workers=2, threads=2, ranks=2, device="cpu", retries=3, watts=1.0))
    assert ran == []


def test_until_runs_ancestors_alone(store: Store) -> None:
    record = go(store, until="join")
    assert ran == ["write", "join"]
    assert [e["stage"] for e in record["stages"]] == ["write", "join"]
    assert states(store, until="join")["count"] == ("skipped", "not needed for join")


def test_from_runs_again_and_resumes_without_it(store: Store) -> None:
    go(store)
    assert states(store, from_="join") == {
        "write": ("cached", "its result is there"),
        "join": ("forced", "asked for by --from"),
        "count": ("forced", "follows from join (--from)"),
    }
    before = store.verify()["stages"]
    go(store, from_="join")
    assert ran == ["join", "count"]
    assert store.verify()["stages"] == before
    go(store)
    assert ran == []


def test_unknown_stages_are_refused_with_the_nearest(store: Store) -> None:
    with pytest.raises(UsageError, match=r"--until names 'joint', which is no stage: did you mean 'join'\?"):
        go(store, until="joint")
    with pytest.raises(UsageError, match="--from names 'zzz', which is no stage: The stages are write, join, count"):
        go(store, from_="zzz")
    with pytest.raises(UsageError, match="--until write does not need --from join"):
        go(store, until="write", from_="join")
    assert not store.local.exists()


def test_damage_is_seen_said_and_mended(store: Store) -> None:
    go(store)
    hashes = store.verify()["stages"]
    (joined,) = store.local.glob("join/*/joined.txt")
    joined.write_text(joined.read_text().replace("a", "b"))
    state, reason = states(store)["join"]
    assert state == "damaged"
    assert reason.endswith("joined.txt has other bytes than when it was made")
    heard = Heard()
    go(store, watcher=heard)
    assert ran == ["join"]  # its key is what it was, so nothing after it runs
    assert any("it is made again" in line for line in heard.said)
    assert store.verify() == {**store.verify(), "stages": hashes, "bad": []}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 1, "stage": "join"}'])
def test_an_unreadable_manifest_is_damage(store: Store, text: str) -> None:
    go(store)
    (manifest,) = store.local.glob("join/*/manifest.json")
    manifest.write_text(text)
    assert states(store)["join"][0] == "damaged"
    assert "manifest.json" in store.verify()["bad"][0]
    go(store)
    assert ran == ["join"]
    assert store.verify()["bad"] == []


def test_a_result_that_was_removed_and_one_that_is_unfinished(store: Store) -> None:
    go(store)
    (manifest,) = store.local.glob("join/*/manifest.json")
    manifest.unlink()
    assert states(store)["join"] == ("partial", "never run in this store; unfinished work is there")


def read_source(config: Source, out: Path) -> dict[str, Any]:
    (out / "copy.txt").write_text(Path(config.path).read_text())
    return {}


def contents(config: Source) -> dict[str, str]:
    if not Path(config.path).exists():
        raise ValueError(f"source {config.path!r} does not exist: correct its path")
    return {"mine": hashlib.sha256(Path(config.path).read_bytes()).hexdigest()}


def test_a_source_enters_by_what_it_holds(store: Store, tmp_path: Path) -> None:
    copied = stage("copied", version=1, sources=contents)(read_source)
    file = tmp_path / "source.txt"

    def pipeline(recipe: Toy) -> Artifact:
        return copied(Source(path=str(file)))

    with pytest.raises(UsageError, match=r"source\.txt' does not exist: correct its path"):
        go(store, pipeline=pipeline)
    assert not store.local.exists()
    file.write_text("one")
    go(store, pipeline=pipeline)
    file.touch()
    assert states(store, pipeline=pipeline)["copied"][0] == "cached"
    file.write_text("two")
    assert states(store, pipeline=pipeline)["copied"] == ("run", "source mine changed")


def test_a_source_that_changes_while_it_is_read_makes_no_result(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "source.txt"
    file.write_text("one")

    def unsteady(config: Source, out: Path) -> dict[str, Any]:
        made = read_source(config, out)
        file.write_text("two")
        return made

    copied = stage("copied", version=1, sources=contents)(unsteady)
    with pytest.raises(RuntimeError, match="source 'mine' changed while stage copied read it"):
        go(store, pipeline=lambda recipe: copied(Source(path=str(file))))
    assert store.manifests("copied") == []


def test_what_a_stage_says_of_how_it_ran_is_in_its_manifest_and_no_content(store: Store) -> None:
    said: list[str] = ["it was dark"]

    def told(config: Frozen, out: Path) -> dict[str, Any]:
        (out / "log" / "notes.json").write_text(json.dumps(said))
        return {}

    noted = stage("noted", version=1)(told)
    go(store, pipeline=lambda recipe: noted(Frozen()))
    (first,) = store.manifests("noted")
    assert first["notes"] == ["it was dark"]
    assert "\nit was dark\n" in card_markdown(first, store.folder("noted", first["key"]))
    said.clear()
    go(store, pipeline=lambda recipe: noted(Frozen()), from_="noted")
    (second,) = store.manifests("noted")
    assert (second["notes"], second["content_hash"]) == ([], first["content_hash"])


def test_drift_warns_and_strict_refuses(store: Store) -> None:
    go(store)
    (path,) = store.local.glob("join/*/manifest.json")
    manifest = json.loads(path.read_text())
    manifest["fingerprint"] = manifest["fingerprint"][:-1] + "x"
    path.write_text(json.dumps(manifest))
    plan = Plan(store).run(toy, Toy())
    assert plan.cached
    assert plan.warnings[0].startswith("stage join: its code changed since its result was made")
    heard = Heard()
    go(store, watcher=heard)
    assert ran == []
    assert heard.said == [f"warning: {plan.warnings[0]}"]
    runs = len(store.runs())
    with pytest.raises(UsageError, match="its code changed"):
        go(store, strict=True)
    assert len(store.runs()) == runs  # refused before anything was written


def test_estimates_come_from_earlier_runs_or_from_the_stage(store: Store) -> None:
    def guess(config: Frozen, recipe: Toy) -> Estimate:
        return Estimate(seconds=5.0, memory_bytes=7, disk_bytes=9)

    counted = stage("count", version=1, estimate=guess)(count_characters)

    def pipeline(recipe: Toy) -> Artifact:
        return counted(recipe.count, joined=toys.join(recipe.join, parts=write(recipe.write, seed=recipe.seed)))

    plan = Plan(store).run(pipeline, Toy())
    assert (plan.named("count").seconds, plan.seconds, plan.memory_bytes) == (5.0, None, 7)
    go(store, pipeline=pipeline)
    plan = Plan(store).run(pipeline, Toy(join=Join(between="-")))
    assert plan.seconds is not None
    assert 0 <= plan.seconds < 5
    assert plan.memory_bytes is not None
    assert plan.memory_bytes > 10_000_000  # a Python process


def test_a_store_too_full_for_the_plan_is_refused(store: Store) -> None:
    huge = stage("count", version=1, estimate=lambda config, recipe: Estimate(disk_bytes=10**18))(count_characters)

    def pipeline(recipe: Toy) -> Artifact:
        return huge(recipe.count, joined=toys.join(recipe.join, parts=write(recipe.write, seed=recipe.seed)))

    with pytest.raises(UsageError, match="MB free and the plan needs"):
        go(store, pipeline=pipeline)
    assert not store.local.exists()


def test_a_result_is_asked_for_once_and_a_pipeline_depends_on_its_recipe_alone(store: Store) -> None:
    with pytest.raises(TypeError, match="stage 'write' is called twice for the same result"):
        go(store, pipeline=lambda recipe: [write(recipe.write, seed=0), write(recipe.write, seed=0)])
    seeds = iter(range(9))
    with pytest.raises(RuntimeError, match="must depend on its recipe alone"):
        go(store, pipeline=lambda recipe: write(recipe.write, seed=next(seeds)))
