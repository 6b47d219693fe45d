"""Cached decoding against `transformers.generate`, and speculative decoding against our own. JSON at the end.

    python -P bench/decode.py [--rounds 3] [--sequences 32] [--prompt 64] [--new 128] [--store .gristmill/store]

The first comparison is of a model of 22 M parameters with random weights in float32: both sides read the same prompts
and take the likeliest token, so many times, with no token that ends a response; their tokens are compared. transformers
runs with its cache in each of its implementations of the experts that --experts names, and the fastest counts.

The second is of a base model that `make run` trained and its own MTP module, on prompts from held-out text, in batches
of one and of all sequences, greedy and sampled. Keys of the last line:

    ratio                   seconds of their fastest over ours (goal: at least 3)
    tokens_equal            share of the tokens that are the same on both sides (greedy; float32 sums differ in order)
    tokens_per_second       ours
    speculative_ratio       seconds without drafts over those with them, greedy, one sequence (goal: more than 1.3)
    speculative             by batch and temperature: ratio, acceptance, tokens a second without drafts and with them,
                            what a step with a draft takes of one without, and whether greedy tokens are the same
    speculative_bound       (1 + acceptance) / (1 + d), greedy, one sequence, d being the weights that a draft reads
                            over those that a plain step reads: the ratio if reading them took all the time and a second
                            token in the model's own step took none
    second_draft            how often the module, chained to itself, is right about the token behind a right draft
    step_by_layers          what a step with a draft takes of one without, one sequence, in models of the same width
                            with so many layers and random weights
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gristmill.model.config import ModelConfig
from gristmill.model.generate import Sampling, sample
from gristmill.model.hugging_face.conversion import export, of_model
from gristmill.model.speculative import speculate
from gristmill.model.training.models import load_model
from gristmill.model.transformer import Batch, Transformer, rotary_angles

VOCAB, NEVER, PAD = 8192, -1, 0


def small(length: int) -> ModelConfig:
    """The shape of 22 M parameters that `bench/pretrain.py` trains."""
    return ModelConfig(
        hidden_size=256, moe_intermediate_size=128, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8,
        kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32, first_k_dense_replace=1,
        n_routed_experts=32, num_experts_per_tok=4, num_nextn_predict_layers=0, max_position_embeddings=length,
    )  # fmt: skip


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def against_transformers(asked: argparse.Namespace) -> dict[str, Any]:
    """Both sides on the same weights and prompts, taking turns."""
    from transformers import AutoModelForCausalLM

    model = Transformer(small(asked.prompt + asked.new), VOCAB)
    model.initialise(0)
    model.eval()
    prompts = torch.randint(1, VOCAB, (asked.sequences, asked.prompt), generator=torch.Generator().manual_seed(1))
    sampling = Sampling(asked.new, temperature=0)
    seeds = [0] * asked.sequences

    def ours() -> list[list[int]]:
        return [s.tokens for s in sample(model, prompts.tolist(), seeds, sampling, eos=NEVER, pad=PAD)]

    sides: dict[str, Callable[[], list[list[int]]]] = {"ours": ours}
    with tempfile.TemporaryDirectory(prefix="gristmill-decode-") as folder:
        export(of_model(model), model.config, VOCAB, Path(folder))
        for experts in asked.experts:
            theirs = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, experts_implementation=experts
            ).eval()

            def generate(theirs: Any = theirs) -> list[list[int]]:
                made = theirs.generate(
                    prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=asked.new, do_sample=False,
                    min_new_tokens=asked.new, pad_token_id=PAD, eos_token_id=None,
                )  # fmt: skip
                return made[:, asked.prompt :].tolist()

            sides[f"transformers {experts}"] = generate
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    said: dict[str, list[list[int]]] = {}
    for round_ in range(asked.rounds + 1):
        for side, work in sides.items():
            taken, said[side] = timed(work)
            if round_:  # the first is for what is made once
                seconds[side].append(taken)
    median = {side: statistics.median(taken) for side, taken in seconds.items()}
    for side, taken in median.items():
        print(f"{side:28s} {asked.sequences * asked.new / taken:8.0f} tokens/s", flush=True)
    fastest = min((side for side in sides if side != "ours"), key=median.__getitem__)
    mine, other = (torch.tensor(said[side]) for side in ("ours", fastest))
    return {
        "ratio": round(median[fastest] / median["ours"], 2),
        "fastest_peer": fastest,
        "tokens_equal": round(float((mine == other).float().mean()), 4),
        "tokens_per_second": round(asked.sequences * asked.new / median["ours"]),
    }


def trained(store: Path) -> tuple[Transformer, torch.Tensor]:
    """The latest base model in a store, and sequences of the text that it was not trained on."""
    from gristmill.data.mixture import Mixture
    from gristmill.data.shards import TokenShards

    manifests = sorted((store / "pretrain").glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not manifests:
        sys.exit(f"{store} holds no pretrained model: make run, or name another --store")
    inputs = json.loads(manifests[-1].read_text())["inputs"]
    folder = {name: store / what["stage"] / what["key"] for name, what in inputs.items()}
    mixture = Mixture(folder["mixture"], TokenShards(folder["tokens"] / "tokens"))
    import numpy as np

    rows = mixture.batch(np.arange(64), "held_out", across=True).tokens
    return load_model(manifests[-1].parent / "model", torch.device("cpu")).eval(), torch.from_numpy(rows)


def drafted(model: Transformer, text: torch.Tensor, count: int, sampling: Sampling, asked: argparse.Namespace) -> dict:
    """So many sequences at once, with drafts and without in turn, each round other prompts."""
    seconds: dict[str, list[float]] = {"plain": [], "drafts": []}
    rates, equal = [], True
    for round_ in range(asked.rounds + 1):
        rows = (torch.arange(count) + round_ * count) % len(text)
        given = (model, text[rows, : asked.prompt].tolist(), rows.tolist(), sampling)
        without, plain = timed(partial(sample, *given, eos=NEVER, pad=PAD))
        with_, (samples, found) = timed(partial(speculate, *given, eos=NEVER, pad=PAD))
        equal &= [s.tokens for s in samples] == [s.tokens for s in plain]
        if round_:  # the first is for what is made once
            seconds["plain"].append(without)
            seconds["drafts"].append(with_)
            rates.append(found.rate)
    plain_, drafts = (statistics.median(taken) for taken in seconds.values())
    rate = statistics.mean(rates)
    row = {
        "ratio": round(plain_ / drafts, 2),
        "acceptance": round(rate, 3),
        "tokens_per_second": [round(count * asked.new / taken) for taken in (plain_, drafts)],
        "step": round((1 + rate) * drafts / plain_, 2),
    }
    return row if sampling.temperature else {**row, "tokens_equal": equal}


def drafted_weights(model: Transformer) -> float:
    """Weights that drafting a token reads, over those that a step of one token without a draft reads."""
    c = model.config
    share = c.num_experts_per_tok / c.n_routed_experts

    def read(part: torch.nn.Module) -> float:
        return sum(p.numel() * (share if ".experts." in name else 1) for name, p in part.named_parameters())

    head = read(model.lm_head)
    return (read(model.mtp[0]) + head) / (read(model.layers) + head)


@torch.no_grad()
def second_draft(model: Transformer, text: torch.Tensor, asked: argparse.Namespace) -> float:
    """Of greedy responses; the second pass reads the first one's states, and attends to its own at places before."""
    given = text[: asked.sequences, : asked.prompt].tolist()
    said = sample(model, given, [0] * len(given), Sampling(asked.new, temperature=0), eos=NEVER, pad=PAD)
    token_BS = torch.tensor([prompt + response.tokens for prompt, response in zip(given, said, strict=True)])
    position_BS = torch.arange(token_BS.shape[1]).expand_as(token_BS)
    hidden_BSD, rotary = (
        model.norm(model.hidden(Batch(token_BS, position_BS))),
        rotary_angles(model.config, position_BS),
    )
    next_BS, right = token_BS.roll(-1, 1), []
    for ahead in (2, 3):
        hidden_BSD = model.mtp[0](hidden_BSD, model.embed_tokens(next_BS), rotary, None, None)
        next_BS = model.lm_head(hidden_BSD).argmax(-1)
        right.append((next_BS == token_BS.roll(-ahead, 1))[:, asked.prompt : -3])
    return float(right[1][right[0]].float().mean())


