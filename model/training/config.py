"""What is asked of pretraining, context extension and fine-tuning, and how they are laid out over processes."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from gristmill.model.batch_sizes import BatchSizes
from gristmill.model.config import Config, ModelConfig, RotaryScalingConfig

MOST_PHASES = 4  # of context extension: each has stages of its own

Precision = Literal["float32", "bfloat16", "fp8"]


class OptimizerConfig(Config):
    """Muon on matrices (expert stacks matrix by matrix), AdamW on the rest; rates are the peaks of the schedule."""

    muon_learning_rate: float = Field(
        default=0.02, ge=0, title="Muon rate", description="For hidden matrices; 0 trains them by AdamW as well."
    )
    adam_learning_rate: float = Field(
        default=3e-3, gt=0, title="AdamW rate", description="For embeddings, head and norms."
    )
    muon_matrices: Literal["stored", "logical"] = Field(
        default="stored",
        title="Muon's matrices",
        description="What is orthogonalised: whole stored ones, or the matrices of V3's equations that lie in one, "
        "apart (gate and up, keys and values, latent and rotary rows).",
    )
    momentum: float = Field(default=0.95, ge=0, lt=1, title="Muon momentum", description="Nesterov momentum of Muon.")
    beta1: float = Field(default=0.9, ge=0, lt=1, title="β₁", description="First-moment decay of AdamW (V3: 0.9).")
    beta2: float = Field(default=0.95, ge=0, lt=1, title="β₂", description="Second-moment decay of AdamW (V3: 0.95).")
    weight_decay: float = Field(
        default=0.1, ge=0, title="Weight decay", description="Decoupled; matrices only (V3: 0.1)."
    )
    gradient_clip: float = Field(default=1.0, gt=0, title="Gradient clip", description="Largest global norm (V3: 1.0).")
    moments: Literal["float32", "bfloat16"] = Field(
        default="float32",
        title="Moments",
        description="How the optimizer keeps its moments (V3: bfloat16); sums are float32.",
    )
    moment_rounding: Literal["nearest", "stochastic"] = Field(
        default="nearest",
        title="Rounding of moments",
        description="To the nearest bfloat16 number, or to one of the two beside it at random, right in the mean.",
    )

    @model_validator(mode="after")
    def _rounds(self) -> Self:
        if self.moment_rounding == "stochastic" and self.moments == "float32":
            raise ValueError(
                "moment_rounding stochastic with moments float32: nothing is rounded, so set moments to bfloat16, or "
                "moment_rounding to nearest"
            )
        return self


class TailConfig(Config):
    """A constant rate at the end of a run (V3 section 4.2 has two)."""

    share: float = Field(gt=0, le=1, title="Share", description="Share of the run's steps.")
    ratio: float = Field(ge=0, le=1, title="Ratio", description="Rate over the peak.")


def _within_the_run(tails: tuple[TailConfig, ...]) -> tuple[TailConfig, ...]:
    if (shares := sum(tail.share for tail in tails)) > 1 + 1e-9:  # shares written in decimals
        raise ValueError(f"the shares of the tails, {shares:g}, are more than the whole run: lower them to at most 1")
    return tails


Tails = Annotated[tuple[TailConfig, ...], AfterValidator(_within_the_run)]


class ScheduleConfig(Config):
    """Warm-up, constant, decay to a fraction of the peak, then constant tails; the defaults are V3's (section 4.2).

    `wsd` (warm-up, stable, decay): Hu et al. 2024 (arXiv 2404.06395, section 4); its decay by one minus a square root:
    Hägele et al. 2024 (arXiv 2405.18392). `linear` decays from the end of the warm-up on.
    """

    kind: Literal["cosine", "wsd", "linear"] = Field(
        default="cosine", title="Kind", description="cosine, wsd (warm-up, stable, decay), or linear."
    )
    warmup_steps: int = Field(default=20, ge=0, title="Warm-up", description="Steps of linear warm-up.")
    decay_fraction: float = Field(
        default=0.5,
        ge=0,
        le=1,
        title="Decay share",
        description="cosine, wsd: share of the steps spent in decay, at the end or before the tails.",
    )
    wsd_decay: Literal["1-sqrt", "linear", "cosine"] = Field(
        default="1-sqrt", title="Decay of wsd", description="Shape of the decay of wsd."
    )
    final_ratio: float = Field(
        default=0.1, ge=0, le=1, title="Final ratio", description="Rate at the end of the decay over the peak."
    )
    tails: tuple[TailConfig, ...] = Field(
        default=(), title="Tails", description="Constant rates after the decay, in their order (V3 has two)."
    )

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        tails = sum(tail.share for tail in self.tails)
        decay = 0.0 if self.kind == "linear" else self.decay_fraction
        if tails + decay > 1 + 1e-9:  # shares written in decimals
            raise ValueError(
                f"the shares of the steps, {decay:g} of decay_fraction and {tails:g} of tails, are more than the whole "
                f"run: lower them to at most 1 in all"
            )
        return self


class BatchRampConfig(Config):
    """A batch that grows in equal increments, each kept for the same number of tokens (V3 section 4.2)."""

    start_sequences: int = Field(ge=1, title="First batch", description="Sequences of the first steps (V3: 3072).")
    increment: int = Field(ge=1, title="Increment", description="Sequences by which a batch grows at once.")
    tokens: int = Field(
        ge=1, title="Ramp", description="Tokens after which the batch is batch_sequences (V3: 469 billion)."
    )


class SpikeConfig(Config):
    """What becomes of a step whose loss is not finite or far above those before it."""

    policy: Literal["skip", "rollback", "stop"] = Field(
        default="skip",
        title="Policy",
        description="skip: drop the batch; rollback: go back to the last checkpoint's weights, and on with the data "
        "behind the batch; stop: end the stage.",
    )
    threshold: float = Field(
        default=10.0,
        gt=0,
        title="Threshold",
        description="Robust z-score above which a loss is a spike: its distance from the window's median over 1.4826 "
        "median absolute deviations.",
    )
    window: int = Field(default=64, ge=16, title="Window", description="Losses before it that a loss is held against.")
    at_most: int = Field(default=10, ge=0, title="At most", description="So often; once more ends the stage.")


class LayoutConfig(Config):
    """How training is laid out over its processes; it changes results by rounding at most, and is in no key."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=0,
        title="ZeRO stage",
        description="What DeepSpeed shares out among the ranks: 1 the optimizer's state, 2 gradients too, 3 parameters "
        "too.",
    )
    micro_batches: int = Field(
        default=1, ge=1, title="Micro-batches", description="Parts of a rank's batch, whose gradients are added up."
    )
    expert_parallel: int = Field(
        default=1, ge=1, title="Expert parallel", description="Ranks that hold the experts of a mixture between them."
    )
    sequence_parallel: int = Field(
        default=1, ge=1, title="Sequence parallel", description="Ranks that hold parts of the same sequences."
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        default="none",
        title="Offload",
        description="What lies in the host's memory: the optimizer's state (ZeRO 1 to 3), or parameters too (ZeRO 3).",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        title="Recompute",
        description="Activations that are dropped and computed again: selective keeps attention, and "
        "a GPU's products outside of the experts where they are not FP8.",
    )
    nodes: int = Field(
        default=1, ge=1, title="Nodes", description="Machines that share the ranks evenly; their store is one folder."
    )
    hostfile: str | None = Field(
        default=None,
        title="Host file",
        description="Of DeepSpeed's launcher, a line a machine (`name slots=8`); none: the nodes are those of the "
        "Slurm job that the run was started in.",
    )
    hang_seconds: float = Field(
        default=45.0,
        gt=0,
        title="Hang",
        description="Without a sign of life from any rank for so long the job is stopped, and tried again as often as "
        "`retries` says; more than a micro-batch, an optimizer's step, the copy of a checkpoint, sampled texts or "
        "the compilation of one kernel takes. Each 100 MB built or saved in one go has a second more.",
    )
    kept_checkpoints: int = Field(default=2, ge=1, title="Checkpoints", description="How many are kept to resume from.")
    profile: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(),
        title="Profile",
        description="Steps, counted from 0 as in curves.jsonl, whose torch.profiler trace is left in log/.",
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(
                f"offload {self.offload} with zero_stage {self.zero_stage}: DeepSpeed offloads what ZeRO shares out, "
                f"so raise zero_stage to {least} or more"
            )
        if self.hostfile is not None and self.nodes == 1:
            raise ValueError(f"hostfile {self.hostfile!r} with nodes 1: say how many of its machines to use")
        return self


