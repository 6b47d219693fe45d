"""Held-out loss against steps and against time, Muon (with AdamW for the rest) and AdamW alone. JSON at the end.

    OMP_NUM_THREADS=1 python -P bench/optimizers.py [--steps 240] [--seeds 3] [--adamw 0.0005 … 0.016]
                                                    [--muon 0.005 … 0.08] [--muon-matrices stored|logical]
                                                    [--plot FILE.png]

A DeepSeek-V3 of 0.2 M parameters (width 64, 3 layers, 8 experts of which 2 are active) learns the bytes of this
Python's library, in the loop that the stages run: warm-up, constant, cosine to a tenth, weight decay 0.1, clipping 1.0.
Rates are tuned first, on a seed that is not measured, by the loss at the end of runs of the full length: AdamW's over
its grid, then Muon's over its own, whose AdamW part keeps the rate that was best for AdamW alone. Then each seed
trains both sides in turn, from the same weights on the same sequences. Time is the CPU time of the process in one
thread (`time.process_time`), evaluation left out, so that other work on the machine counts little; it is not wall time.
Keys of the last line, medians over the seeds:

    loss             held-out nats a byte at the end, of each side
    seconds          CPU seconds of the whole run, of each side
    steps_ratio      steps that Muon needs to AdamW's last held-out loss, over AdamW's steps
    seconds_ratio    the same of CPU seconds
    rates            the rates that were taken; `grid` has the loss of each
    edge             sides whose best rate lies at an end of its grid: such a grid is too narrow
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from gristmill.flows.cards import charts
from gristmill.model.config import ModelConfig
from gristmill.model.costs import parameter_counts
from gristmill.model.stage_types import silent
from gristmill.model.training.batches import TrainingBatch, numpy_generator
from gristmill.model.training.config import OptimizerConfig, ScheduleConfig
from gristmill.model.training.engine import Engine, start_distributed
from gristmill.model.training.loop import Row, Training, train
from gristmill.model.transformer import Batch, Transformer

BATCH, LENGTH, VOCAB = 8, 128, 256
HELD_OUT, EVERY = 32, 10  # sequences of a check, and steps between checks
TUNING_SEED = 1000
MODEL = ModelConfig(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, kv_lora_rank=32, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=16, intermediate_size=128, n_routed_experts=8, num_experts_per_tok=2,
    moe_intermediate_size=32, num_nextn_predict_layers=0, max_position_embeddings=LENGTH,
)  # fmt: skip
SIDES = {"adamw": ("AdamW", charts.PALETTE["base"]), "muon": ("Muon", charts.PALETTE["rl"])}


def as_batch(bytes_BS1: np.ndarray) -> TrainingBatch:
    """Sequences of one byte more than their length, as inputs and targets."""
    token_BS1 = torch.from_numpy(bytes_BS1.astype(np.int64))
    inputs = token_BS1[:, :-1]
    position_BS = torch.arange(inputs.shape[1]).expand_as(inputs)
    return TrainingBatch(Batch(inputs, position_BS), token_BS1[:, 1:], None, torch.ones(inputs.shape))


class Windows:
    """Places of the text drawn by (seed, step); notes the CPU time at which each step begins."""

    def __init__(self, text: np.ndarray, seed: int) -> None:
        self.text, self.seed, self.began = text, seed, 0.0

    def step(self, step: int, rank: int, ranks: int) -> TrainingBatch:
        self.began = time.process_time()
        starts = numpy_generator(self.seed, "windows", step).integers(0, len(self.text) - LENGTH, BATCH)
        return as_batch(self.text[starts[:, None] + np.arange(LENGTH + 1)])

    def documents(self, step: int) -> list[str]:
        return []


def library() -> tuple[np.ndarray, np.ndarray]:
    """Bytes to train on, and the last twentieth of them, cut into sequences, to hold out."""
    text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
    everything = np.frombuffer(text, np.uint8)
    cut = len(everything) * 19 // 20
    places = np.linspace(cut, len(everything) - LENGTH - 1, HELD_OUT).astype(np.int64)
    return everything[:cut], everything[places[:, None] + np.arange(LENGTH + 1)]


def trained(optimizer: OptimizerConfig, seed: int, steps: int) -> list[Row]:
    """Rows of (step, CPU seconds until then, held-out nats a byte) of one run."""
    text, kept = library()
    windows, check = Windows(text, seed), as_batch(kept)
    model = Transformer(MODEL, VOCAB)
    model.initialise(seed)
    rows: list[Row] = []
    seconds = 0.0

    @torch.no_grad()
    def held_out(step: int, engine: Engine) -> Row:
        nonlocal seconds
        seconds += time.process_time() - windows.began
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            rows.append({"step": step + 1, "seconds": seconds, "loss": engine.evaluate(check)})
        return {}

    schedule = ScheduleConfig(warmup_steps=min(20, steps), decay_fraction=0.5, final_ratio=0.1)
    asked = Training(steps, BATCH, optimizer, schedule, checkpoint_every=steps)
    with tempfile.TemporaryDirectory() as out:
        (Path(out) / "log").mkdir()
        train(model, windows, asked, Path(out), silent, held_out)
    return rows


def tuned(
    adamw: list[float], muon: list[float], matrices: Literal["stored", "logical"], steps: int
) -> tuple[dict[str, Any], dict[str, OptimizerConfig]]:
    """The loss of each rate of the grids, and each side with its best; `matrices` are those that Muon takes."""
    grid: dict[str, dict[float, float]] = {"adamw": {}, "muon": {}}
    best: dict[str, OptimizerConfig] = {}
    for rate in adamw:
        config = OptimizerConfig(muon_learning_rate=0.0, adam_learning_rate=rate)
        grid["adamw"][rate] = trained(config, TUNING_SEED, steps)[-1]["loss"]
        print(f"tuning AdamW {rate:g}: {grid['adamw'][rate]:.4f}", flush=True)
    base = min(grid["adamw"], key=grid["adamw"].__getitem__)
    best["adamw"] = OptimizerConfig(muon_learning_rate=0.0, adam_learning_rate=base)
    for rate in muon:
        config = OptimizerConfig(muon_learning_rate=rate, adam_learning_rate=base, muon_matrices=matrices)
        grid["muon"][rate] = trained(config, TUNING_SEED, steps)[-1]["loss"]
        print(f"tuning Muon {rate:g} with AdamW {base:g}: {grid['muon'][rate]:.4f}", flush=True)
    best["muon"] = OptimizerConfig(
        muon_learning_rate=min(grid["muon"], key=grid["muon"].__getitem__),
        adam_learning_rate=base,
        muon_matrices=matrices,
    )
    return grid, best


def reached(rows: list[Row], loss: float, what: str) -> float:
    """Steps or seconds at the first check that is as low as `loss`; infinite where none is."""
    return next((row[what] for row in rows if row["loss"] <= loss), float("inf"))


def summary(runs: dict[str, list[list[Row]]]) -> dict[str, Any]:
    """Medians over the seeds."""
    ratios: dict[str, list[float]] = {"step": [], "seconds": []}
    for adamw, muon in zip(runs["adamw"], runs["muon"], strict=True):
        for what, found in ratios.items():
            found.append(reached(muon, adamw[-1]["loss"], what) / adamw[-1][what])
    return {
        "loss": {side: round(statistics.median(rows[-1]["loss"] for rows in found), 4) for side, found in runs.items()},
        "seconds": {
            side: round(statistics.median(rows[-1]["seconds"] for rows in found), 2) for side, found in runs.items()
        },
        "steps_ratio": round(statistics.median(ratios["step"]), 3),
        "seconds_ratio": round(statistics.median(ratios["seconds"]), 3),
        "steps_ratios": [round(r, 3) for r in ratios["step"]],
        "seconds_ratios": [round(r, 3) for r in ratios["seconds"]],
    }


def plot(runs: dict[str, list[list[Row]]], path: Path) -> None:
    """Every seed's curve against steps and against CPU time; the line is AdamW's last loss, the median."""
    last = statistics.median(rows[-1]["loss"] for rows in runs["adamw"])
    with charts.house_style():
        figure, axes = charts.panels(2, 2, 4.4, 3.2)
        for ax, what, label in zip(axes, ("step", "seconds"), ("steps", "CPU seconds, one thread"), strict=True):
            for side, (name, colour) in SIDES.items():
                for seed, rows in enumerate(runs[side]):
                    charts.line(
                        ax,
                        [row[what] for row in rows],
                        [row["loss"] for row in rows],
                        colour,
                        linewidth=1.1,
                        label=name if seed == 0 else None,
                    )
            ax.axhline(last, color=charts.PALETTE["muted"], linewidth=0.8, linestyle=(0, (4, 3)))
            ax.set_xlabel(label)
            ax.set_xlim(left=0)
            ax.set_ylim(top=max(rows[2]["loss"] for found in runs.values() for rows in found))
        axes[0].set_title("Held-out loss, nats a byte")
        axes[1].legend(loc="upper right")
        figure.savefig(path, dpi=110, facecolor="white", metadata={"Software": None})


def main() -> None:
    """Parse the arguments, run, draw, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--adamw", type=float, nargs="+", default=[0.0005, 0.001, 0.002, 0.004, 0.008, 0.016])
    parser.add_argument("--muon", type=float, nargs="+", default=[0.005, 0.01, 0.02, 0.04, 0.08])
    parser.add_argument("--muon-matrices", default="stored", choices=["stored", "logical"])
    parser.add_argument("--plot", type=Path, default=Path("docs/images/optimizers.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    start_distributed(torch.device("cpu"))
    grid, best = tuned(arguments.adamw, arguments.muon, arguments.muon_matrices, arguments.steps)
    runs: dict[str, list[list[Row]]] = {side: [] for side in SIDES}
    for seed in range(arguments.seeds):
        for side, config in best.items():
            runs[side].append(trained(config, seed, arguments.steps))
            end = runs[side][-1][-1]
            print(f"seed {seed} {side:5s} {end['loss']:.4f} nats a byte, {end['seconds']:.1f} CPU s", flush=True)
    plot(runs, arguments.plot)
    rates = {"adamw": best["adamw"].adam_learning_rate, "muon": best["muon"].muon_learning_rate}
    edge = [side for side, rate in rates.items() if rate in (min(grid[side]), max(grid[side]))]
    losses = {side: {f"{rate:g}": round(loss, 4) for rate, loss in found.items()} for side, found in grid.items()}
    how = {"parameters": parameter_counts(MODEL, VOCAB)[0], "steps": arguments.steps, "seeds": arguments.seeds}
    how["muon_matrices"] = arguments.muon_matrices
    print(json.dumps({**summary(runs), "rates": rates, "edge": edge, "grid": losses, **how}))


if __name__ == "__main__":
    main()
