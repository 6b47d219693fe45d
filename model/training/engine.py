"""A model in training: DeepSpeed's engine around it, laid out over ranks as asked, its optimizer and its state.

The layout decides where numbers lie and who adds them up, and so changes a result by rounding at most.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gristmill.model.signs_of_life import unwatched
from gristmill.model.training.batches import Batches, TrainingBatch
from gristmill.model.training.checkpoints import Checkpoint
from gristmill.model.training.config import LayoutConfig, OptimizerConfig
from gristmill.model.training.ema import WeightAverage
from gristmill.model.training.expert_parallel import expert_parameters, reduce_expert_gradients, shard_experts
from gristmill.model.training.fused import fused_of
from gristmill.model.training.gradient_norms import GradientSquares, group_of, norms_by_group
from gristmill.model.training.layout import Layout, groups
from gristmill.model.training.memory import LARGEST_BUCKET
from gristmill.model.training.objective import Objective
from gristmill.model.training.optimizers import MuonAdamW, Piece
from gristmill.model.training.partitions import tell_optimizer
from gristmill.model.training.recomputation import recompute_blocks
from gristmill.model.training.sequence_parallel import shard_sequences, split_sequence
from gristmill.model.transformer import Transformer

Row = dict[str, Any]
LONGEST_WAIT = timedelta(days=1)


def backend_of(device: torch.device) -> str:
    """What ranks talk over: NCCL on CUDA, gloo on a CPU."""
    return "nccl" if device.type == "cuda" else "gloo"


def start_distributed(device: torch.device) -> tuple[int, int]:
    """(rank, ranks), with the process group up, by `backend_of`; on CUDA each rank has a device of its own.

    A rank that hangs is noticed by the job's launcher; the group's own limit would end ranks that rightly wait.

    DeepSpeed's shared-memory reduction is left out: it would be compiled on first use, 40 s and a C++ compiler for a
    reduction that gloo does as well at this size, and its sums would be in another order than gloo's.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = backend_of(device)
    if not dist.is_initialized() and os.environ["WORLD_SIZE"] == "1":  # there is nobody to meet
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    elif not dist.is_initialized():
        deepspeed.init_distributed(backend, verbose=False, timeout=LONGEST_WAIT)
    return dist.get_rank(), dist.get_world_size()


