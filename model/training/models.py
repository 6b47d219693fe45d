"""Finished models on disk: `config.json` and safetensors, written aside and renamed, never pickled."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from gristmill.model.config import ModelConfig
from gristmill.model.hugging_face.folders import Entry, TensorFolder, write_folder
from gristmill.model.signs_of_life import unwatched
from gristmill.model.training.files import write_json
from gristmill.model.transformer import Transformer

SHARD_MEGABYTES = 5000


def save_model(folder: Path, model: Transformer) -> None:
    """Write `config.json` and the tensors (parameters and expert biases) into `folder`, atomically.

    Raises:
        FloatingPointError: a weight is infinite or not a number.
    """
    own = own_tensors(model)
    write_model(folder, model.config, model.vocab_size, own, lambda name: iter((own[name],)))


def write_model(
    folder: Path,
    config: ModelConfig,
    vocab_size: int,
    like: dict[str, Tensor],
    parts: Callable[[str], Iterator[Tensor]],
) -> None:
    """Write a model a tensor at a time: shapes and types are those of `like`, numbers come from `parts(name)`.

    Raises:
        FloatingPointError: a weight is infinite or not a number.
    """

    def finite(name: str) -> Iterator[Tensor]:
        for part in parts(name):
            if part.is_floating_point() and not bool(part.isfinite().all()):
                raise FloatingPointError(f"{name} is not finite: lower the learning rates and run again")
            yield part

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {**config.model_dump(mode="json"), "vocab_size": vocab_size})
    entries = [Entry(name, tuple(t.shape), t.dtype, lambda name=name: finite(name)) for name, t in sorted(like.items())]
    write_folder(folder, entries, SHARD_MEGABYTES, lambda _: None)


def load_model(
    folder: Path, device: torch.device, *, mtp: bool = True, alive: Callable[[], None] = unwatched
) -> Transformer:
    """The model that `save_model` wrote; without its MTP module where `mtp` is false. `alive` is called at each tensor.

    Raises:
        ValueError: the folder holds no model, a damaged one, or tensors that do not fit its configuration.
    """
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no model (config.json and model.safetensors): give a stage's `model` folder")
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vocab_size = described.pop("vocab_size")
    if not mtp:
        described["num_nextn_predict_layers"] = 0
    model = Transformer(ModelConfig.model_validate(described), vocab_size).to(device)
    own = own_tensors(model)
    with TensorFolder(folder) as found:
        names = {name for name in found.names() if mtp or not name.startswith("mtp.")}
        missing, unexpected = sorted(own.keys() - names), sorted(names - own.keys())
        if missing or unexpected:
            raise ValueError(f"{folder} does not fit its config.json: missing {missing}, unexpected {unexpected}")
        for name, tensor in own.items():
            alive()
            if found.shape(name) != tuple(tensor.shape):
                raise ValueError(
                    f"{folder} does not fit its config.json: {name} is {found.shape(name)}, expected "
                    f"{tuple(tensor.shape)}"
                )
            tensor.copy_(found.read(name))
    return model


def own_tensors(model: Transformer) -> dict[str, Tensor]:
    """The tensors of a model, each once: a head that is the embedding is left out."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" or not model.config.tie_word_embeddings
    }
