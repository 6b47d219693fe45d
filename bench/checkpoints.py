"""What saving costs a training run: the copy, and how long training waits beyond it. JSON in the last line.

    OMP_NUM_THREADS=1 python -P bench/checkpoints.py [--steps 41] [--every 8] [--keep] [--device cpu]

A DeepSeek-V3 of about 20 M parameters trains on random tokens in the loop that the stages run, with AdamW (three
numbers a parameter are saved), and saves every so many steps; `--keep` keeps each checkpoint's model as well. Steps
are read from log/timings.jsonl. The first save is left out, as is the last, which nothing trains beside. A plain step
is the median of the last quarter of the steps between two saves, when the save has long been written. Medians over
saves in the last line:

    parameters, saves      of the model; that are counted
    step_seconds           a plain step
    copy_seconds           the copy of what is saved (`copying_seconds`)
    stall_seconds          what training waited beyond it until the next save (`stalled_seconds`)
    stall_share            of a plain step; the goal is below 0.05
    slowed_seconds         what the steps behind a save took longer than plain ones, which is no wait: on a CPU the
    slowed_share           thread hashes and writes on the cores that train
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from gristmill.model.config import ModelConfig
from gristmill.model.costs import parameter_counts
from gristmill.model.stage_types import silent
from gristmill.model.training.batches import TrainingBatch, torch_seed
from gristmill.model.training.config import OptimizerConfig, ScheduleConfig
from gristmill.model.training.engine import Engine, start_distributed
from gristmill.model.training.loop import Row, Training, train
from gristmill.model.transformer import Batch, Transformer

BATCH, LENGTH, VOCAB = 4, 256, 8192
MODEL = ModelConfig(
    hidden_size=256, num_hidden_layers=6, num_attention_heads=8, kv_lora_rank=64, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=32, first_k_dense_replace=1, intermediate_size=1024, n_routed_experts=32,
    num_experts_per_tok=4, moe_intermediate_size=128, num_nextn_predict_layers=0, max_position_embeddings=LENGTH,
)  # fmt: skip


class Random:
    """Tokens drawn by the step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def step(self, step: int, rank: int, ranks: int) -> TrainingBatch:
        generator = torch.Generator().manual_seed(torch_seed("checkpoints", step))
        token_BS1 = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator).to(self.device)
        position_BS = torch.arange(LENGTH, device=self.device).expand(BATCH, -1)
        weight_BS = torch.ones(BATCH, LENGTH, device=self.device)
        return TrainingBatch(Batch(token_BS1[:, :-1], position_BS), token_BS1[:, 1:], None, weight_BS)

    def documents(self, step: int) -> list[str]:
        return []


def timings(steps: int, every: int, keep: bool, device: torch.device) -> list[Row]:
    """Rows of log/timings.jsonl of one run."""
    model = Transformer(MODEL, VOCAB)
    model.initialise(0)
    asked = Training(
        steps=steps,
        batch_sequences=BATCH,
        optimizer=OptimizerConfig(muon_learning_rate=0.0),
        schedule=ScheduleConfig(warmup_steps=2),
        checkpoint_every=every,
        keep_every=every if keep else 0,
    )

    def wait_for_device(step: int, engine: Engine) -> Row:
        if device.type == "cuda":  # so that its work is not taken for the copy's
            torch.cuda.synchronize()
        return {}

    with tempfile.TemporaryDirectory(prefix="gristmill-checkpoints-") as out:
        (Path(out) / "log").mkdir()
        train(model.to(device), Random(device), asked, Path(out), silent, wait_for_device)
        return [json.loads(line) for line in (Path(out) / "log" / "timings.jsonl").read_text().splitlines()]


def costs(rows: list[Row], every: int) -> dict[str, Any]:
    """What each save but the first and the last cost, by the rows of a run's steps.

    Raises:
        ValueError: there are too few saves.
    """
    starts = [row["step"] for row in rows if (row["step"] + 1) % every == 0][1:-1]
    if not starts:
        raise ValueError(f"{len(rows)} steps with a save each {every} have none to measure: take more steps")
    found: dict[str, list[float]] = {"step": [], "copy": [], "stall": [], "slowed": []}
    for start in starts:
        # What a save costs: its own copy, and the waits of the steps behind it, the next save's included.
        after = rows[start + 1 : start + 1 + every]
        working = [row["seconds"] - row["evaluating_seconds"] - row["saving_seconds"] for row in after]
        plain = statistics.median(working[-max(2, every // 4) :])
        found["step"].append(plain)
        found["copy"].append(rows[start]["copying_seconds"])
        found["stall"].append(sum(row["stalled_seconds"] for row in after))
        found["slowed"].append(sum(working) - every * plain)
    median = {name: statistics.median(values) for name, values in found.items()}
    made: dict[str, Any] = {f"{name}_seconds": round(value, 5) for name, value in median.items()}
    for name in ("stall", "slowed"):
        shares = [value / step for value, step in zip(found[name], found["step"], strict=True)]
        made[f"{name}_share"] = round(statistics.median(shares), 4)
    return {"saves": len(starts), **made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=41)
    parser.add_argument("--every", type=int, default=8, help="steps between checkpoints, 4 or more")
    parser.add_argument("--keep", action="store_true", help="keep the model of each checkpoint")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    if arguments.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    device = torch.device(arguments.device)
    start_distributed(device)
    made = costs(timings(arguments.steps, arguments.every, arguments.keep, device), arguments.every)
    made = {"parameters": parameter_counts(MODEL, VOCAB)[0], **made}
    for name, value in made.items():
        print(f"{name:<16} {value}")
    print(json.dumps(made))


if __name__ == "__main__":
    main()