class PretrainConfig(Config):
    """Pretraining of the base model (V3 section 4)."""

    model: ModelConfig = Field(default_factory=ModelConfig, title="Model", description="Shape of the model.")
    steps: int = Field(default=400, ge=1, title="Steps", description="Optimizer steps.")
    sequence_length: int = Field(default=128, ge=8, title="Sequence", description="Tokens of a packed sequence.")
    batch_sequences: int = Field(default=32, ge=1, title="Batch", description="Sequences a step, over all ranks.")
    attend_across_documents: bool = Field(
        default=False,
        title="Attend across documents",
        description="Let a packed document see those before it (V3 does).",
    )
    precision: Precision = Field(
        default="float32",
        title="Precision",
        description="Of the blocks' matrix products; weights, gradients and optimizer are float32. fp8: E4M3 in tiles "
        "of 1 × 128 and blocks of 128 × 128 (V3 section 3.3), the rest as in bfloat16.",
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, title="Optimizer", description="Rates.")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, title="Schedule", description="Rate over steps.")
    mtp_weight_tails: Tails = Field(
        default=(),
        title="MTP weight at the end",
        description="Shares of the steps at the end and the MTP weight in each over mtp_loss_weight (V3: a third after "
        "10 of 14.8 T tokens).",
    )
    bias_speed_tails: Tails = Field(
        default=(),
        title="Bias step at the end",
        description="Shares of the steps at the end and γ in each over bias_update_speed (V3: 0 in the last 500 B "
        "tokens).",
    )
    batch_ramp: BatchRampConfig | None = Field(
        default=None, title="Batch ramp", description="Smaller batches at first; none: batch_sequences throughout."
    )
    ema_decay: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        title="Averaged weights",
        description="Decay a step of an exponential average of the weights, evaluated and kept beside them; 0: none.",
    )
    checkpoint_every: int = Field(default=100, ge=1, title="Checkpoint", description="Steps between checkpoints.")
    evaluate_every: int = Field(default=100, ge=1, title="Held-out check", description="Steps between held-out losses.")
    held_out_sequences: int = Field(default=64, ge=1, title="Held-out", description="Held-out sequences of each check.")
    spikes: SpikeConfig = Field(
        default_factory=SpikeConfig, title="Spikes", description="Losses that jump or are no number."
    )
    keep_every: int = Field(
        default=0,
        ge=0,
        title="Keep",
        description="Steps between checkpoints kept for good, in `kept/`; a multiple of checkpoint_every, 0 none.",
    )
    keep_best: bool = Field(
        default=False,
        title="Keep the best",
        description="Keep the latest checkpoint that no held-out check up to it was better than as well.",
    )

    @model_validator(mode="after")
    def _keeps(self) -> Self:
        if self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every {self.keep_every} is no multiple of checkpoint_every {self.checkpoint_every}: what is "
                f"kept is a checkpoint"
            )
        if self.keep_best and self.checkpoint_every % self.evaluate_every:
            raise ValueError(
                f"keep_best needs a held-out check at every checkpoint, and checkpoint_every {self.checkpoint_every} "
                f"is no multiple of evaluate_every {self.evaluate_every}"
            )
        return self

    @property
    def batches(self) -> BatchSizes:
        """The size of each step's batch."""
        return BatchSizes(self.batch_sequences, self.sequence_length, self.batch_ramp)

    @property
    def sequences(self) -> int:
        """Sequences that the run reads in all."""
        return self.batches.first_position(self.steps)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"sequence_length {self.sequence_length} is longer than the position limit "
                f"max_position_embeddings {self.model.max_position_embeddings}: choose at most "
                f"{self.model.max_position_embeddings} tokens, or raise the limit to {self.sequence_length}"
            )
        return self

    @model_validator(mode="after")
    def _warms_up(self) -> Self:
        if self.schedule.warmup_steps > self.steps:
            raise ValueError(
                f"schedule.warmup_steps {self.schedule.warmup_steps} is longer than the run of {self.steps} steps, "
                f"which would never reach its rate: lower it or raise steps"
            )
        return self

    @model_validator(mode="after")
    def _ramps_up(self) -> Self:
        ramp, full = self.batch_ramp, self.batch_sequences
        if ramp is None:
            return self
        if ramp.start_sequences >= full:
            raise ValueError(
                f"batch_ramp.start_sequences {ramp.start_sequences} is not below batch_sequences {full}: lower it, or "
                f"leave batch_ramp out"
            )
        if (full - ramp.start_sequences) % ramp.increment:
            raise ValueError(
                f"batch_ramp.increment {ramp.increment} does not divide the {full - ramp.start_sequences} sequences "
                f"between start_sequences {ramp.start_sequences} and batch_sequences {full}: choose a divisor"
            )
        if (last := self.batches.stretches[-1].first_step) >= self.steps:
            raise ValueError(
                f"batch_ramp.tokens {ramp.tokens} take {last} steps of growing batches, and the run has {self.steps}: "
                f"lower tokens, or raise steps"
            )
        return self


