"""The adoption of a model from its Hugging Face folder as a job: weights in our form, its tokenizer with our chat form.

The tokenizer's tokens stay as they are. Its conversations become those of DeepSeek-R1, which end the question where the
thought begins; a mark such as `</think>` that is none of its tokens is spelled out in several.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from gristmill.model.chat import Chat, token_name
from gristmill.model.costs import parameter_counts
from gristmill.model.hugging_face.conversion import import_folder, read_config
from gristmill.model.hugging_face.folders import TensorFolder
from gristmill.model.stage_types import Metrics, Progress


def run(job: dict[str, Any], out: Path, device: torch.device, progress: Progress) -> Metrics:
    """Write `out/model` and `out/tokenizer` from `job["folder"]`, its conversations by `job["chat_template"]`."""
    source = Path(job["folder"])
    config, rows = read_config(source)
    tokens = write_tokenizer(source, out / "tokenizer", job["chat_template"], rows)
    with TensorFolder(source) as found:
        dtype = found.dtype("model.embed_tokens.weight")

    def wrote(_: str) -> None:
        progress(0, 1)

    files = import_folder(source, out / "model", dtype=dtype, mtp=False, log=wrote)
    progress(1, 1)
    total, active = parameter_counts(config.model_copy(update={"num_nextn_predict_layers": 0}), rows)
    return {"parameters": total, "active_parameters": active, "tokens_known": tokens, "files": files}


def write_tokenizer(source: Path, folder: Path, chat_template: str, rows: int) -> int:
    """Copy tokenizer.json and describe it anew, with this chat template; the number of its tokens.

    Where it has no token for padding, which no loss is taken of, its end token pads.

    Raises:
        ValueError: a token has no row of the model's `rows`, or there is no end token.
    """
    told = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    bos, eos, pad = (token_name(told.get(f"{name}_token")) for name in ("bos", "eos", "pad"))
    known = Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab()
    if eos not in known:
        said = f"names the eos_token {eos!r}, which is no token of tokenizer.json" if eos else "names no eos_token"
        raise ValueError(f"{source / 'tokenizer_config.json'} {said}: a response ends with it, so correct it")
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"bos_token": bos} if bos else {}),
        "eos_token": eos,
        "pad_token": pad if pad in known else eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
        "chat_template": chat_template,
    }
    folder.mkdir(exist_ok=True)
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    text = json.dumps(described, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    Chat(folder)
    if (last := max(known.values())) >= rows:
        raise ValueError(
            f"the tokenizer of {source} has a token {last}, and its model {rows} rows of embeddings: give a model and "
            f"the tokenizer that it was trained with"
        )
    return len(known)
