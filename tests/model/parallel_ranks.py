"""What the ranks of test_parallel.py do: run as a script this file is the ranks."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gristmill.kernels.expert_rows import rows_by_expert
from gristmill.kernels.router import Routes
from gristmill.model.config import ModelConfig
from gristmill.model.training.batches import IGNORED, TrainingBatch, packed_inputs
from gristmill.model.training.config import OptimizerConfig, Precision
from gristmill.model.training.expert_parallel import (
    ShardedExperts,
    expert_parameters,
    reduce_expert_gradients,
    shard_experts,
)
from gristmill.model.training.layout import Groups, Layout, groups
from gristmill.model.training.optimizers import MuonAdamW
from gristmill.model.training.precision import apply_precision
from gristmill.model.training.sequence_parallel import (
    SequenceParallelGroupedAttention,
    SequenceParallelLatentAttention,
    SequenceParallelMixture,
    shard_sequences,
    split_sequence,
)
from gristmill.model.transformer import (
    Batch,
    Experts,
    GroupedQueryAttention,
    MixtureOfExperts,
    MultiHeadLatentAttention,
    Routing,
    Transformer,
    rotary_angles,
)

VOCAB, SEQUENCES, LENGTH, STEPS, MTP_WEIGHT = 64, 4, 16, 20, 0.3
SMALL = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=12, intermediate_size=48, n_routed_experts=4, moe_intermediate_size=24,
    balance_loss_alpha=0.1, initializer_range=0.1,
)  # fmt: skip
GQA = {"attention": "gqa", "qk_norm": True, "qkv_bias": True}
V2 = {"scoring_func": "softmax", "norm_topk_prob": False, "bias_update_speed": 0.0, "n_shared_experts": 0}


@dataclass(frozen=True)
class Case:
    """A layout, what its model has beyond `SMALL`, and the experts' biases where tokens are to be steered."""

    ranks: int
    experts: int = 1
    sequence: int = 1
    masked: bool = True
    bias: tuple[float, ...] = ()
    model: dict[str, Any] = field(default_factory=dict)
    precision: Precision = "float32"

    @property
    def layout(self) -> Layout:
        return Layout(self.ranks, self.experts, self.sequence)

    def transformer(self) -> Transformer:
        model = Transformer(ModelConfig.model_validate({**SMALL.model_dump(), **self.model}), VOCAB)
        model.initialise(1)
        for mixture in model.mixtures() if self.bias else []:
            mixture.gate.e_score_correction_bias.copy_(torch.tensor(self.bias))
        apply_precision(model, self.precision)
        return model


CASES = {
    "experts": Case(2, experts=2),
    "experts-in-groups": Case(2, experts=2, model={"n_routed_experts": 8, "n_group": 4, "topk_group": 2}),
    "experts-of-one-rank": Case(2, experts=2, bias=(-9.0, -9.0, 9.0, 9.0)),
    "experts-idle": Case(2, experts=2, bias=(9.0, -9.0, -9.0, 9.0)),
    "experts-softmax": Case(2, experts=2, model={**V2, "num_experts_per_tok": 3}),
    "sequence": Case(2, sequence=2, model={"q_lora_rank": 20}),
    "sequence-causal": Case(2, sequence=2, masked=False),
    "sequence-gqa": Case(2, sequence=2, model={**GQA, "num_key_value_heads": 2}),
    "sequence-gqa-one-head": Case(2, sequence=2, model={**GQA, "num_key_value_heads": 1}),
    "both": Case(2, experts=2, sequence=2),
    "experts-replicas-sequence": Case(4, experts=2, sequence=2),
    "experts-sequence-crossed": Case(4, experts=4, sequence=2, masked=False),
    "sequence-of-four-gqa": Case(4, experts=2, sequence=4, model={**GQA, "num_key_value_heads": 2}),
}
# All experts are chosen by every token, so that a rounded affinity changes no choice.
ROUNDED = {
    f"{name}-{precision}": Case(2, **layout, model={"num_experts_per_tok": 4}, precision=precision)
    for name, layout in {
        "experts": {"experts": 2},
        "sequence": {"sequence": 2},
        "both": {"experts": 2, "sequence": 2},
    }.items()
    for precision in ("bfloat16", "fp8")
}
TWO = [name for name, case in CASES.items() if case.ranks == 2]
FOUR = [name for name, case in CASES.items() if case.ranks == 4]
TRAINED = ("experts", "both")
LONG, LONG_CASE = 8192, Case(2, sequence=2, model={"num_experts_per_tok": 4})  # all experts, as in ROUNDED


