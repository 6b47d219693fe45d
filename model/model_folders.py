"""Folders of models, ours and Hugging Face's, and checkpoints of a run: check, convert, compare, average.

Tensors are read and written a piece at a time. What is written is written beside its place and renamed when it is
whole.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gristmill.model.config import ModelConfig
from gristmill.model.hugging_face.conversion import (
    TOKENIZER_FILES,
    check_tensors,
    export,
    has_mtp,
    import_folder,
    of_folder,
    read_config,
    silent,
)
from gristmill.model.hugging_face.folders import Entry, TensorFolder, Tensors, write_folder
from gristmill.model.hugging_face.names import layout
from gristmill.model.training.checkpoint_tensors import CheckpointModel, CheckpointTensors, model_of
from gristmill.model.training.checkpoints import Checkpoint, is_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BESIDE = ("generation_config.json", *TOKENIZER_FILES)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SHARD_MEGABYTES = 2000

Log = Callable[[str], None]


@dataclass(frozen=True)
class Described:
    """What a folder's config.json, or a checkpoint's manifest, says: whose form it has, and the model's shape."""

    hugging_face: bool
    config: ModelConfig
    vocab_size: int


def describe(folder: Path) -> Described:
    """Read a folder's config.json, or of a checkpoint whose it is.

    Raises:
        ValueError: there is none, or it describes nothing that this model can be.
    """
    if is_checkpoint(folder):
        with Checkpoint(folder, trusted=True) as checkpoint:
            return Described(False, *model_of(checkpoint))
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(
            f"{folder} holds no config.json: give the folder of a model, a stage's `model` for instance, or of a "
            f"checkpoint with its manifest"
        )
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
    """Read every tensor; how many there are, their numbers and the bytes they are stored in.

    A checkpoint of a training run is held against its manifest.

    Raises:
        ValueError: tensors are missing, left over, misshapen or not finite; all of them are named. Of a checkpoint, the
            first file that is missing, was cut or changed.
    """
    if is_checkpoint(folder):
        return Checkpoint(folder).sizes()
    described = describe(folder)
    numbers = size = count = 0
    spoilt = []
    with TensorFolder(folder) as found:
        check(found, described)
        for name in sorted(found.names()):
            parts = found.parts(name)
            if not all(bool(part.isfinite().all()) for part in parts):
                spoilt.append(name)
            count, numbers, size = count + 1, numbers + math.prod(found.shape(name)), size + found.size(name)
    if spoilt:
        raise ValueError(f"{folder} holds numbers that are not finite in {len(spoilt)} tensors: {', '.join(spoilt)}")
    form = "Hugging Face form" if described.hugging_face else "Gristmill form"
    return {"form": form, "tensors": count, "parameters": numbers, "bytes": size}


@contextmanager
def opened_model(folder: Path, described: Described) -> Iterator[Tensors]:
    """The tensors of a folder of a model, or of the model in a checkpoint, all there and of their shapes.

    Raises:
        ValueError: they are not, or there are none.
    """
    if is_checkpoint(folder):
        with Checkpoint(folder) as checkpoint:
            yield CheckpointModel(checkpoint)
        return
    with TensorFolder(folder) as found:
        check(found, described)
        yield found


def check(found: TensorFolder, described: Described) -> None:
    """Refuse a folder whose tensors are not those of its configuration.

    Raises:
        ValueError: which are missing, left over or misshapen.
    """
    config, vocab_size = described.config, described.vocab_size
    if described.hugging_face:
        check_tensors(found, config, vocab_size, mtp=has_mtp(found, config))
        return
    found.refuse_unless({name: shape for name, (shape, _) in layout(config, vocab_size).items()})


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
    """From Hugging Face's form to ours, or from ours (a checkpoint's too) to theirs; the number of safetensors files.

    Args:
        dtype: of the weights written; by default bfloat16 for ours, and for theirs what the weights have.
        fp8: to Hugging Face: the blocks' matrices in FP8, as DeepSeek releases them.
        mtp: to Hugging Face: the multi-token-prediction modules too. To ours they always go, where they are there.

    Raises:
        ValueError: the source is not a whole model, or `out` is not empty, or the form does not exist.
    """
    described = describe(source)
    if described.hugging_face and fp8:
        raise ValueError("fp8 is a form of Hugging Face's folders, and this one becomes ours: leave it out")
    with _written(out) as part, ExitStack() as stack:
        if described.hugging_face:
            files = import_folder(
                source, part, dtype=DTYPES[dtype or "bfloat16"], shard_megabytes=shard_megabytes, log=log
            )
        else:
            found = stack.enter_context(opened_model(source, described))
            kept = DTYPES[dtype] if dtype else found.dtype("norm.weight")
            files = export(
                of_folder(found), described.config, described.vocab_size, part, dtype=kept, fp8=fp8, mtp=mtp,
                shard_megabytes=shard_megabytes, further=_token_ids(source), log=log,
            )  # fmt: skip
        _copy_beside(source, part)
    return files