class NeedleConfig(Config):
    """The needle-in-a-haystack check of a context: numbers hidden in held-out text and asked for behind it."""

    lengths: tuple[int, ...] = Field(
        default=(),
        title="Lengths",
        description="Tokens of the haystacks, needle and question included; empty doubles the first context up to the "
        "phase's sequence_length.",
    )
    depths: int = Field(
        default=5, ge=2, le=101, title="Depths", description="Evenly spaced places, both ends included."
    )
    cases: int = Field(default=8, ge=1, title="Cases", description="Needles of each length and depth.")
    digits: int = Field(default=5, ge=1, le=18, title="Digits", description="Digits of a hidden number.")


class ExtendSection(Config):
    """One phase of context extension (V3 section 4.3): further training on longer sequences, positions by YaRN."""

    sequence_length: int = Field(default=512, ge=16, title="Sequence", description="The new context, in tokens.")
    steps: int = Field(default=1000, ge=1, title="Steps", description="Optimizer steps (V3: 1000 a phase).")
    batch_sequences: int = Field(default=8, ge=1, title="Batch", description="Sequences a step, over all ranks.")
    attend_across_documents: bool = Field(
        default=True,
        title="Attend across documents",
        description="Let a packed document see those before it (V3 does); otherwise only documents as long as the new "
        "context train its last positions.",
    )
    rope_scaling: RotaryScalingConfig | None = Field(
        default=None,
        title="Rotary scaling",
        description="YaRN of this phase; none: α and β of V3, from the context trained first, its factor the new one "
        "over that.",
    )
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(muon_learning_rate=0.002, adam_learning_rate=3e-4),
        title="Optimizer",
        description="Rates (V3: those that pretraining ended with).",
    )
    schedule: ScheduleConfig = Field(
        default_factory=lambda: ScheduleConfig(warmup_steps=0, decay_fraction=0.0),
        title="Schedule",
        description="Rate over steps (V3: constant).",
    )
    mtp_weight_tails: Tails = Field(
        default=(),
        title="MTP weight at the end",
        description="As in pretraining; a share of 1 is the whole phase.",
    )
    bias_speed_tails: Tails = Field(
        default=(),
        title="Bias step at the end",
        description="As in pretraining; a share of 1 is the whole phase.",
    )
    checkpoint_every: int = Field(default=100, ge=1, title="Checkpoint", description="Steps between checkpoints.")
    evaluate_every: int = Field(default=100, ge=1, title="Held-out check", description="Steps between held-out losses.")
    held_out_sequences: int = Field(default=16, ge=1, title="Held-out", description="Held-out sequences of each check.")
    precision: Precision = Field(
        default="float32", title="Precision", description="Of the blocks' matrix products, as in pretraining."
    )
    spikes: SpikeConfig = Field(
        default_factory=SpikeConfig, title="Spikes", description="Losses that jump or are no number."
    )
    needle: NeedleConfig = Field(
        default_factory=NeedleConfig, title="Needle", description="Retrieval check before and after the phase."
    )

    @property
    def batches(self) -> BatchSizes:
        """The sequences of each step."""
        return BatchSizes(self.batch_sequences, self.sequence_length, None)

    @property
    def sequences(self) -> int:
        """Sequences of the whole phase."""
        return self.steps * self.batch_sequences


