"""What would run, and why: keys depend on configurations and input keys alone, so a plan runs nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from gristmill.flows import tombstones
from gristmill.flows.errors import StoreDamaged, UsageError
from gristmill.flows.execution import Execution
from gristmill.flows.fingerprint import drifted
from gristmill.flows.identity import canonical, changed_input, dumped, first_difference, likeness
from gristmill.flows.manifest import Manifest, identity_of
from gristmill.flows.stage import RUNNER, Artifact, Call, Estimate, Stage
from gristmill.flows.store import Store

Pipeline = Callable[[Any], Any]
State = Literal["cached", "run", "partial", "damaged", "forced", "skipped"]
ROOM_BYTES = 64 << 20  # asked of a store for stages that nobody can estimate


@dataclass(frozen=True)
class Planned:
    """One stage of a plan: whether it is there, and if not, why it would run."""

    call: Call
    state: State
    reason: str
    manifest: Manifest | None = None
    drifted: bool = False  # cached, but its code is no longer the code that made it
    estimate: Estimate = field(default_factory=Estimate)  # from its nearest earlier run, or its own hook

    @property
    def name(self) -> str:
        return self.call.stage.name

    @property
    def runs(self) -> bool:
        """Whether a run would compute it."""
        return self.state not in ("cached", "skipped")

    @property
    def seconds(self) -> float | None:
        """What it took last time or may take; nothing where it need not run."""
        return self.estimate.seconds


@dataclass
class PlanResult:
    """All stages of a pipeline in the order of their calls."""

    stages: list[Planned] = field(default_factory=list)

    @property
    def cached(self) -> bool:
        """Whether nothing would run."""
        return not any(s.runs for s in self.stages)

    @property
    def seconds(self) -> float | None:
        """The sum of what is to run; none where a part of it is unknown."""
        known = [s.seconds for s in self.stages if s.runs]
        return None if None in known else sum(s for s in known if s is not None)

    @property
    def memory_bytes(self) -> int | None:
        """The largest of what is to run, as far as it is known."""
        known = [s.estimate.memory_bytes for s in self.stages if s.runs and s.estimate.memory_bytes is not None]
        return max(known, default=None)

    @property
    def device_bytes(self) -> int | None:
        """The largest on an accelerator of what is to run; none where none is used."""
        known = [s.estimate.device_bytes for s in self.stages if s.runs and s.estimate.device_bytes is not None]
        return max(known, default=None)

    @property
    def disk_bytes(self) -> int:
        """What the results of the stages to run may need."""
        known = [s.estimate.disk_bytes for s in self.stages if s.runs]
        return sum(n or 0 for n in known) + (ROOM_BYTES if None in known else 0)

    @property
    def warnings(self) -> list[str]:
        """Results that are taken although the code that made them has changed."""
        return [
            f"stage {s.name}: its code changed since its result was made and its version did not; "
            f"raise it if the bytes differ"
            for s in self.stages
            if s.drifted
        ]

    def named(self, name: str) -> Planned:
        """The first call of a stage; most pipelines call each once."""
        return next(s for s in self.stages if s.name == name)

    def of(self, artifact: Artifact) -> Planned:
        """What is planned for a result.

        Raises:
            RuntimeError: the plan has no such result.
        """
        for planned in self.stages:
            if planned.call.artifact == artifact:
                return planned
        raise RuntimeError(
            f"stage {artifact.stage} is asked for with key {artifact.key}, which was not planned: a pipeline must "
            f"depend on its recipe alone"
        )


class Sources:
    """What the stages' sources hold, looked up once a run: a run is of one moment, even if a source changes in it.

    Documents that were taken out of the store (`tombstones.py`) are a source of their own, and so in the key.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._seen: dict[tuple[str, str], dict[str, str]] = {}
        self._tombstones: list[dict[str, Any]] | None = None

    def of(self, stage: Stage, config: BaseModel) -> dict[str, str]:
        if stage.sources is None:
            return {}
        values = dumped(config)
        asked = (stage.name, canonical(values))
        if asked not in self._seen:
            if self._tombstones is None:
                self._tombstones = tombstones.read(self.store)
            removed = tombstones.as_source(tombstones.applying(self._tombstones, values))
            self._seen[asked] = stage.sources(config) | removed
        return self._seen[asked]


