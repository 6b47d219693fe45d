"""How a training step grows: with experts, with the sequence, with ranks. Tables, and JSON at the end.

    python -P bench/growth.py [--parts experts sequence ranks] [--rounds 3] [--steps 8] [--optimizer adamw|muon]
                              [--experts 8 16 32 64] [--lengths 256 512 1024 2048] [--tokens 2048] [--threads N]
                              [--bandwidth 400e9] [--latency 5e-6]

The model is the 22 M one of `bench/pretrain.py` (width 256, 6 layers, 4 active experts of width 128), without MTP; a
step has 2,048 tokens of text in documents of 300 on average, packed, each seen and numbered on its own, as training
has them. Every measurement is a process of its own, sides take turns, times are medians over the steps of all rounds.
A step is `accumulate` (forward and backward) and `update` (clipping, optimizer, biases), each timed by itself.

*Experts.* 8 to 64 at equal active work. What has more to do is what touches all parameters once a step, however many
tokens that has: the optimizer, and the writing of gradients. Its share shrinks with --tokens, and is largest with Muon,
whose Newton-Schulz iterations multiply each matrix, of smaller side m, as often as up to 5 m tokens do: 500 and 1,300
here, where each of 64 experts has 128 tokens. AdamW is the default.

*Sequence.* 256 to 2,048 at equal tokens a step, beside what `flops_per_token` predicts from the time at the first
length: that model counts attention's products with half of the positions, and nothing but products.

*Ranks.* Tokens a second of one rank with one thread, two such ranks (each with as many tokens: weak scaling), and one
rank with two threads. Then what 64 ranks would do, by layout: each sends so many messages and bytes a step,

    seconds = measured seconds of one rank + messages × latency + bytes / bandwidth

(Hockney's α-β model), with these assumptions: as many tokens a rank as measured; rings for reductions and gathers,
(n − 1)/n of the bytes and n − 1 messages each way; direct messages for all-to-alls; gradients, parameters and rows of
four bytes; every rank's load is even; nothing is sent while something is computed, which DeepSpeed does and which would
hide most of it; every message crosses the link of --bandwidth (bits a second a rank; InfiniBand NDR has 400 Gb/s), none
shares it with another. A CPU's seconds beside such a link flatter the efficiency: hold bytes, not efficiency, against
other machines, or give --compute-seconds of the device in mind. Keys of the last line:

    experts_growth      seconds of a step at the most experts over those at the fewest (goal: at most 1.2)
    experts_growth_accumulate   the same of forward and backward alone
    optimizer_share     of a step's seconds, at the fewest and the most experts
    sequence_growth     measured over predicted seconds of forward and backward at the longest sequence
    ranks_speedup       tokens a second of two ranks with a thread each over one
    threads_speedup     of one rank with two threads over one
    efficiency_64       by layout, seconds of computing over predicted seconds
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from gristmill.model.config import ModelConfig
    from gristmill.model.training.batches import TrainingBatch
    from gristmill.model.training.layout import Layout

VOCAB, WARM, NUMBER_BYTES = 8192, 3, 4
DOCUMENT_TOKENS = 300  # of a document, the mean
PARTS = ("experts", "sequence", "ranks")


# --- what is sent -----------------------------------------------------------------------------------------------------


class Traffic(NamedTuple):
    """What a rank sends in a step."""

    messages: int
    bytes: float

    def seconds(self, latency: float, bandwidth: float) -> float:
        """The α-β model; latency in seconds a message, bandwidth in bits a second."""
        return self.messages * latency + 8 * self.bytes / bandwidth


def ring(ranks: int, size: float, passes: int) -> Traffic:
    """Reduce-scatters or all-gathers of `size` bytes, so many; an all-reduce is one of each."""
    return Traffic(passes * (ranks - 1), passes * (ranks - 1) / ranks * size)


def total(parts: list[Traffic]) -> Traffic:
    """Sent one after the other."""
    return Traffic(sum(part.messages for part in parts), sum(part.bytes for part in parts))


def traffic(model: ModelConfig, layout: Layout, zero_stage: int, tokens: int) -> dict[str, Traffic]:
    """By purpose, what a rank of `tokens` tokens sends in a step whose parameters AdamW moves."""
    from gristmill.model.training.layout import expert_bytes, mixtures, sequence_bytes

    ordinary, routed = parameter_bytes(model)
    shared, parts = layout.expert_parallel, layout.sequence_parallel
    if shared == 1:
        ordinary, routed = ordinary + routed, 0
    # All-reduce; reduce-scatter of gradients and all-gather of parameters; the latter for backward once more.
    found = {"parameters": ring(layout.ranks, ordinary, {0: 2, 1: 2, 2: 2, 3: 3}[zero_stage])}
    if shared > 1:
        found["expert gradients"] = ring(layout.ranks // shared, routed / shared, 2)
        found["rows"] = Traffic(
            mixtures(model) * 5 * (shared - 1), expert_bytes(model, layout, tokens, NUMBER_BYTES)
        )  # out and back, their gradients, and the counts
    if parts > 1:
        blocks = model.num_hidden_layers + model.num_nextn_predict_layers
        found["sequence"] = Traffic(
            blocks * 6 * (parts - 1), sequence_bytes(model, layout, tokens, NUMBER_BYTES)
        )  # queries, keys and results, and their gradients
    return found


def parameter_bytes(model: ModelConfig) -> tuple[int, int]:
    """Of all parameters but the routed experts', and of these."""
    import torch

    from gristmill.model.transformer import Transformer

    with torch.device("meta"):
        named = list(Transformer(model, VOCAB).named_parameters())
    routed = sum(p.numel() for name, p in named if ".experts." in name)
    return NUMBER_BYTES * (sum(p.numel() for _, p in named) - routed), NUMBER_BYTES * routed


