"""Folders of models, ours and Hugging Face's: check, convert, compare, average; a tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gristmill.model.config import ModelConfig
from gristmill.model.hugging_face.conversion import (
    check_tensors,
    export,
    has_mtp,
    import_folder,
    of_folder,
    read_config,
)
from gristmill.model.hugging_face.folders import Entry, TensorFolder, write_folder
from gristmill.model.hugging_face.names import layout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
SHARD_MEGABYTES = 2000

Log = Callable[[str], None]


def silent(_: str) -> None:
    """No progress."""


@dataclass(frozen=True)
class Described:
    """What a folder's config.json says: whose form it has, and the model's shape."""

    hugging_face: bool
    config: ModelConfig
    vocab_size: int


def describe(folder: Path) -> Described:
    """Read a folder's config.json.

    Raises:
        ValueError: there is none, or it describes nothing that this model can be.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no config.json: give the folder of a model, a stage's `model` for instance")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again") from error
    if "model_type" in described:
        return Described(True, *read_config(folder))
    if "vocab_size" not in described:
        raise ValueError(f"{path} has neither model_type nor vocab_size: it describes no model")
    vocab_size = int(described.pop("vocab_size"))
    return Described(False, ModelConfig.model_validate(described), vocab_size)


def verify(folder: Path) -> dict[str, Any]:
    """Read every tensor; how many there are, their numbers and bytes.

    Raises:
        ValueError: tensors are missing, left over, misshapen or not finite; all of them are named.
    """
    described = describe(folder)
    numbers = size = count = 0
    spoilt = []
    with TensorFolder(folder) as found:
        check(found, described)
        for name in sorted(found.names()):
            tensor = found.read(name)
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                spoilt.append(name)
            count, numbers, size = count + 1, numbers + tensor.numel(), size + tensor.nbytes
    if spoilt:
        raise ValueError(f"{folder} holds numbers that are not finite in {len(spoilt)} tensors: {', '.join(spoilt)}")
    form = "Hugging Face" if described.hugging_face else "Gristmill"
    return {"form": form, "tensors": count, "parameters": numbers, "bytes": size}


def check(found: TensorFolder, described: Described) -> None:
    """Refuse a folder whose tensors are not those of its configuration.

    Raises:
        ValueError: which are missing, left over or misshapen.
    """
    config, vocab_size = described.config, described.vocab_size
    if described.hugging_face:
        check_tensors(found, config, vocab_size, mtp=has_mtp(found, config))
        return
    wanted, names = {name: shape for name, (shape, _) in layout(config, vocab_size).items()}, found.names()
    wrong = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in names]
    wrong += [f"left over {name}" for name in sorted(names - wanted.keys())]
    wrong += [
        f"{name} is {found.shape(name)}, expected {shape}"
        for name, shape in wanted.items()
        if name in names and found.shape(name) != shape
    ]
    if wrong:
        raise ValueError(
            f"{found.folder} does not fit its config.json in {len(wrong)} tensors:\n  " + "\n  ".join(wrong)
        )


def convert(
    source: Path,
    out: Path,
    *,
    dtype: str | None = None,
    fp8: bool = False,
    mtp: bool = False,
    shard_megabytes: int = SHARD_MEGABYTES,
    log: Log = silent,
) -> int:
    """From Hugging Face's form to ours, or from ours to theirs; the number of safetensors files.

    Args:
        dtype: of the weights written; by default bfloat16 for ours, and for theirs what the weights have.
        fp8: to Hugging Face: the blocks' matrices in FP8, as DeepSeek releases them.
        mtp: to Hugging Face: the multi-token-prediction modules too. To ours they always go, where they are there.

    Raises:
        ValueError: the source is not a whole model, or `out` is not empty, or the form does not exist.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: name another folder, or remove it")
    described = describe(source)
    if described.hugging_face:
        if fp8:
            raise ValueError("fp8 is a form of Hugging Face's folders, and this one becomes ours: leave it out")
        files = import_folder(source, out, dtype=DTYPES[dtype or "bfloat16"], shard_megabytes=shard_megabytes, log=log)
    else:
        with TensorFolder(source) as found:
            check(found, described)
            kept = DTYPES[dtype] if dtype else found.read("norm.weight").dtype
            files = export(
                of_folder(found), described.config, described.vocab_size, out, dtype=kept, fp8=fp8, mtp=mtp,
                shard_megabytes=shard_megabytes, log=log,
            )  # fmt: skip
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    return files


def differences(one: Path, other: Path) -> Iterator[dict[str, Any]]:
    """Of each tensor that differs, how: the largest difference, and the root mean square of it over that of the first.

    Tensors that only one of them has, or that have other shapes, are told with those words.

    Raises:
        ValueError: one of them is not a folder of tensors.
    """
    with TensorFolder(one) as first, TensorFolder(other) as second:
        for name in sorted(first.names() | second.names()):
            if name not in second.names() or name not in first.names():
                yield {"tensor": name, "differs": f"only in {one if name in first.names() else other}"}
                continue
            if first.shape(name) != second.shape(name):
                yield {"tensor": name, "differs": f"{first.shape(name)} and {second.shape(name)}"}
                continue
            a, b = first.read(name), second.read(name)
            if a.dtype == b.dtype and torch.equal(a, b):
                continue
            a, b = a.float(), b.float()
            size = float(a.square().mean().sqrt())
            apart = a - b
            relative = float(apart.square().mean().sqrt()) / max(size, 1e-30)
            yield {"tensor": name, "largest": float(apart.abs().max()), "relative": relative}


def average(folders: Sequence[Path], out: Path, weights: Sequence[float] | None = None, log: Log = silent) -> int:
    """Write the weighted mean of models of one shape (in float32, kept in the first one's types); the number of files.

    Raises:
        ValueError: they are of different shapes, there are fewer than two, or the weights do not fit.
    """
    if len(folders) < 2:
        raise ValueError("an average takes two folders or more")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: name another folder, or remove it")
    shares = list(weights or [1.0] * len(folders))
    if len(shares) != len(folders) or sum(shares) <= 0 or min(shares) < 0:
        raise ValueError(
            f"{len(shares)} weights ({shares}) for {len(folders)} folders: give one of each, none negative"
        )
    first = describe(folders[0])
    for folder in folders[1:]:
        if describe(folder) != first:
            raise ValueError(f"{folder} is a model of another shape or form than {folders[0]}: average equal ones")
    opened = [TensorFolder(folder) for folder in folders]
    for found in opened:
        check(found, first)
    out.mkdir(parents=True, exist_ok=True)

    def entry(name: str) -> Entry:
        kept = opened[0].read(name).dtype
        return Entry(name, opened[0].shape(name), kept, lambda: [_mean(name, opened, shares)])

    files = write_folder(out, [entry(name) for name in sorted(opened[0].names())], SHARD_MEGABYTES, log)
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
        if (folders[0] / name).exists():
            shutil.copyfile(folders[0] / name, out / name)
    return files


def _mean(name: str, folders: Sequence[TensorFolder], shares: Sequence[float]) -> Tensor:
    total = sum(shares)
    mean = folders[0].read(name).float() * (shares[0] / total)
    for found, share in zip(folders[1:], shares[1:], strict=True):
        mean += found.read(name).float() * (share / total)
    return mean
