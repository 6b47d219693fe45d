"""The stage: declared once as a name, a version, a frozen configuration, inputs and a plain function.

    dedup = stage("dedup", version=1, title="Deduplication")(deduplicate)

    def corpus(recipe):                       # a pipeline is an ordinary function
        documents = ingest(recipe.ingest, seed=recipe.seed)
        return dedup(recipe.dedup, documents=documents)

Calling a stage asks the runner in force what that means: to plan it, to run it here, or to run it under Prefect.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from gristmill.flows.identity import fingerprint, key_of


@dataclass(frozen=True)
class Artifact:
    """What a stage call stands for: a key, and so a folder of the store, whether it is filled yet or not."""

    stage: str
    key: str


@dataclass(frozen=True)
class Call:
    """One call of a stage in a pipeline, with all that its key is made of."""

    stage: Stage
    config: BaseModel
    inputs: dict[str, Artifact]
    seed: int | None
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "stage": self.stage.name,
            "version": self.stage.version,
            "config": self.config.model_dump(mode="json"),
            "seed": self.seed,
            "inputs": {name: {"stage": a.stage, "key": a.key} for name, a in self.inputs.items()},
            "sources": self.sources,
        }

    @property
    def key(self) -> str:
        return key_of(self.identity)

    @property
    def artifact(self) -> Artifact:
        return Artifact(self.stage.name, self.key)


class Runner(Protocol):
    """What decides the meaning of a stage call."""

    def call(self, call: Call) -> Artifact: ...


RUNNER: ContextVar[Runner | None] = ContextVar("gristmill_runner", default=None)


class Stage:
    """A declared stage; see the module's text. Made by `stage`."""

    def __init__(
        self,
        function: Callable[..., dict[str, Any]],
        name: str,
        version: int,
        title: str,
        sources: Callable[[Any], dict[str, str]] | None,
        check: Callable[[Any], None] | None,
    ) -> None:
        self.function, self.name, self.version, self.title = function, name, version, title
        self.sources, self.check = sources, check
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters
        self.config_type: type[BaseModel] = hints.get("config")  # type: ignore[assignment]
        self._refuse_bad_config()
        self.services = [n for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
        positional = [n for n, p in parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        if "out" not in positional:
            raise TypeError(f"stage {name!r}: its function has no parameter `out`, the folder it fills: add one")
        self.seeded = "seed" in positional
        self.inputs = [n for n in positional if n not in ("config", "out", "seed")]
        for parameter in self.inputs:
            if hints.get(parameter) is not Path:
                raise TypeError(f"stage {name!r}: input {parameter!r} is not annotated as Path: inputs are folders")

    def _refuse_bad_config(self) -> None:
        config = self.config_type
        if not (isinstance(config, type) and issubclass(config, BaseModel)):
            raise TypeError(
                f"stage {self.name!r}: its first parameter must be `config`, annotated with a pydantic model"
            )
        if not config.model_config.get("frozen") or config.model_config.get("extra") != "forbid":
            raise TypeError(
                f"stage {self.name!r}: {config.__name__} must be frozen and forbid extra fields, since it is hashed"
            )

    def __call__(self, config: BaseModel, *, seed: int | None = None, **inputs: Artifact) -> Artifact:
        """Ask the runner in force. Inputs are artifacts of other stages, by the names of the function's parameters."""
        runner = RUNNER.get()
        if runner is None:
            raise RuntimeError(
                f"stage {self.name!r} was called outside a runner: use Plan(store).run(pipeline, recipe) or Plain(…)"
            )
        if not isinstance(config, self.config_type):
            raise TypeError(f"stage {self.name!r} takes a {self.config_type.__name__}, not a {type(config).__name__}")
        if sorted(inputs) != sorted(self.inputs):
            raise TypeError(f"stage {self.name!r} takes the inputs {self.inputs}, not {sorted(inputs)}")
        if self.seeded != (seed is not None):
            raise TypeError(f"stage {self.name!r} {'needs' if self.seeded else 'takes no'} seed")
        sources = self.sources(config) if self.sources else {}
        return runner.call(Call(self, config, inputs, seed, sources))

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.function)


def stage(
    name: str | None = None,
    *,
    version: int,
    title: str = "",
    sources: Callable[[Any], dict[str, str]] | None = None,
    check: Callable[[Any], None] | None = None,
) -> Callable[[Callable[..., dict[str, Any]]], Stage]:
    """Declare a stage around a plain function `(config, *inputs, out[, seed], *, services) -> metrics`.

    Args:
        name: the stage's name; the function's own where none is given.
        version: raised by hand whenever the same configuration would give other bytes than before.
        sources: content hashes of what the stage reads from outside the store; they enter the key.
        check: refuses (ValueError) a configuration that cannot work here, before anything runs.
    """

    def declare(function: Callable[..., dict[str, Any]]) -> Stage:
        own = name or function.__name__
        return Stage(function, own, version, title or own.replace("_", " ").capitalize(), sources, check)

    return declare