# --- one measurement, in a process of its own -------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """What is measured."""

    experts: int = 32
    length: int = 256
    sequences: int = 8  # a rank's
    ranks: int = 1
    threads: int = 1
    optimizer: str = "adamw"


def shape(experts: int, length: int) -> ModelConfig:
    """The 22 M model of `bench/pretrain.py` with this many experts."""
    from gristmill.model.config import ModelConfig

    return ModelConfig(
        hidden_size=256, moe_intermediate_size=128, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8,
        kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32, first_k_dense_replace=1,
        n_routed_experts=experts, num_experts_per_tok=4, num_nextn_predict_layers=0, max_position_embeddings=length,
    )  # fmt: skip


class Packed:
    """Text of this Python's library, two bytes a token, in documents of exponential length."""

    def __init__(self, sequences: int, length: int) -> None:
        from pathlib import Path

        import numpy as np

        self.sequences, self.length = sequences, length
        text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
        pairs = np.frombuffer(text[: len(text) // 2 * 2], np.uint16)
        self.tokens = np.unique(pairs, return_inverse=True)[1] % VOCAB

    def step(self, step: int, rank: int, ranks: int) -> TrainingBatch:
        import numpy as np
        import torch

        from gristmill.model.training.batches import (
            TrainingBatch,
            numpy_generator,
            packed_inputs,
        )

        size = self.sequences * (self.length + 1)
        first = (step * ranks + rank) * size % (len(self.tokens) - size)
        token = torch.from_numpy(self.tokens[first : first + size].astype(np.int64)).view(self.sequences, -1)
        draw = numpy_generator("documents", step, rank).random((self.sequences, self.length))
        document = torch.from_numpy((draw < 1 / DOCUMENT_TOKENS).cumsum(1))
        inputs = packed_inputs(token[:, :-1], document)
        return TrainingBatch(inputs, token[:, 1:], None, torch.ones(self.sequences, self.length))

    def documents(self, step: int) -> list[str]:
        return []


def measure(side: Side, steps: int) -> dict[str, list[float]]:
    """Seconds of each step's parts."""
    import torch

    from gristmill.model.training.config import LayoutConfig, OptimizerConfig
    from gristmill.model.training.engine import Engine, start_distributed
    from gristmill.model.transformer import Transformer

    torch.set_num_threads(side.threads)
    start_distributed(torch.device("cpu"))
    model = Transformer(shape(side.experts, side.length), VOCAB)
    model.initialise(0)
    rate = {"adamw": 0.0, "muon": 0.02}[side.optimizer]
    engine = Engine(
        model,
        OptimizerConfig(muon_learning_rate=rate, adam_learning_rate=3e-4),
        mtp_loss_weight=0.0,
        batch_sequences=side.sequences * side.ranks,
        layout=LayoutConfig(),
    )
    batches = Packed(side.sequences, side.length)
    seconds: dict[str, list[float]] = {"accumulate": [], "update": []}
    for step in range(WARM + steps):
        began = time.perf_counter()
        engine.accumulate(batches, step)
        made = time.perf_counter()
        engine.step(1.0, admitted=True)
        engine.balance()
        done = time.perf_counter()
        if step >= WARM:
            seconds["accumulate"].append(made - began)
            seconds["update"].append(done - made)
    return seconds


def measured(side: Side, steps: int) -> dict[str, list[float]]:
    """`measure` in a process of its own, or as many as there are ranks; the first rank's seconds."""
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={side.ranks}"]
    command += [__file__, "--measure", json.dumps(asdict(side)), "--steps", str(steps)]
    fixed = {"OMP_NUM_THREADS": str(side.threads), "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    environment = {**os.environ, **fixed, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"accumulate"')))


def medians(sides: list[Side], rounds: int, steps: int) -> list[dict[str, float]]:
    """Of each side, the median seconds of a step and of its parts; the sides take turns."""
    taken: list[dict[str, list[float]]] = [{"accumulate": [], "update": []} for _ in sides]
    for _, (side, kept) in product(range(rounds), list(zip(sides, taken, strict=True))):
        for part, seconds in measured(side, steps).items():
            kept[part] += seconds
        print(
            f"  {side}: {statistics.median(kept['accumulate']) + statistics.median(kept['update']):.3f} s", flush=True
        )
    return [
        {
            "step": statistics.median(map(sum, zip(kept["accumulate"], kept["update"], strict=True))),
            **{part: statistics.median(seconds) for part, seconds in kept.items()},
        }
        for kept in taken
    ]


# --- the parts --------------------------------------------------------------------------------------------------------


def grow_experts(asked: argparse.Namespace) -> dict[str, Any]:
    """More experts, the same of them active."""
    sides = [
        Side(experts, sequences=asked.tokens // 256, threads=asked.threads, optimizer=asked.optimizer)
        for experts in asked.experts
    ]
    found = medians(sides, asked.rounds, asked.steps)
    print(f"{'experts':>8s} {'parameters':>11s} {'step s':>8s} {'accumulate':>11s} {'update':>8s} {'its share':>10s}")
    for side, row in zip(sides, found, strict=True):
        parameters = sum(parameter_bytes(shape(side.experts, side.length))) // NUMBER_BYTES
        print(
            f"{side.experts:8d} {parameters:11,d} {row['step']:8.3f} {row['accumulate']:11.3f} {row['update']:8.3f} "
            f"{row['update'] / row['step']:10.2f}"
        )
    first, last = found[0], found[-1]
    return {
        "experts_growth": last["step"] / first["step"],
        "experts_growth_accumulate": last["accumulate"] / first["accumulate"],
        "optimizer_share": [row["update"] / row["step"] for row in (first, last)],
    }


def grow_sequence(asked: argparse.Namespace) -> dict[str, Any]:
    """Longer sequences, as many tokens."""
    from gristmill.model.costs import flops_per_token

    sides = [
        Side(length=length, sequences=asked.tokens // length, threads=asked.threads, optimizer=asked.optimizer)
        for length in asked.lengths
    ]
    found = medians(sides, asked.rounds, asked.steps)
    flops = [flops_per_token(shape(s.experts, s.length), VOCAB, s.length, mtp=False) for s in sides]
    ratio = 1.0
    print(f"{'length':>8s} {'step s':>8s} {'accumulate':>11s} {'predicted':>10s} {'ratio':>6s}")
    for side, row, each in zip(sides, found, flops, strict=True):
        predicted = found[0]["accumulate"] * each / flops[0]
        ratio = row["accumulate"] / predicted
        print(f"{side.length:8d} {row['step']:8.3f} {row['accumulate']:11.3f} {predicted:10.3f} {ratio:6.2f}")
    return {"sequence_growth": ratio}


def grow_ranks(asked: argparse.Namespace) -> dict[str, Any]:
    """One rank, two ranks, one rank with two threads; then the model of 64."""
    sequences = asked.tokens // 256
    sides = [Side(sequences=sequences, ranks=ranks, threads=threads) for ranks, threads in ((1, 1), (2, 1), (1, 2))]
    found = medians(sides, asked.rounds, asked.steps)
    rates = [side.ranks * asked.tokens / row["step"] for side, row in zip(sides, found, strict=True)]
    print(f"{'ranks':>6s} {'threads each':>13s} {'tokens/s':>9s} {'of one':>7s}")
    for side, rate in zip(sides, rates, strict=True):
        print(f"{side.ranks:6d} {side.threads:13d} {rate:9.0f} {rate / rates[0]:7.2f}")
    grown = found[1]["step"] - found[0]["step"]
    print(f"what two ranks send each other, and the memory that they share, add {grown:.3f} s to a step")
    efficiency = predict(asked, asked.compute_seconds or found[0]["step"])
    return {
        "ranks_speedup": rates[1] / rates[0],
        "threads_speedup": rates[2] / rates[0],
        "efficiency_64": efficiency,
    }


LAYOUTS = {  # (ranks that share the experts, and sequences, ZeRO stage)
    "ZeRO 0": (1, 1, 0),
    "ZeRO 1, 2": (1, 1, 1),
    "ZeRO 3": (1, 1, 3),
    "expert_parallel 2": (2, 1, 0),
    "expert_parallel 8": (8, 1, 0),
    "sequence_parallel 2": (1, 2, 0),
}


def predict(asked: argparse.Namespace, compute: float) -> dict[str, float]:
    """The table of layouts at 2 and 64 ranks; at 64, computing over the whole."""
    from gristmill.model.training.layout import Layout

    model, efficiency = shape(Side.experts, Side.length), {}
    print(f"{'layout':20s} {'ranks':>6s} {'messages':>9s} {'MB sent':>9s} {'s sent':>9s} {'efficiency':>11s}  of them")
    for ranks, (name, (experts, sequence, zero)) in product((2, 64), LAYOUTS.items()):
        if ranks % experts:
            continue
        sent = traffic(model, Layout(ranks, experts, sequence), zero, asked.tokens)
        whole = total(list(sent.values()))
        seconds = whole.seconds(asked.latency, asked.bandwidth)
        share = compute / (compute + seconds)
        if ranks == 64:
            efficiency[name] = share
        told = ", ".join(f"{purpose} {part.bytes / 1e6:.1f} MB" for purpose, part in sent.items())
        print(
            f"{name:20s} {ranks:6d} {whole.messages:9d} {whole.bytes / 1e6:9.1f} {seconds:9.5f} {share:11.4f}  {told}"
        )
    return efficiency


def rounded(result: Any) -> Any:
    """Numbers of the line to four digits behind the point."""
    if isinstance(result, dict):
        return {name: rounded(value) for name, value in result.items()}
    return [rounded(value) for value in result] if isinstance(result, list) else round(result, 4)


def main() -> None:
    """Parse the arguments, run the parts, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="of a measurement, besides three that are not counted")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--tokens", type=int, default=2048, help="of a step, on a rank")
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "muon"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of experts and sequence")
    parser.add_argument("--bandwidth", type=float, default=400e9, help="bits a second that a rank sends")
    parser.add_argument("--latency", type=float, default=5e-6, help="seconds of a message")
    parser.add_argument("--compute-seconds", type=float, help="of a step on one rank; none takes the measured ones")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        seconds = measure(Side(**json.loads(asked.measure)), asked.steps)
        if os.environ["RANK"] == "0":
            print(json.dumps(seconds))
        return
    lengths = [256, *asked.lengths] if "sequence" in asked.parts else [256]
    if wrong := [length for length in lengths if asked.tokens % length]:
        parser.error(f"--tokens {asked.tokens} is no multiple of {wrong[0]}, the length of a sequence: give another")
    grow = {"experts": grow_experts, "sequence": grow_sequence, "ranks": grow_ranks}
    result: dict[str, Any] = {}
    for part in asked.parts:
        print(f"{part}:", flush=True)
        result |= grow[part](asked)
    how = {name: getattr(asked, name) for name in ("rounds", "steps", "tokens", "threads", "optimizer")}
    print(json.dumps({**rounded(result), **how}))


if __name__ == "__main__":
    main()
