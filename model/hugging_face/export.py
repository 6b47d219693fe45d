"""The export of a finished model as a job: its Hugging Face folder, and the proof that `transformers` agrees."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from gristmill.model.chat import Chat
from gristmill.model.config import ExportConfig
from gristmill.model.hugging_face.conversion import TOKENIZER_FILES, export, of_model
from gristmill.model.stage_types import Metrics, Progress
from gristmill.model.training.models import load_model
from gristmill.model.transformer import Batch, Transformer


def run(job: dict[str, Any], out: Path, device: torch.device, progress: Progress) -> Metrics:
    """Export `job["model"]` with `job["tokenizer"]` to `out/huggingface` and check the logits of `transformers`."""
    config, folder = ExportConfig.model_validate(job["config"]), out / "huggingface"
    tokenizer = Path(job["tokenizer"]) / "tokenizer"
    model = load_model(Path(job["model"]) / "model", device, mtp=False).eval()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    progress(0, 3)
    files = write_folder(model, Chat(tokenizer), tokenizer, folder, config.shard_megabytes)
    progress(1, 3)
    difference, cached = logits_difference(model, folder)
    progress(2, 3)
    worst = max(difference, cached)
    if not worst <= config.parity_tolerance:
        raise ValueError(
            f"the logits that transformers computes from {folder} differ by {worst:.3g} from ours, more than "
            f"export.parity_tolerance {config.parity_tolerance}: the export would be another model"
        )
    text = _generated(folder)
    (out / "samples.jsonl").write_text(json.dumps({"prompt": text[0], "response": text[1]}) + "\n", encoding="utf-8")
    progress(3, 3)
    total = sum(p.numel() for p in model.parameters())
    # Rounded up to a power of ten: which libraries' kernels ran moves the last digits of a difference this small.
    return {"files": files, "parameters": total, "parity_within": _power_of_ten(worst)}


def _power_of_ten(value: float) -> float:
    return float(f"1e{int(torch.tensor(max(value, 1e-12)).log10().ceil())}")


def write_folder(model: Transformer, chat: Chat, tokenizer: Path, folder: Path, shard_megabytes: int) -> int:
    """Write the folder, tokenizer and chat template with it; the number of safetensors files."""
    tokens = {
        "bos_token_id": chat.tokenizer.token_to_id(chat.names["bos_token"]),
        "eos_token_id": chat.eos,
        "pad_token_id": chat.pad,
    }
    files = export(
        of_model(model), model.config, model.vocab_size, folder, shard_megabytes=shard_megabytes, further=tokens
    )
    generation = {**tokens, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    text = json.dumps(generation, indent=2, sort_keys=True)
    (folder / "generation_config.json").write_text(text + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, folder / name)
    return files


@torch.no_grad()
def logits_difference(model: Transformer, folder: Path) -> tuple[float, float]:
    """Largest differences of logits between ours and transformers': at once, and token by token with its cache."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    length = min(32, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    token_BS = torch.randint(7, model.vocab_size, (2, length), generator=generator)
    position_BS = torch.arange(length).expand_as(token_BS)
    ours_BSV = model(Batch(token_BS, position_BS))
    difference = float((ours_BSV - theirs(token_BS).logits).abs().max())
    cache, cached = None, 0.0
    for place in range(length):
        out = theirs(token_BS[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        cached = max(cached, float((ours_BSV[:, place] - out.logits[:, 0]).abs().max()))
    return difference, cached


def _generated(folder: Path) -> tuple[str, str]:
    """A greedy answer by `transformers.generate`, through the folder's own tokenizer and chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    messages = [{"role": "user", "content": "7+5-3+9=?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**prompt, max_new_tokens=64, do_sample=False)
    return text, tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
