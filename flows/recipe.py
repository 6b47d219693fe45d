"""A recipe: everything that is asked of a run, in one frozen, bounded, documented model. YAML in, JSON schema out."""

from __future__ import annotations

import math
import re
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gristmill.data.decontaminate import DecontaminateConfig
from gristmill.data.dedup import DedupConfig
from gristmill.data.filters import FilterConfig
from gristmill.data.ingest import IngestConfig
from gristmill.data.mix import MixConfig, MixSection
from gristmill.data.problems import ProblemsConfig
from gristmill.data.spans import SpansConfig
from gristmill.data.tokenize import TokenizeConfig
from gristmill.data.tokenizer import CHAT_TEMPLATE
from gristmill.flows.errors import UsageError
from gristmill.flows.execution import Execution
from gristmill.flows.identity import flattened
from gristmill.flows.report import ReportConfig
from gristmill.model.config import EvaluateConfig, ExportConfig, ModelConfig, StudentConfig, TracesConfig
from gristmill.model.extend import extended
from gristmill.model.ladder import SweepConfig
from gristmill.model.nearest import either, neighbours
from gristmill.model.rl.config import GRPOConfig
from gristmill.model.training.config import MOST_PHASES, ExtendConfig, ExtendSection, PretrainConfig, SFTConfig
from gristmill.model.training.layout import Layout


class DistillSection(BaseModel):
    """A smaller model that exists already learns by fine-tuning alone (R1 section 2.4)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str = Field(
        min_length=1,
        title="Folder",
        description="Of the model as Hugging Face has it (Llama, Qwen, DeepSeek) with its tokenizer, a path or s3://….",
    )
    traces: TracesConfig | None = Field(
        default_factory=TracesConfig,
        title="Traces",
        description="What the reasoner (RL) is asked, whose right answers are learned; none: the cold start's chains.",
    )
    training: SFTConfig = Field(default_factory=SFTConfig, title="Training", description="As in the cold start.")

    @property
    def student(self) -> StudentConfig:
        """The model, in conversations as R1 has them."""
        return StudentConfig(folder=self.folder, chat_template=CHAT_TEMPLATE)


class Recipe(BaseModel):
    """What a run of the pipeline is asked for, section by section; `execution` says how and is in no key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        default="custom", pattern=r"^[a-z0-9][a-z0-9_-]*$", title="Name", description="Short, lower case."
    )
    description: str = Field(default="", title="Description", description="What the recipe is for.")
    seed: int = Field(default=0, ge=0, lt=2**31, title="Seed", description="Everything random follows from it.")
    ingest: IngestConfig = Field(title="Ingest", description="Sources of documents.")
    problems: ProblemsConfig = Field(default_factory=ProblemsConfig, title="Problems", description="What is asked.")
    dedup: DedupConfig = Field(default_factory=DedupConfig, title="Dedup", description="Duplicate removal.")
    filter: FilterConfig = Field(default_factory=FilterConfig, title="Filter", description="Quality rules.")
    spans: SpansConfig | None = Field(
        default=None,
        title="Spans",
        description="Removal of repeated lines, paragraphs and long spans; none leaves them.",
    )
    decontaminate: DecontaminateConfig = Field(
        default_factory=DecontaminateConfig, title="Decontaminate", description="What the evaluation asks goes."
    )
    tokenize: TokenizeConfig = Field(default_factory=TokenizeConfig, title="Tokenize", description="Tokenizer, shards.")
    mix: MixSection = Field(default_factory=MixSection, title="Mix", description="Packing, and the sources' shares.")
    pretrain: PretrainConfig = Field(default_factory=PretrainConfig, title="Pretrain", description="Base model.")
    extend: tuple[ExtendSection, ...] = Field(
        default=(),
        max_length=MOST_PHASES,
        title="Extend",
        description="Phases of context extension, each longer than the one before; none: contexts stay as pretrained.",
    )
    cold_start: SFTConfig = Field(default_factory=SFTConfig, title="Cold start", description="Fine-tuning.")
    rl_zero: GRPOConfig = Field(default_factory=GRPOConfig, title="R1-Zero", description="RL from the base model.")
    rl: GRPOConfig = Field(default_factory=GRPOConfig, title="RL", description="RL from the cold start.")
    distill: DistillSection | None = Field(
        default=None, title="Distill", description="Into a model that exists already; none: no such stage."
    )
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig, title="Evaluate", description="Protocol.")
    sweep: SweepConfig = Field(
        default_factory=SweepConfig, title="Sweep", description="Ladder of models for `gristmill sweep`; no run has it."
    )
    export: ExportConfig = Field(default_factory=ExportConfig, title="Export", description="Hugging Face folder.")
    report: ReportConfig = Field(default_factory=lambda: ReportConfig(), title="Report", description="The page.")
    execution: Execution = Field(default_factory=Execution, title="Execution", description="How; never in a key.")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        model, named = self._extended()
        limit = model.max_position_embeddings
        for name in ("cold_start",):
            length = getattr(self, name).sequence_length
            if length > limit:
                raise ValueError(
                    f"{name}.sequence_length {length} is longer than the position limit {named} {limit}: choose at "
                    f"most {limit} tokens, or raise the limit to {length}"
                )
        sampled = {"rl_zero": self.rl_zero, "rl": self.rl, "evaluate": self.evaluate}
        if self.distill is not None and self.distill.traces is not None:
            sampled["distill.traces"] = self.distill.traces
        for name, section in sampled.items():
            length = section.max_new_tokens
            if length >= limit:
                raise ValueError(
                    f"{name}.max_new_tokens {length} leaves no room for a prompt under the position limit {named} "
                    f"{limit}: choose at most {limit - 1} tokens, less those of the prompts, or raise the limit"
                )
        if self.evaluate.problems > self.problems.test:
            raise ValueError(
                f"evaluate.problems {self.evaluate.problems} is more than the {self.problems.test} of problems.test: "
                f"lower one or raise the other"
            )
        sources = [source.name for source in self.ingest.sources]
        for field, names in self.mix.named.items():
            for name in names:
                if name not in sources:
                    raise ValueError(
                        f"mix.{field} names {name!r}, which is no source of ingest.sources ({', '.join(sources)}): "
                        f"{_near(name, sources)}name those, or give {{}} to take them by size"
                    )
        place = Layout.of(self.execution.ranks, self.execution.layout)
        trained = {"pretrain": self.pretrain, "cold_start": self.cold_start}
        trained |= {f"extend.{number}": phase for number, phase in enumerate(self.extend)}
        if self.distill is not None:
            if place.expert_parallel > 1:
                raise ValueError(
                    f"execution.layout.expert_parallel {place.expert_parallel} with distill: a dense student has no "
                    f"experts to share; set it to 1, or run the recipe without distill first and with it after"
                )
            trained["distill.training"] = self.distill.training
        for name, run in trained.items():
            try:
                place.check(self.pretrain.model, run.sequence_length, run.batch_sequences)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        self.pretrain.batches.refuse_ranks(place.shares)
        return self

    def _extended(self) -> tuple[ModelConfig, str]:
        """The base model after its phases, and the field that its position limit comes from.

        Raises:
            ValueError: a phase does not fit the model or the phase before.
        """
        model, named = self.pretrain.model, "pretrain.model.max_position_embeddings"
        for number, phase in enumerate(self.phases):
            try:
                model = extended(model, phase)
            except ValueError as error:
                raise ValueError(f"extend.{number}: {error}") from error
            named = f"extend.{number}.sequence_length"
        return model, named

    @property
    def phases(self) -> list[ExtendConfig]:
        """The phases of context extension, each with the contexts before it."""
        first = self.pretrain.sequence_length
        before = [first, *(phase.sequence_length for phase in self.extend)]
        return [
            ExtendConfig(
                **{name: getattr(phase, name) for name in type(phase).model_fields},
                first_length=first,
                trained_length=trained,
            )
            for phase, trained in zip(self.extend, before, strict=False)
        ]

    @property
    def mixing(self) -> MixConfig:
        """The mixture of this recipe's pretraining."""
        return self.mixing_of(self.pretrain)

    def mixing_of(self, run: PretrainConfig | ExtendSection) -> MixConfig:
        """The mixture of a run: as many sequences as its steps take, of its length."""
        section = {name: getattr(self.mix, name) for name in type(self.mix).model_fields}
        return MixConfig(**section, sequence_length=run.sequence_length, sequences=run.sequences)


