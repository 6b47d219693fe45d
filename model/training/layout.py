"""Which ranks share what: data, experts and positions laid over one row of ranks, checked before a process starts.

Rank r holds part r mod `sequence_parallel` of the sequences of data rank r div `sequence_parallel`, and part
r mod `expert_parallel` of the experts, so that both groups are neighbours (the GPUs of a node) and their copies lie
further apart. An expert group may hold several parts of one sequence: to an expert a token is a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gristmill.model.config import ModelConfig
from gristmill.model.nearest import either, neighbours
from gristmill.model.training.config import LayoutConfig

if TYPE_CHECKING:  # the layout is checked where torch is not imported
    from torch.distributed import ProcessGroup

COUNT_BYTES = 8  # of the number of rows that an expert is sent


@dataclass(frozen=True)
class Layout:
    """How many ranks share the experts of one copy of the model, and how many the positions of one sequence.

    Raises:
        ValueError: a number is below one, or does not divide the ranks.
    """

    ranks: int
    expert_parallel: int = 1
    sequence_parallel: int = 1
    micro_batches: int = 1
    nodes: int = 1

    @classmethod
    def of(cls, ranks: int, asked: LayoutConfig) -> Layout:
        """What a run's configuration asks for."""
        return cls(ranks, asked.expert_parallel, asked.sequence_parallel, asked.micro_batches, asked.nodes)

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"ranks {self.ranks} is less than one: choose 1 or more")
        for name in ("expert_parallel", "sequence_parallel", "nodes"):
            _refuse_unless_divisor(name, getattr(self, name), {"ranks": self.ranks})

    @property
    def shares(self) -> int:
        """Parts that a step's batch is cut into: the micro-batches of all data-parallel ranks."""
        return self.data_parallel * self.micro_batches

    @property
    def data_parallel(self) -> int:
        """Ranks among which the sequences of a step are shared out; each stands for `sequence_parallel` ranks."""
        return self.ranks // self.sequence_parallel

    def data_rank(self, rank: int) -> int:
        """Which share of a step's sequences a rank works on."""
        return rank // self.sequence_parallel

    def sequence_rank(self, rank: int) -> int:
        """Which part of the positions of these sequences it holds."""
        return rank % self.sequence_parallel

    def check(self, model: ModelConfig, sequence_length: int, batch_sequences: int) -> None:
        """Refuse a model and a batch that this layout cannot share out.

        Groups of experts need not lie whole on a rank: node-limited routing bounds what is sent, not what is computed.

        Raises:
            ValueError: experts, heads, positions or sequences do not divide, or the model has no experts to share, or
                several MTP modules' targets would fall to several micro-batches.
        """
        if self.expert_parallel > 1:
            if not mixtures(model):
                raise ValueError(
                    f"expert_parallel {self.expert_parallel} with a model of dense blocks alone "
                    f"(first_k_dense_replace {model.first_k_dense_replace}): there are no experts to share, set it to 1"
                )
            whole = {"ranks": self.ranks, "n_routed_experts": model.n_routed_experts}
            _refuse_unless_divisor("expert_parallel", self.expert_parallel, whole)
        if self.sequence_parallel > 1:
            heads = {"num_attention_heads": model.num_attention_heads}
            whole = {"ranks": self.ranks, **heads, "sequence_length": sequence_length}
            _refuse_unless_divisor("sequence_parallel", self.sequence_parallel, whole)
        if self.micro_batches > 1 and model.num_nextn_predict_layers > 1:
            raise ValueError(
                f"num_nextn_predict_layers {model.num_nextn_predict_layers} with micro_batches {self.micro_batches}: "
                f"how a step's targets fall to its micro-batches is known for one module alone; set one of them to 1"
            )
        if batch_sequences % self.shares:
            near = neighbours(batch_sequences, lambda n: n % self.shares == 0, batch_sequences + self.shares)
            raise ValueError(
                f"batch_sequences {batch_sequences} does not divide among {self.data_parallel} data-parallel ranks "
                f"({self.ranks} ranks, sequence_parallel {self.sequence_parallel}) of {self.micro_batches} "
                f"micro-batches: choose {either(near)}"
            )