@contextmanager
def _written(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place at the end; what an interrupted one left there is removed.

    Raises:
        ValueError: `out` is a file, or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not an empty folder: name another one, or remove it")
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if out.exists():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _copy_beside(source: Path, out: Path) -> None:
    """Take over what lies beside the tensors; ids of special tokens that config.json alone has go there too."""
    for name in BESIDE:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    own = out / BESIDE[0]
    told = json.loads(own.read_text(encoding="utf-8")) if own.exists() else {}
    if (both := told | _token_ids(source)) != told:
        own.write_text(json.dumps(both, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _token_ids(folder: Path) -> dict[str, Any]:
    """Ids of special tokens as a folder's configurations say them."""
    found: dict[str, Any] = {}
    for name in ("config.json", BESIDE[0]):
        if (folder / name).exists():
            told = json.loads((folder / name).read_text(encoding="utf-8"))
            found |= {field: told[field] for field in TOKEN_IDS if told.get(field) is not None}
    return found


def differences(one: Path, other: Path) -> Iterator[dict[str, Any]]:
    """Of each tensor that differs, how: the largest difference, and the root mean square of it over that of the first.

    Of two checkpoints all that they hold is compared, moments of the optimizer and averages too
    (`momentum/norm.weight`, laid flat); of a checkpoint and a model, the model. Tensors that only one of them has, or
    that have other shapes, are told with those words.

    Raises:
        ValueError: one of them is not a folder of tensors.
    """
    whole = is_checkpoint(one) and is_checkpoint(other)
    with _opened(one, whole) as first, _opened(other, whole) as second:
        for name in sorted(first.names() | second.names()):
            if name not in second.names() or name not in first.names():
                yield {"tensor": name, "differs": f"only in {one if name in first.names() else other}"}
                continue
            if first.shape(name) != second.shape(name):
                yield {"tensor": name, "differs": f"{first.shape(name)} and {second.shape(name)}"}
                continue
            largest = apart = size = 0.0
            for a, b in zip(_floats(first, name), _floats(second, name), strict=True):
                largest = max(largest, float((a - b).abs().max()))
                apart, size = apart + float((a - b).square().sum()), size + float(a.square().sum())
            if largest or first.dtype(name) != second.dtype(name):
                yield {"tensor": name, "largest": largest, "relative": math.sqrt(apart / size) if size else math.inf}


@contextmanager
def _opened(folder: Path, whole: bool) -> Iterator[Tensors]:
    """The tensors of a folder; of a checkpoint those of its model, or the `whole` of what it holds."""
    if not is_checkpoint(folder):
        with TensorFolder(folder) as found:
            yield found
        return
    with Checkpoint(folder) as checkpoint:
        yield CheckpointTensors(checkpoint) if whole else CheckpointModel(checkpoint)


def _floats(found: Tensors, name: str) -> Iterator[Tensor]:
    """A tensor in float32, a bounded number of rows at a time."""
    return (part.float() for part in found.parts(name))


def average(folders: Sequence[Path], out: Path, weights: Sequence[float] | None = None, log: Log = silent) -> int:
    """Write the weighted mean of models of one shape, computed in float32; the number of files.

    Types are those of the first one, bfloat16 where it has FP8.

    Raises:
        ValueError: they are of different shapes, there are fewer than two, or the weights do not fit.
    """
    if len(folders) < 2:
        raise ValueError("an average takes two folders or more")
    shares = list(weights or [1.0] * len(folders))
    if len(shares) != len(folders) or sum(shares) <= 0 or min(shares) < 0:
        raise ValueError(
            f"{len(shares)} weights ({shares}) for {len(folders)} folders: give one of each, none negative"
        )
    first = describe(folders[0])
    for folder in folders[1:]:
        if describe(folder) != first:
            raise ValueError(f"{folder} is a model of another shape or form than {folders[0]}: average equal ones")
    total = sum(shares)
    with ExitStack() as stack:
        opened = [stack.enter_context(opened_model(folder, first)) for folder in folders]
        part = stack.enter_context(_written(out))

        def mean(name: str) -> Iterator[Tensor]:
            for rows in zip(*(_floats(found, name) for found in opened), strict=True):
                yield torch.stack([row * (share / total) for row, share in zip(rows, shares, strict=True)]).sum(0)

        def entry(name: str) -> Entry:
            return Entry(name, opened[0].shape(name), opened[0].dtype(name), lambda: mean(name))

        files = write_folder(part, [entry(name) for name in sorted(opened[0].names())], SHARD_MEGABYTES, log)
        described = _config_json(folders[0], first)
        if described.pop("quantization_config", None):  # FP8 was multiplied out
            described["torch_dtype"] = "bfloat16"
        text = json.dumps(described, indent=2, sort_keys=True)
        (part / "config.json").write_text(text + "\n", encoding="utf-8")
        _copy_beside(folders[0], part)
    return files


def _config_json(folder: Path, described: Described) -> dict[str, Any]:
    """What a folder's config.json says; of a checkpoint, what that of its model would."""
    if is_checkpoint(folder):
        return {**described.config.model_dump(mode="json"), "vocab_size": described.vocab_size}
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
