"""The declaration of a stage: what is refused, and what a call asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

from gristmill.flows.plan import Plan
from gristmill.flows.stage import Artifact, stage
from gristmill.flows.store import Store
from tests.flows.toys import Frozen, Join, Parts, Toy, join, toy, write


class LooseInside(BaseModel):
    count: int = 1


class Nested(Frozen):
    inner: list[LooseInside | None] = Field(default_factory=list)


class Thawed(BaseModel):
    model_config = ConfigDict(extra="forbid")


def fine(config: Frozen, out: Path) -> dict[str, Any]:
    return {}


def nested(config: Nested, out: Path) -> dict[str, Any]:
    return {}


def thawed(config: Thawed, out: Path) -> dict[str, Any]:
    return {}


def no_config(out: Path) -> dict[str, Any]:
    return {}


def no_out(config: Frozen) -> dict[str, Any]:
    return {}


def not_a_path(config: Frozen, documents: str, out: Path) -> dict[str, Any]:
    return {}


def hidden(config: Frozen, out: Path, **more: Any) -> dict[str, Any]:
    return {}


def unknown_service(config: Frozen, out: Path, *, cores: int) -> dict[str, Any]:
    return {}


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (nested, "LooseInside must be frozen and forbid extra fields"),
        (thawed, "Thawed must be frozen"),
        (no_config, "first parameter must be `config`"),
        (no_out, "no parameter `out`"),
        (not_a_path, "input 'documents' is not annotated as Path"),
        (hidden, "which hides its inputs"),
        (unknown_service, "no execution service 'cores': a keyword-only parameter is one of workers, threads"),
    ],
)
def test_a_function_of_another_form_is_refused(function: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        stage("fine", version=1)(function)


@pytest.mark.parametrize(("name", "version"), [("Fine", 1), ("a/b", 1), ("runs", 1), ("fine", 0), ("fine", True)])
def test_bad_names_and_versions_are_refused(name: str, version: int) -> None:
    with pytest.raises(TypeError, match="stage "):
        stage(name, version=version)(fine)


def test_what_a_declaration_reads_from_the_function() -> None:
    assert (write.inputs, write.seeded, write.services) == ([], True, ["progress", "workers"])
    assert (join.inputs, join.seeded, join.services) == (["parts"], False, [])
    assert stage(version=3)(fine).name == "fine"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: write(Join(), seed=0), "takes a Parts, not a Join"),
        (lambda: write(Parts()), "needs a seed"),
        (lambda: join(Join(), seed=0, parts=Artifact("write", "0" * 16)), "takes no seed"),
        (lambda: join(Join()), r"takes the inputs \['parts'\], not \[\]"),
        (lambda: join(Join(), parts="folder"), "input 'parts' is a str"),
    ],
)
def test_a_wrong_call_is_refused(call: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=said):
        Plan(Store(tmp_path)).run(lambda recipe: call(), None)


def test_a_pipeline_only_names_keys(tmp_path: Path) -> None:
    first = Plan(Store(tmp_path / "a")).run(toy, Toy())
    second = Plan(Store(tmp_path / "b")).run(toy, Toy())
    assert [s.call.key for s in first.stages] == [s.call.key for s in second.stages]
    assert not (tmp_path / "a").exists()  # a plan writes nothing
