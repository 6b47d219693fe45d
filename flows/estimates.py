"""What each stage may take before it has ever run: hooks of the declarations in `gristmill.flows.stages`.

Training is arithmetic on the hardware table (`gristmill.infra.planner`); the corpus stages are bytes over rates that
were measured with the shipped recipe. They are orders of magnitude, to tell minutes from days; once a stage has run in
a store, the plan takes what that run took and uses these functions alone to scale it to another configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from gristmill.data.ingest import IngestConfig
from gristmill.flows.stage import Estimate
from gristmill.infra.planner import HardwareError, estimate, find_device
from gristmill.model.rl.config import MICRO_TOKENS
from gristmill.model.training.config import LayoutConfig
from gristmill.model.training.layout import Layout
from gristmill.model.training.memory import FLOAT, parameters_of, training_memory

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
    kept = (config.steps // config.keep_every if config.keep_every else 0) + config.keep_best
    return _of_training(config, recipe, config.model, averaged=config.ema_decay > 0, kept=kept)


def of_fine_tuning(config: Any, recipe: Recipe) -> Estimate:
    """As pretraining, of the recipe's model without its MTP modules."""
    return _of_training(config, recipe, _without_mtp(recipe.pretrain.model), averaged=False)


def _of_training(config: Any, recipe: Recipe, model: ModelConfig, *, averaged: bool, kept: int = 0) -> Estimate:
    flops = TRAINED_FLOPS * config.sequences * config.sequence_length
    return _of_steps(recipe, model, flops, _of_ranks(config, recipe, model, averaged=averaged), kept)


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
    return _of_steps(recipe, model, flops * more, _of_ranks(config, recipe, model, averaged=False))


def of_reinforcement(config: Any, recipe: Recipe) -> Estimate:
    """Of GRPO: each response is sampled token by token, and trained on; with a KL term, scored by the reference too."""
    responses = config.questions_per_step * config.samples_per_question
    tokens = responses * config.max_new_tokens
    flops = SAMPLED_FLOPS + TRAINED_FLOPS + (2 if config.kl_weight else 0)
    model, vocabulary = _without_mtp(recipe.pretrain.model), recipe.tokenize.vocab_size
    held = training_memory(
        model, vocabulary, config.optimizer, Layout(1), LayoutConfig(), tokens=MICRO_TOKENS, precision="float32",
        device=_kind(recipe), mtp_modules=0, averaged=False,
    )  # fmt: skip
    reference = held.finished if config.kl_weight else 0
    sampling = _sampling_bytes(model, vocabulary, responses, config.max_new_tokens)
    most = held.most(_kind(recipe)) + reference + max(0, sampling - held.activations)
    return _of_steps(recipe, model, flops * config.steps * tokens * RESPONSE_SHARE, _on_one(recipe, most, held.host))


def of_evaluation(config: Any, recipe: Recipe) -> Estimate:
    """Four models sample k responses a problem, one model after the other."""
    return _of_answers(config, recipe, 4)


def of_traces(config: Any, recipe: Recipe) -> Estimate:
    """As evaluation, of one model."""
    return _of_answers(config, recipe, 1)


def _of_answers(config: Any, recipe: Recipe, models: int) -> Estimate:
    model, vocabulary = _without_mtp(recipe.pretrain.model), recipe.tokenize.vocab_size
    tokens = models * config.problems * config.samples * config.max_new_tokens
    weights = FLOAT * parameters_of(model, vocabulary, 0).total
    most = weights + _sampling_bytes(model, vocabulary, config.batch_size, config.max_new_tokens)
    found = _of_steps(recipe, model, SAMPLED_FLOPS * tokens * RESPONSE_SHARE, _on_one(recipe, most, 0))
    return replace(found, disk_bytes=models * config.problems * config.samples * 150)


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


@dataclass(frozen=True)
class Held:
    """Bytes in a machine's memory, those of its processes included, and on each of its accelerators."""

    memory: int
    device: int | None


def _of_ranks(config: Any, recipe: Recipe, model: ModelConfig, *, averaged: bool) -> Held:
    """What the ranks of a training hold that share one machine."""
    execution, kind = recipe.execution, _kind(recipe)
    place = Layout.of(execution.ranks, execution.layout)
    tokens = config.batch_sequences * config.sequence_length // (place.shares * place.sequence_parallel)
    rank = training_memory(
        model, recipe.tokenize.vocab_size, config.optimizer, place, execution.layout, tokens=max(1, tokens),
        precision=config.precision, device=kind, mtp_modules=model.num_nextn_predict_layers, averaged=averaged,
    )  # fmt: skip
    each = BYTES_A_PROCESS + rank.host + (rank.most(kind) if kind == "cpu" else 0)
    return Held(place.ranks // place.nodes * each, None if kind == "cpu" else rank.most(kind))


def _on_one(recipe: Recipe, device: int, host: int) -> Held:
    """Of a job that is one process."""
    if _kind(recipe) == "cpu":
        return Held(BYTES_A_PROCESS + host + device, None)
    return Held(BYTES_A_PROCESS + host, device)


def _kind(recipe: Recipe) -> Literal["cpu", "cuda"]:
    """What the work runs on: a device that the table lacks is an accelerator."""
    try:
        found = find_device(recipe.execution.device_name)
    except HardwareError:
        return "cuda"
    return "cuda" if found.kind == "gpu" else "cpu"


def _sampling_bytes(model: ModelConfig, vocabulary: int, responses: int, length: int) -> int:
    """Of responses that are sampled at once: their cache without the prompts, and the logits of a token each."""
    return FLOAT * responses * (length * model.cache_width * model.num_hidden_layers + vocabulary)


def _without_mtp(model: ModelConfig) -> ModelConfig:
    return model.model_copy(update={"num_nextn_predict_layers": 0})


def _of_steps(recipe: Recipe, model: ModelConfig, flops_a_parameter: float, held: Held, kept: int = 0) -> Estimate:
    """Of work that does `flops_a_parameter` operations in all, and keeps so many checkpoints for good."""
    execution, vocabulary = recipe.execution, recipe.tokenize.vocab_size
    disk = FLOAT * parameters(model, vocabulary, active=False) * (1 + 3 * (CHECKPOINTS + kept))
    try:
        device = find_device(execution.device_name)
    except HardwareError:
        return Estimate(None, held.memory, disk, held.device)  # an accelerator that the table does not have
    devices = execution.ranks * (1 if device.kind == "gpu" else execution.threads)
    work = flops_a_parameter * parameters(model, vocabulary)
    seconds = estimate(work, 0, device, count=devices, precision="bf16" if device.kind == "gpu" else "fp32").seconds
    return Estimate(LAUNCH_SECONDS + seconds, held.memory, disk, held.device)


def parameters(model: ModelConfig, vocab_size: int, active: bool = True) -> int:
    """Parameters of a model without its MTP modules, those of a token's experts alone where `active`."""
    found = parameters_of(model, vocab_size, 0)
    experts = found.experts.total()
    used = experts * model.num_experts_per_tok // model.n_routed_experts if active else experts
    return found.total - experts + used
