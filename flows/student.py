"""The `student` stage: a dense model that exists already, adopted from its Hugging Face folder for distillation."""

from __future__ import annotations

import json
from pathlib import Path

from gristmill.flows.fetched import fetched, is_remote, local_path
from gristmill.flows.remote import Remote
from gristmill.model.config import ModelConfig, StudentConfig
from gristmill.model.hub import adopt
from gristmill.model.hugging_face.configs import from_hugging_face
from gristmill.model.stage_types import Metrics, Progress

NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json")
WEIGHTS = (".safetensors", ".safetensors.index.json")


def student_files(config: StudentConfig) -> list[str]:
    """Names of the files that the stage reads, sorted."""
    folder = config.folder.rstrip("/")
    if is_remote(folder):
        names = Remote(folder).names("")
    else:
        here = local_path(folder)
        names = [path.name for path in here.iterdir()] if here.is_dir() else []
    return sorted(name for name in names if name in NEEDED or name.endswith(WEIGHTS))


def student_tags(config: StudentConfig) -> dict[str, str]:
    """What a remote store calls the version of each file that the stage reads.

    Raises:
        ValueError: it tells none, so that a change could not be seen.
    """
    far, tags = Remote(config.folder.rstrip("/")), dict[str, str]()
    for name in student_files(config):
        tag = far.tag(name)
        if tag is None:
            raise ValueError(f"{far.uri} gives no ETag of {name}, by which a change is seen: copy the folder to a disk")
        tags[name] = tag.strip('"')
    return tags


def check_student(config: StudentConfig) -> None:
    """Refuse a folder that holds no model of a family that can be read, or lacks its tokenizer.

    Raises:
        ValueError: which files it lacks, or what of its config.json this model has not.
    """
    names = student_files(config)
    lacking = [name for name in NEEDED if name not in names]
    if not any(name.endswith(WEIGHTS) for name in names):
        lacking.append("*.safetensors")
    if lacking:
        raise ValueError(
            f"distill.folder {config.folder!r} lacks {', '.join(lacking)}: name a model's folder as Hugging Face has it"
        )
    _described(config)


def student_positions(config: StudentConfig) -> int:
    """The longest sequence, in tokens, that the folder's model is declared for.

    Raises:
        ValueError: as `check_student`, of its config.json.
    """
    return _described(config).max_position_embeddings


def _described(config: StudentConfig) -> ModelConfig:
    folder = config.folder.rstrip("/")
    data = Remote(folder).read(NEEDED[0]) if is_remote(folder) else (local_path(folder) / NEEDED[0]).read_bytes()
    try:
        return from_hugging_face(json.loads(data or b""))[0]
    except ValueError as error:
        raise ValueError(f"distill.folder {config.folder!r}: {error}") from error


def take_student(config: StudentConfig, out: Path, *, threads: int, progress: Progress) -> Metrics:
    """Leave the model in `out/model` in our form, in the type it has, and its tokenizer in `out/tokenizer`.

    Of a remote folder the files that are in the key are fetched; what runs the stage refuses its result where one of
    them has another ETag by then, or others have come.

    Raises:
        JobFailed: tensors are missing or misshapen, or the tokenizer has more tokens than the model.
    """
    with fetched([config.folder], only=student_files(config)) as (here,):
        return adopt(here, config.chat_template, out, threads=threads, progress=progress)
