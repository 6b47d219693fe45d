"""What is asked of the model and its training: frozen, bounded, without torch, so that a plan is cheap."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gristmill.model.batch_sizes import BatchSizes

Precision = Literal["float32", "bfloat16", "fp8"]
MOST_PHASES = 4  # of context extension: each has stages of its own


class Config(BaseModel):
    """A frozen configuration that refuses unknown fields: it is hashed into a stage's key."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RotaryScalingConfig(Config):
    """How rotary frequencies are stretched to contexts longer than the model was first trained on.

    `yarn`: Peng et al. 2023 (arXiv 2309.00071, section 3); `llama3`: as Llama 3.1 does it. Field names are those of
    `rope_scaling` in the public configurations.
    """

    type: Literal["yarn", "llama3"] = Field(default="yarn", title="Kind", description="yarn, or llama3.")
    factor: float = Field(default=40.0, ge=1, title="Factor", description="s: new context over old one (V3: 40).")
    original_max_position_embeddings: int = Field(
        default=4096, ge=1, title="First context", description="Tokens of the context that was trained first."
    )
    beta_fast: float = Field(
        default=32.0, gt=0, title="β", description="yarn: with so many turns or more a frequency stays as it is."
    )
    beta_slow: float = Field(
        default=1.0, gt=0, title="α", description="yarn: with so many turns or fewer a frequency is divided by s."
    )
    mscale: float = Field(
        default=1.0, gt=0, title="Amplitude", description="yarn: 0.1·mscale·ln s + 1 multiplies the rotary part."
    )
    mscale_all_dim: float = Field(
        default=1.0,
        ge=0,
        title="Temperature",
        description="yarn: the square of 0.1·mscale_all_dim·ln s + 1 multiplies all scores, and its value divides the "
        "amplitude (V3: both 1, so that only the scores change); 0: neither, as YaRN is elsewhere.",
    )
    low_freq_factor: float = Field(default=1.0, gt=0, title="Low factor", description="llama3: turns of slow ones.")
    high_freq_factor: float = Field(default=4.0, gt=0, title="High factor", description="llama3: turns of fast ones.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.type == "yarn" and self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast} is not above beta_slow {self.beta_slow}: raise it")
        if self.type == "yarn" and not self.mscale_all_dim and self.mscale != 1:
            raise ValueError(
                f"mscale {self.mscale} without mscale_all_dim means one thing to DeepSeek's code and another to "
                f"transformers: give both, or neither"
            )
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} is not above low_freq_factor {self.low_freq_factor}: "
                f"raise it"
            )
        return self