def shipped() -> list[str]:
    """Names of the recipes that come with Gristmill."""
    folder = resources.files("gristmill.flows.recipes")
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_recipe(which: str, settings: list[str] | None = None) -> Recipe:
    """A shipped recipe by name or a YAML file by path, with `section.field=value` settings laid over it.

    Raises:
        UsageError: no such recipe, bad YAML, an unknown field, a value of the wrong type or out of bounds.
    """
    values = _values(which, ())
    for setting in settings or []:
        _apply(values, setting)
    for field, value in flattened(values).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"recipe {which}: {field} is {value}, which is no number: write a finite one")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UsageError(_sentence(which, error)) from error


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe."""
    return Recipe.model_json_schema()


def _values(which: str, above: tuple[str, ...]) -> dict[str, Any]:
    if which in above:
        raise UsageError(f"recipe {which!r} extends itself through {' → '.join(above)}: break the circle")
    text, name = _text(which)
    try:
        values = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {name} is not valid YAML: {' '.join(str(error).split())}") from error
    values = _unshared(values)
    if not isinstance(values, dict):
        raise UsageError(f"recipe {name} holds no sections: write `section:` and its fields, see the shipped ones")
    parent = values.pop("extends", None)
    return values if parent is None else _merged(_values(_beside(str(parent), which), (*above, which)), values)


def _beside(parent: str, which: str) -> str:
    """The recipe that `which` extends: a shipped one, or a file whose path starts where `which` lies."""
    return parent if parent in shipped() or which in shipped() else str(Path(which).parent / parent)


def _text(which: str) -> tuple[str, str]:
    if which in shipped():
        resource = resources.files("gristmill.flows.recipes") / f"{which}.yaml"
        return resource.read_text(encoding="utf-8"), which
    path = Path(which)
    if path.suffix in (".yaml", ".yml") or "/" in which:
        if not path.is_file():
            raise UsageError(f"there is no recipe file {which!r}: name a YAML file or one of {', '.join(shipped())}")
        try:
            return path.read_text(encoding="utf-8"), which
        except UnicodeDecodeError as error:
            raise UsageError(f"recipe {which} is not UTF-8 text ({error}): save it as UTF-8") from error
        except OSError as error:
            raise UsageError(f"recipe {which} cannot be read ({error.strerror}): change its rights") from error
    raise UsageError(f"there is no recipe {which!r}: {_near(which, shipped())}shipped are {', '.join(shipped())}")


class _UniqueKeys(yaml.SafeLoader):
    """YAML without the silent loss of a key that is written twice."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _unshared(value: Any) -> Any:
    """A copy in which what YAML's anchors shared is apart: a setting on one section must not reach another."""
    if isinstance(value, dict):
        return {name: _unshared(inner) for name, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _merged(base: dict[str, Any], over: dict[str, Any], model: Any = Recipe) -> dict[str, Any]:
    """One recipe over another: sections are laid over each other, any other value (a mixture, a list) is replaced."""
    both = dict(base)
    for name, value in over.items():
        section = model.model_fields[name].annotation if name in model.model_fields else None
        inner = isinstance(section, type) and issubclass(section, BaseModel)
        old = both.get(name)
        both[name] = (
            _merged(old, value, section) if inner and isinstance(old, dict) and isinstance(value, dict) else value
        )
    return both


def _apply(values: dict[str, Any], setting: str) -> None:
    path, equals, text = setting.partition("=")
    if not equals or not all(path.split(".")):
        raise UsageError(f"--set {setting!r} is no setting: write it as section.field=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {setting!r}: {text!r} is not a value that YAML can read: quote it") from error
    place: Any = values
    *parents, last = path.split(".")
    for part in parents:
        place = _step(place, part, setting)
    if isinstance(place, list):
        place[_index(place, last, setting)] = value
    else:
        place[last] = value


def _step(place: Any, part: str, setting: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, part, setting)]
    inner = place.setdefault(part, {})
    if not isinstance(inner, dict | list):
        raise UsageError(f"--set {setting!r}: {part} is a value, not a section: name a field that the recipe has")
    return inner


