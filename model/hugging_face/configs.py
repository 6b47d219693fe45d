"""config.json of the families this model can be, and our configuration: each from the other."""

from __future__ import annotations

from typing import Any

from gristmill.model.config import ModelConfig

SAME = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rope_theta",
    "max_position_embeddings", "rms_norm_eps", "initializer_range", "tie_word_embeddings",
)  # fmt: skip
LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
EXPERTS = (
    "first_k_dense_replace", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
    "n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob",
)  # fmt: skip
ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
          "max_position_embeddings", "rms_norm_eps")  # fmt: skip
NEEDED_OF = {
    "deepseek_v3": (*LATENT, *EXPERTS),
    "deepseek_v2": (*LATENT, *(field for field in EXPERTS if field not in ("n_group", "topk_group"))),
}
YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
LLAMA3 = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")


def family(config: ModelConfig) -> str:
    """The `model_type` under which others know a model of this shape.

    Raises:
        ValueError: none has this shape.
    """
    if config.attention == "gqa":
        if config.first_k_dense_replace < config.num_hidden_layers:
            raise ValueError("attention gqa with experts has no Hugging Face form: make all blocks dense, or use mla")
        name = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
        if config.qk_norm:
            _without("qkv_bias", config, name)
        return _without("num_nextn_predict_layers", config, name)
    if config.n_shared_experts == 0 and config.first_k_dense_replace < config.num_hidden_layers:
        raise ValueError("n_shared_experts is 0, and DeepseekV3ForCausalLM has at least 1: train with a shared expert")
    if config.scoring_func == "softmax":
        if config.norm_topk_prob:
            raise ValueError("norm_topk_prob with a softmax gate has no Hugging Face form: DeepSeek-V2 has it false")
        return _without("num_nextn_predict_layers", config, "deepseek_v2")
    return "deepseek_v3"


def _without(field: str, config: ModelConfig, name: str) -> str:
    if getattr(config, field):
        raise ValueError(f"{field} {getattr(config, field)} has no place in {ARCHITECTURES[name]}: leave it out")
    return name


