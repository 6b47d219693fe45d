"""The stage: declared once as a name, a version, a frozen configuration, inputs and a plain function.

    dedup = stage("dedup", version=1, title="Deduplication")(deduplicate)

    def corpus(recipe):                       # a pipeline is an ordinary function
        documents = ingest(recipe.ingest, seed=recipe.seed)
        return dedup(recipe.dedup, documents=documents)

Calling a stage asks the runner in force what that means: to plan it, to run it here, or to run it under Prefect.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from pydantic import BaseModel

from gristmill.flows.fingerprint import fingerprint
from gristmill.flows.identity import dumped, key_of

NAME = re.compile(r"[a-z][a-z0-9_]*")
RESERVED = ("runs", "lock", "ledger")  # names of other things in a store
Inputs = Mapping[str, Any]  # by name: a folder, or a list of folders
InputCheck = Callable[[Any, Inputs], None]
Configs = Mapping[str, BaseModel]  # of the stages that make the inputs, by the inputs' names
ConfigCheck = Callable[[Any, Configs], None]
SERVICES = ("workers", "threads", "ranks", "device", "layout", "progress")


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

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What is asked for, in JSON's own values."""
        return {
            "stage": self.stage.name,
            "version": self.stage.version,
            "config": dumped(self.config),
            "seed": self.seed,
            "inputs": {name: {"stage": a.stage, "key": a.key} for name, a in self.inputs.items()},
            "sources": self.sources,
        }

    @cached_property
    def key(self) -> str:
        return key_of(self.identity)

    @property
    def artifact(self) -> Artifact:
        return Artifact(self.stage.name, self.key)


@dataclass(frozen=True)
class Estimate:
    """What a stage that never ran here may take; none where nobody can say.

    Attributes:
        memory_bytes: in the memory of a machine, of all processes of the stage on it.
        device_bytes: beside these, on each accelerator; none where the work is the processor's.
    """

    seconds: float | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    device_bytes: int | None = None


class Runner(Protocol):
    """What decides the meaning of a stage call."""

    def sources(self, stage: Stage, config: BaseModel) -> dict[str, str]:
        """Content hashes of what the stage reads from outside the store, the same for the whole of a run."""
        ...

    def call(self, call: Call) -> Artifact: ...


RUNNER: ContextVar[Runner | None] = ContextVar("gristmill_runner", default=None)


