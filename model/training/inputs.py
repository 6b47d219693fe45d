"""What meets in a stage must belong together: asked without torch, before a process is started."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from gristmill.data.mixture import Mixture
from gristmill.data.shards import TokenShards
from gristmill.model.training.config import ExtendConfig, PretrainConfig, SFTConfig


def check_pretraining(config: PretrainConfig, tokens: Path, mixture: Path) -> None:
    """The shards of a tokenize stage and the mixture made from them give what a run reads.

    Raises:
        ValueError: they are of other shards or another run, or hold fewer sequences than a batch.
    """
    check_mixture("pretrain", config, Mixture(mixture, TokenShards(tokens / "tokens")))


def check_extension(config: ExtendConfig, model: Path, tokens: Path, mixture: Path) -> None:
    """As `check_pretraining`; and the base, the `model` folder's parent, knows the shards' tokens.

    Raises:
        ValueError: as there, or the base has another vocabulary.
    """
    shards = TokenShards(tokens / "tokens")
    refuse_other_vocabulary(vocabulary_of(model), shards.vocab_size, "shards")
    check_mixture("extend", config, Mixture(mixture, shards))


def check_tokenizer(model: Path, tokenizer: Path) -> None:
    """A model, in the folder of the stage that made it, and the tokenizer of a tokenize stage have one vocabulary.

    Raises:
        ValueError: they have not, or one of them is not there or damaged.
    """
    path = tokenizer / "tokenizer" / "tokenizer.json"
    if not path.exists():
        raise ValueError(f"{tokenizer} holds no tokenizer/tokenizer.json: give the folder of a tokenize stage")
    try:
        found = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"{path} is no tokenizer ({error}): run tokenize again") from error
    refuse_other_vocabulary(vocabulary_of(model), found.get_vocab_size(), "tokenizer")


def check_context(config: SFTConfig, limit: int) -> None:
    """Conversations of fine-tuning fit the positions of a model, of which there are `limit`.

    Raises:
        ValueError: they are longer.
    """
    if config.sequence_length > limit:
        raise ValueError(
            f"sequence_length {config.sequence_length} is longer than the {limit} positions of the model: choose at "
            f"most {limit} tokens"
        )


def vocabulary_of(model: Path) -> int:
    """Tokens that the model in a stage's folder knows, by its config.json.

    Raises:
        ValueError: there is no model, or its config.json is damaged.
    """
    path = model / "model" / "config.json"
    if not path.exists():
        raise ValueError(f"{model} holds no model/config.json: give the folder of a stage that made a model")
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["vocab_size"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} gives no vocab_size ({error!r}): make the model again") from error


def refuse_other_vocabulary(own: int, given: int, of: str) -> None:
    """Raise a ValueError where a model of `own` tokens is given something of another number of them."""
    if own != given:
        raise ValueError(
            f"the model has a vocabulary of {own} tokens and the {of} one of {given}: give a model of {given} tokens, "
            f"or tokenize with vocab_size {own}"
        )


def check_mixture(stage: str, config: PretrainConfig | ExtendConfig, mixture: Mixture) -> None:
    """The mixture was made for this run, and gives each of its batches different sequences.

    Raises:
        ValueError: it has sequences of another length, another number of them, or fewer different ones than a batch.
    """
    asked = {"sequence_length": config.sequence_length, "sequences": config.sequences}
    for name, value in asked.items():
        if value != getattr(mixture, name):
            raise ValueError(
                f"{stage} asks for {name} {value} (sequences: those of all its steps), and the mixture was made for "
                f"{getattr(mixture, name)}: let mix.{name} agree"
            )
    order = mixture.orders["train"]
    different = sum(min(pool, used) for pool, used in zip(order.pools, order.used, strict=True))
    if different < config.batch_sequences:
        raise ValueError(
            f"{stage} asks for batches of batch_sequences {config.batch_sequences}, and the shards give it {different} "
            f"different sequences of {config.sequence_length} tokens: "
            f"{f'choose at most {different}, or ' if different else ''}give more text"
        )
