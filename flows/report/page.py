"""From findings to the page: figures drawn, words chosen, the template filled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gristmill.flows.cards import charts, context_figures, figures, text
from gristmill.flows.cards.charts import MODEL_NAMES
from gristmill.flows.cards.folder import Row, StageFolder
from gristmill.flows.report import words
from gristmill.flows.report.costs import elsewhere, made_earlier, run_cost
from gristmill.flows.report.findings import SIEVES
from gristmill.flows.report.pipeline import LABELS, diagram

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
EXCERPT = 700  # characters of a removed document


def render(found: Mapping[str, Any], folders: Mapping[str, StageFolder], title: str, examples: int) -> str:
    """The whole page as one string: no script, no link to anything outside it."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "number": text.number,
        "short": text.short,
        "size": text.size,
        "duration": text.duration,
        "money": text.money,
        "times": text.times,
        "points": words.points,
        "label": lambda name: LABELS.get(name, name.replace("_", " ")),
    }
    earlier = made_earlier(folders)
    cost = run_cost(folders)
    drawn = _figures(found, folders)
    return environment.get_template("page.html.j2").render(
        title=title,
        css=(HERE / "style.css").read_text(encoding="utf-8"),
        found=found,
        names=MODEL_NAMES,
        folders=folders,
        headline=words.headline(found),
        protocol=words.protocol(found, folders["evaluate"].config, folders["evaluate"].metrics),
        cold_start=words.cold_start(found["thinking"]["cold_start_data"]),
        discovered=words.discovered(found, folders["rl"].config),
        zero=f"{words.zero(found)} {words.lessons(found)}".strip(),
        figures=drawn,
        removal_charts=[name for name in drawn if name.startswith("removed-")],
        diagram=diagram(folders, earlier),
        earlier=earlier,
        cost=cost,
        elsewhere=elsewhere(cost.flops),
        removed=_removed_examples(folders, examples),
        samples=folders["evaluate"].rows("samples.jsonl", examples),
        environment=_environment(folders),
        recipe=_recipe(folders),
    )


def _figures(found: Mapping[str, Any], folders: Mapping[str, StageFolder]) -> dict[str, str]:
    """Inline SVG by name; a figure that has nothing to show is not there."""
    pretraining = folders["pretrain"].rows("curves.jsonl")
    runs = {"zero": folders["rl_zero"].rows("curves.jsonl"), "rl": folders["rl"].rows("curves.jsonl")}
    chosen: dict[str, Figure | None] = {
        "accuracy": figures.accuracy(list(found["results"].values())),
        "loss": figures.training_loss(pretraining, "Pretraining loss"),
        "bits": figures.bits_per_byte(pretraining, found["pretraining"].get("unigram_bpb")),
        "fine_tuning": figures.training_loss(folders["cold_start"].rows("curves.jsonl"), "Cold-start loss"),
        "violation": figures.load_violation(pretraining),
        "experts": figures.expert_loads(folders["pretrain"].rows("expert_load.jsonl")),
        "reward": figures.rl_curve(runs, "reward", "Reward", "mean reward of a response"),
        "length": figures.rl_curve(runs, "thought_length", "Thought length", "tokens"),
        "rl_accuracy": figures.rl_curve(runs, "accuracy", "Right answers", "share", small=True),
        "rl_format": figures.rl_curve(runs, "format", "Form kept", "share", small=True),
        "rl_entropy": figures.rl_curve(runs, "entropy", "Entropy", "nats a token", small=True),
        "rl_groups": figures.rl_curve(runs, "groups_kept", "Groups with a spread", "questions", small=True),
        "ways": figures.shares_by_model(_ways(found)),
    }
    for stage, tables in found["corpus"]["removed"].items():
        for name, table in tables.items():
            if sum(table.values()):
                title = f"{stage}: {name.replace('_', ' ')}"
                chosen[f"removed-{stage}-{name}"] = figures.counts(table, title)
    for name in found.get("extension", {}):
        trained = folders[name].config.get("trained_length")
        chosen[f"needle-{name}"] = context_figures.needle_maps(folders[name].rows("needle.jsonl"), trained)
        by_position = folders[name].rows("loss_by_position.jsonl")
        chosen[f"positions-{name}"] = context_figures.loss_by_position(by_position, trained)
    return {
        name: charts.svg(figure, name.replace("_", "-").replace(" ", "-"))
        for name, figure in chosen.items()
        if figure is not None
    }


def _ways(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The bars on ways of thinking: the data first, then the models; none without answers."""
    thinking = found["thinking"]
    if not thinking["models"]:
        return {}
    data = thinking["cold_start_data"]
    rows = {"cold-start data": data["shares"]} if data else {}
    return rows | {MODEL_NAMES[name]: part["shares"] for name, part in thinking["models"].items()}


def _removed_examples(folders: Mapping[str, StageFolder], count: int) -> dict[str, list[Row]]:
    """A few rows of the samples of dedup and filter, long texts cut."""
    return {
        name: [{k: _cut(v) for k, v in _flat(row).items() if k != "outcome"} for row in _removed(folders[name])[:count]]
        for name in SIEVES
    }


def _removed(stage: StageFolder) -> list[Row]:
    return [row for row in stage.rows("samples.jsonl") if row.get("outcome") == "removed"]


def _flat(row: Row, before: str = "") -> Row:
    flat: Row = {}
    for name, value in row.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return flat


def _cut(value: Any) -> str:
    said = text.number(value)
    return said if len(said) <= EXCERPT else said[:EXCERPT] + " …"


def _environment(folders: Mapping[str, StageFolder]) -> dict[str, list[tuple[str, list[str]]]]:
    """For each fact of the environment its values, each with the stages it holds for."""
    facts: dict[str, dict[str, list[str]]] = {}
    for name, folder in folders.items():
        said = {**_flat(folder.environment), "gristmill": folder.manifest.get("code_version")}
        for fact, value in said.items():
            if value is not None:
                facts.setdefault(fact, {}).setdefault(text.number(value), []).append(name)
    return {fact: list(values.items()) for fact, values in sorted(facts.items())}


def _recipe(folders: Mapping[str, StageFolder]) -> str:
    """The recipe that makes this run again: every stage's whole configuration, as YAML."""
    import yaml

    seeds = [f.manifest["seed"] for f in folders.values() if f.manifest.get("seed") is not None]
    recipe: Row = {"seed": seeds[0]} if seeds else {}
    recipe |= {name: folder.config for name, folder in folders.items() if folder.config}
    phases = [recipe.pop(name) for name in list(recipe) if name.startswith("extend_")]
    if phases:  # the contexts before it follow from `pretrain`
        derived = ("first_length", "trained_length")
        recipe["extend"] = [{k: v for k, v in phase.items() if k not in derived} for phase in phases]
    if "mix" in recipe:  # these two follow from `pretrain`
        recipe["mix"] = {k: v for k, v in recipe["mix"].items() if k not in ("sequence_length", "sequences")}
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
