"""Loss over 500 steps in float32, bfloat16 and FP8 from equal weights on equal batches. JSON at the end.

    python -P bench/precision.py [--steps 500] [--seeds 1 2 3 4] [--precisions float32 bfloat16 fp8] [--rate 2e-4]
                              [--device cpu]

A mixture of experts whose widths are multiples of 128 reads the bytes of this Python's library, in the loop that the
stages run, at about V3's own learning rate. A loss is the mean over the last 100 steps, which are the same batches for
all. Keys of the last line:

    loss          of each precision and seed; of bfloat16 the mean of two runs
    noise         (second bfloat16's loss − first's) / first's, of each seed: the second starts from weights that are
                  off by a millionth of themselves, so that rounding alone parts the two
    fp8_apart     (FP8's loss − bfloat16's) / bfloat16's, of each seed
    fp8_apart_mean  the mean of their sizes; the goal is at most 0.0025
    bfloat16_apart  the same as fp8_apart, of bfloat16 over float32
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

BATCH, LENGTH, VOCAB, LAST = 8, 128, 256, 100
RATE, CLIP = 2e-4, 1.0  # V3: 2.2e-4. At twice as much, chance decides when a run learns to copy
MOVED = 1e-6  # of a weight: some roundings of float32


def windows(steps: int, seed: int) -> Any:
    """Bytes of Python's own sources, (steps, BATCH, LENGTH + 1), at places drawn by the seed."""
    import numpy as np

    from gristmill.model.training.batches import numpy_generator

    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    text = np.frombuffer(b"".join(path.read_bytes() for path in sources), np.uint8)
    start = numpy_generator(seed, "windows", 0).integers(0, len(text) - LENGTH - 1, (steps, BATCH))
    return text[start[..., None] + np.arange(LENGTH + 1)].astype(np.int64)


def run(
    precision: str, steps: int, seed: int, device: str, rate: float = RATE, moved: float = 0.0
) -> tuple[list[float], list[float]]:
    """Losses and seconds of the steps, from weights that are `moved` by so much of themselves."""
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
        if done % LAST == 0:
            last = statistics.fmean(seen[-LAST:])
            print(f"seed {seed} {precision:8s} step {done}: {last:.5f} over the last {LAST}", flush=True)

    start_distributed(torch.device(device))
    model = Transformer(config, VOCAB)
    model.initialise(torch_seed(seed, "initialise"))
    generator = torch.Generator().manual_seed(torch_seed(seed, "moved"))
    with torch.no_grad():
        for parameter in model.parameters() if moved else ():
            parameter *= 1 + moved * torch.empty(parameter.shape).normal_(generator=generator)
    model.to(device)
    apply_precision(model, precision)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="gristmill-precision-") as out:
        (Path(out) / "log").mkdir()
        training = Training(
            steps=steps,
            batch_sequences=BATCH,
            optimizer=OptimizerConfig(muon_learning_rate=0.0, adam_learning_rate=rate, gradient_clip=CLIP),
            schedule=ScheduleConfig(),
            checkpoint_every=10**9,
        )
        history = train(model, Given(), training, Path(out), said)
        timings = (Path(out) / "log" / "timings.jsonl").read_text().splitlines()
    return [row["main_loss"] for row in history.curves], [json.loads(line)["seconds"] for line in timings]


def compared(loss: dict[str, list[float]], again: list[float]) -> dict[str, Any]:
    """The line's comparisons, of each precision's losses by seed and those of bfloat16's second runs."""

    def apart(ours: list[float], base: list[float]) -> list[float]:
        return [round((a - b) / b, 6) for a, b in zip(ours, base, strict=True)]

    both = dict(loss)
    if "bfloat16" in loss:
        both["bfloat16"] = [statistics.fmean(pair) for pair in zip(loss["bfloat16"], again, strict=True)]
    result: dict[str, Any] = {"loss": {p: [round(v, 5) for v in values] for p, values in both.items()}}
    if "bfloat16" in loss:
        result["noise"] = apart(again, loss["bfloat16"])
    for key, ours, base in (("fp8_apart", "fp8", "bfloat16"), ("bfloat16_apart", "bfloat16", "float32")):
        if ours in both and base in both:
            result[key] = apart(both[ours], both[base])
    if "fp8_apart" in result:
        result["fp8_apart_mean"] = round(statistics.fmean(map(abs, result["fp8_apart"])), 6)
    return result


def main() -> None:
    """Parse the arguments, train, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    precisions = ["float32", "bfloat16", "fp8"]
    parser.add_argument("--precisions", nargs="+", default=precisions, choices=precisions)
    parser.add_argument("--rate", type=float, default=RATE, help="AdamW's learning rate")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    asked = parser.parse_args()
    if asked.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ[name] = value
    os.environ["MASTER_PORT"] = _free_port()
    loss: dict[str, list[float]] = {precision: [] for precision in asked.precisions}
    seconds: dict[str, list[float]] = {precision: [] for precision in asked.precisions}
    again: list[float] = []
    for seed in asked.seeds:
        for precision in asked.precisions:
            losses, taken = run(precision, asked.steps, seed, asked.device, asked.rate)
            loss[precision].append(statistics.fmean(losses[-LAST:]))
            seconds[precision] += taken
            print(f"seed {seed} {precision:8s} {losses[0]:.4f} → {loss[precision][-1]:.5f}", flush=True)
            if precision == "bfloat16":
                losses, taken = run(precision, asked.steps, seed, asked.device, asked.rate, MOVED)
                again.append(statistics.fmean(losses[-LAST:]))
                print(f"seed {seed} {precision:8s} {losses[0]:.4f} → {again[-1]:.5f}, moved", flush=True)
    result = compared(loss, again)
    result["seconds"] = {precision: round(statistics.median(taken), 4) for precision, taken in seconds.items()}
    print(
        json.dumps(
            {**result, "steps": asked.steps, "seeds": asked.seeds, "rate": asked.rate, "python": sys.version.split()[0]}
        )
    )


def _free_port() -> str:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


if __name__ == "__main__":
    main()
