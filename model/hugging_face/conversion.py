"""From Hugging Face's folder to ours and back, streamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gristmill.model.config import ModelConfig
from gristmill.model.hugging_face.configs import from_hugging_face, to_hugging_face
from gristmill.model.hugging_face.folders import Entry, TensorFolder, Tensors, write_folder
from gristmill.model.hugging_face.fp8 import SCALES, is_quantised, quantised
from gristmill.model.hugging_face.names import Piece, copies, layout
from gristmill.model.transformer import Transformer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

Get = Callable[[str, Piece], Tensor]  # of our tensor of this name, this piece


def silent(_: str) -> None:
    """No progress."""


def check_tensors(found: TensorFolder, config: ModelConfig, vocab_size: int, *, mtp: bool) -> None:
    """Refuse a folder whose tensors are not those of its configuration.

    Raises:
        ValueError: tensors are missing, left over or of another shape; all of them are listed.
    """
    wanted = {
        piece.name: piece.shape
        for name, (_, pieces) in layout(config, vocab_size).items()
        if mtp or not name.startswith("mtp.")
        for piece in pieces
    }
    names = found.names()
    ignored = set(copies(config))
    if not mtp:
        ignored |= {name for name in names if _layer(name) >= config.num_hidden_layers}
    if config.tie_word_embeddings:
        ignored.add("lm_head.weight")
    ignored |= {name for name in names if name.endswith("rotary_emb.inv_freq")}
    found.refuse_unless(wanted, ignored)


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[2]) if name.startswith("model.layers.") and parts[2].isdigit() else -1


def read_config(folder: Path) -> tuple[ModelConfig, int]:
    """The configuration of a Hugging Face folder, and the rows of its vocabulary.

    Raises:
        ValueError: there is none, or this model cannot be one like it.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no config.json: give the folder of a model")
    return from_hugging_face(json.loads(path.read_text(encoding="utf-8")))


def load(folder: Path, *, mtp: bool = True) -> Transformer:
    """The model of a Hugging Face folder, in memory, in float32.

    Raises:
        ValueError: the folder does not hold a whole model of a family that this model can be.
    """
    config, vocab_size = read_config(folder)
    with TensorFolder(folder) as found:
        config = _held(found, config, vocab_size, mtp)
        model = Transformer(config, vocab_size)
        own = model.state_dict()
        for name, (_, pieces) in layout(config, vocab_size).items():
            for piece in pieces:
                own[name][piece.place()].copy_(found.read(piece.name))
    return model


def _held(found: TensorFolder, config: ModelConfig, vocab_size: int, mtp: bool) -> ModelConfig:
    """The configuration of what is taken over, its tensors checked: no MTP modules unless there and wanted."""
    mtp = mtp and has_mtp(found, config)
    check_tensors(found, config, vocab_size, mtp=mtp)
    return config if mtp else config.model_copy(update={"num_nextn_predict_layers": 0})


def has_mtp(found: TensorFolder, config: ModelConfig) -> bool:
    """Releases declare MTP modules, and conversions by others often leave them out."""
    first = config.num_hidden_layers
    return config.num_nextn_predict_layers > 0 and any(_layer(name) >= first for name in found.names())


def import_folder(
    source: Path,
    out: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    mtp: bool = True,
    shard_megabytes: int = 2000,
    log: Callable[[str], None] = silent,
) -> int:
    """Write our model folder from a Hugging Face one, a tensor of theirs at a time; the number of files.

    Raises:
        ValueError: as `load`.
    """
    config, vocab_size = read_config(source)
    with TensorFolder(source) as found:
        config = _held(found, config, vocab_size, mtp)
        out.mkdir(parents=True, exist_ok=True)

        def entry(name: str, shape: tuple[int, ...], pieces: list[Piece]) -> Entry:
            kept = torch.float32 if name.endswith("e_score_correction_bias") else dtype
            if not pieces:
                return Entry(name, shape, kept, lambda: [torch.zeros(shape)])
            return Entry(name, shape, kept, lambda: (found.read(piece.name, kept) for piece in pieces))

        entries = [entry(name, *how) for name, how in layout(config, vocab_size).items()]
        files = write_folder(out, entries, shard_megabytes, log)
    described = {**config.model_dump(mode="json"), "vocab_size": vocab_size}
    (out / "config.json").write_text(json.dumps(described, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return files


def of_model(model: Transformer) -> Get:
    """Pieces of a model in memory."""
    own = model.state_dict()
    return lambda name, piece: own[name][piece.place()]


def of_folder(found: Tensors) -> Get:
    """Pieces of a folder that holds our tensors."""
    return lambda name, piece: found.read(name, None, piece.place())


def export(
    get: Get,
    config: ModelConfig,
    vocab_size: int,
    out: Path,
    *,
    dtype: torch.dtype = torch.float32,
    fp8: bool = False,
    mtp: bool = False,
    shard_megabytes: int = 2000,
    further: dict[str, Any] | None = None,
    log: Callable[[str], None] = silent,
) -> int:
    """Write a Hugging Face folder without its tokenizer; the number of safetensors files.

    Args:
        fp8: the blocks' matrices as E4M3 with a scale for each 128 × 128, as DeepSeek's releases hold them.
        mtp: the MTP modules too, as layers behind the last, each with the copies of embedding and head that others
            look for there.
        further: more fields of config.json.

    Raises:
        ValueError: the shape has no form there.
    """
    if not mtp:
        config = config.model_copy(update={"num_nextn_predict_layers": 0})
    described = to_hugging_face(config, vocab_size, dtype=str(dtype).removeprefix("torch."), fp8=fp8)
    out.mkdir(parents=True, exist_ok=True)
    entries = list(_entries(get, config, vocab_size, dtype, fp8))
    files = write_folder(out, entries, shard_megabytes, log)
    text = json.dumps({**described, **(further or {})}, indent=2, sort_keys=True)
    (out / "config.json").write_text(text + "\n", encoding="utf-8")
    return files


def _entries(get: Get, config: ModelConfig, vocab_size: int, dtype: torch.dtype, fp8: bool) -> Iterator[Entry]:
    made = layout(config, vocab_size)
    for ours, (shape, pieces) in made.items():
        if not pieces and bool(get(ours, Piece(ours, shape)).any()):
            raise ValueError(
                f"{ours} is not zero, and DeepseekV2ForCausalLM has no such bias: train with bias_update_speed 0"
            )
    by_name = {piece.name: (ours, piece) for ours, (_, pieces) in made.items() for piece in pieces}
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
    for copy, original in copies(config).items():
        ours, piece = by_name[tied.get(original, original)]
        by_name[copy] = (ours, Piece(copy, piece.shape, piece.expert, piece.first_row))
    for name, (ours, piece) in by_name.items():
        if fp8 and is_quantised(name):
            yield from _in_fp8(name, ours, piece, get)
        else:
            kept = torch.float32 if name.endswith("e_score_correction_bias") else dtype
            yield Entry(name, piece.shape, kept, lambda ours=ours, piece=piece: [get(ours, piece)])


def _in_fp8(name: str, ours: str, piece: Piece, get: Get) -> Iterator[Entry]:
    """Values and scales; the scales are computed a second time rather than held."""
    blocks = tuple(-(-size // 128) for size in piece.shape)
    yield Entry(name, piece.shape, torch.float8_e4m3fn, lambda: [quantised(get(ours, piece))[0]])
    yield Entry(name + SCALES, blocks, torch.float32, lambda: [quantised(get(ours, piece))[1]])
