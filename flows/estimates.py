"""What each stage may take before it has ever run: hooks of the declarations in `gristmill.flows.stages`.

Training is arithmetic on the hardware table (`gristmill.infra.planner`); the corpus stages are bytes over rates that
were measured with the shipped recipe. They are orders of magnitude, to tell minutes from days; once a stage has run in
a store, the plan takes what that run took and uses these functions alone to scale it to another configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from gristmill.data.ingest import IngestConfig
from gristmill.flows.stage import Estimate
from gristmill.infra.planner import HardwareError, estimate, find_device, training_memory

if TYPE_CHECKING:
    from gristmill.flows.recipe import Recipe
    from gristmill.model.config import ModelConfig

Hook = Callable[[Any, Any], Estimate]

START_SECONDS = 1.5  # a Dask cluster on this machine
LAUNCH_SECONDS = 8.0  # a training process until its first step: imports of torch and DeepSpeed
BYTES_A_PROCESS = 500 << 20  # torch, DeepSpeed and Python themselves; a Dask worker with its libraries
CHECKPOINTS = 2  # kept while a stage trains
TRAINED_FLOPS = 6  # operations a token and active parameter, forward and backward (arXiv 2001.08361, section 2.1)
FORWARD_FLOPS = 2
SAMPLED_FLOPS = 6  # a forward's 2, thrice: token by token, decoding reaches about a third of training's rate
RESPONSE_SHARE = 0.6  # of the length cap that a response takes: most end before it


def of_corpus(rate: float, kept: float) -> Hook:
    """Hook of a stage that works through all text.

    Args:
        rate: bytes a second and worker, measured on `tiny`, one core of a server a worker.
        kept: bytes of its result for one byte of text.
    """

    def hook(config: Any, recipe: Recipe) -> Estimate:
        text = _text_bytes(recipe.ingest.model_dump_json())
        if text is None:
            return Estimate()
        workers = max(recipe.execution.workers, 1)
        memory = BYTES_A_PROCESS * (1 + workers)
        return Estimate(START_SECONDS + text / (rate * workers), memory, int(text * kept))

    return hook


@lru_cache(maxsize=16)
def _text_bytes(ingest: str) -> int | None:
    """Bytes of text that sources may give, looked up once for all stages; none with a hub's dataset of unknown size."""
    sizes = [source.expected_bytes() for source in IngestConfig.model_validate_json(ingest).sources]
    return None if None in sizes else sum(size or 0 for size in sizes)


def of_problems(config: Any, recipe: Recipe) -> Estimate:
    """Generated, or copied from files: thousands a second, a few hundred bytes each."""
    count = config.cold_start + config.train + config.test
    return Estimate(0.2 + count / 20_000, BYTES_A_PROCESS, 300 * count)


def of_exam(config: Any, recipe: Recipe) -> Estimate:
    """As problems, of the test alone."""
    return Estimate(0.2 + config.test / 20_000, BYTES_A_PROCESS, 300 * config.test)


def of_pretraining(config: Any, recipe: Recipe) -> Estimate:
    """Steps of packed sequences, of the model that the run itself asks for."""
    return _of_training(config, recipe, config.model)


def of_fine_tuning(config: Any, recipe: Recipe) -> Estimate:
    """As pretraining, of the recipe's model."""
    return _of_training(config, recipe, recipe.pretrain.model)


def _of_training(config: Any, recipe: Recipe, model: ModelConfig) -> Estimate:
    held = config.batch_sequences * config.sequence_length // recipe.execution.ranks
    return _of_steps(recipe, model, TRAINED_FLOPS * config.sequences * config.sequence_length, held)