class ExtendConfig(ExtendSection):
    """A phase and the contexts before it, which a recipe takes from `pretrain` and the phases before."""

    first_length: int = Field(ge=8, title="First context", description="Tokens of the sequences of pretraining.")
    trained_length: int = Field(ge=8, title="Context so far", description="Tokens of those that the base saw last.")

    @property
    def needle_lengths(self) -> list[int]:
        """Lengths of the needle check, ascending."""
        doublings = range((self.sequence_length // self.first_length).bit_length())
        doubled = {self.first_length << n for n in doublings} | {self.sequence_length}
        return sorted(set(self.needle.lengths) or doubled)


class SFTConfig(Config):
    """Supervised fine-tuning on chains of thought, loss on the response only (R1 section 2.3.1)."""

    steps: int = Field(default=200, ge=1, title="Steps", description="Optimizer steps.")
    sequence_length: int = Field(
        default=128,
        ge=8,
        title="Sequence",
        description="Tokens of a packed sequence; chains that are longer are left out.",
    )
    batch_sequences: int = Field(default=32, ge=1, title="Batch", description="Sequences a step, over all ranks.")
    precision: Precision = Field(
        default="float32",
        title="Precision",
        description="Of the blocks' matrix products; weights, gradients and optimizer are float32. fp8: E4M3 in tiles "
        "of 1 × 128 and blocks of 128 × 128 (V3 section 3.3), the rest as in bfloat16.",
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, title="Optimizer", description="Rates.")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, title="Schedule", description="Rate over steps.")
    checkpoint_every: int = Field(default=100, ge=1, title="Checkpoint", description="Steps between checkpoints.")
    evaluate_every: int = Field(default=100, ge=1, title="Held-out check", description="Steps between held-out losses.")
    held_out_share: float = Field(
        default=0.02,
        ge=0,
        le=0.5,
        title="Held-out",
        description="Share of the questions that are not trained on but checked: at least one of two or more; 0: none.",
    )
    spikes: SpikeConfig = Field(
        default_factory=SpikeConfig, title="Spikes", description="Losses that jump or are no number."
    )

    @property
    def sequences(self) -> int:
        """Sequences that the run reads in all."""
        return self.steps * self.batch_sequences
