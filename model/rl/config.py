"""What is asked of reinforcement learning."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from gristmill.model.config import Config
from gristmill.model.training.config import OptimizerConfig, ScheduleConfig

MICRO_TOKENS = 4096  # padded positions of one forward and backward: small enough to stay in the cache


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
