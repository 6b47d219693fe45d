"""What is asked of the model, its evaluation and its export: frozen, bounded, without torch, so that a plan is cheap.

Training is in `training/config.py`, reinforcement in `rl/config.py`.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gristmill.model.nearest import either, neighbours


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
            self._latents_fit()
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

    def _latents_fit(self) -> None:
        """A latent compresses the residual stream: a wider one holds nothing more, and costs more."""
        for name in ("kv_lora_rank", "q_lora_rank"):
            rank = getattr(self, name)
            if rank is not None and rank > self.hidden_size:
                raise ValueError(
                    f"{name} {rank} is a latent wider than the model, whose hidden_size is {self.hidden_size}: choose "
                    f"at most {self.hidden_size}"
                )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self._routing_possible()
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

    def _routing_possible(self) -> None:
        experts, groups, active = self.n_routed_experts, self.n_group, self.num_experts_per_tok
        if self.topk_group > groups:
            raise ValueError(
                f"topk_group {self.topk_group} is more than the {groups} groups of n_group: choose at most {groups}"
            )
        if experts % groups:
            raise ValueError(
                f"n_routed_experts {experts} is not divisible by n_group {groups}: choose {self._other_routing()}"
            )
        each = experts // groups
        reachable = each * self.topk_group
        if groups > 1 and each < 2 and self.scoring_func == "sigmoid":
            raise ValueError(
                f"n_group {groups} leaves {each} expert a group, and a group is scored by its two best: choose "
                f"{self._other_routing()}"
            )
        if active > experts:
            raise ValueError(
                f"num_experts_per_tok {active} is more than the {experts} experts there are: choose at most {reachable}"
            )
        if active > reachable:
            raise ValueError(
                f"num_experts_per_tok {active} is more than the {reachable} experts of the {self.topk_group} of "
                f"{groups} groups that topk_group allows: choose at most {reachable}, or topk_group "
                f"{-(-active // each)}"
            )

    def _routes(self, experts: int, groups: int) -> bool:
        """Whether so many experts in so many groups can be routed to: a sigmoid gate scores a group by two of its."""
        each, least = experts // groups, 2 if groups > 1 and self.scoring_func == "sigmoid" else 1
        fits = self.topk_group <= groups and self.num_experts_per_tok <= each * self.topk_group
        return experts % groups == 0 and each >= least and fits

    def _other_routing(self) -> str:
        """The nearest numbers of experts and of groups that would do, each with the other as it is."""
        experts, groups = self.n_routed_experts, self.n_group
        enough = groups * max(2, -(-self.num_experts_per_tok // self.topk_group))
        near = neighbours(experts, lambda n: self._routes(n, groups), max(experts + groups, enough))
        others = neighbours(groups, lambda n: self._routes(experts, n), experts)
        return f"{either(near)} experts" + (f", or n_group {either(others)}" if others else "")


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


class TracesConfig(EvaluateConfig):
    """Rejection sampling (R1 section 2.3.3): of k answers to each training problem those that are right are kept."""

    problems: int = Field(
        default=500, ge=1, title="Problems", description="Training problems; the first so many are taken."
    )
    kept: int = Field(default=1, ge=1, title="Kept", description="Different chains of a problem at most.")


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


class StudentConfig(Config):
    """A model that exists already, in a folder as Hugging Face has it."""

    folder: str = Field(
        min_length=1,
        title="Folder",
        description="Of a Llama, Qwen or DeepSeek model with its tokenizer, a path or s3://…; its contents are in the "
        "key.",
    )
    chat_template: str = Field(min_length=1, title="Chat template", description="Jinja, of a conversation as text.")