class Plan:
    """Answers what would run, without running or writing anything."""

    def __init__(self, store: Store, *, verify: bool = True, sources: Sources | None = None) -> None:
        """Args:
        verify: compare the files of what is there with its manifest: by hash on a disk, by name and size elsewhere.
        """
        self.store, self.verify = store, verify
        self.calls: list[Call] = []
        self.recipe: Any = None
        self._sources = sources or Sources(store)

    def sources(self, stage: Stage, config: BaseModel) -> dict[str, str]:
        if stage.check is not None:
            stage.check(config)
        return self._sources.of(stage, config)

    def call(self, call: Call) -> Artifact:
        if any(c.artifact == call.artifact for c in self.calls):
            raise TypeError(
                f"stage {call.stage.name!r} is called twice for the same result {call.key}: keep what the first call "
                f"returned"
            )
        self.calls.append(call)
        return call.artifact

    def run(self, pipeline: Pipeline, recipe: Any, until: str | None = None, from_: str | None = None) -> PlanResult:
        """The plan of `pipeline(recipe)`.

        Args:
            until: leave out what this stage does not need.
            from_: this stage and all that follows from it run again, whatever is there.

        Raises:
            UsageError: `until` or `from_` names no stage; a stage refuses its configuration, or inputs that are there;
                a source is missing.
        """
        self.calls, self.recipe = [], recipe
        token = RUNNER.set(self)
        try:
            pipeline(recipe)
        except UsageError:
            raise
        except (ValueError, OSError) as error:
            raise UsageError(str(error)) from error
        finally:
            RUNNER.reset(token)
        names = [c.stage.name for c in self.calls]
        wanted = self._ancestors(known(until, names, "--until")) if until else set(names)
        forced = self._descendants(known(from_, names, "--from")) if from_ else set()
        if from_ and until and not wanted & forced:
            raise UsageError(f"--until {until} does not need --from {from_}: name a stage that comes before {until}")
        result = PlanResult()
        for call in self.calls:
            if call.stage.name not in wanted:
                planned = Planned(call, "skipped", f"not needed for {until}")
            elif call.stage.name in forced:
                planned = self._forced(call, from_ or "")
            else:
                planned = self._planned(call)
            result.stages.append(planned)
        self._check_configs(result)
        self._check_inputs(result)
        return result

    def _check_configs(self, result: PlanResult) -> None:
        """Refuse what would run where the configurations of its inputs' stages already tell that it cannot."""
        for planned in result.stages:
            check = planned.call.stage.check_configs
            if check is None or not planned.runs:
                continue
            makers = {name: result.of(a).call.config for name, a in planned.call.inputs.items()}
            try:
                check(planned.call.config, makers)
            except ValueError as error:
                raise UsageError(f"stage {planned.name}: {error}") from error

    def _check_inputs(self, result: PlanResult) -> None:
        """Refuse what would run on inputs that do not belong together, where they lie here and are sound."""
        if not self.verify or self.store.remote:
            return
        for planned in result.stages:
            if planned.runs and all(result.of(a).state == "cached" for a in planned.call.inputs.values()):
                check_inputs(planned.call, self.store)

    def _planned(self, call: Call) -> Planned:
        name, key = call.stage.name, call.key
        try:
            manifest = self.store.manifest(name, key)
            wrong = self.store.damage(manifest, deep=not self.store.remote) if manifest and self.verify else []
        except StoreDamaged as error:
            manifest, wrong = None, [str(error)]
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            return Planned(call, "damaged", f"{wrong[0]}{more}", manifest, estimate=self._taken(manifest, call))
        if manifest is not None:
            code_changed = drifted(manifest["fingerprint"], call.stage.fingerprint)
            return Planned(call, "cached", "its result is there", manifest, code_changed)
        earlier = self._nearest(call)
        reason = self._cause(call, earlier)
        if self.store.partial(name, key):
            return Planned(call, "partial", f"{reason}; unfinished work is there", estimate=self._taken(earlier, call))
        return Planned(call, "run", reason, estimate=self._taken(earlier, call))

    def _forced(self, call: Call, from_: str) -> Planned:
        try:
            manifest = self.store.manifest(call.stage.name, call.key)
        except StoreDamaged:
            manifest = None
        reason = "asked for by --from" if call.stage.name == from_ else f"follows from {from_} (--from)"
        return Planned(call, "forced", reason, manifest, estimate=self._taken(manifest or self._nearest(call), call))

    def _nearest(self, call: Call) -> Manifest | None:
        """The earlier result of the same stage that has most in common with this call; the newest of equals."""
        earlier = self.store.manifests(call.stage.name)
        return max(earlier, key=lambda m: (likeness(identity_of(m), call.identity), m["started"]), default=None)

    def _cause(self, call: Call, earlier: Manifest | None) -> str:
        if earlier is None:
            return "never run in this store"
        before = identity_of(earlier)
        cause = first_difference(before, call.identity)
        if cause is not None and cause.startswith("input ") and (name := changed_input(before, call.identity)):
            return f"input {name} changed ({self._input_cause(before, call, name)})"
        return cause or "its result was removed"

    def _input_cause(self, before: dict[str, Any], call: Call, name: str) -> str:
        """Why an input is another result than the nearest earlier run's: its own first difference, or an input's."""
        artifact, old = call.inputs[name], before["inputs"].get(name)
        now = next((c for c in self.calls if c.artifact == artifact), None)
        unknown = f"{artifact.stage} {artifact.key}"
        if old is None or now is None or old["stage"] != artifact.stage:
            return unknown
        try:
            manifest = self.store.manifest(old["stage"], old["key"])
        except StoreDamaged:
            return unknown
        if manifest is None:
            return unknown
        earlier = identity_of(manifest)
        cause = first_difference(earlier, now.identity)
        if cause is None:
            return unknown
        if cause.startswith("input ") and (inner := changed_input(earlier, now.identity)):
            return self._input_cause(earlier, now, inner)
        return cause if cause.startswith(f"{artifact.stage}.") else f"{artifact.stage} {cause}"

    def _taken(self, earlier: Manifest | None, call: Call) -> Estimate:
        """What the nearest earlier run took, scaled to this configuration; a guess where there was none."""
        guess = _guessed(call.stage, call.config, self.recipe)
        if earlier is None:
            return guess
        before = _guessed(call.stage, _config(call.stage, earlier), _as_run(self.recipe, earlier))
        seconds = earlier.get("work_seconds", earlier["seconds"])
        size = sum(f["bytes"] for f in earlier["files"])
        peak = earlier.get("peak_bytes")
        return Estimate(
            seconds * _ratio(guess.seconds, before.seconds),
            None if peak is None else int(peak * _ratio(guess.memory_bytes, before.memory_bytes)),
            int(size * _ratio(guess.disk_bytes, before.disk_bytes)),
            guess.device_bytes,
        )

    def _ancestors(self, name: str) -> set[str]:
        needed = {name}
        for call in reversed(self.calls):
            if call.stage.name in needed:
                needed |= {a.stage for a in call.inputs.values()}
        return needed

    def _descendants(self, name: str) -> set[str]:
        after = {name}
        for call in self.calls:
            if any(a.stage in after for a in call.inputs.values()):
                after.add(call.stage.name)
        return after


