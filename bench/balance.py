"""Are the experts of `tiny` evenly loaded after 300 steps of pretraining? A table by layer, and JSON at the end.

    python -P bench/balance.py [--store FOLDER] [--recipe tiny] [--set section.field=value] [--steps 300] [--window 20]

Makes the corpus of the recipe (in a store that is thrown away, or in --store, where it is taken if it is there) and
takes the first 300 steps of its pretraining: weights, batches, rates and biases are those of the stage, whose record
holds the load of one step in twelve alone. Only the guard against jumping losses is left out.

A layer's violation is (largest load of an expert / mean load) − 1, "MaxVio" of Wang et al. 2024 (arXiv 2408.15664),
taken in two ways over the last 20 steps:

    by step    of each step's load, the mean over the steps: what the ranks of a step wait for. The goal is held against
               this, the stricter: the bias that balances is moved once a step, and a sum over steps would hide that it
               swings. It has the noise of a step in it: `noise` is what even routing would show if each token drew its
               experts independently, a lower bound, as the tokens of a sequence resemble each other.
    in window  of the load that the steps have together: whether an expert is preferred throughout

and an expert is starved whose load over these steps is below a tenth of the mean. Keys of the last line:

    worst_violation     by step, of the worst layer (goal: below 0.25)
    worst_in_window     the same of the summed load
    worst_step          the largest violation of a single layer and step among them
    noise               of one step of evenly routed tokens, the mean
    starved             experts that are, over all layers
    met                 whether the worst violation is below 0.25 and none is starved
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gristmill.flows.recipe import Recipe
    from gristmill.model.config import ModelConfig

GOAL, STARVED = 0.25, 0.1


def violation(load_E: np.ndarray) -> np.ndarray:
    """(Largest load / mean load) − 1 over the last axis."""
    return load_E.max(-1) / load_E.mean(-1) - 1


def judged(load_SLE: np.ndarray) -> list[dict[str, Any]]:
    """Of each layer, what the loads of some steps (S, L, E) come to."""
    step_SL, sum_LE = violation(load_SLE), load_SLE.sum(0)
    share_LE = sum_LE / sum_LE.mean(-1, keepdims=True)
    return [
        {
            "by_step": float(step_SL[:, layer].mean()),
            "worst_step": float(step_SL[:, layer].max()),
            "in_window": float(violation(sum_LE[layer])),
            "least": float(share_LE[layer].min()),
            "starved": int((share_LE[layer] < STARVED).sum()),
        }
        for layer in range(load_SLE.shape[1])
    ]


def noise(tokens: int, experts: int, chosen: int, draws: int = 2000) -> float:
    """The mean violation of a step whose tokens each choose so many different experts evenly, by simulation."""
    # A token's choices are distinct, so an expert's count is binomial, and the counts sum to tokens × chosen: normal
    # deviations with their mean taken off have these variances and covariances.
    deviation = np.random.default_rng(0).normal(size=(draws, experts))
    deviation -= deviation.mean(-1, keepdims=True)
    share = chosen / experts
    spread = (tokens * share * (1 - share) * experts / (experts - 1)) ** 0.5
    return float(violation(tokens * share + spread * deviation).mean())


def corpus_of(recipe: Recipe, store: Path) -> tuple[Path, Path]:
    """The recipe's token shards and mixture, made where they are not there."""
    from gristmill.flows.corpus import corpus
    from gristmill.flows.runners import Plain
    from gristmill.flows.store import Store

    place = Store(store)
    runner = Plain(place, recipe.execution)
    runner.run(corpus, recipe)
    tokens, mixture = (runner.plan.named(name).call.artifact for name in ("tokenize", "mix"))
    return place.folder("tokenize", tokens.key), place.folder("mix", mixture.key)