def whole_batch(case: Case, step: int = 0) -> TrainingBatch:
    """Two documents a sequence; targets are left out unevenly, so that ranks weigh unequally."""
    torch.manual_seed(100 + step)
    token = torch.randint(0, VOCAB, (SEQUENCES, LENGTH + 2))
    target, after = token[:, 1:-1].clone(), token[:, 2:].clone()
    target[0, :9], after[0, :8], target[2, 3:], after[2, 3:] = (IGNORED,) * 4
    cut = torch.randint(1, LENGTH, (SEQUENCES, 1))
    document = (torch.arange(LENGTH) >= cut).long()
    if case.masked:
        inputs = packed_inputs(token[:, :-2], document)
    else:
        inputs = Batch(token[:, :-2], torch.arange(LENGTH).expand(SEQUENCES, -1), None)
    return TrainingBatch(inputs, target, after, torch.rand(SEQUENCES, LENGTH) + 0.5)


def shared_out(batch: TrainingBatch, layout: Layout, rank: int) -> TrainingBatch:
    """A rank's sequences, as the sources of batches share them out, and of these its positions."""
    count, ranks, assigned = SEQUENCES // layout.data_parallel, layout.data_parallel, layout.data_rank(rank)
    mine, next_target = slice(assigned * count, (assigned + 1) * count), batch.next_target_BS
    assert next_target is not None

    def share(target: Tensor) -> float:
        weight = batch.weight_BS * (target >= 0)
        return float(weight[mine].sum() * ranks / weight.sum())

    first = batch.inputs.first_BS
    inputs = Batch(batch.inputs.token_BS[mine], batch.inputs.position_BS[mine], None if first is None else first[mine])
    rows = TrainingBatch(
        inputs, batch.target_BS[mine], next_target[mine], batch.weight_BS[mine],
        share(batch.target_BS), share(next_target),
    )  # fmt: skip
    return split_sequence(rows, layout.sequence_rank(rank), layout.sequence_parallel)


def loss_of(model: Transformer, batch: TrainingBatch, routing: Routing) -> Tensor:
    main, ahead = model.losses(batch.inputs, batch.target_BS, batch.next_target_BS, batch.weight_BS, routing)
    loss = main * batch.share + MTP_WEIGHT * ahead[0] * batch.next_share
    return loss + torch.stack(routing.balance_loss).sum()


@contextmanager
def choices_of(model: Transformer) -> Iterator[list[Tensor]]:
    """The experts that each gate chose, ascending for each token."""
    found: list[Tensor] = []
    hooks = [
        m.gate.register_forward_hook(lambda _m, _i, out: found.append(out[0].sort(-1)[0])) for m in model.mixtures()
    ]
    yield found
    for hook in hooks:
        hook.remove()


