"""Loss over 500 steps in float32, bfloat16 and FP8 from equal weights on equal batches. JSON at the end.

    python -P bench/precision.py [--steps 500] [--seeds 0] [--precisions float32 bfloat16 fp8] [--device cpu]

A mixture of experts whose widths are multiples of 128 reads the bytes of this Python's library, in the loop that the
stages run. A loss is the mean over the last 50 steps, which are the same batches for all. Keys of the last line:

    loss          of each precision and seed
    fp8_apart     (FP8's loss − bfloat16's) / bfloat16's, of each seed; the goal is at most 0.0025
    bfloat16_apart  the same of bfloat16 over float32
    seconds       of a step, the median, of each precision
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

BATCH, LENGTH, VOCAB, LAST = 8, 128, 256, 50
ADAM_RATE, CLIP = 5e-4, 1.0


def windows(steps: int, seed: int) -> Any:
    """Bytes of Python's own sources, (steps, BATCH, LENGTH + 1), at places drawn by the seed."""
    import numpy as np

    from gristmill.model.training.batches import numpy_generator

    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    text = np.frombuffer(b"".join(path.read_bytes() for path in sources), np.uint8)
    start = numpy_generator(seed, "windows", 0).integers(0, len(text) - LENGTH - 1, (steps, BATCH))
    return text[start[..., None] + np.arange(LENGTH + 1)].astype(np.int64)


def run(precision: str, steps: int, seed: int, device: str) -> tuple[list[float], list[float]]:
    """Losses and seconds of the steps."""
    import torch

    from gristmill.model.config import ModelConfig
    from gristmill.model.training.batches import TrainingBatch, torch_seed
    from gristmill.model.training.config import OptimizerConfig, ScheduleConfig
    from gristmill.model.training.engine import start_distributed
    from gristmill.model.training.loop import Training, train
    from gristmill.model.training.precision import apply_precision
    from gristmill.model.transformer import Batch, Transformer

    config = ModelConfig(
        hidden_size=128, num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=2, kv_lora_rank=128,
        qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64, intermediate_size=384, moe_intermediate_size=128,
        n_routed_experts=4, num_experts_per_tok=2, num_nextn_predict_layers=0, max_position_embeddings=LENGTH,
    )  # fmt: skip
    tokens = torch.from_numpy(windows(steps, seed)).to(device)
    position = torch.arange(LENGTH, device=device).expand(BATCH, -1)
    weight = torch.ones(BATCH, LENGTH, device=device)

    class Given:
        def step(self, step: int, rank: int, ranks: int) -> TrainingBatch:
            return TrainingBatch(Batch(tokens[step][:, :-1], position), tokens[step][:, 1:], None, weight)

        def documents(self, step: int) -> list[str]:
            return []

    seen: list[float] = []

    def said(done: int, total: int, **numbers: float) -> None:
        if not numbers:  # a sign of life between steps
            return
        seen.append(numbers["loss"])
        if done % (2 * LAST) == 0:
            last = statistics.fmean(seen[-LAST:])
            print(f"seed {seed} {precision:8s} step {done}: {last:.5f} over the last {LAST}", flush=True)

    start_distributed(torch.device(device))
    model = Transformer(config, VOCAB)
    model.initialise(torch_seed(seed, "initialise"))
    model.to(device)
    apply_precision(model, precision)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="gristmill-precision-") as out:
        (Path(out) / "log").mkdir()
        training = Training(
            steps=steps,
            batch_sequences=BATCH,
            optimizer=OptimizerConfig(muon_learning_rate=0.0, adam_learning_rate=ADAM_RATE, gradient_clip=CLIP),
            schedule=ScheduleConfig(),
            checkpoint_every=10**9,
        )
        history = train(model, Given(), training, Path(out), said)
        timings = (Path(out) / "log" / "timings.jsonl").read_text().splitlines()
    return [row["main_loss"] for row in history.curves], [json.loads(line)["seconds"] for line in timings]


def main() -> None:
    """Parse the arguments, train, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    precisions = ["float32", "bfloat16", "fp8"]
    parser.add_argument("--precisions", nargs="+", default=precisions, choices=precisions)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    asked = parser.parse_args()
    if asked.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ[name] = value
    os.environ["MASTER_PORT"] = _free_port()
    loss: dict[str, list[float]] = {precision: [] for precision in asked.precisions}
    seconds: dict[str, list[float]] = {precision: [] for precision in asked.precisions}
    for seed in asked.seeds:
        for precision in asked.precisions:
            losses, taken = run(precision, asked.steps, seed, asked.device)
            loss[precision].append(statistics.fmean(losses[-LAST:]))
            seconds[precision] += taken
            print(f"seed {seed} {precision:8s} {losses[0]:.4f} → {loss[precision][-1]:.5f}", flush=True)
    result: dict[str, Any] = {"loss": {p: [round(v, 5) for v in values] for p, values in loss.items()}}
    for key, ours, base in (("fp8_apart", "fp8", "bfloat16"), ("bfloat16_apart", "bfloat16", "float32")):
        if ours in loss and base in loss:
            result[key] = [round((a - b) / b, 6) for a, b in zip(loss[ours], loss[base], strict=True)]
    result["seconds"] = {precision: round(statistics.median(taken), 4) for precision, taken in seconds.items()}
    print(json.dumps({**result, "steps": asked.steps, "seeds": asked.seeds, "python": sys.version.split()[0]}))


def _free_port() -> str:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


if __name__ == "__main__":
    main()