class Stage:
    """A declared stage; see the module's text. Made by `stage`.

    Attributes:
        name, version, title: as declared.
        function: the plain function; it can be called in a test without a runner.
        config_type: the class of its configuration.
        inputs: names of its inputs, each the folder of another stage's result.
        lists: those inputs that are any number of folders, in order.
        optional: those of them that a pipeline may leave out: `Path | None`, with the default None.
        seeded: whether it takes the recipe's seed.
        services: the execution services it asks for by name.
    """

    def __init__(
        self,
        function: Callable[..., dict[str, Any]],
        name: str,
        version: int,
        title: str,
        sources: Callable[[Any], dict[str, str]] | None = None,
        check: Callable[[Any], None] | None = None,
        estimate: Callable[[Any, Any], Estimate] | None = None,
        check_inputs: InputCheck | None = None,
        check_configs: ConfigCheck | None = None,
    ) -> None:
        self.function, self.name, self.version, self.title = function, name, version, title
        self.sources, self.check, self.estimate = sources, check, estimate
        self.check_inputs, self.check_configs = check_inputs, check_configs
        if not NAME.fullmatch(name) or name in RESERVED:
            raise TypeError(f"stage {name!r}: a stage's name is lower case, with digits and _, and not {RESERVED}")
        if type(version) is not int or version < 1:
            raise TypeError(f"stage {name!r}: its version is {version!r}: count from 1")
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters
        self.config_type: type[BaseModel] = hints.get("config")  # type: ignore[assignment]
        self._read_parameters(parameters, hints)
        self._refuse_loose(self.config_type, set())

    def _read_parameters(self, parameters: Mapping[str, inspect.Parameter], hints: dict[str, Any]) -> None:
        kinds = {name: parameter.kind for name, parameter in parameters.items()}
        loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if hidden := [name for name, kind in kinds.items() if kind in loose]:
            raise TypeError(f"stage {self.name!r}: its function takes *{hidden[0]}, which hides its inputs: name them")
        positional = [name for name, kind in kinds.items() if kind is not inspect.Parameter.KEYWORD_ONLY]
        if positional[:1] != ["config"] or not _is_model(self.config_type):
            raise TypeError(
                f"stage {self.name!r}: its first parameter must be `config`, annotated with a pydantic model"
            )
        if "out" not in positional:
            raise TypeError(f"stage {self.name!r}: its function has no parameter `out`, the folder it fills: add one")
        self.seeded = "seed" in positional
        self.inputs = [name for name in positional if name not in ("config", "out", "seed")]
        self.lists = [name for name in self.inputs if hints.get(name) == list[Path]]
        for name in self.lists:
            if beside := [other for other in self.inputs if re.fullmatch(rf"{name}_\d+", other)]:
                raise TypeError(f"stage {self.name!r}: {beside[0]!r} is the name of a part of {name!r}: rename it")
        self.optional = [name for name in self.inputs if parameters[name].default is None]
        for name in self.inputs:
            wanted = list[Path] if name in self.lists else Path | None if name in self.optional else Path
            if hints.get(name) != wanted:
                raise TypeError(
                    f"stage {self.name!r}: input {name!r} is not annotated as Path or list[Path]: inputs are folders "
                    f"(an optional one is `Path | None = None`)"
                )
        self.services = [name for name, kind in kinds.items() if kind is inspect.Parameter.KEYWORD_ONLY]
        if unknown := [name for name in self.services if name not in SERVICES]:
            raise TypeError(
                f"stage {self.name!r}: there is no execution service {unknown[0]!r}: a keyword-only parameter is one "
                f"of {', '.join(SERVICES)}; what decides bytes belongs into its configuration"
            )

    def _refuse_loose(self, model: type[BaseModel], seen: set[type[BaseModel]]) -> None:
        """A configuration is hashed: nothing in it may change later, and no misspelled field may pass."""
        seen.add(model)
        if not model.model_config.get("frozen") or model.model_config.get("extra") != "forbid":
            raise TypeError(
                f"stage {self.name!r}: {model.__name__} must be frozen and forbid extra fields, since it is hashed"
            )
        for info in model.model_fields.values():
            for part in _parts(info.annotation):
                if _is_model(part) and part not in seen:
                    self._refuse_loose(part, seen)

    def __call__(
        self, config: BaseModel, *, seed: int | None = None, **inputs: Artifact | Sequence[Artifact]
    ) -> Artifact:
        """Ask the runner in force. Inputs are artifacts of other stages, by the names of the function's parameters."""
        runner = RUNNER.get()
        if runner is None:
            raise RuntimeError(
                f"stage {self.name!r} was called outside a runner: use Plan(store).run(pipeline, recipe) or Plain(…)"
            )
        if not isinstance(config, self.config_type):
            raise TypeError(f"stage {self.name!r} takes a {self.config_type.__name__}, not a {type(config).__name__}")
        if not set(self.inputs) - set(self.optional) <= set(inputs) <= set(self.inputs):
            raise TypeError(f"stage {self.name!r} takes the inputs {self.inputs}, not {sorted(inputs)}")
        if self.seeded != (seed is not None):
            raise TypeError(f"stage {self.name!r} {'needs a' if self.seeded else 'takes no'} seed")
        return runner.call(Call(self, config, self._ordered(inputs), seed, runner.sources(self, config)))

    def _ordered(self, inputs: Mapping[str, Artifact | Sequence[Artifact]]) -> dict[str, Artifact]:
        """The artifacts in the order of the parameters, those of a list under its name and their number."""
        found: dict[str, Artifact] = {}
        for name in [n for n in self.inputs if n in inputs]:
            given = inputs[name]
            if name in self.lists:
                parts = list(given) if isinstance(given, Sequence) else [given]
                named = {f"{name}_{number:02d}": part for number, part in enumerate(parts)}
            else:
                named = {name: given}
            for artifact in named.values():
                if not isinstance(artifact, Artifact):
                    raise TypeError(
                        f"stage {self.name!r}: input {name!r} is a {type(artifact).__name__}, not what a stage returned"
                    )
            found |= named  # type: ignore[arg-type]
        return found

    def arguments(self, folders: Mapping[str, Path]) -> dict[str, Path | list[Path]]:
        """The function's inputs, of the folders of a call's inputs by their names."""
        single = {name: folders[name] for name in self.inputs if name in folders}
        several = {
            name: [folder for own, folder in folders.items() if re.fullmatch(rf"{name}_\d+", own)]
            for name in self.lists
        }
        return single | several

    def __repr__(self) -> str:
        return f"<stage {self.name} version {self.version}>"

    @property
    def fingerprint(self) -> str:
        """A hash of the code behind the function; see `gristmill.flows.fingerprint`."""
        return fingerprint(self.function)


def _is_model(part: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(part, type) and issubclass(part, BaseModel)


def _parts(annotation: Any) -> list[Any]:
    """A type and those inside it: `list[A | None]` has A."""
    return [annotation, *(p for inner in typing.get_args(annotation) for p in _parts(inner))]


def stage(
    name: str | None = None,
    *,
    version: int,
    title: str = "",
    sources: Callable[[Any], dict[str, str]] | None = None,
    check: Callable[[Any], None] | None = None,
    estimate: Callable[[Any, Any], Estimate] | None = None,
    check_inputs: InputCheck | None = None,
    check_configs: ConfigCheck | None = None,
) -> Callable[[Callable[..., dict[str, Any]]], Stage]:
    """Declare a stage around a plain function `(config, *inputs, out[, seed], *, services) -> metrics`.

    Args:
        name: the stage's name; the function's own where none is given.
        version: raised by hand whenever the same configuration would give other bytes than before.
        title: what people read.
        sources: content hashes of what the stage reads from outside the store; they enter the key.
        check: refuses (ValueError) a configuration that cannot work here, before anything runs.
        estimate: `(config, recipe)` → what the stage may take; for the plan of one that never ran, and to scale what
            an earlier run with another configuration took.
        check_inputs: `(config, inputs by name)`, refuses (ValueError) inputs that do not fit the configuration or each
            other: in the plan where they are there, otherwise as soon as they are, before the stage begins.
        check_configs: `(config, the configurations of the stages that make its inputs, by the inputs' names)`, refuses
            (ValueError) what these configurations alone tell cannot work: always in the plan, before anything runs.

    Raises:
        TypeError: the function is not of the contract's form; the message says what to change.
    """

    def declare(function: Callable[..., dict[str, Any]]) -> Stage:
        own = name or function.__name__
        words = title or own.replace("_", " ").capitalize()
        return Stage(function, own, version, words, sources, check, estimate, check_inputs, check_configs)

    return declare
