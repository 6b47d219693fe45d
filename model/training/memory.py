"""What a rank of a training holds in memory, by the engine's own ways, as arithmetic without torch.

Weights and gradients are float32. Parameters that DeepSpeed updates are laid out as `partitions.py` says; experts that
are shared out have an optimizer of their own beside it, whole on each rank that holds them (`engine.py`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from gristmill.model.config import ModelConfig
from gristmill.model.training.activations import FLOAT, activations, result_bytes
from gristmill.model.training.config import LayoutConfig, OptimizerConfig, Precision
from gristmill.model.training.layout import Layout

LARGEST_BUCKET = 500_000_000  # numbers of gradients on their way, DeepSpeed's own
LARGEST_GATHERED = 1_000_000_000  # numbers of parameters that ZeRO 3 keeps whole, DeepSpeed's own
CHUNK_LOGITS = {"cpu": (1 << 20, 1 << 20), "cuda": (1 << 25, 1 << 27)}  # of kernels/cross_entropy/chunked.py
CHUNK_SHARE = 20
CHUNK_ROWS = 128

Shape = tuple[int, int]


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model by how they are trained.

    Attributes:
        experts, matrices: numbers in the matrices between hidden states, by their shape: of routed experts, and others.
        tables: in the embedding, the head and the gates.
        vectors: in norms and biases.
    """

    experts: Counter[Shape] = field(default_factory=Counter)
    matrices: Counter[Shape] = field(default_factory=Counter)
    tables: int = 0
    vectors: int = 0

    @property
    def total(self) -> int:
        return self.experts.total() + self.matrices.total() + self.tables + self.vectors


def parameters_of(model: ModelConfig, vocab_size: int, mtp_modules: int) -> Parameters:
    """The parameters of a model with so many of its MTP modules (fine-tuning has none)."""
    width, dense = model.hidden_size, model.first_k_dense_replace
    sparse = model.num_hidden_layers - dense
    more_sparse, more_dense = (mtp_modules, 0) if sparse else (0, mtp_modules)
    sparse, dense = sparse + more_sparse, dense + more_dense
    found = Parameters()
    for shape in _attention(model):
        found.matrices[shape] += (dense + sparse) * shape[0] * shape[1]
    shared = model.moe_intermediate_size * model.n_shared_experts
    for blocks, hidden in ((dense, model.intermediate_size), (sparse, shared)):
        found.matrices[2 * hidden, width] += blocks * 2 * hidden * width
        found.matrices[width, hidden] += blocks * hidden * width
    experts, hidden = sparse * model.n_routed_experts, model.moe_intermediate_size
    found.experts[2 * hidden, width] += experts * 2 * hidden * width
    found.experts[width, hidden] += experts * hidden * width
    found.matrices[width, 2 * width] += mtp_modules * 2 * width * width
    tables = (1 if model.tie_word_embeddings else 2) * vocab_size * width + sparse * model.n_routed_experts * width
    vectors = (dense + sparse) * (2 * width + _attention_vectors(model)) + width * (1 + 3 * mtp_modules)
    return Parameters(found.experts, found.matrices, tables, vectors)


def _attention(model: ModelConfig) -> list[Shape]:
    """Shapes of a block's projections."""
    width, heads, head = model.hidden_size, model.num_attention_heads, model.head_width
    if model.attention == "gqa":
        each = (model.num_key_value_heads or heads) * head
        return [(heads * head, width), (each, width), (each, width), (width, heads * head)]
    rank, latent = model.q_lora_rank, model.kv_lora_rank
    query = [(heads * head, width)] if rank is None else [(rank, width), (heads * head, rank)]
    up = heads * (model.qk_nope_head_dim + model.v_head_dim)
    return [*query, (latent + model.qk_rope_head_dim, width), (up, latent), (width, heads * model.v_head_dim)]


def _attention_vectors(model: ModelConfig) -> int:
    if model.attention == "mla":
        return model.kv_lora_rank + (model.q_lora_rank or 0)
    biases = (model.num_attention_heads * model.head_width + model.cache_width) if model.qkv_bias else 0
    return biases + (2 * model.head_width if model.qk_norm else 0)


@dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank holds, by what they are for; on its device but for the last two.

    Attributes:
        weights: parameters, ZeRO 1 and 2's own copy of a rank's part, those that ZeRO 3 has whole for the time, and
            the copies that products in fewer bits take.
        gradients: with the buffer in which they are sent.
        moments: of the optimizer; average: of the weights.
        activations: of a micro-batch, with the head's gradient and a chunk of logits.
        step: what the optimizer's step holds for the time, when there are no activations.
        finished: the whole model, which the first rank reads when the training is done.
        offloaded: what lies in the host's memory instead.
        saving: a checkpoint's copy in the host's memory, while it is written.
    """

    weights: int
    gradients: int
    moments: int
    average: int
    activations: int
    step: int
    finished: int
    offloaded: int
    saving: int

    def most(self, device: str) -> int:
        """The most that is held at once on a `device` cpu or cuda.

        On a GPU the optimizer's step is made in the room that activations had. On a CPU that room is in small pieces of
        the C library's, which the step's large tensors do not fit: both count.
        """
        lasting = self.weights + self.gradients + self.moments + self.average
        passing = self.activations + self.step if device == "cpu" else max(self.activations, self.step)
        return lasting + max(passing, self.finished)

    @property
    def host(self) -> int:
        """What is held in the host's memory, where that is another than the device's."""
        return self.offloaded + self.saving


def training_memory(
    model: ModelConfig,
    vocab_size: int,
    optimizer: OptimizerConfig,
    place: Layout,
    layout: LayoutConfig,
    *,
    tokens: int,
    precision: Precision,
    device: str,
    mtp_modules: int,
    averaged: bool,
) -> RankMemory:
    """What a rank holds that trains on `tokens` tokens at once, on a `device` cpu or cuda."""
    found, stage = parameters_of(model, vocab_size, mtp_modules), layout.zero_stage
    apart = place.expert_parallel > 1  # experts that DeepSpeed does not know
    own = Parameters(experts=_divided(found.experts, place.expert_parallel)) if apart else Parameters()
    known = Parameters(Counter() if apart else found.experts, found.matrices, found.tables, found.vectors)
    part = -(-known.total // place.ranks) if stage else known.total
    bucket = min(known.total, LARGEST_BUCKET) if stage or place.ranks > 1 else 0
    copy = part if stage in (1, 2) else 0
    gathered = min(known.total, LARGEST_GATHERED) if stage == 3 else 0
    moments, own_moments = (_moments(p, optimizer) for p in (known, own))
    moments = -(-moments // place.ranks) if stage else moments
    average = FLOAT * part if averaged else 0

    # The optimizer's state under offload: a rank's own copy, its gradients and its moments; under ZeRO 3 the copy is
    # the parameters' own part only where these are offloaded as well.
    away = layout.offload != "none"
    state = (2 if stage in (1, 2) else 1) * FLOAT * part + FLOAT * part + moments + average if away else 0
    if away and stage < 3:
        copy = 0
    resident = part if stage == 3 else known.total
    if layout.offload == "parameters":
        state, resident = state + FLOAT * part, 0
    gradients = (0 if away else part) if stage >= 2 else known.total
    operands = 0 if layout.recompute != "none" else _operand_bytes(precision, device)
    products = found.matrices.total() + (own if apart else found).experts.total()
    saved = own_moments + (FLOAT * own.total) * (2 if averaged else 1)
    saved += -(-(known.total * FLOAT * (2 if averaged else 1) + _moments(known, optimizer)) // place.ranks)
    step = _step(known, own, optimizer, place.ranks if stage else 1, device)
    return RankMemory(
        weights=FLOAT * (resident + copy + gathered + own.total) + operands * products,
        gradients=FLOAT * (gradients + bucket + own.total),
        moments=(0 if away else moments) + own_moments,
        average=(0 if away else average) + (FLOAT * own.total if averaged else 0),
        activations=activations(model, tokens, layout, precision, device, mtp_modules)
        + _head(model, vocab_size, tokens, precision, device, mtp_modules),
        step=step + (FLOAT * part if stage in (1, 2) else 0),
        finished=FLOAT * found.total,
        offloaded=state,
        saving=saved,
    )


def _divided(numbers: Counter[Shape], among: int) -> Counter[Shape]:
    return Counter({shape: count // among for shape, count in numbers.items()})


def _moments(parameters: Parameters, optimizer: OptimizerConfig) -> int:
    """Bytes: Muon keeps one number a parameter, AdamW two."""
    hidden = parameters.experts.total() + parameters.matrices.total()
    of_hidden = 1 if optimizer.muon_learning_rate > 0 else 2
    size = 2 if optimizer.moments == "bfloat16" else FLOAT
    return size * (of_hidden * hidden + 2 * (parameters.tables + parameters.vectors))


def _step(known: Parameters, own: Parameters, optimizer: OptimizerConfig, shared_by: int, device: str) -> int:
    """Bytes of Muon's step: the momenta of whole matrices, and the largest stack of one shape while it is worked on."""
    if not optimizer.muon_learning_rate:
        return 0
    held = []
    for parameters, ranks in ((known, shared_by), (own, 1)):
        stacks = parameters.experts + parameters.matrices
        largest = max((_orthogonalising(shape, numbers, device) for shape, numbers in stacks.items()), default=0)
        held.append(stacks.total() + -(-largest // ranks))
    return FLOAT * max(held)


def _orthogonalising(shape: Shape, numbers: int, device: str) -> int:
    """Numbers that a Newton–Schulz iteration holds of a stack: of its own size, and of its matrices' products with it.

    In torch its polynomial takes three and four of them, its end five and two (`orthogonalised_reference`). Compiled,
    on a CPU, it is the stack and its factors, and of one matrix a thread two more and two products.
    """
    if device == "cpu":
        return 2 * numbers + 8 * shape[0] * shape[1]  # of two threads
    products = numbers * min(shape) // max(shape)
    return max(3 * numbers + 4 * products, 5 * numbers + 2 * products)


def _operand_bytes(precision: Precision, device: str) -> int:
    """Of a weight's copy in a product's own type, which its backward pass needs.

    A CPU rounds to bfloat16 as it packs, and has E4M3's values in float32.
    """
    if precision == "float32" or (precision == "bfloat16" and device == "cpu"):
        return 0
    return FLOAT if device == "cpu" else 2 if precision == "bfloat16" else 1


def _head(model: ModelConfig, vocab_size: int, tokens: int, precision: Precision, device: str, mtp_modules: int) -> int:
    """Bytes of each loss's input and gradients, which it makes in its forward pass, and of the logits of a chunk."""
    least, most = CHUNK_LOGITS[device]
    chunk = max(CHUNK_ROWS * vocab_size, min(most, max(least, tokens * vocab_size // CHUNK_SHARE)))
    size = FLOAT if device == "cpu" else result_bytes(precision, device)
    losses, width = 1 + mtp_modules, model.hidden_size
    kept = losses * width * (size * (vocab_size + tokens) + FLOAT * tokens)
    return kept + size * min(chunk, tokens * vocab_size)
