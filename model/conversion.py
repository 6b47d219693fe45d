"""Our model as a Hugging Face folder, in the tensor layout of DeepSeek's own releases (one matrix an expert)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gristmill.model.chat import Chat
from gristmill.model.config import ExportConfig, ModelConfig
from gristmill.model.stage_types import Metrics, Progress
from gristmill.model.training.checkpoints import load_model
from gristmill.model.transformer import Batch, Transformer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


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


def hugging_face_config(config: ModelConfig, vocab_size: int, chat: Chat) -> dict[str, Any]:
    """config.json of a DeepseekV3ForCausalLM of this shape.

    Raises:
        ValueError: the shape has no shared expert, which that architecture always has.
    """
    if config.n_shared_experts == 0 and config.first_k_dense_replace < config.num_hidden_layers:
        raise ValueError("n_shared_experts is 0, and DeepseekV3ForCausalLM has at least 1: train with a shared expert")
    same = [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "first_k_dense_replace",
        "intermediate_size",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "n_group",
        "topk_group",
        "routed_scaling_factor",
        "norm_topk_prob",
        "rope_theta",
        "max_position_embeddings",
        "rms_norm_eps",
        "initializer_range",
    ]
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **{name: getattr(config, name) for name in same},
        "num_key_value_heads": config.num_attention_heads,
        "rope_interleave": True,
        "rope_scaling": None,
        "hidden_act": "silu",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "vocab_size": vocab_size,
        "bos_token_id": chat.tokenizer.token_to_id(chat.names["bos_token"]),
        "eos_token_id": chat.eos,
        "pad_token_id": chat.pad,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def hugging_face_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Our tensors under the names and in the shapes of DeepSeek's releases, one after the other."""
    for name, tensor in model.state_dict().items():
        if name.startswith("mtp."):
            continue
        if name == "lm_head.weight":
            yield name, tensor
        elif name.endswith("experts.gate_up_proj"):
            for expert, matrix in enumerate(tensor):
                gate, up = matrix.chunk(2)
                stem = f"model.{name.removesuffix('gate_up_proj')}{expert}"
                yield f"{stem}.gate_proj.weight", gate
                yield f"{stem}.up_proj.weight", up
        elif name.endswith("experts.down_proj"):
            for expert, matrix in enumerate(tensor):
                yield f"model.{name.removesuffix('down_proj')}{expert}.down_proj.weight", matrix
        elif name.endswith("gate_up_proj.weight"):
            gate, up = tensor.chunk(2)
            yield f"model.{name.replace('gate_up_proj', 'gate_proj')}", gate
            yield f"model.{name.replace('gate_up_proj', 'up_proj')}", up
        else:
            yield f"model.{name}", tensor


def write_folder(model: Transformer, chat: Chat, tokenizer: Path, folder: Path, shard_megabytes: int) -> int:
    """Write the folder; the number of safetensors files. One shard is held in memory at a time."""
    described = hugging_face_config(model.config, model.vocab_size, chat)
    _write_json(folder / "config.json", described)
    generation = {k: described[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(
        folder / "generation_config.json",
        {**generation, "do_sample": True, "temperature": 0.6, "top_p": 0.95},
    )
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, folder / name)
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0
    for name, tensor in hugging_face_tensors(model):
        held[name] = tensor.detach().cpu().contiguous().clone()
        size += tensor.numel() * tensor.element_size()
        if size >= shard_megabytes * 1_000_000:
            total, size = total + size, 0
            shards.append(_write_shard(folder, len(shards), held))
            held = {}
    if held:
        total += size
        shards.append(_write_shard(folder, len(shards), held))
    _name_shards(folder, shards, total)
    return len(shards)


def _write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> list[str]:
    save_file(tensors, folder / f"part-{number}.safetensors", metadata={"format": "pt"})
    return list(tensors)


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    if len(shards) == 1:
        (folder / "part-0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


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


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