class Engine:
    """Takes steps: `accumulate` makes the gradient of a step's batch, `step` applies it.

    Of the last step it tells `norm` and `norms` of the gradient (of all, and `grad_norm.<group>`), the `tokens` of all
    ranks, padding included, their `sequence_length`, and the `data_seconds` that this rank waited for its batches.

    Experts that are shared out (`expert_parallel`) are hidden from DeepSpeed, which would average their gradients over
    all ranks: they have an optimizer of their own, and whole moments on each rank that holds them.

    `Layout.check` says whether a model and its batch can be laid out so.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: OptimizerConfig,
        *,
        mtp_loss_weight: float,
        batch_sequences: int,
        layout: LayoutConfig,
        alive: Callable[[], None] = unwatched,
        ema_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        """`alive` is called at every batch, so that a rank that hangs can be told from one that works.

        `seed` is that of moments' stochastic rounding, 0 to 2⁶³ − 1.
        """
        import deepspeed

        self.model, self.layout, self.clip, self.alive = model, layout, optimizer.gradient_clip, alive
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.place = Layout.of(self.ranks, layout)
        self.shares = self.place.shares
        self.groups = groups(self.place) if self.ranks > 1 else None
        self.experts = self._share_out()
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self.fused = fused_of(optimizer, model.config)
        self.optimizer = MuonAdamW(model.named_parameters(), optimizer, self.fused, seed)
        self.optimizer.admit = self._admit
        self.expert_optimizer = self._of_experts(optimizer, seed) if self.experts else None
        self.objective = Objective(model, mtp_loss_weight)
        if layout.recompute != "none":
            recompute_blocks(model, layout.recompute)
        self.engine: Any = deepspeed.initialize(
            model=self.objective,
            optimizer=self.optimizer,
            config=self._described(batch_sequences // self.shares),
            dist_init_required=False,
        )[0]
        if self.ranks == 1 and layout.zero_stage == 0:
            self.engine.enable_backward_allreduce = False  # a copy of all gradients, to no end
        if layout.zero_stage == 3:
            deepspeed.zero.register_external_parameter(self.objective, model.lm_head.weight)
        tell_optimizer(self.optimizer, self.engine, self.names)
        self.norm: float | None = None
        self.norms: Row = {}
        self._squares = [GradientSquares() for _ in self._optimizers()]
        for watched, squares in zip(self._optimizers(), self._squares, strict=True):
            watched.watch = squares.add
        names = (*self.names.values(), *(piece.name for piece in self.experts.values()))
        self._present = {group_of(name) for name in names}
        self.tokens, self.sequence_length, self.data_seconds = 0, 0, 0.0
        updated = dict.fromkeys(tensor for tensor, _ in self._pieces())
        self.average = WeightAverage([*updated, *model.buffers()], ema_decay) if ema_decay else None

    def _share_out(self) -> dict[nn.Parameter, Piece]:
        """Share experts and sequences among the ranks; this rank's experts, which the modules no longer register."""
        if self.groups is None:
            return {}
        shard_experts(self.model, self.groups.experts)
        shard_sequences(self.model, self.groups.sequence)
        own = expert_parameters(self.model)
        for parameter, piece in own.items():
            module, _, name = piece.name.rpartition(".")
            holder = self.model.get_submodule(module)
            del holder._parameters[name]
            holder.__dict__[name] = parameter
        return own

    def _of_experts(self, config: OptimizerConfig, seed: int) -> MuonAdamW:
        named = ((piece.name, parameter) for parameter, piece in self.experts.items())
        made = MuonAdamW(named, config, self.fused, seed)
        made.admit = lambda: self._coefficient
        for group in made.param_groups:
            group["pieces"] = {parameter: (self.experts[parameter],) for parameter in group["pieces"]}
        return made

    def _pieces(self) -> Iterator[tuple[Tensor, Piece]]:
        for optimizer in self._optimizers():
            yield from optimizer.pieces()

    def _optimizers(self) -> list[MuonAdamW]:
        return [self.optimizer] if self.expert_optimizer is None else [self.optimizer, self.expert_optimizer]

    def _described(self, micro_batch: int) -> dict[str, Any]:
        """DeepSpeed's configuration. Clipping is ours, which records the norm and may leave a step out."""
        whole = sum(parameter.numel() for parameter in self.model.parameters())
        zero: dict[str, Any] = {"stage": self.layout.zero_stage}
        # ZeRO makes a buffer of this size at every step, for gradients on their way.
        zero["reduce_bucket_size"] = min(whole, LARGEST_BUCKET)
        if self.layout.zero_stage == 3:
            # Vectors stay whole on each rank; a matrix is fetched when its module runs.
            zero["stage3_param_persistence_threshold"] = self.model.config.hidden_size
        if self.layout.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.layout.offload == "parameters":
            zero["offload_param"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": self.layout.micro_batches,
            "gradient_clipping": 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
            "wall_clock_breakdown": False,
        }

    def accumulate(self, batches: Batches, step: int, mtp_scale: float = 1.0) -> Row:
        """Make the gradient of a step's batch, with this factor on the MTP weight; its loss's parts, over all ranks.

        A micro-batch is a share of the batch as a rank's is: `Batches.step` shares out among their product.
        """
        self.engine.train()
        self.objective.begin_step(mtp_scale)
        found: list[dict[str, Tensor]] = []
        first = self.place.data_rank(self.rank) * self.layout.micro_batches
        self.tokens, self.data_seconds = 0, 0.0
        for part in range(self.layout.micro_batches):
            if part:
                self.engine.step()  # not at a boundary: DeepSpeed counts the micro-batch
            self.alive()
            batch = self._fetched(batches, step, first + part)
            self.alive()
            loss, parts = self.engine(self._own_positions(batch))
            self.engine.backward(loss)
            found.append(parts)
            self.alive()
        if self.groups is not None:
            reduce_expert_gradients(self.experts, self.groups.expert_replicas)
        values = torch.stack([torch.stack([p.float() for p in parts.values()]) for parts in found]).mean(0)
        if self.ranks > 1:
            dist.all_reduce(values)
            values /= self.ranks
        return dict(zip(found[0], values.tolist(), strict=True))

    def _fetched(self, batches: Batches, step: int, share: int) -> TrainingBatch:
        """A micro-batch, with what it adds to the step's tokens and wait noted."""
        began = time.perf_counter()
        batch = batches.step(step, share, self.shares)
        self.data_seconds += time.perf_counter() - began
        self.tokens += batch.target_BS.numel() * self.place.data_parallel
        self.sequence_length = batch.target_BS.shape[1]
        return batch

    def _own_positions(self, batch: TrainingBatch) -> TrainingBatch:
        size = self.layout.sequence_parallel
        return batch if size == 1 else split_sequence(batch, self.place.sequence_rank(self.rank), size)

    def step(self, scale: float, *, admitted: bool) -> bool:
        """Clip and apply the gradient, with this factor on the rates; or drop it. Whether it was applied.

        It is dropped where it is not `admitted` and where its norm, in `norm` afterwards, is not finite.
        """
        self.alive()
        self.norm, self._admitted, self._coefficient = None, admitted, None
        for squares in self._squares:
            squares.begin()
        done = self.optimizer.steps_done
        self.optimizer.begin_step(scale)
        self.engine.step()
        asked = self.norm is not None
        if self.norm is None:  # DeepSpeed found the gradient infinite, and did not ask
            self.norm = math.inf
        if self.expert_optimizer is not None:
            self.expert_optimizer.begin_step(scale)
            self.expert_optimizer.step()
            self.expert_optimizer.zero_grad()
        self.norms = self._norms_by_group() if asked else {}
        return self.optimizer.steps_done > done

    def _norms_by_group(self) -> Row:
        """Norms of the gradient as the optimizers took it up: under ZeRO each rank holds other numbers of it."""
        copies = [self.ranks if self.layout.zero_stage == 0 else 1]
        if self.groups is not None and self.expert_optimizer is not None:
            copies.append(self.groups.expert_replicas.size())
        held = zip(self._squares, copies, strict=True)
        return norms_by_group(held, self._present, torch.device(self.engine.device), self.ranks)

    def _admit(self) -> float | None:
        """What the gradient is multiplied by; none to drop it."""
        if self.layout.zero_stage == 0:
            sums = self._squares[0].sums
            norm = torch.zeros(()) if sums is None else sums.sum().sqrt()
        else:
            norm = torch.as_tensor(self.engine.optimizer._global_grad_norm)
        if self.experts:
            assert self.groups is not None
            own = nn.utils.get_total_norm([p.grad for p in self.experts if p.grad is not None], foreach=True) ** 2
            dist.all_reduce(own, group=self.groups.experts)
            norm = (norm.to(own) ** 2 + own).sqrt()
        self.norm = float(norm)
        if self._admitted and math.isfinite(self.norm):
            self._coefficient = min(1.0, float(self.clip / (norm + 1e-6)))
        return self._coefficient

    @torch.no_grad()
    def evaluate(self, batch: TrainingBatch) -> float:
        """Mean cross-entropy of this rank's batch, which ranks that share its positions have too; all ranks call it."""
        self.alive()
        self.engine.eval()
        _, parts = self.engine(self._own_positions(batch))
        self.engine.train()
        loss = parts["main_loss"].float()
        if self.groups is not None and self.layout.sequence_parallel > 1:
            dist.all_reduce(loss, group=self.groups.sequence)
            loss /= self.layout.sequence_parallel
        return float(loss)

    def over_sequences(self, own: Tensor) -> Tensor:
        """The sum of what each data-parallel rank has found on its sequences, on the CPU; all ranks call it."""
        if self.ranks == 1:
            return own
        whole = own.to(self.engine.device)
        dist.all_reduce(whole)
        return (whole / self.layout.sequence_parallel).cpu()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the weights are their average; all ranks enter it."""
        assert self.average is not None
        self.average.swap()
        self._spread()
        try:
            yield
        finally:
            self.average.swap()
            self._spread()

    @torch.no_grad()
    def balance(self, scale: float = 1.0) -> Tensor | None:
        """End a step that was taken: move the experts' biases by its load over all ranks, and follow with the average.

        `scale` is on the biases' speed. Returns the load, (L, E), float32; none in a dense model.
        """
        load_LE = self.objective.load_LE()
        if load_LE is not None:
            load_LE = load_LE.float()
            if self.ranks > 1:
                dist.all_reduce(load_LE)
            for mixture, load_E in zip(self.model.mixtures(), load_LE, strict=False):
                mixture.update_bias(load_E, scale)
        if self.average is not None:
            self.average.update()
        return load_LE

    def agree(self, own: bool) -> bool:
        """Whether this is so on all ranks."""
        if self.ranks == 1:
            return own
        found = torch.tensor([float(own)], device=self.engine.device)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return bool(found)

    def tensors(self) -> Iterator[tuple[str, str, int, Tensor]]:
        """What this rank saves: (kind, name, first number, numbers). Every number is saved by one rank."""
        for optimizer, tensor, piece in self._own_pieces():
            kinds = {"parameter": tensor, **optimizer.state.get(tensor, {})}
            if self.average is not None:
                kinds["average"] = self.average.average[tensor]
            for kind, numbers in kinds.items():
                yield kind, piece.name, piece.start, piece.of(numbers)
        if self.rank == 0:
            for name, buffer in self.model.named_buffers():
                yield "buffer", name, 0, buffer
                if self.average is not None:
                    yield "average", name, 0, self.average.average[buffer]

    def _own_pieces(self) -> Iterator[tuple[MuonAdamW, Tensor, Piece]]:
        """Pieces that no other rank saves: where all have the same, they are shared out."""
        whole = self.layout.zero_stage == 0
        for i, (tensor, piece) in enumerate(self.optimizer.pieces()):
            if not whole or i % self.ranks == self.rank:
                yield self.optimizer, tensor, piece
        if self.expert_optimizer is not None and self.groups is not None and self.groups.expert_replicas.rank() == 0:
            for tensor, piece in self.expert_optimizer.pieces():
                yield self.expert_optimizer, tensor, piece

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Take up the state of a checkpoint, whatever layout wrote it.

        Raises:
            DamagedCheckpoint: it lacks numbers of a parameter.
        """

        def read(kind: str, name: str, start: int, stop: int) -> Tensor:
            self.alive()
            return checkpoint.read(kind, name, start, stop)

        def moment(kind: str, piece: Piece) -> Tensor | None:
            self.alive()
            return checkpoint.find(kind, piece.name, piece.start, piece.stop)

        average, steps = self.average, checkpoint.state()["optimizer_steps"]
        if average is not None:
            average.updates = steps
        for tensor, piece in self._pieces():
            piece.of(tensor).copy_(read("parameter", piece.name, piece.start, piece.stop))
            if average is not None:
                piece.of(average.average[tensor]).copy_(read("average", piece.name, piece.start, piece.stop))
        for name, buffer in self.model.named_buffers():
            buffer.copy_(read("buffer", name, 0, buffer.numel()).view_as(buffer))
            if average is not None:
                average.average[buffer].copy_(read("average", name, 0, buffer.numel()).view_as(buffer))
        self._spread()
        for optimizer in self._optimizers():
            optimizer.load_moments(moment, steps)

    @torch.no_grad()
    def _spread(self) -> None:
        """Give the module the parameters that the optimizer's tensors hold now."""
        zero = self.engine.optimizer
        if self.layout.zero_stage in (1, 2):
            for flat, own, group in zip(
                zero.bit16_groups_flat, zero.single_partition_of_fp32_groups, zero.real_dp_process_group, strict=True
            ):
                dist.all_gather_into_tensor(flat.data, own.detach().to(flat), group=group)
        elif self.layout.zero_stage == 3:
            for group in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
