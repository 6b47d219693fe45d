"""Which tensors of a Hugging Face folder a tensor of ours is made of.

One of ours is its pieces end to end: an expert stack is gate and up of expert 0, then of expert 1, and so on. So each
way a tensor can be streamed, piece by piece, and is never held twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gristmill.model.config import ModelConfig
from gristmill.model.transformer import Transformer


@dataclass(frozen=True)
class Piece:
    """A tensor over there; here it is `[expert, rows]` of one (expert none: `[rows]`)."""

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    first_row: int = 0

    def place(self) -> tuple[int | slice, ...]:
        """Its index in our tensor."""
        rows = slice(self.first_row, self.first_row + self.shape[0])
        return (rows,) if self.expert is None else (self.expert, rows)


def layout(config: ModelConfig, vocab_size: int) -> dict[str, tuple[tuple[int, ...], list[Piece]]]:
    """Of each of our tensors, in their order, its shape and its pieces; none: zeros over there (V2's bias)."""
    with torch.device("meta"):
        model = Transformer(config, vocab_size)
    made = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        shape = tuple(tensor.shape)
        absent = name.endswith("e_score_correction_bias") and config.scoring_func == "softmax"
        made[name] = shape, [] if absent else list(_pieces(name, shape, config))
    return made


def copies(config: ModelConfig) -> dict[str, str]:
    """Tensors over there that hold once more what another one holds: each MTP module's embedding and head."""
    first = config.num_hidden_layers
    made = {}
    for layer in range(first, first + config.num_nextn_predict_layers):
        made[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        made[f"model.layers.{layer}.shared_head.head.weight"] = "lm_head.weight"
    return made


def _pieces(name: str, shape: tuple[int, ...], config: ModelConfig) -> Iterator[Piece]:
    over_there = _renamed(name, config)
    if name.endswith("experts.gate_up_proj"):
        experts, twice, width = shape
        stem = over_there.removesuffix("gate_up_proj")
        for expert in range(experts):
            yield Piece(f"{stem}{expert}.gate_proj.weight", (twice // 2, width), expert)
            yield Piece(f"{stem}{expert}.up_proj.weight", (twice // 2, width), expert, twice // 2)
    elif name.endswith("experts.down_proj"):
        stem = over_there.removesuffix("down_proj")
        for expert in range(shape[0]):
            yield Piece(f"{stem}{expert}.down_proj.weight", shape[1:], expert)
    elif name.endswith("gate_up_proj.weight"):
        half = (shape[0] // 2, shape[1])
        yield Piece(over_there.replace("gate_up_proj", "gate_proj"), half)
        yield Piece(over_there.replace("gate_up_proj", "up_proj"), half, None, half[0])
    else:
        yield Piece(over_there, shape)


def _renamed(name: str, config: ModelConfig) -> str:
    if not name.startswith("mtp."):
        return name if name == "lm_head.weight" else f"model.{name}"
    _, number, rest = name.split(".", 2)
    layer = f"model.layers.{config.num_hidden_layers + int(number)}"
    if rest == "norm.weight":
        return f"{layer}.shared_head.norm.weight"
    return f"{layer}.{rest.removeprefix('block.')}"