def step_by_layers(like: ModelConfig, asked: argparse.Namespace) -> dict[int, float]:
    """Responses with drafts that are hardly ever right, so that seconds a step are what is compared."""
    steps, greedy = {}, Sampling(asked.new, temperature=0)
    for layers in (4, 8, 16, 32):
        model = Transformer(like.model_copy(update={"num_hidden_layers": layers}), 1024)
        model.initialise(0)
        model.eval()
        given, found = (model, [list(range(asked.prompt))], [0], greedy), []
        for _ in range(asked.rounds + 1):
            without, _ = timed(partial(sample, *given, eos=NEVER, pad=PAD))
            with_, (_, rate) = timed(partial(speculate, *given, eos=NEVER, pad=PAD))
            found.append((1 + rate.rate) * with_ / without)
        steps[layers] = round(statistics.median(found[1:]), 2)
    return steps


def with_drafts(asked: argparse.Namespace) -> dict[str, Any]:
    """Our own decoding with and without the MTP module's drafts."""
    model, text = trained(asked.store)
    table: dict[str, dict[str, Any]] = {}
    for count in (1, asked.sequences):
        for temperature in (0.0, 0.6):
            name = f"{count} at temperature {temperature}"
            table[name] = drafted(model, text, count, Sampling(asked.new, temperature=temperature), asked)
            print(f"speculative, {name}: {table[name]}", flush=True)
    greedy = table["1 at temperature 0.0"]
    bound = (1 + greedy["acceptance"]) / (1 + drafted_weights(model))
    return {
        "speculative_ratio": greedy["ratio"],
        "speculative_bound": round(bound, 2),
        "second_draft": round(second_draft(model, text, asked), 2),
        "step_by_layers": step_by_layers(model.config, asked),
        "speculative": table,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens that are said")
    parser.add_argument("--experts", nargs="+", default=["grouped_mm", "eager"])
    parser.add_argument("--store", type=Path, default=Path(".gristmill/store"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    import transformers

    torch.set_num_threads(asked.threads)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {asked.threads} threads")
    print(json.dumps({**with_drafts(asked), **against_transformers(asked), "threads": asked.threads}))


if __name__ == "__main__":
    main()
