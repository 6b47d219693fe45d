"""What a model of a configuration costs: its parameters and its operations, counted without making it."""

from __future__ import annotations

import math

import torch

from gristmill.model.config import ModelConfig
from gristmill.model.transformer import Transformer


def parameter_counts(config: ModelConfig, vocab_size: int) -> tuple[int, int]:
    """(all, active a token) parameters without the MTP module, counted on the meta device."""
    with torch.device("meta"):
        model = Transformer(config, vocab_size)
    total = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("mtp."))
    routed = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n and not n.startswith("mtp."))
    return total, total - routed + math.ceil(routed * config.num_experts_per_tok / config.n_routed_experts)


def flops_per_token(config: ModelConfig, vocab_size: int, length: int, mtp: bool) -> int:
    """Floating-point operations of forward and backward of one token in a sequence of `length` (2 a product, ×3)."""
    with torch.device("meta"):
        model = Transformer(config, vocab_size)
    share = config.num_experts_per_tok / config.n_routed_experts
    products = 0.0
    for name, p in model.named_parameters():
        if p.ndim < 2 or name.startswith("embed_tokens") or (name.startswith("mtp.") and not mtp):
            continue
        products += p.numel() * (share if ".experts." in name else 1.0)
    heads_width = config.head_width + (config.v_head_dim if config.attention == "mla" else config.head_width)
    depth = len(model.mtp) if mtp else 0
    products += (config.num_hidden_layers + depth) * config.num_attention_heads * heads_width * length / 2
    head = model.lm_head.weight.numel()  # a tied one is the embedding, and left out above
    products += head * (depth + config.tie_word_embeddings)
    return int(6 * products)
