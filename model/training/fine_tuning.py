"""Supervised fine-tuning as a job: a base model and chains of thought in, a model that converses out.

Some of the questions are held out, with all their chains: their loss is checked and they are asked as training goes on.
"""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gristmill.model.chat import Chat
from gristmill.model.costs import flops_per_token
from gristmill.model.stage_types import Metrics, Progress
from gristmill.model.training.batches import (
    Conversation,
    ConversationBatches,
    PackedConversations,
    numpy_generator,
    torch_seed,
)
from gristmill.model.training.checks import Checks
from gristmill.model.training.config import LayoutConfig, SFTConfig
from gristmill.model.training.engine import start_distributed
from gristmill.model.training.held_out import HeldOutConversations
from gristmill.model.training.layout import Layout
from gristmill.model.training.loop import Row, Training, train, write_rows
from gristmill.model.training.models import load_model
from gristmill.model.training.precision import apply_precision
from gristmill.model.training.text_samples import TextSamples, first_questions

log = logging.getLogger("gristmill.fine_tuning")


def run(job: dict[str, Any], out: Path, device: torch.device, progress: Progress) -> Metrics:
    """Fine-tune `job["model"]` on `cold_start.jsonl` of `job["problems"]`; the MTP module stays behind."""
    config, seed = SFTConfig.model_validate(job["config"]), int(job["seed"])
    chat = Chat(Path(job["tokenizer"]) / "tokenizer")
    with (Path(job["problems"]) / "cold_start.jsonl").open(encoding="utf-8") as file:
        chains = with_conversations([json.loads(line) for line in file], chat)
    fitting = that_fit(chains, config.sequence_length)
    left_out = len(chains) - len(fitting)
    taught, held = held_apart(fitting, config.held_out_share, seed)
    rank, ranks = start_distributed(device)
    if left_out and rank == 0:
        log.warning(
            "%d of %d chains of thought are left out: longer than a sequence of %d tokens, the longest of %d",
            left_out,
            len(chains),
            config.sequence_length,
            max(chain["conversation"].positions for chain in chains),
        )
    model = load_model(Path(job["model"]) / "model", device, mtp=False, alive=partial(progress, 0, config.steps))
    products = apply_precision(model, config.precision)
    packed: dict[str, Any] = {"length": config.sequence_length, "pad": chat.pad, "device": device}
    batches = ConversationBatches(
        [chain["conversation"] for chain in taught],
        sequences=config.batch_sequences,
        steps=config.steps,
        seed=seed,
        **packed,
    )
    training = Training(
        steps=config.steps,
        batch_sequences=config.batch_sequences,
        optimizer=config.optimizer,
        schedule=config.schedule,
        checkpoint_every=config.checkpoint_every,
        precision=config.precision,
        spikes=config.spikes,
        seed=torch_seed(seed, "moments"),
    )
    layout = LayoutConfig.model_validate(job["layout"])
    place = Layout.of(ranks, layout)
    place.check(model.config, config.sequence_length, config.batch_sequences)
    apart = PackedConversations([chain["conversation"] for chain in held], **packed)
    held_out = HeldOutConversations(apart, config.batch_sequences // place.shares)  # a micro-batch fits
    prompts = first_questions(chat, questions_of(held), model.config.max_position_embeddings)
    texts = TextSamples(model, prompts, layout, seed, out / "log")
    checks = Checks(config.evaluate_every, config.steps, held_out.loss, texts)
    history = train(model, batches, training, out, progress, checks.look, layout, checks.write)
    if rank == 0:
        write_rows(out / "curves.jsonl", history.curves)
        write_rows(out / "spikes.jsonl", history.spikes)
        alive = partial(progress, config.steps, config.steps)
        finished = load_model(out / "model", device, alive=alive)  # whole, whatever the layout left here
        write_rows(out / "samples.jsonl", texts.rows_of(finished, config.steps - 1))
    dist.barrier()
    tokens = config.steps * config.batch_sequences * config.sequence_length
    last = history.curves[-1]
    return {
        "conversations": len(taught),
        "held_out_conversations": len(held),
        **({"left_out_too_long": left_out} if left_out else {}),
        "sequences": len(batches.packs),
        "padding": round(
            1 - sum(c.positions for c in batches.conversations) / (len(batches.packs) * config.sequence_length),
            5,
        ),
        "epochs": round(config.steps * config.batch_sequences / len(batches.packs), 4),
        "tokens": tokens,
        "flops": flops_per_token(model.config, model.vocab_size, config.sequence_length, mtp=False) * tokens,
        "steps": config.steps,
        "loss": round(history.last_taken()["main_loss"], 5),
        **{name: round(last[name], 5) for name in ("held_out_loss",) if name in last},
        "steps_left_out": len(history.spikes),
        **products,
    }


def held_apart(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and those held out: of this share of the questions, at least one of two or more; 0 none.

    A question goes with all its chains, so that none is asked whose answer was taught.
    """
    questions = questions_of(rows)
    count = max(1, round(share * len(questions))) if share and len(questions) > 1 else 0
    order = numpy_generator(seed, "held-out questions").permutation(len(questions))
    chosen = {questions[i] for i in order[:count]}
    return [row for row in rows if row["question"] not in chosen], [row for row in rows if row["question"] in chosen]


def questions_of(rows: list[Row]) -> list[str]:
    """The different questions, in the order of the rows."""
    return list(dict.fromkeys(row["question"] for row in rows))


def with_conversations(rows: list[Row], chat: Chat) -> list[Row]:
    """The rows, with each one's question and chain as tokens in `conversation`."""
    return [
        {**r, "conversation": Conversation(chat.prompt(r["question"]), chat.response(r["thought"], r["final"]))}
        for r in rows
    ]


def that_fit(chains: list[Row], length: int) -> list[Row]:
    """Those that go into a sequence of so many tokens whole: one that is cut would teach a thought without an end.

    Raises:
        ValueError: none does.
    """
    fitting = [chain for chain in chains if chain["conversation"].positions <= length]
    if not chains:
        raise ValueError("there is no chain of thought to learn from: give a cold_start.jsonl that holds some")
    if not fitting:
        shortest = min(chain["conversation"].positions for chain in chains)
        raise ValueError(
            f"none of {len(chains)} chains of thought fits into a sequence of sequence_length {length} tokens, and the "
            f"shortest has {shortest}: choose at least {shortest}"
        )
    return fitting
