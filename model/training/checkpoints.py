"""Checkpoints and finished models on disk: safetensors and JSON, written aside and renamed, never pickled."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gristmill.model.config import ModelConfig
from gristmill.model.hugging_face.folders import TensorFolder
from gristmill.model.training.optimizers import MuonAdamW
from gristmill.model.transformer import Transformer

KEPT = 2


def save_model(folder: Path, model: Transformer) -> None:
    """Write `config.json` and `model.safetensors` (parameters and expert biases) into `folder`, atomically.

    Raises:
        FloatingPointError: a weight is infinite or not a number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = {**model.config.model_dump(mode="json"), "vocab_size": model.vocab_size}
    _write_json(folder / "config.json", described)
    _write_tensors(folder / "model.safetensors", own_tensors(model))


def load_model(folder: Path, device: torch.device, *, mtp: bool = True) -> Transformer:
    """The model that `save_model` wrote; without its MTP module where `mtp` is false.

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


def take_tensors(model: Transformer, path: Path) -> None:
    """Load what `own_tensors` gave from a file.

    Raises:
        ValueError: the file holds other tensors than the model has.
    """
    kept, own = load_file(path, device=str(next(model.parameters()).device)), own_tensors(model)
    if kept.keys() != own.keys():
        raise ValueError(
            f"{path} is of another model: missing {sorted(own.keys() - kept.keys())}, unexpected "
            f"{sorted(kept.keys() - own.keys())}"
        )
    model.load_state_dict(kept, strict=False)


def save_checkpoint(
    work: Path,
    step: int,
    model: Transformer,
    optimizer: MuonAdamW,
    state: dict[str, Any],
    further: dict[str, dict[str, Tensor]] | None = None,
) -> None:
    """Keep everything a run needs to go on after `step` steps; older checkpoints but one are removed.

    `further` names more files of tensors, a reference policy's for instance.

    Raises:
        FloatingPointError: a weight or the optimizer's state is infinite or not a number; the earlier ones are kept.
    """
    part, final = work / f"checkpoint-{step:08d}.tmp", work / f"checkpoint-{step:08d}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    _write_tensors(part / "model.safetensors", own_tensors(model))
    _write_tensors(part / "optimizer.safetensors", optimizer.named_state())
    for name, tensors in (further or {}).items():
        _write_tensors(part / name, tensors)
    files = sorted(p.name for p in part.iterdir())
    _write_json(part / "state.json", {**state, "step": step, "optimizer_steps": optimizer.steps_done, "files": files})
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    for old in checkpoints(work)[:-KEPT]:
        shutil.rmtree(old)


def checkpoints(work: Path) -> list[Path]:
    """Whole checkpoints, oldest first: one that was killed while it was copied or removed lacks a file."""
    return sorted(p for p in work.glob("checkpoint-*") if p.suffix != ".tmp" and _is_whole(p))


def _is_whole(checkpoint: Path) -> bool:
    """`state.json` is the last file that is written or copied, and names the others."""
    state = checkpoint / "state.json"
    if not state.exists():
        return False
    return all((checkpoint / name).exists() for name in json.loads(state.read_text(encoding="utf-8"))["files"])


def load_checkpoint(work: Path, model: Transformer, optimizer: MuonAdamW) -> dict[str, Any] | None:
    """Take up the last whole checkpoint; its state, or none where there is no checkpoint."""
    found = checkpoints(work)
    if not found:
        return None
    device = str(next(model.parameters()).device)
    state = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
    take_tensors(model, found[-1] / "model.safetensors")
    optimizer.load_named_state(load_file(found[-1] / "optimizer.safetensors", device=device), state["optimizer_steps"])
    return state


def further_tensors(work: Path, name: str) -> dict[str, Tensor]:
    """A further file of the last whole checkpoint, which must be there."""
    return load_file(checkpoints(work)[-1] / name)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    if wrong := [name for name, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]:
        raise FloatingPointError(
            f"{wrong[0]} (and {len(wrong) - 1} more) is not finite: lower the learning rates and resume from the last "
            f"checkpoint"
        )
    part = path.with_suffix(".part")
    save_file({name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}, part)
    _sync_and_rename(part, path)


def _write_json(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    _sync_and_rename(part, path)


def _sync_and_rename(part: Path, path: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