def of_extension(config: Any, recipe: Recipe) -> Estimate:
    """Of a phase of context extension: its steps, and three models read through the held-out check and the haystacks.

    At these lengths the products of queries and keys weigh as much as the weights' own in a small model.
    """
    model, length = recipe.pretrain.model, config.sequence_length
    tokens = config.batch_sequences * length
    needles = sum(config.needle_lengths) * config.needle.depths * config.needle.cases
    checked = 3 * (needles + config.held_out_sequences * length)
    values = model.v_head_dim if model.attention == "mla" else model.head_width
    attended = model.num_hidden_layers * model.num_attention_heads * (model.head_width + values) * length / 2
    more = 1 + attended / parameters(model, recipe.tokenize.vocab_size)
    flops = TRAINED_FLOPS * config.steps * tokens + FORWARD_FLOPS * checked
    return _of_steps(recipe, model, flops * more, tokens // recipe.execution.ranks)


def of_reinforcement(config: Any, recipe: Recipe) -> Estimate:
    """Of GRPO: each response is sampled token by token, and trained on; with a KL term, scored by the reference too."""
    responses = config.questions_per_step * config.samples_per_question
    tokens = responses * config.max_new_tokens
    flops = SAMPLED_FLOPS + TRAINED_FLOPS + (2 if config.kl_weight else 0)
    held = tokens // (config.minibatches * recipe.execution.ranks)
    return _of_steps(recipe, recipe.pretrain.model, flops * config.steps * tokens * RESPONSE_SHARE, held)


def of_evaluation(config: Any, recipe: Recipe) -> Estimate:
    """Four models sample k responses a problem."""
    tokens = 4 * config.problems * config.samples * config.max_new_tokens
    held = config.batch_size * config.max_new_tokens
    found = _of_steps(recipe, recipe.pretrain.model, SAMPLED_FLOPS * tokens * RESPONSE_SHARE, held)
    return Estimate(found.seconds, found.memory_bytes, 4 * config.problems * config.samples * 150)


def of_export(config: Any, recipe: Recipe) -> Estimate:
    """The weights once more, and `transformers` loading them."""
    weights = 4 * parameters(recipe.pretrain.model, recipe.tokenize.vocab_size, active=False)
    return Estimate(LAUNCH_SECONDS + weights / 100e6, BYTES_A_PROCESS + 3 * weights, weights)


def of_report(config: Any, recipe: Recipe) -> Estimate:
    """One page."""
    return Estimate(4.0, BYTES_A_PROCESS, 2 << 20)


def of_scaling(config: Any, recipe: Recipe) -> Estimate:
    """A fit and a picture."""
    return Estimate(4.0, BYTES_A_PROCESS, 1 << 20)


def _of_steps(recipe: Recipe, model: ModelConfig, flops_a_parameter: float, tokens: int) -> Estimate:
    """Of work that does `flops_a_parameter` operations in all and holds `tokens` tokens' activations at once."""
    execution = recipe.execution
    vocabulary = recipe.tokenize.vocab_size
    count = parameters(model, vocabulary, active=False)
    held = training_memory(
        count, tokens=tokens, width=model.hidden_size, layers=model.num_hidden_layers + 1, vocab_size=vocabulary
    ).total
    disk = 4 * count * (1 + 3 * CHECKPOINTS)
    try:
        device = find_device(execution.device_name)
    except HardwareError:
        return Estimate(None, BYTES_A_PROCESS + held, disk)  # an accelerator that the table does not have
    devices = execution.ranks * (1 if device.kind == "gpu" else execution.threads)
    work = flops_a_parameter * parameters(model, vocabulary)
    seconds = estimate(work, 0, device, count=devices, precision="bf16" if device.kind == "gpu" else "fp32").seconds
    return Estimate(LAUNCH_SECONDS + seconds, execution.ranks * BYTES_A_PROCESS + held, disk)


def parameters(model: ModelConfig, vocab_size: int, active: bool = True) -> int:
    """Parameters of a model, those of a token's experts alone where `active`; arithmetic, without torch.

    Norms, routing biases and the MTP module are left out.
    """
    width, heads = model.hidden_size, model.num_attention_heads
    query = heads * model.head_width
    through = width * query if model.q_lora_rank is None else model.q_lora_rank * (width + query)
    attention = through + width * (model.kv_lora_rank + model.qk_rope_head_dim)
    attention += model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    attention += heads * model.v_head_dim * width
    if model.attention == "gqa":
        attention = 2 * width * query + width * model.cache_width
    experts = (model.num_experts_per_tok if active else model.n_routed_experts) + model.n_shared_experts
    sparse = 3 * width * model.moe_intermediate_size * experts + width * model.n_routed_experts
    dense = model.first_k_dense_replace
    blocks = model.num_hidden_layers * attention + dense * 3 * width * model.intermediate_size
    blocks += (model.num_hidden_layers - dense) * sparse
    return blocks + (1 if model.tie_word_embeddings else 2) * vocab_size * width