def to_hugging_face(
    config: ModelConfig, vocab_size: int, *, dtype: str = "float32", fp8: bool = False
) -> dict[str, Any]:
    """config.json of a model of this shape, without what the tokenizer decides (ids of its special tokens).

    Raises:
        ValueError: no architecture has this shape.
    """
    name = family(config)
    described: dict[str, Any] = {
        "architectures": [ARCHITECTURES[name]],
        "model_type": name,
        **{field: getattr(config, field) for field in SAME},
        "rope_scaling": _scaling(config),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "vocab_size": vocab_size,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if config.attention == "gqa":
        described["num_key_value_heads"] = config.num_key_value_heads or config.num_attention_heads
        described["head_dim"] = config.head_width
        return described
    described |= {field: getattr(config, field) for field in (*LATENT, *EXPERTS)}
    described["num_key_value_heads"] = config.num_attention_heads
    if name == "deepseek_v2":
        described["topk_method"] = "greedy" if config.n_group == 1 else "group_limited_greedy"
        described["scoring_func"] = "softmax"
    else:
        described |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_interleave": True}
        described["num_nextn_predict_layers"] = config.num_nextn_predict_layers
    return {**described, "quantization_config": FP8} if fp8 else described


def _scaling(config: ModelConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    fields = YARN if scaling.type == "yarn" else LLAMA3
    return {"type": scaling.type, "rope_type": scaling.type, **{field: getattr(scaling, field) for field in fields}}


def from_hugging_face(described: dict[str, Any]) -> tuple[ModelConfig, int]:
    """Our configuration and the rows of the vocabulary.

    Raises:
        ValueError: another family, or a property that this model has not.
    """
    name = described.get("model_type")
    if name not in ARCHITECTURES:
        raise ValueError(f"model_type {name!r} is not one of {', '.join(ARCHITECTURES)}: convert it to one of them")
    lacking = [f for f in (*NEEDED, *NEEDED_OF.get(name, ())) if f not in described]
    if lacking:
        raise ValueError(f"config.json of a {name} lacks {', '.join(lacking)}: what is not said is not guessed")
    _refuse(described, name)
    _refuse_other_quantisation(described.get("quantization_config"))
    rotary = described.get("rope_parameters") or {}
    given: dict[str, Any] = {field: described[field] for field in SAME if described.get(field) is not None}
    given["rope_theta"] = described.get("rope_theta") or rotary.get("rope_theta", 10_000.0)
    given["rope_scaling"] = _read_scaling(described.get("rope_scaling") or rotary)
    if name.startswith("deepseek"):
        given |= {field: described[field] for field in (*LATENT, *EXPERTS) if described.get(field) is not None}
        given["scoring_func"] = "sigmoid" if name == "deepseek_v3" else "softmax"
        given["num_nextn_predict_layers"] = described.get("num_nextn_predict_layers", 0) if name == "deepseek_v3" else 0
        given["q_lora_rank"] = described["q_lora_rank"]
        if name == "deepseek_v2":
            given["bias_update_speed"] = 0.0
            if described.get("topk_method", "greedy") == "greedy":
                given |= {"n_group": 1, "topk_group": 1}
            elif lacking := [f for f in ("n_group", "topk_group") if described.get(f) is None]:
                raise ValueError(f"topk_method group_limited_greedy without {' and '.join(lacking)}: give them")
    else:
        heads = described["num_attention_heads"]
        given |= {
            "attention": "gqa",
            "num_key_value_heads": described.get("num_key_value_heads") or heads,
            "head_dim": described.get("head_dim") or described["hidden_size"] // heads,
            "qkv_bias": name == "qwen2",
            "qk_norm": name == "qwen3",
            "first_k_dense_replace": described["num_hidden_layers"],
            "num_nextn_predict_layers": 0,
        }
    return ModelConfig.model_validate(given), int(described["vocab_size"])


def _refuse(described: dict[str, Any], name: str) -> None:
    """What these architectures may have and this model has not.

    Raises:
        ValueError: which.
    """
    wanted = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
    if name == "deepseek_v3":
        wanted |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True}
    if name == "deepseek_v2":
        wanted |= {"scoring_func": "softmax", "norm_topk_prob": False}
    wanted["moe_layer_freq"] = 1
    for field, value in wanted.items():
        if described.get(field, value) not in (value, None):
            raise ValueError(f"{field} is {described[field]!r}, and this model has {value!r} alone: it cannot be read")
    methods = ("greedy", "group_limited_greedy")
    if name == "deepseek_v2" and described.get("topk_method", "greedy") not in methods:
        raise ValueError(f"topk_method is {described['topk_method']!r}, and a softmax gate has {' or '.join(methods)}")


def _refuse_other_quantisation(quantisation: dict[str, Any] | None) -> None:
    """Weights that are stored in another way than DeepSeek's releases, with a scale a block of 128 × 128.

    Raises:
        ValueError: which field says so.
    """
    if quantisation is None:
        return
    for field in ("quant_method", "fmt", "weight_block_size"):
        given = quantisation.get(field)
        if given != FP8[field]:
            raise ValueError(
                f"quantization_config has {field} {given!r}, and {FP8[field]!r} alone can be read: convert the weights "
                f"to bfloat16 first"
            )


def _read_scaling(scaling: dict[str, Any]) -> dict[str, Any] | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("yarn", "llama3"):
        raise ValueError(f"rope_scaling of type {kind!r} is neither yarn nor llama3: it cannot be read")
    fields = YARN if kind == "yarn" else LLAMA3
    needed = fields if kind == "llama3" else fields[:2]
    if lacking := [field for field in needed if scaling.get(field) is None]:
        raise ValueError(f"rope_scaling of type {kind} lacks {', '.join(lacking)}: what is not said is not guessed")
    for field, usual in (("attention_factor", None), ("truncate", True)):
        if scaling.get(field, usual) != usual:
            raise ValueError(
                f"rope_scaling has {field} {scaling[field]!r}, which this model has not: it cannot be read"
            )
    read = {field: scaling[field] for field in fields if scaling.get(field) is not None}
    if kind == "yarn":
        read.setdefault("mscale_all_dim", 0.0)
        if read["mscale_all_dim"] and "mscale" not in read:
            raise ValueError("rope_scaling has mscale_all_dim without mscale: give both, or neither")
    return {"type": kind, **read}