def check_inputs(call: Call, store: Store) -> None:
    """Ask a stage, all of whose inputs are here, whether they belong together.

    Raises:
        UsageError: they do not, and the stage would fail.
    """
    stage = call.stage
    if stage.check_inputs is None:
        return
    folders = {name: store.folder(a.stage, a.key) for name, a in call.inputs.items()}
    try:
        stage.check_inputs(call.config, stage.arguments(folders))
    except ValueError as error:
        raise UsageError(f"stage {stage.name}: {error}") from error


def _guessed(stage: Stage, config: BaseModel | None, recipe: Any) -> Estimate:
    """What the stage itself says of a configuration, if it says anything."""
    return stage.estimate(config, recipe) if stage.estimate is not None and config is not None else Estimate()


def _config(stage: Stage, manifest: Manifest) -> BaseModel | None:
    """The configuration of an earlier run; none where the stage's fields are other ones by now."""
    try:
        return stage.config_type.model_validate(identity_of(manifest)["config"])
    except ValidationError:
        return None


def _as_run(recipe: Any, manifest: Manifest) -> Any:
    """The recipe on the ranks, threads and layout that an earlier run had; as it is where these cannot be told."""
    if not isinstance(recipe, BaseModel) or not isinstance(getattr(recipe, "execution", None), Execution):
        return recipe
    execution = recipe.execution  # type: ignore[attr-defined]
    environment = manifest["environment"]
    had = {name: environment[name] for name in ("ranks", "threads", "layout") if name in environment}
    try:
        return recipe.model_copy(update={"execution": Execution.model_validate(execution.model_dump() | had)})
    except ValidationError:
        return recipe


def _ratio(now: float | None, before: float | None) -> float:
    return now / before if now and before else 1.0


def known(name: str, names: list[str], option: str) -> str:
    """The stage's name, or a refusal that suggests the nearest."""
    if name in names:
        return name
    near = get_close_matches(name, names, 1, 0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"{option} names {name!r}, which is no stage: {hint}The stages are {', '.join(names)}")