def rank_main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", init_method=f"file://{folder / f'store-{ranks}'}", rank=rank, world_size=ranks)
    for name in TWO if ranks == 2 else FOUR:
        save_file(one_step(CASES[name], rank), folder / f"{name}-{rank}.safetensors")
    if ranks == 2:
        for name, case in ROUNDED.items():
            save_file(one_step(case, rank), folder / f"{name}-{rank}.safetensors")
        made = groups(Layout(2, 2, 2))
        save_file(exact_experts(rank, made), folder / f"exact-experts-{rank}.safetensors")
        save_file(exact_attention(rank, made), folder / f"exact-attention-{rank}.safetensors")
        for name in TRAINED:
            save_file(twenty_steps(CASES[name], rank), folder / f"trained-{name}-{rank}.safetensors")
        save_file(bytes_sent(rank), folder / f"bytes-{rank}.safetensors")
        save_file(long_step(rank), folder / f"long-{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def parallel(case: Case, made: Groups) -> Transformer:
    model = case.transformer()
    shard_experts(model, made.experts)
    shard_sequences(model, made.sequence)
    return model


def one_step(case: Case, rank: int) -> dict[str, Tensor]:
    """Loss over all ranks, every gradient as the optimizer would see it, this rank's choices and load."""
    made = groups(case.layout)
    model, routing = parallel(case, made), Routing()
    with choices_of(model) as choices:
        loss = loss_of(model, shared_out(whole_batch(case), case.layout, rank), routing)
    loss.backward()
    average_gradients(model, made, case.ranks)
    whole = loss.detach().clone()
    dist.all_reduce(whole)
    pieces = {piece.name: torch.tensor([piece.start, piece.stop]) for piece in expert_parameters(model).values()}
    return {
        "loss": whole / case.ranks,
        "balance": torch.stack(routing.balance_loss).sum().detach(),
        **{f"choice/{i}": c for i, c in enumerate(choices)},
        **{f"load/{i}": load for i, load in enumerate(routing.load_LE)},
        **{f"range/{name}": ends for name, ends in pieces.items()},
        **{f"gradient/{n}": p.grad for n, p in model.named_parameters() if p.grad is not None},
    }


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation gave."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.bytes = max(self.bytes, *found, 0)
        return out


def long_step(rank: int | None) -> dict[str, Tensor]:
    """A step on one sequence of documents of a hundred positions on average: one of two ranks, or all of it on one."""
    torch.manual_seed(10)
    token, document = torch.randint(0, VOCAB, (1, LONG + 2)), (torch.rand(1, LONG) < 0.01).cumsum(1)
    inputs, weight = packed_inputs(token[:, :-2], document), torch.ones(1, LONG)
    batch = TrainingBatch(inputs, token[:, 1:-1], token[:, 2:], weight)
    if rank is None:
        made, model = None, LONG_CASE.transformer()
    else:
        made = groups(LONG_CASE.layout)
        model, batch = parallel(LONG_CASE, made), split_sequence(batch, rank, 2)
    with Largest() as largest:
        loss = loss_of(model, batch, Routing())
        loss.backward()
    if made is not None:
        average_gradients(model, made, LONG_CASE.ranks)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "largest": torch.tensor(largest.bytes), **gradients}


def average_gradients(model: Transformer, made: Groups, ranks: int) -> None:
    parts = expert_parameters(model)
    reduce_expert_gradients(parts, made.expert_replicas)
    for parameter in model.parameters():
        if parameter not in parts and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks


def twenty_steps(case: Case, rank: int) -> dict[str, Tensor]:
    made = groups(case.layout)
    model = parallel(case, made)
    losses = train(model, case, lambda batch: shared_out(batch, case.layout, rank), made)
    return {"loss": losses, **{name: p.detach() for name, p in model.named_parameters()}}


def train(model: Transformer, case: Case, share: Any, made: Groups | None) -> Tensor:
    """Losses over all ranks of `STEPS` steps, with the experts' biases moved."""
    optimizer, losses = MuonAdamW(model.named_parameters(), OptimizerConfig()), []
    for step in range(STEPS):
        optimizer.zero_grad()
        routing = Routing()
        loss = loss_of(model, share(whole_batch(case, step % 4)), routing)
        loss.backward()
        load, loss = torch.stack(routing.load_LE), loss.detach()
        if made is not None:
            average_gradients(model, made, case.ranks)
            dist.all_reduce(load)
            dist.all_reduce(loss)
            loss = loss / case.ranks
        optimizer.begin_step(1.0)
        optimizer.step()
        for mixture, load_E in zip(model.mixtures(), load, strict=True):
            mixture.update_bias(load_E)
        losses.append(loss)
    return torch.stack(losses)