@dataclass(frozen=True)
class Groups:
    """The process groups of one rank."""

    experts: ProcessGroup  # together they hold every expert once
    expert_replicas: ProcessGroup  # they hold the same experts
    sequence: ProcessGroup  # together they hold whole sequences


def groups(layout: Layout) -> Groups:
    """Build this rank's groups, on the default group's backend; every rank calls it once, at the start.

    Raises:
        ValueError: the layout is of another number of ranks than there are.
    """
    import torch.distributed as dist

    if layout.ranks != dist.get_world_size():
        raise ValueError(f"the layout has {layout.ranks} ranks and {dist.get_world_size()} run: let ranks agree")

    def made(members: list[list[int]]) -> ProcessGroup:
        own, _ = dist.new_subgroups_by_enumeration(members)
        assert isinstance(own, dist.ProcessGroup)  # every rank is a member of one
        return own

    return Groups(
        experts=made(_neighbours(layout.ranks, layout.expert_parallel)),
        expert_replicas=made(
            [list(range(i, layout.ranks, layout.expert_parallel)) for i in range(layout.expert_parallel)]
        ),
        sequence=made(_neighbours(layout.ranks, layout.sequence_parallel)),
    )


def mixtures(model: ModelConfig) -> int:
    """How many blocks have routed experts, those of the MTP modules among them."""
    own = model.num_hidden_layers - model.first_k_dense_replace
    return own + model.num_nextn_predict_layers if own else 0


def expert_bytes(model: ModelConfig, layout: Layout, tokens: int, element_bytes: int) -> int:
    """Bytes that a rank with `tokens` tokens sends a step to share the experts, forward and backward.

    Rows go out and come back, and so do their gradients; the load is taken to be even, as bias balancing makes it.
    """
    away = layout.expert_parallel - 1
    rows = tokens * model.num_experts_per_tok * away / layout.expert_parallel
    counts = model.n_routed_experts * away // layout.expert_parallel
    return mixtures(model) * (int(4 * rows * model.hidden_size * element_bytes) + counts * COUNT_BYTES)


def sequence_bytes(model: ModelConfig, layout: Layout, tokens: int, element_bytes: int) -> int:
    """Bytes that a rank with `tokens` tokens sends a step to share the attention of a sequence, forward and backward.

    The few sums of the balance loss are left out.
    """
    size, heads = layout.sequence_parallel, model.num_attention_heads
    own = model.num_key_value_heads or heads
    if model.attention == "mla":
        exchanged, gathered = heads * (model.head_width + model.v_head_dim), model.cache_width
    elif own % size == 0:
        exchanged, gathered = heads * 2 * model.head_width + model.cache_width, 0
    else:
        exchanged, gathered = heads * 2 * model.head_width, model.cache_width
    numbers = tokens * (exchanged * (size - 1) // size + gathered * (size - 1))
    return 2 * (model.num_hidden_layers + model.num_nextn_predict_layers) * numbers * element_bytes


def _neighbours(ranks: int, size: int) -> list[list[int]]:
    return [list(range(first, first + size)) for first in range(0, ranks, size)]


def _refuse_unless_divisor(name: str, value: int, whole: dict[str, int]) -> None:
    """Refuse a value that does not divide all of `whole`, naming the nearest that do."""
    wrong = next((key for key, number in whole.items() if value < 1 or number % value), None)
    if wrong is None:
        return
    common = math.gcd(*whole.values())
    near = neighbours(value, lambda n: common % n == 0, common)
    raise ValueError(f"{name} {value} does not divide {wrong} {whole[wrong]}: choose {either(near)}")
