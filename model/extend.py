"""The `extend_…` stages: a base model made to read longer contexts (V3 section 4.3; YaRN, arXiv 2309.00071).

What a phase makes of the model's configuration is here, without torch, so that a recipe can be refused before it runs;
the work is in `training/extension.py`, the check in `needle.py`.
"""

from __future__ import annotations

from pathlib import Path

from gristmill.model.config import ModelConfig, RotaryScalingConfig
from gristmill.model.launch import launch
from gristmill.model.stage_types import Metrics, Progress
from gristmill.model.training.config import ExtendConfig, LayoutConfig


def extend(
    config: ExtendConfig,
    model: Path,
    tokens: Path,
    mixture: Path,
    out: Path,
    seed: int,
    *,
    threads: int,
    ranks: int,
    device: str,
    layout: LayoutConfig,
    progress: Progress,
) -> Metrics:
    """Train a base model further on longer sequences and leave it in `out/model`; it is checked before and after.

    `model` is the folder of a pretrain stage or of another phase, `tokens` that of the tokenize stage and `mixture`
    that of the mix stage for this length. The optimizer starts afresh.

    Raises:
        JobFailed: the training process ended badly (a base that does not fit the phase, a mixture of another length,
            NaN loss, a signal).
    """
    job = {
        "config": config.model_dump(mode="json"),
        "model": str(model),
        "tokens": str(tokens),
        "mixture": str(mixture),
        "seed": seed,
        "layout": layout.model_dump(mode="json"),
    }
    return launch(
        "gristmill.model.training.extension:run",
        job,
        out,
        threads=threads,
        device=device,
        progress=progress,
        ranks=ranks,
        layout=layout,
    )


def extended(model: ModelConfig, config: ExtendConfig) -> ModelConfig:
    """The configuration of `model` for a phase's longer context: YaRN's frequencies, and the position limit raised.

    Raises:
        ValueError: the context is no longer than what was trained, or the scaling does not fit it or the model.
    """
    length, first = config.sequence_length, config.first_length
    if length <= config.trained_length:
        raise ValueError(
            f"sequence_length {length} is not longer than the {config.trained_length} tokens that the base was trained "
            f"on: raise it, or leave the phase out"
        )
    if config.needle_lengths[-1] > length:
        raise ValueError(
            f"needle.lengths has {config.needle_lengths[-1]}, longer than sequence_length {length}: leave it out"
        )
    before = model.rope_scaling
    if before is not None and (before.type != "yarn" or before.original_max_position_embeddings != first):
        raise ValueError(
            f"the base's rope_scaling is {before.type} from {before.original_max_position_embeddings} tokens, and this "
            f"phase extends one that was trained on {first} first: give a base without scaling, or one of yarn from "
            f"{first}"
        )
    # Where queries are grouped the rotary part is scaled in place of the scores: there mscale_all_dim has no effect.
    scaling = config.rope_scaling or RotaryScalingConfig(
        factor=length / first,
        original_max_position_embeddings=first,
        mscale_all_dim=1.0 if model.attention == "mla" else 0.0,
    )
    _check_scaling(scaling, config, model)
    limit = max(length, model.max_position_embeddings)
    return model.model_copy(update={"rope_scaling": scaling, "max_position_embeddings": limit})


def _check_scaling(scaling: RotaryScalingConfig, config: ExtendConfig, model: ModelConfig) -> None:
    length, first = config.sequence_length, config.first_length
    if scaling.type != "yarn":
        raise ValueError(f"rope_scaling.type is {scaling.type}, and contexts are extended by yarn: write yarn")
    if scaling.original_max_position_embeddings != first:
        raise ValueError(
            f"rope_scaling.original_max_position_embeddings {scaling.original_max_position_embeddings} is not the "
            f"{first} tokens of pretraining's sequences: give {first}"
        )
    if scaling.factor * first < length:
        raise ValueError(
            f"rope_scaling.factor {scaling.factor:g} stretches {first} tokens to {scaling.factor * first:.0f}, fewer "
            f"than sequence_length {length}: give at least {length / first:g}"
        )
    if model.attention == "gqa" and scaling.mscale_all_dim:
        raise ValueError(
            f"rope_scaling.mscale_all_dim {scaling.mscale_all_dim:g} scales the scores of latent attention alone, and "
            f"the model's attention is gqa: set it to 0 and mscale to 1"
        )
