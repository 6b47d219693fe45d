"""How long a stage would take and how much memory it needs: from its earlier runs, or from the hardware table."""

from __future__ import annotations

from typing import Any

from gristmill.flows.plan import Planned

BYTES_A_PARAMETER = 4 * 4  # float32 weights, gradients and two moments
ACTIVATIONS_A_TOKEN = 34 * 4  # bytes a token, layer and unit of width: arXiv 2205.05198, equation 2, in float32
PROCESS_BYTES = 700_000_000  # torch, DeepSpeed and Python themselves


def estimated_seconds(stage: Planned, recipe: Any) -> float | None:
    """Seconds of the nearest earlier run, scaled by steps where both have them; by the planner where there is none."""
    if stage.seconds is not None:
        return stage.seconds
    tokens = _trained_tokens(stage.call.config)
    if tokens is None:
        return None
    from gristmill.infra.planner import HardwareError, estimate, find_device

    execution = recipe.execution
    try:
        device = find_device(execution.device_name)
    except HardwareError:
        return None  # an accelerator that the table does not have
    parameters = _parameters(recipe.pretrain.model, recipe.tokenize.vocab_size)
    count = execution.ranks if device.kind == "gpu" else execution.ranks * execution.threads
    return estimate(6 * parameters * tokens, 0, device, count=count, precision="fp32").seconds


def estimated_memory(stage: Planned, recipe: Any) -> int | None:
    """Bytes that the nearest earlier run held at most; else those of a training stage's process, none for others."""
    if stage.estimate.memory_bytes is not None:
        return stage.estimate.memory_bytes
    config: Any = stage.call.config
    if not hasattr(config, "batch_sequences"):
        return None
    model = recipe.pretrain.model
    parameters = _parameters(model, recipe.tokenize.vocab_size, active=False)
    tokens = config.batch_sequences * config.sequence_length // recipe.execution.ranks
    activations = tokens * model.hidden_size * (model.num_hidden_layers + 1) * ACTIVATIONS_A_TOKEN
    return PROCESS_BYTES + BYTES_A_PARAMETER * parameters + activations


def _trained_tokens(config: Any) -> int | None:
    if hasattr(config, "batch_sequences"):
        return config.steps * config.batch_sequences * config.sequence_length
    if hasattr(config, "samples_per_question"):
        return config.steps * config.questions_per_step * config.samples_per_question * config.max_new_tokens * 2
    return None


def _parameters(model: Any, vocab_size: int, active: bool = True) -> int:
    """Parameters of the model, those of a token's experts alone where `active`; arithmetic, without torch."""
    width, heads = model.hidden_size, model.num_attention_heads
    query = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    through = width * query if model.q_lora_rank is None else model.q_lora_rank * (width + query)
    attention = through + width * (model.kv_lora_rank + model.qk_rope_head_dim)
    attention += model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    attention += heads * model.v_head_dim * width
    experts = (model.num_experts_per_tok if active else model.n_routed_experts) + model.n_shared_experts
    sparse = 3 * width * model.moe_intermediate_size * experts + width * model.n_routed_experts
    dense = model.first_k_dense_replace
    blocks = model.num_hidden_layers * attention + dense * 3 * width * model.intermediate_size
    blocks += (model.num_hidden_layers - dense) * sparse
    return blocks + 2 * vocab_size * width
