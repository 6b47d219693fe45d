"""Context extension as a job: a base model in, the model with longer contexts, and what it gained, out.

Three models are checked alike: `base`, as it came; `yarn`, the same weights with the new positions; and `extended`,
those weights trained on. What was found of the first two is kept in work/, so that a resumed run does not look again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gristmill.data.mixture import Mixture
from gristmill.data.shards import TokenShards
from gristmill.model import needle
from gristmill.model.config import ModelConfig
from gristmill.model.extend import extended
from gristmill.model.stage_types import Metrics, Progress
from gristmill.model.training.batches import IGNORED, TrainingBatch
from gristmill.model.training.config import ExtendConfig, LayoutConfig
from gristmill.model.training.engine import start_distributed
from gristmill.model.training.held_out import HeldOut
from gristmill.model.training.inputs import check_mixture, refuse_other_vocabulary
from gristmill.model.training.loop import Row, write_rows
from gristmill.model.training.models import load_model
from gristmill.model.training.pretraining import (
    held_out_of,
    tokenizer_of,
    train_on_mixture,
    training_of,
)
from gristmill.model.training.text_samples import TextSamples, beginnings
from gristmill.model.transformer import Transformer

CHECKED_TOKENS = 1 << 14  # of one held-out batch
BINS = 16  # of positions
LOGITS_POSITIONS = 1024  # whose logits are held at once

Rows = dict[str, list[Row]]


def run(job: dict[str, Any], out: Path, device: torch.device, progress: Progress) -> Metrics:
    """Extend the model of `job["model"]` to the configured length, on the sequences of `job["mixture"]`."""
    config, seed = ExtendConfig.model_validate(job["config"]), int(job["seed"])
    shards = TokenShards(Path(job["tokens"]) / "tokens")
    mixture = Mixture(Path(job["mixture"]), shards)
    check_mixture("extend", config, mixture)
    tokenizer = tokenizer_of(Path(job["tokens"]))
    needles = needle.Needles(tokenizer, shards, config.needle, seed)
    alive = partial(progress, 0, config.steps)
    base = load_model(Path(job["model"]) / "model", device, alive=alive)
    refuse_other_vocabulary(base.vocab_size, shards.vocab_size, "shards")
    longer = extended(base.config, config)
    rank, _ = start_distributed(device)
    held_out = held_out_of(config, mixture, max(1, CHECKED_TOKENS // config.sequence_length), device)
    layout = LayoutConfig.model_validate(job["layout"])

    def checked(name: str, model: Transformer, alive: Callable[[], None]) -> Rows:
        model.eval()
        found = {
            "needle": _needle_rows(name, model, needles, config, alive),
            "loss": _loss_rows(name, model, held_out, config, alive),
        }
        model.train()
        return found

    def kept(name: str, model: Transformer) -> Rows:
        file = out / "work" / f"checked-{name}.json"
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        found = checked(name, model, alive)
        if rank == 0:
            part = file.with_suffix(".part")
            part.write_text(json.dumps(found), encoding="utf-8")
            part.replace(file)
        return found

    model = with_config(base, longer)
    before = [kept("base", base), kept("yarn", model)]
    del base
    asked = training_of(config, model, seed)
    prompts = beginnings(shards, tokenizer, longer.max_position_embeddings)
    texts = TextSamples(model, prompts, layout, seed, out / "log")
    metrics = train_on_mixture(model, config, asked, mixture, held_out, texts, layout, out, progress)
    del model  # a rank may hold a part of it alone
    alive = partial(progress, config.steps, config.steps)
    checks = [*before, checked("extended", load_model(out / "model", device, alive=alive), alive)]
    needle_rows, loss_rows = ([row for found in checks for row in found[kind]] for kind in ("needle", "loss"))
    if rank == 0:
        write_rows(out / "needle.jsonl", needle_rows)
        write_rows(out / "loss_by_position.jsonl", loss_rows)
    dist.barrier()
    found = {**_needle_metrics(needle_rows, config), **_loss_metrics(loss_rows, config)}
    return {**metrics, "sequence_length": config.sequence_length, **found}


def with_config(model: Transformer, config: ModelConfig) -> Transformer:
    """A model of another configuration with the same weights, for what changes no tensor: rotary scaling, limits."""
    made = Transformer(config, model.vocab_size).to(model.lm_head.weight.device)
    made.load_state_dict(model.state_dict())
    return made


def _needle_rows(
    name: str, model: Transformer, needles: needle.Needles, config: ExtendConfig, alive: Callable[[], None]
) -> list[Row]:
    """A row a length and depth."""
    device = model.lm_head.weight.device
    cells = [(length, depth) for length in config.needle_lengths for depth in needle.depths(config.needle)]

    def predict(token_BS: Tensor, count: int) -> Tensor:
        return needle.predicted(model, token_BS, count)

    scores = _among_ranks(len(cells), 3, lambda i: needles.score(predict, *cells[i], device), device, alive)
    return [
        needle.row(name, length, depth, found, config.needle.cases)
        for (length, depth), found in zip(cells, scores.tolist(), strict=True)
    ]


def _loss_rows(
    name: str, model: Transformer, held_out: HeldOut, config: ExtendConfig, alive: Callable[[], None]
) -> list[Row]:
    """Held-out loss of the next token in nats, a row a bin of positions that has targets."""
    device, length = model.lm_head.weight.device, config.sequence_length
    edges = [length * i // BINS for i in range(BINS + 1)]

    batches = [batch for _, batch, _ in held_out.parts()]

    def measured(number: int) -> list[float]:
        return loss_by_position(model, batches[number], edges).flatten().tolist()

    sums = _among_ranks(len(batches), 2 * BINS, measured, device, alive).sum(0).view(2, BINS).tolist()
    return [
        {"model": name, "start": start, "end": end, "loss": round(total / targets, 5), "targets": round(targets)}
        for start, end, total, targets in zip(edges[:-1], edges[1:], *sums, strict=True)
        if targets
    ]


@torch.no_grad()
def loss_by_position(model: Transformer, batch: TrainingBatch, edges: Sequence[int]) -> Tensor:
    """Cross-entropies summed, and their number, by the bin that a position lies in; (2, len(edges) - 1) float64.

    A position is counted from where attention begins: from the document's start where documents are apart.
    """
    hidden_BSD = model.norm(model.hidden(batch.inputs))
    found = torch.zeros(2, len(edges) - 1, dtype=torch.float64, device=hidden_BSD.device)
    inner = torch.tensor(edges[1:-1], device=hidden_BSD.device)
    for first in range(0, hidden_BSD.shape[1], LOGITS_POSITIONS):
        part = slice(first, first + LOGITS_POSITIONS)
        target_BP = batch.target_BS[:, part]
        loss_BP = torch.nn.functional.cross_entropy(
            model.lm_head(hidden_BSD[:, part]).float().flatten(0, 1), target_BP.flatten(), reduction="none"
        )
        counted = target_BP.flatten() != IGNORED
        bin_T = torch.bucketize(batch.inputs.position_BS[:, part].flatten()[counted], inner, right=True)
        found[0] += torch.bincount(bin_T, loss_BP[counted].double(), found.shape[1])
        found[1] += torch.bincount(bin_T, minlength=found.shape[1])
    return found


def _among_ranks(
    count: int,
    width: int,
    work: Callable[[int], Sequence[float]],
    device: torch.device,
    alive: Callable[[], None],
) -> Tensor:
    """`work(i)`, `width` numbers, of each i below `count`: shared out among the ranks and known to all, in float64.

    `alive` is called before each.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    values = torch.zeros(count, width, dtype=torch.float64, device=device)
    for i in range(rank, count, ranks):
        alive()
        values[i] = torch.tensor(work(i), dtype=torch.float64)
    if ranks > 1:
        dist.all_reduce(values)
    return values


def _needle_metrics(rows: list[Row], config: ExtendConfig) -> Metrics:
    """Means by model over haystacks that the base was not trained for, and over those that it was, where there are."""
    parts = {
        "beyond": [r for r in rows if r["length"] > config.trained_length],
        "within": [r for r in rows if r["length"] <= config.trained_length],
    }
    return {
        f"{field}_{where}": _means(part, field, "cases")
        for field in ("retrieved", "digits_in_front", "bits")
        for where, part in parts.items()
        if part
    }


def _loss_metrics(rows: list[Row], config: ExtendConfig) -> Metrics:
    """Held-out loss by model at positions that the base was not trained for; nothing where no document reaches them."""
    beyond = [r for r in rows if r["start"] >= config.trained_length]
    return {"loss_beyond": _means(beyond, "loss", "targets")} if beyond else {}


def _means(rows: list[Row], field: str, weight: str) -> dict[str, float]:
    """The weighted mean of a field, by model."""
    means = {}
    for model in dict.fromkeys(r["model"] for r in rows):
        own = [r for r in rows if r["model"] == model]
        means[model] = round(sum(r[field] * r[weight] for r in own) / sum(r[weight] for r in own), 5)
    return means
