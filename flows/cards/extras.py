"""What the card of a stage shows beyond every card: stage name → functions from its folder to Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gristmill.flows.cards import charts, context_figures, figures
from gristmill.flows.cards.folder import StageFolder, is_number
from gristmill.flows.cards.scaling import scaling_parts
from gristmill.flows.cards.training import training_parts
from gristmill.model.training.config import MOST_PHASES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Extra = Callable[[StageFolder], list[str]]


def removal_tables(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The tables `removed_by_…` of a stage's metrics."""
    return {
        name: {k: v for k, v in table.items() if is_number(v)}
        for name, table in metrics.items()
        if name.startswith("removed_by_") and isinstance(table, dict) and table
    }


def _picture(title: str, figure: Figure | None, dpi: int = 100) -> list[str]:
    return [] if figure is None else [f"![{title}]({charts.png_uri(figure, dpi)})"]


def _experts(stage: StageFolder) -> list[str]:
    drawn = _picture("Load of the experts", figures.expert_loads(stage.rows("expert_load.jsonl")), 90)
    return ["## Load of the experts", *drawn] if drawn else []


def _context(stage: StageFolder) -> list[str]:
    rows, trained = stage.rows("needle.jsonl"), stage.config.get("trained_length")
    drawn = _picture("Needles by length and depth", context_figures.needle_maps(rows, trained))
    if not drawn:
        return []
    said = (
        f"A number of {stage.config.get('needle', {}).get('digits', '?')} digits stands somewhere in held-out text and "
        f"is asked for at its end, {rows[0]['cases']} times for each length and depth. The colour is how often the "
        f"right digit is the likeliest of the ten, given those before it (by chance one in ten); the number in a cell "
        f"is the share that greedy decoding retrieves whole. Right of the dashed line: lengths that the base was not "
        f"trained on."
    )
    by_position = context_figures.loss_by_position(stage.rows("loss_by_position.jsonl"), trained)
    return ["## Needles in a haystack", said, *drawn, "## Loss by position", *_picture("Loss by position", by_position)]


def _thinking(stage: StageFolder) -> list[str]:
    rows = stage.rows("curves.jsonl")
    if not rows:
        return []
    model = "zero" if stage.name == "rl_zero" else "rl"
    return [
        "## Reward and thought length",
        *_picture("Reward and length", figures.rl_overview({model: rows})),
    ]


def _accuracy(stage: StageFolder) -> list[str]:
    results = stage.rows("results.jsonl")
    drawn = _picture("Pass@1 by model", figures.accuracy(results))
    if not drawn:
        return []
    first = results[0]
    said = (
        f"Pass@1 is the share of right answers among {first.get('k', '?')} samples for each of "
        f"{first.get('problems', '?')} held-out problems, with its 95 % interval."
    )
    return ["## Accuracy", said, *drawn]


EXTRAS: dict[str, tuple[Extra, ...]] = {
    "pretrain": (training_parts, _experts),
    "cold_start": (training_parts,),
    "distill": (training_parts,),
    **{f"extend_{phase}": (_context, training_parts, _experts) for phase in range(1, MOST_PHASES + 1)},
    "rl_zero": (_thinking,),
    "rl": (_thinking,),
    "evaluate": (_accuracy,),
    "scaling": (scaling_parts,),
}
