"""What the model writes as training goes on: the same few prompts, and the same draws, at each held-out check."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tokenizers import Tokenizer

from gristmill.data.shards import BOS_ID, EOS_ID, PAD_ID, TokenShards
from gristmill.kernels.linear import linear
from gristmill.kernels.moe_mlp import moe_mlp
from gristmill.model.chat import Chat
from gristmill.model.generate import Sampling, sample
from gristmill.model.training.batches import torch_seed
from gristmill.model.training.config import LayoutConfig
from gristmill.model.training.files import write_json
from gristmill.model.transformer import Experts, Linear, Transformer

Row = dict[str, Any]

DOCUMENTS, PROMPT_TOKENS, NEW_TOKENS = 3, 16, 48
QUESTIONS, ANSWER_TOKENS = 4, 128
TEMPERATURE = 0.7  # the likeliest token alone goes round in circles in a young model

log = logging.getLogger("gristmill.text_samples")


@dataclass(frozen=True)
class Prompts:
    """What a model is to go on from, each prompt as tokens and as it is shown, and how what it writes is read."""

    tokens: list[list[int]]
    shown: list[str]
    new_tokens: int
    eos: int
    pad: int
    decode: Callable[[list[int]], str]


def beginnings(shards: TokenShards, tokenizer: Tokenizer, limit: int) -> Prompts:
    """The beginning of nothing and of one held-out document of each of the first sources, for a base model.

    `limit` is that of the model's positions, of which prompts take at most half.
    """
    prompts = [prompt[: limit // 2] for prompt in ([BOS_ID], *_documents(shards))]
    shown = [tokenizer.decode(prompt) for prompt in prompts]
    return Prompts(prompts, shown, min(NEW_TOKENS, limit - limit // 2), EOS_ID, PAD_ID, tokenizer.decode)


def first_questions(chat: Chat, questions: list[str], limit: int) -> Prompts:
    """The first few of these questions, as a conversation asks them; there may be none."""
    asked = questions[:QUESTIONS]
    prompts = [chat.prompt(question) for question in asked]
    room = limit - max(map(len, prompts), default=0)
    return Prompts(prompts, asked, min(ANSWER_TOKENS, room), chat.eos, chat.pad, chat.text)


class TextSamples:
    """What a model writes behind these prompts.

    As training goes on only where a rank holds the whole model (elsewhere the log says once that none is sampled, and
    `notes.json` in `folder`, the stage's log/, for its manifest and card), and so for the log alone; what the finished
    model writes is the stage's own.
    """

    def __init__(self, model: Transformer, prompts: Prompts, layout: LayoutConfig, seed: int, folder: Path) -> None:
        self.model, self.prompts = model, prompts
        self.seeds = [torch_seed(seed, "text", i) for i in range(len(prompts.tokens))]
        self.sampling = Sampling(prompts.new_tokens, TEMPERATURE)
        self.why_not = _why_not(layout)
        if dist.get_rank() == 0:
            self._note(folder / "notes.json")

    def _note(self, file: Path) -> None:
        """Say where no text is to be expected; an earlier start in another layout may have said so too."""
        file.unlink(missing_ok=True)
        if self.why_not and self.prompts.tokens:
            said = f"no text is sampled as training goes on: {self.why_not}; the finished model's is in samples.jsonl"
            log.warning("%s", said)
            write_json(file, [said])

    def rows(self, step: int) -> list[Row]:
        """As `rows_of` the model in training; none where no rank holds it whole."""
        return [] if self.why_not else self.rows_of(self.model, step)

    def rows_of(self, model: Transformer, step: int) -> list[Row]:
        """A row a prompt: `step`, `prompt` and how it goes on (`text`), special tokens left out."""
        asked = self.prompts
        with _float32_products(model):
            found = sample(model, asked.tokens, self.seeds, self.sampling, eos=asked.eos, pad=asked.pad)
        return [
            {"step": step, "prompt": shown, "text": asked.decode(said.tokens)}
            for shown, said in zip(asked.shown, found, strict=True)
        ]


def _documents(shards: TokenShards) -> Iterator[list[int]]:
    for source in shards.streams("held_out")[:DOCUMENTS]:
        stream = shards.stream("held_out", source)
        if len(stream):
            token_S, document_S = stream.read(0, min(PROMPT_TOKENS, len(stream)))
            yield [token for token in token_S[document_S == document_S[0]].tolist() if token != EOS_ID]


def _why_not(layout: LayoutConfig) -> str:
    parts = {"zero_stage": layout.zero_stage > 2}
    parts |= {name: getattr(layout, name) > 1 for name in ("expert_parallel", "sequence_parallel")}
    split = [f"{name} {getattr(layout, name)}" for name, is_so in parts.items() if is_so]
    return f"no rank holds the whole model ({', '.join(split)})" if split else ""


@contextmanager
def _float32_products(model: Transformer) -> Iterator[None]:
    """Within it the model decodes in the one dtype that decoding takes, that of its weights."""
    changed: list[tuple[Any, Any, Any]] = [
        (module, module.product, linear if isinstance(module, Linear) else moe_mlp)
        for module in model.modules()
        if isinstance(module, Linear | Experts)
    ]
    for module, _, plain in changed:
        module.product = plain
    try:
        yield
    finally:
        for module, product, _ in changed:
            module.product = product