def _index(place: list[Any], part: str, setting: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        raise UsageError(f"--set {setting!r}: {part!r} is no place in a list of {len(place)}: count from 0")
    return int(part)


def _sentence(which: str, error: ValidationError) -> str:
    """The first problem of a recipe as one sentence: what, which value, where, what to do."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path, model = _place(first["loc"])
    where = ".".join(path) or "the recipe"
    said = f"{first['msg'][0].lower()}{first['msg'][1:]}"
    if first["type"] == "extra_forbidden":
        fields = list(model.model_fields) if model else []
        return f"recipe {which}: {where} is no field: {_near(path[-1], fields)}known are {', '.join(fields)}"
    if first["type"] == "missing":
        return f"recipe {which}: {where} is missing: add it"
    if first["type"] == "value_error":
        place = f"{where}: " if path else ""
        return f"recipe {which}: {place}{re.sub('^value error, ', '', said)}"
    if first["type"] == "multiple_of" and isinstance(value := first["input"], int):
        step = int(first.get("ctx", {})["multiple_of"])
        near = neighbours(value, lambda n: n % step == 0, max(value, 0) + step)
        return f"recipe {which}: {where} {value} is no multiple of {step}: choose {either(near)}"
    if first["type"] == "model_type":
        return f"recipe {which}: {where} is {first['input']!r}, which will not do: it is a section, give its fields"
    return f"recipe {which}: {where} is {first['input']!r}, which will not do: {said}"


def _place(location: tuple[int | str, ...]) -> tuple[list[str], type[BaseModel] | None]:
    """A place of an error as a recipe writes it (without the names of a union's kinds), and the section it lies in."""
    path: list[str] = []
    here: list[Any] = [Recipe]
    section: type[BaseModel] | None = Recipe
    for part in location:
        kinds = [m for m in here if _tag(m) == part]
        if kinds:
            here = kinds
            continue
        path.append(str(part))
        if isinstance(part, int):
            continue
        models = [m for m in here if isinstance(m, type) and issubclass(m, BaseModel)]
        section = models[0] if models else None
        inner = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        here = [p for annotation in inner for p in _types(annotation)] if models else here
    return path, section


def _tag(model: Any) -> str | None:
    """The value of `type` by which a union tells its kinds apart."""
    if not (isinstance(model, type) and issubclass(model, BaseModel) and "type" in model.model_fields):
        return None
    return next(iter(get_args(model.model_fields["type"].annotation)), None)


def _types(annotation: Any) -> list[Any]:
    """The classes inside an annotation: of `list[Annotated[A | B, …]]` A and B."""
    inner = [part for argument in get_args(annotation) for part in _types(argument)]
    return inner or [annotation]


def _near(name: str, names: list[str]) -> str:
    near = get_close_matches(name, names, 1, 0.5)
    return f"did you mean {near[0]!r}? " if near else ""