class ModelConfig(Config):
    """The shape of a DeepSeek-V3 (arXiv 2412.19437, section 2); field names are those of its public configuration.

    DeepSeek-V2 is the same with a softmax gate. Small dense models to distill into (Llama, Qwen) are the same with
    `attention: gqa` and dense blocks throughout.
    """

    hidden_size: int = Field(default=128, ge=8, title="Width", description="Width of the residual stream.")
    num_hidden_layers: int = Field(default=4, ge=1, title="Layers", description="Transformer blocks, dense and MoE.")
    num_attention_heads: int = Field(default=4, ge=1, title="Heads", description="Attention heads of each block.")
    attention: Literal["mla", "gqa"] = Field(
        default="mla",
        title="Attention",
        description="mla: keys and values from a latent; gqa: grouped queries, as Llama and Qwen have.",
    )
    num_key_value_heads: int | None = Field(
        default=None, ge=1, title="Key/value heads", description="gqa: heads of keys and values; none: as of queries."
    )
    head_dim: int | None = Field(
        default=None, ge=2, multiple_of=2, title="Head width", description="gqa: none: width over heads."
    )
    qkv_bias: bool = Field(default=False, title="Biases", description="gqa: biases on queries, keys, values (Qwen 2).")
    qk_norm: bool = Field(default=False, title="Norms", description="gqa: RMSNorm on queries and keys (Qwen 3).")
    tie_word_embeddings: bool = Field(
        default=False, title="Tied head", description="The output head is the embedding matrix."
    )
    q_lora_rank: int | None = Field(
        default=None, ge=1, title="Query latent", description="Width of the query latent; none projects directly."
    )
    kv_lora_rank: int = Field(
        default=64,
        ge=1,
        title="Key/value latent",
        description="Width of the cached key/value latent (numbers a token).",
    )
    qk_nope_head_dim: int = Field(default=16, ge=1, title="Query/key width without position", description="Per head.")
    qk_rope_head_dim: int = Field(
        default=16,
        ge=2,
        multiple_of=2,
        title="Rotary width",
        description="Rotary part of a head; one key for all heads.",
    )
    v_head_dim: int = Field(default=32, ge=1, title="Value width", description="Width of a head's values.")
    first_k_dense_replace: int = Field(
        default=1, ge=0, title="Dense layers", description="How many of the first blocks have a dense FFN."
    )
    intermediate_size: int = Field(default=256, ge=1, title="Dense FFN", description="Hidden width of a dense FFN.")
    n_routed_experts: int = Field(default=8, ge=1, title="Routed experts", description="Experts of each MoE block.")
    n_shared_experts: int = Field(default=1, ge=0, title="Shared experts", description="Experts that see every token.")
    num_experts_per_tok: int = Field(default=2, ge=1, title="Active experts", description="Routed experts a token.")
    moe_intermediate_size: int = Field(default=64, ge=1, title="Expert FFN", description="Hidden width of one expert.")
    scoring_func: Literal["sigmoid", "softmax"] = Field(
        default="sigmoid",
        title="Gate",
        description="sigmoid (V3): a group scores by its two best; softmax (V2): by its best one.",
    )
    n_group: int = Field(default=1, ge=1, title="Expert groups", description="Groups for node-limited routing.")
    topk_group: int = Field(default=1, ge=1, title="Groups a token", description="Groups a token may choose from.")
    routed_scaling_factor: float = Field(
        default=1.0, gt=0, title="Routed scale", description="Factor on the normalised gates (2.5 in V3)."
    )
    norm_topk_prob: bool = Field(default=True, title="Normalise gates", description="Chosen gates sum to one.")
    bias_update_speed: float = Field(
        default=0.001,
        ge=0,
        title="Bias step",
        description="γ: how far an expert's bias moves after each step (V3: 0.001).",
    )
    balance_loss_alpha: float = Field(
        default=0.0001, ge=0, title="Balance loss", description="α of the sequence-wise balance loss (V3: 0.0001)."
    )
    num_nextn_predict_layers: int = Field(
        default=1,
        ge=0,
        le=8,
        title="MTP depth",
        description="Multi-token-prediction modules trained beside the model; the k-th predicts token t+1+k.",
    )
    mtp_loss_weight: float = Field(
        default=0.3, ge=0, title="MTP weight", description="λ of the MTP loss in pretraining (V3: 0.3)."
    )
    rope_theta: float = Field(
        default=10_000.0, gt=1, title="Rotary base", description="Base of the rotary frequencies."
    )
    rope_scaling: RotaryScalingConfig | None = Field(
        default=None, title="Rotary scaling", description="For contexts longer than those trained first; none: as is."
    )
    max_position_embeddings: int = Field(
        default=512,
        ge=8,
        title="Position limit",
        description="Longest sequence, in tokens, the model is declared for.",
    )
    rms_norm_eps: float = Field(default=1e-6, gt=0, title="Norm ε", description="Added to the mean square.")
    initializer_range: float = Field(
        default=0.02,
        gt=0,
        title="Initial spread",
        description="Standard deviation of the initial weights (V3: 0.006).",
    )

    @property
    def rotary_width(self) -> int:
        """Numbers of a head that are rotated."""
        return self.qk_rope_head_dim if self.attention == "mla" else self.head_width

    @property
    def head_width(self) -> int:
        """Numbers of a query head."""
        if self.attention == "mla":
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def cache_width(self) -> int:
        """Numbers that decoding keeps of a token in a layer: V3 section 2.1.1, or keys and values of all heads."""
        if self.attention == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * (self.num_key_value_heads or self.num_attention_heads) * self.head_width

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.attention == "mla":
            given = [n for n in ("num_key_value_heads", "head_dim") if getattr(self, n) is not None]
            given += [n for n in ("qkv_bias", "qk_norm") if getattr(self, n)]
            if given:
                raise ValueError(f"{given[0]} belongs to attention: gqa, and attention is mla: leave it out")
            return self
        heads, own = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if heads % own:
            near = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ValueError(f"num_key_value_heads {own} does not divide num_attention_heads {heads}: choose of {near}")
        if self.head_dim is None and (self.hidden_size % heads or self.hidden_size // heads % 2):
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_attention_heads {heads} is no even width of a head: "
                f"choose other numbers, or give head_dim"
            )
        return self

    @model_validator(mode="after")
    def _possible(self) -> Self:
        experts, groups = self.n_routed_experts, self.n_group
        if experts % groups:
            raise ValueError(
                f"n_routed_experts {experts} is not divisible by n_group {groups}: choose a multiple of {groups}"
            )
        if self.topk_group > groups:
            raise ValueError(f"topk_group {self.topk_group} is more than the {groups} groups of n_group: lower it")
        if self.num_experts_per_tok > experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than the {experts} experts there are: "
                f"choose at most {experts}"
            )
        reachable = experts // groups * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than the {reachable} experts of "
                f"{self.topk_group} groups: raise topk_group or lower num_experts_per_tok"
            )
        if groups > 1 and experts // groups < 2 and self.scoring_func == "sigmoid":
            raise ValueError(
                f"n_group {groups} leaves {experts // groups} expert a group, and a group is scored by its two best: "
                f"choose at most {experts // 2} groups"
            )
        if self.scoring_func == "softmax" and self.bias_update_speed:
            raise ValueError(
                f"bias_update_speed {self.bias_update_speed} with scoring_func softmax: DeepSeek-V2 has no biases to "
                f"move, so set it to 0, or take sigmoid"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace {self.first_k_dense_replace} is more than the "
                f"{self.num_hidden_layers} layers there are: lower it"
            )
        return self


