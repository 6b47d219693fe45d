"""A model in training: DeepSpeed's engine around it, laid out over ranks as asked, its optimizer and its state.

The layout decides where numbers lie and who adds them up, and so changes a result by rounding at most.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gristmill.model.config import LayoutConfig, OptimizerConfig
from gristmill.model.training.batches import Batches, TrainingBatch
from gristmill.model.training.checkpoints import Checkpoint, DamagedCheckpoint
from gristmill.model.training.objective import Objective
from gristmill.model.training.optimizers import MuonAdamW
from gristmill.model.training.partitions import tell_optimizer
from gristmill.model.training.recomputation import recompute_blocks
from gristmill.model.transformer import Transformer

Row = dict[str, Any]


def start_distributed(device: torch.device) -> tuple[int, int]:
    """(rank, ranks), with the process group up: NCCL on CUDA, gloo on CPU.

    DeepSpeed's shared-memory reduction is left out: it would be compiled on first use, 40 s and a C++ compiler for a
    reduction that gloo does as well at this size, and its sums would be in another order than gloo's.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    return dist.get_rank(), dist.get_world_size()


class Engine:
    """Takes steps: `accumulate` makes the gradient of a step's batch, `step` applies it.

    Raises:
        ValueError: the batch does not divide among ranks and micro-batches.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: OptimizerConfig,
        *,
        mtp_loss_weight: float,
        batch_sequences: int,
        layout: LayoutConfig,
    ) -> None:
        import deepspeed

        self.model, self.layout, self.clip = model, layout, optimizer.gradient_clip
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.micro_batches = layout.micro_batches
        parts = self.ranks * self.micro_batches
        if batch_sequences % parts:
            raise ValueError(
                f"batch_sequences {batch_sequences} does not divide among {self.ranks} ranks of "
                f"{self.micro_batches} micro-batches: choose a multiple of {parts}"
            )
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.shapes = {name: tuple(parameter.shape) for parameter, name in self.names.items()}
        self.optimizer = MuonAdamW(model.named_parameters(), optimizer)
        self.optimizer.admit = self._admit
        self.objective = Objective(model, mtp_loss_weight)
        if layout.recompute != "none":
            recompute_blocks(model, layout.recompute)
        self.engine, *_ = deepspeed.initialize(
            model=self.objective,
            optimizer=self.optimizer,
            config=self._described(batch_sequences // parts),
            dist_init_required=False,
        )
        if layout.zero_stage == 3:
            deepspeed.zero.register_external_parameter(self.objective, model.lm_head.weight)
        tell_optimizer(self.optimizer, self.engine, self.names)
        self.norm: float | None = None

    def _described(self, micro_batch: int) -> dict[str, Any]:
        """DeepSpeed's configuration. Clipping is ours, which records the norm and may leave a step out."""
        zero: dict[str, Any] = {"stage": self.layout.zero_stage}
        if self.layout.zero_stage == 3:
            # Vectors stay whole on each rank; a matrix is fetched when its module runs.
            zero["stage3_param_persistence_threshold"] = self.model.config.hidden_size
        if self.layout.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.layout.offload == "parameters":
            zero["offload_param"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": self.micro_batches,
            "gradient_clipping": 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
            "wall_clock_breakdown": False,
        }

    def accumulate(self, batches: Batches, step: int) -> Row:
        """Make the gradient of a step's batch; the parts of its loss, over all ranks, and the seconds spent on data.

        A micro-batch is to the batch what a rank's share is: `Batches.step` shares out among their product.
        """
        self.engine.train()
        self.objective.forget()
        found: list[dict[str, Tensor]] = []
        for part in range(self.micro_batches):
            if part:
                self.engine.step()  # not at a boundary: DeepSpeed counts the micro-batch
            share = batches.step(step, self.rank * self.micro_batches + part, self.ranks * self.micro_batches)
            loss, parts = self.engine(share)
            self.engine.backward(loss)
            found.append(parts)
        values = torch.stack([torch.stack([p.float() for p in parts.values()]) for parts in found]).mean(0)
        if self.ranks > 1:
            dist.all_reduce(values)
            values /= self.ranks
        return dict(zip(found[0], values.tolist(), strict=True))

    def step(self, scale: float, *, admitted: bool) -> bool:
        """Clip and apply the gradient, with this factor on the rates; or drop it. Whether it was applied.

        It is dropped where it is not `admitted` and where its norm, in `norm` afterwards, is not finite.
        """
        self.norm, self._admitted = None, admitted
        done = self.optimizer.steps_done
        self.optimizer.begin_step(scale)
        self.engine.step()
        if self.norm is None:  # DeepSpeed found the gradient infinite, and did not ask
            self.norm = math.inf
        return self.optimizer.steps_done > done

    def _admit(self) -> float | None:
        """What the gradient is multiplied by; none to drop it."""
        if self.layout.zero_stage == 0:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients, foreach=True)
        else:
            norm = torch.as_tensor(self.engine.optimizer._global_grad_norm)
        self.norm = float(norm)
        if not self._admitted or not math.isfinite(self.norm):
            return None
        return min(1.0, float(self.clip / (norm + 1e-6)))

    @torch.no_grad()
    def evaluate(self, batch: TrainingBatch) -> float:
        """Mean cross-entropy of a batch that every rank has; all ranks call it."""
        self.engine.eval()
        _, parts = self.engine(batch)
        self.engine.train()
        return float(parts["main_loss"])

    @torch.no_grad()
    def balance(self) -> Tensor | None:
        """Move the experts' biases by the step's load over all ranks; the load, (L, E), float32."""
        load_LE = self.objective.load_LE()
        if load_LE is None:
            return None
        load_LE = load_LE.float()
        if self.ranks > 1:
            dist.all_reduce(load_LE)
        for mixture, load_E in zip(self.model.mixtures(), load_LE, strict=False):
            mixture.update_bias(load_E)
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
        mine = self.layout.zero_stage == 0
        for i, (tensor, piece) in enumerate(self.optimizer.pieces()):
            if not mine or i % self.ranks == self.rank:
                yield "parameter", piece.name, piece.start, piece.of(tensor)
                for kind, moment in self.optimizer.state.get(tensor, {}).items():
                    yield kind, piece.name, piece.start, piece.of(moment)
        if self.rank == 0:
            for name, buffer in self.model.named_buffers():
                yield "buffer", name, 0, buffer

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Take up the state of a checkpoint, whatever layout wrote it.

        Raises:
            DamagedCheckpoint: it lacks numbers of a parameter.
        """

        def read(kind: str, name: str, start: int, stop: int) -> Tensor:
            found = checkpoint.read(kind, name, start, stop)
            if found is None:
                raise DamagedCheckpoint(f"{checkpoint.folder} has no {kind} {name}: it is of another model")
            return found

        for tensor, piece in self.optimizer.pieces():
            piece.of(tensor).copy_(read("parameter", piece.name, piece.start, piece.stop))
        for name, buffer in self.model.named_buffers():
            buffer.copy_(read("buffer", name, 0, buffer.numel()).view_as(buffer))
        self._spread(read)
        steps = checkpoint.state()["optimizer_steps"]
        self.optimizer.load_moments(lambda kind, p: checkpoint.read(kind, p.name, p.start, p.stop), steps)

    def _spread(self, read: Any) -> None:
        """Give the module the parameters that the optimizer's tensors hold now."""
        zero = self.engine.optimizer
        if self.layout.zero_stage in (1, 2):
            for parameter, name in self.names.items():
                parameter.data.copy_(read("parameter", name, 0, parameter.numel()).view_as(parameter))
        elif self.layout.zero_stage == 3:
            for group in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