def expert_inputs() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Rows, choices and gates of 12 tokens; float64."""
    torch.manual_seed(5)
    tokens, chosen = 12, 2
    some = torch.stack([torch.randperm(SMALL.n_routed_experts)[:chosen] for _ in range(tokens)])
    choices = {
        "mixed": some,
        "first rank alone": torch.tensor([[0, 1]]).repeat(tokens, 1),
        "second rank alone": torch.tensor([[3, 2]]).repeat(tokens, 1),
        "an expert each": torch.tensor([[3, 0]]).repeat(tokens, 1),
        "all at home": torch.tensor([[1, 0]] * 5 + [[2, 3]] * 7),
        "all away": torch.tensor([[2, 3]] * 5 + [[1, 0]] * 7),
        "no tokens on the first rank": some,
    }
    draw = [torch.randn(tokens, SMALL.hidden_size).double(), torch.rand(tokens, chosen).double()]
    return {name: (draw[0], choice, draw[1]) for name, choice in choices.items()}


def whole_experts(dtype: torch.dtype) -> Experts:
    torch.manual_seed(6)
    experts = Experts(SMALL)
    torch.nn.init.normal_(experts.gate_up_proj, std=0.3)
    torch.nn.init.normal_(experts.down_proj, std=0.3)
    return experts.to(dtype)


def through(experts: torch.nn.Module, x: Tensor, choice: Tensor, gate: Tensor) -> dict[str, Tensor]:
    """Output and all gradients of the sum of squares of the output."""
    x, gate = x.clone().requires_grad_(), gate.clone().requires_grad_()
    load = torch.bincount(choice.reshape(-1), minlength=SMALL.n_routed_experts)
    affinities = torch.empty(0)  # of which experts know nothing
    out = experts(x, Routes(choice, gate, affinities, load, rows_by_expert(choice), load.cumsum(0)))
    experts.zero_grad()
    out.square().sum().backward()
    assert x.grad is not None
    assert gate.grad is not None
    weights = {name: p.grad.clone() for name, p in experts.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, "gate": gate.grad, **weights}


def exact_experts(rank: int, made: Groups) -> dict[str, Tensor]:
    found = {}
    for dtype in (torch.float64, torch.bfloat16):
        sharded = ShardedExperts(whole_experts(dtype), made.experts)
        for name, (x, choice, gate) in expert_inputs().items():
            first = 0 if name == "no tokens on the first rank" else 5
            mine = slice(0, first) if rank == 0 else slice(first, 12)
            ran = through(sharded, x[mine].to(dtype), choice[mine], gate[mine].to(dtype))
            found |= {f"{dtype}/{name}/{key}": value for key, value in ran.items()}
    return found


ATTENTIONS = {
    "mla": {"q_lora_rank": 20},
    "gqa": {**GQA, "num_key_value_heads": 4},
    "gqa two heads": {**GQA, "num_key_value_heads": 2},
    "gqa one head": {**GQA, "num_key_value_heads": 1},
}


def attention(name: str) -> torch.nn.Module:
    config = ModelConfig.model_validate({**SMALL.model_dump(), **ATTENTIONS[name]})
    module = (MultiHeadLatentAttention if config.attention == "mla" else GroupedQueryAttention)(config)
    torch.manual_seed(7)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.double()


def attended(module: torch.nn.Module, x: Tensor, batch: TrainingBatch) -> dict[str, Tensor]:
    """As `through`, of attention; the gradients of weights."""
    x = x.clone().requires_grad_()
    config = module.config
    assert isinstance(config, ModelConfig)
    out = module(x, rotary_angles(config, batch.inputs.position_BS), batch.inputs.first_BS)
    out.square().sum().backward()
    assert x.grad is not None
    return {"out": out.detach(), "x": x.grad, **{n: p.grad for n, p in module.named_parameters() if p.grad is not None}}


def attention_inputs(masked: bool) -> tuple[Tensor, TrainingBatch]:
    torch.manual_seed(8)
    x = torch.randn(SEQUENCES, LENGTH, SMALL.hidden_size).double()
    return x, whole_batch(Case(2, masked=masked))


def scores() -> tuple[Tensor, Tensor]:
    torch.manual_seed(9)
    tokens = SEQUENCES * LENGTH
    return torch.rand(tokens, 4).double(), torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])


def balanced(mixture: MixtureOfExperts, score: Tensor, choice: Tensor) -> dict[str, Tensor]:
    score = score.clone().requires_grad_()
    loss = mixture.balance_loss(score, choice, SEQUENCES)
    loss.backward()
    assert score.grad is not None
    return {"out": loss.detach()[None], "x": score.grad}


def split_attention(whole: torch.nn.Module, made: Groups) -> torch.nn.Module:
    if isinstance(whole, MultiHeadLatentAttention):
        return SequenceParallelLatentAttention(whole, made.sequence)
    assert isinstance(whole, GroupedQueryAttention)
    return SequenceParallelGroupedAttention(whole, made.sequence)


def exact_attention(rank: int, made: Groups) -> dict[str, Tensor]:
    own, found = slice(rank * LENGTH // 2, (rank + 1) * LENGTH // 2), {}
    for masked in (True, False):
        x, batch = attention_inputs(masked)
        for name in ATTENTIONS:
            ran = attended(split_attention(attention(name), made), x[:, own], split_sequence(batch, rank, 2))
            found |= {f"{name}/{masked}/{key}": value for key, value in ran.items()}
    score, choice = (part.view(SEQUENCES, LENGTH, -1)[:, own].flatten(0, 1) for part in scores())
    ran = balanced(SequenceParallelMixture(MixtureOfExperts(SMALL), made.sequence), score, choice)
    return {
        name: value.contiguous() for name, value in {**found, **{f"balance/{k}": v for k, v in ran.items()}}.items()
    }


def bytes_sent(rank: int) -> dict[str, Tensor]:
    """What a step hands to the rows' and positions' exchanges for other ranks; every expert is chosen by all tokens."""
    found = {}
    for name, more in (
        ("mla", {}),
        ("gqa", {**GQA, "num_key_value_heads": 2}),
        ("one", {**GQA, "num_key_value_heads": 1}),
    ):
        case = Case(2, experts=2, sequence=2, model={**more, "num_experts_per_tok": 4, "balance_loss_alpha": 0.0})
        model = parallel(case, groups(case.layout))
        with counted(dist) as sent:
            loss = main_loss(model, shared_out(whole_batch(case), case.layout, rank))
            loss.backward()
        found[name] = torch.tensor(sum(sent))
    return found


def main_loss(model: Transformer, batch: TrainingBatch) -> Tensor:
    main, ahead = model.losses(batch.inputs, batch.target_BS, batch.next_target_BS, batch.weight_BS, Routing())
    return main + ahead[0]


@contextmanager
def counted(module: Any) -> Iterator[list[int]]:
    """Bytes for the other of two ranks in each exchange: its rows of an all-to-all, a gathered part, a part to add."""
    sent: list[int] = []
    exchange, gather, scatter = module.all_to_all_single, module.all_gather, module.reduce_scatter

    def exchanging(out: Tensor, given: Tensor, receive: Any = None, send: Any = None, **more: Any) -> Any:
        parts = given.split(send) if send else given.chunk(2)
        sent.append(parts[1 - dist.get_rank()].nbytes)
        return exchange(out, given, receive, send, **more)

    def gathering(out: list[Tensor], given: Tensor, **more: Any) -> Any:
        sent.append(given.nbytes)
        return gather(out, given, **more)

    def scattering(out: Tensor, given: list[Tensor], **more: Any) -> Any:
        sent.append(given[1 - dist.get_rank()].nbytes)
        return scatter(out, given, **more)

    module.all_to_all_single, module.all_gather, module.reduce_scatter = exchanging, gathering, scattering
    try:
        yield sent
    finally:
        module.all_to_all_single, module.all_gather, module.reduce_scatter = exchange, gather, scatter


def fork_ranks(ranks: int, folder: Path) -> int:
    """The ranks as copies of this process, which has imported torch and done nothing; how many failed."""
    copies = multiprocessing.get_context("fork")
    processes = [copies.Process(target=rank_main, args=(rank, ranks, folder), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    ends = {process.sentinel for process in processes}
    while ends:  # one that fails leaves the others waiting for it
        ends -= set(wait(ends))
        if any(process.exitcode for process in processes):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(fork_ranks(int(sys.argv[1]), Path(sys.argv[2])))