class OptimizerConfig(Config):
    """Muon on matrices (expert stacks matrix by matrix), AdamW on the rest; rates are the peaks of the schedule."""

    muon_learning_rate: float = Field(
        default=0.02, ge=0, title="Muon rate", description="For hidden matrices; 0 trains them by AdamW as well."
    )
    adam_learning_rate: float = Field(
        default=3e-3, gt=0, title="AdamW rate", description="For embeddings, head and norms."
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


class TailConfig(Config):
    """A constant rate at the end of a run (V3 section 4.2 has two)."""

    share: float = Field(gt=0, le=1, title="Share", description="Share of the run's steps.")
    ratio: float = Field(ge=0, le=1, title="Ratio", description="Rate over the peak.")


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
        description="Activations that are dropped and computed again: selective keeps products and attention.",
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
        "`retries` says; more than a micro-batch, an optimizer's step or the copy of a checkpoint takes.",
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
        description="Steps between models that are kept for good, in `kept/`; a multiple of checkpoint_every, 0 none.",
    )
    keep_best: bool = Field(
        default=False, title="Keep the best", description="Keep the checkpoint with the least held-out loss as well."
    )

    @model_validator(mode="after")
    def _keeps(self) -> Self:
        if self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every {self.keep_every} is no multiple of checkpoint_every {self.checkpoint_every}: a kept "
                f"model is made of a checkpoint"
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
                f"max_position_embeddings {self.model.max_position_embeddings}: lower one or raise the other"
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
    sequence_length: int = Field(default=128, ge=8, title="Sequence", description="Tokens of a packed sequence.")
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
    spikes: SpikeConfig = Field(
        default_factory=SpikeConfig, title="Spikes", description="Losses that jump or are no number."
    )

    @property
    def sequences(self) -> int:
        """Sequences that the run reads in all."""
        return self.steps * self.batch_sequences