def loads(recipe: Recipe, tokens: Path, mixture: Path, steps: int) -> np.ndarray:
    """Rows that each expert received in each of the first steps of pretraining, (S, L, E); MTP modules' layers last.

    Raises:
        FloatingPointError: a gradient was not finite.
    """
    import torch

    from gristmill.data.mixture import Mixture
    from gristmill.data.shards import TokenShards
    from gristmill.model.training.batches import torch_seed
    from gristmill.model.training.config import LayoutConfig
    from gristmill.model.training.engine import Engine, start_distributed
    from gristmill.model.training.inputs import check_mixture
    from gristmill.model.training.precision import apply_precision
    from gristmill.model.training.pretraining import token_batches, training_of
    from gristmill.model.training.schedules import factor, tail_factor
    from gristmill.model.transformer import Transformer

    config, device = recipe.pretrain, torch.device("cpu")
    shards = TokenShards(tokens / "tokens")
    read = Mixture(mixture, shards)
    check_mixture("pretrain", config, read)
    start_distributed(device)
    model = Transformer(config.model, shards.vocab_size)
    model.initialise(torch_seed(recipe.seed, "initialise"))
    asked = training_of(config, model, recipe.seed)
    apply_precision(model, config.precision)
    engine = Engine(
        model,
        asked.optimizer,
        mtp_loss_weight=asked.mtp_loss_weight,
        batch_sequences=asked.batch_sequences,
        layout=LayoutConfig(),
    )
    batches, found = token_batches(config, read, "train", device), []
    for step in range(steps):
        row = engine.accumulate(batches, step, tail_factor(asked.mtp_weight_tails, step, asked.steps))
        if not engine.step(factor(asked.schedule, step, asked.steps), admitted=True):
            raise FloatingPointError(f"the gradient of step {step} is not finite")
        load_LE = engine.balance(tail_factor(asked.bias_speed_tails, step, asked.steps))
        assert load_LE is not None
        found.append(load_LE.numpy().copy())
        if (step + 1) % 50 == 0:
            mean = violation(found[-1]).mean()
            print(f"step {step + 1}: loss {row['main_loss']:.4f}, violation {mean:.3f} (mean of layers)", flush=True)
    return np.stack(found)


def layer_names(model: ModelConfig) -> list[str]:
    """Of the blocks with routed experts, in the order of `Transformer.mixtures`."""
    blocks = [f"layer {i}" for i in range(model.first_k_dense_replace, model.num_hidden_layers)]
    return blocks + [f"MTP {i + 1}" for i in range(model.num_nextn_predict_layers)]


def shown(rows: list[dict[str, Any]], layers: list[str]) -> None:
    """The table."""
    print(
        f"{'layer':>8s} {'by step':>9s} {'worst step':>11s} {'in window':>10s} {'least share × E':>16s} {'starved':>8s}"
    )
    for name, row in zip(layers, rows, strict=True):
        print(
            f"{name:8s} {row['by_step']:9.3f} {row['worst_step']:11.3f} {row['in_window']:10.3f} "
            f"{row['least']:16.3f} {row['starved']:8d}"
        )


def one_process() -> None:
    """Make this the only rank."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def main() -> None:
    """Parse the arguments, train, print the table and the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="a store whose corpus is taken, or where it is left")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--window", type=int, default=20)
    parser.add_argument("--loads", type=Path, help="leave all loads, (steps, layers, experts), in this .npy file")
    asked = parser.parse_args()
    from gristmill.flows.recipe import load_recipe

    recipe = load_recipe(asked.recipe, asked.settings)
    config, model = recipe.pretrain, recipe.pretrain.model
    if not 0 < asked.window <= asked.steps <= config.steps:
        parser.error(f"--window {asked.window} of --steps {asked.steps} of {config.steps} in all: give rising numbers")
    one_process()
    with nullcontext(asked.store) if asked.store else tempfile.TemporaryDirectory(prefix="gristmill-balance-") as store:
        load_SLE = loads(recipe, *corpus_of(recipe, Path(store)), asked.steps)
    if asked.loads:
        np.save(asked.loads, load_SLE)
    rows = judged(load_SLE[-asked.window :])
    tokens = config.batch_sequences * config.sequence_length
    print(
        f"steps {asked.steps - asked.window + 1} to {asked.steps} of {asked.recipe}, {tokens} tokens each, "
        f"{model.num_experts_per_tok} of {model.n_routed_experts} experts a token"
    )
    shown(rows, layers := layer_names(model))
    worst, starved = max(row["by_step"] for row in rows), sum(row["starved"] for row in rows)
    result = {
        "worst_violation": round(worst, 4),
        "worst_in_window": round(max(row["in_window"] for row in rows), 4),
        "worst_step": round(max(row["worst_step"] for row in rows), 4),
        "noise": round(noise(tokens, model.n_routed_experts, model.num_experts_per_tok), 4),
        "by_layer": {name: round(row["by_step"], 4) for name, row in zip(layers, rows, strict=True)},
    }
    print(json.dumps({**result, "starved": starved, "met": worst < GOAL and not starved, "steps": asked.steps}))


if __name__ == "__main__":
    main()