class RewardConfig(Config):
    """Rule rewards of R1 (sections 2.2.2 and 2.3.2), summed with these weights."""

    accuracy: float = Field(default=1.0, ge=0, title="Accuracy", description="Weight of a right final answer.")
    format: float = Field(
        default=0.1, ge=0, title="Format", description="Weight of a thought, then an answer, then the end."
    )
    language: float = Field(
        default=0.0, ge=0, title="Language", description="Weight of the share of words in the question's language."
    )


class GRPOConfig(Config):
    """Group relative policy optimisation (DeepSeekMath, arXiv 2402.03300, section 4.1)."""

    steps: int = Field(default=60, ge=1, title="Steps", description="Rollouts; each is one or more optimizer steps.")
    questions_per_step: int = Field(default=32, ge=1, title="Questions", description="Questions a rollout.")
    samples_per_question: int = Field(default=8, ge=2, title="Samples", description="G: outputs a question.")
    minibatches: int = Field(
        default=1, ge=1, title="Minibatches", description="Optimizer steps a rollout is split into."
    )
    max_new_tokens: int = Field(default=64, ge=2, title="Length cap", description="Tokens of a response.")
    temperature: float = Field(default=1.0, gt=0, title="Temperature", description="Of the rollouts (R1-Zero: 1).")
    clip_low: float = Field(
        default=0.2, gt=0, lt=1, title="Clip below", description="ε under one of the clipped ratio."
    )
    clip_high: float = Field(default=0.28, gt=0, title="Clip above", description="ε over one of the clipped ratio.")
    kl_weight: float = Field(
        default=0.0, ge=0, title="KL weight", description="β of the KL term to the reference policy."
    )
    reference_every: int = Field(
        default=400,
        ge=1,
        title="Reference renewal",
        description="Steps after which the policy becomes the reference.",
    )
    drop_flat_groups: bool = Field(
        default=True,
        title="Drop flat groups",
        description="Leave out groups whose rewards are all equal (advantage zero).",
    )
    rewards: RewardConfig = Field(default_factory=RewardConfig, title="Rewards", description="Weights of the rules.")
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(muon_learning_rate=0.0, adam_learning_rate=2e-4, weight_decay=0.0),
        title="Optimizer",
        description="Rates.",
    )
    schedule: ScheduleConfig = Field(
        default_factory=lambda: ScheduleConfig(warmup_steps=5, decay_fraction=0.0),
        title="Schedule",
        description="Rate over steps.",
    )
    checkpoint_every: int = Field(default=20, ge=1, title="Checkpoint", description="Steps between checkpoints.")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.questions_per_step % self.minibatches:
            raise ValueError(
                f"questions_per_step {self.questions_per_step} is not divisible by minibatches {self.minibatches}: "
                f"choose a divisor"
            )
        return self


class EvaluateConfig(Config):
    """The protocol of R1 section 3: k samples a question at temperature 0.6, top-p 0.95."""

    problems: int = Field(
        default=500, ge=1, title="Problems", description="Held-out problems; the first so many are taken."
    )
    samples: int = Field(default=4, ge=1, title="Samples", description="k: samples a problem.")
    temperature: float = Field(default=0.6, ge=0, title="Temperature", description="Of the samples (R1: 0.6).")
    top_p: float = Field(default=0.95, gt=0, le=1, title="Top-p", description="Nucleus of the samples (R1: 0.95).")
    max_new_tokens: int = Field(default=64, ge=2, title="Length cap", description="Tokens of a response.")
    batch_size: int = Field(default=512, ge=1, title="Batch", description="Responses sampled at once.")


class ExportConfig(Config):
    """The Hugging Face folder of the finished model."""

    shard_megabytes: int = Field(
        default=2000, ge=1, title="Shard", description="Largest safetensors file, in megabytes."
    )
    parity_tolerance: float = Field(
        default=2e-4,
        gt=0,
        title="Parity",
        description="Largest difference of logits that transformers may show (float32).",
    )
