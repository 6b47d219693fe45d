"""Tokens a second of a whole training step, ours against `transformers`' DeepseekV3ForCausalLM. JSON at the end.

    python -P bench/pretrain.py [--steps 50] [--rounds 3] [--shapes small wide] [--ours float32 bfloat16]
                                [--theirs float32/grouped_mm float32/eager bfloat16/grouped_mm] [--device cpu]
                                [--profile]

Both start from the same weights, read the same tokens in the same order and take the same AdamW steps (forward,
backward, clipping, optimizer); what theirs does not have (MTP, balance loss, moving biases) is off in ours. Ours runs
in the loop that the stage runs, its engine and its records included; in bfloat16 and fp8 its moments are bfloat16, as
V3's are (section 3.3.3), while parameters and gradients are float32 on both sides. Every run is a process of its own;
sides take turns. `small` is the shape of 22 M parameters (width 256, 6 layers, 32 experts of which 4 are active),
`wide` is four times as wide with as many layers: sixteen times the matrices. Keys of the last line:

    ratio               ours over the fastest of theirs, the smaller of the shapes' (medians of the steps)
    ratio_same_dtype    the same with both in float32
    memory_ratio        most memory of our process (on a GPU, of what torch holds there) over that of their fastest,
                        the larger of the shapes'
    peak_fraction       model FLOPs of our fastest over what the machine's product reaches in that dtype, the smaller
    tokens_per_second   ours, at each shape
    loss_apart          largest difference of the losses of the two sides in float32, over the loss; exit code 1 where
                        it is above half a percent, since the work was then not the same
    loss_apart_fastest  that of the two that `ratio` compares, with the same limit
    loss_apart_theirs   that of their fastest from theirs in float32: what rounding alone does to these batches

The text is the source of the first hundred models in the transformers that is measured, the same for every Python.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gristmill.model.training.config import Precision

BATCH, LENGTH, VOCAB = 8, 256, 8192
RATE, CLIP = 3e-4, 1.0
WARM = 3  # steps that are run and not counted
FILES = 100  # of transformers' models, 4 MB
SHAPES = {
    "small": {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 1024},
    "wide": {"hidden_size": 1024, "moe_intermediate_size": 512, "intermediate_size": 4096},
}
THEIRS = ("float32/grouped_mm", "float32/eager", "bfloat16/grouped_mm")  # autocast, and the way of the experts
APART = 0.005


def shape(name: str) -> Any:
    """The model of this name, without what the other side has not."""
    from gristmill.model.config import ModelConfig

    width = SHAPES[name]["hidden_size"]
    return ModelConfig(
        **SHAPES[name], num_hidden_layers=6, num_attention_heads=8, kv_lora_rank=width // 4,
        qk_nope_head_dim=width // 16, qk_rope_head_dim=width // 16, v_head_dim=width // 8, first_k_dense_replace=1,
        n_routed_experts=32, num_experts_per_tok=4, num_nextn_predict_layers=0, balance_loss_alpha=0.0,
        bias_update_speed=0.0, max_position_embeddings=LENGTH,
    )  # fmt: skip


def prepare(folder: Path, name: str, steps: int) -> None:
    """The same weights in both forms, and tokens: bytes of transformers' models, in pairs, so that there is a text."""
    import numpy as np
    import transformers

    from gristmill.model.hugging_face.conversion import export, of_model
    from gristmill.model.training.models import save_model
    from gristmill.model.transformer import Transformer

    model = Transformer(shape(name), VOCAB)
    model.initialise(0)
    save_model(folder / "ours", model)
    export(of_model(model), model.config, VOCAB, folder / "theirs")
    sources = sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))[:FILES]
    text = b"".join(path.read_bytes() for path in sources)
    pairs = np.frombuffer(text[: len(text) // 2 * 2], np.uint16)
    token = np.unique(pairs, return_inverse=True)[1] % VOCAB
    count = (steps + WARM) * BATCH * (LENGTH + 1)
    np.save(folder / "tokens.npy", np.resize(token, count).reshape(-1, BATCH, LENGTH + 1))


def run_ours(folder: Path, device: str, precision: Precision = "float32", profile: str = "") -> dict[str, Any]:
    """Our loop, as the stage runs it; with its table of the last step's operators where a profile is asked for."""
    import numpy as np
    import torch

    from gristmill.model.costs import flops_per_token
    from gristmill.model.stage_types import silent
    from gristmill.model.training.batches import TrainingBatch
    from gristmill.model.training.config import LayoutConfig, OptimizerConfig, ScheduleConfig
    from gristmill.model.training.engine import start_distributed
    from gristmill.model.training.loop import Training, train
    from gristmill.model.training.models import load_model
    from gristmill.model.training.precision import apply_precision
    from gristmill.model.transformer import Batch

    tokens = torch.from_numpy(np.load(folder / "tokens.npy").astype(np.int64)).to(device)
    position = torch.arange(LENGTH, device=device).expand(BATCH, -1)
    weight = torch.ones(BATCH, LENGTH, device=device)

    class Given:
        def step(self, step: int, rank: int, ranks: int) -> TrainingBatch:
            row = tokens[step]
            return TrainingBatch(Batch(row[:, :-1], position), row[:, 1:], None, weight)

        def documents(self, step: int) -> list[str]:
            return []

    start_distributed(torch.device(device))
    model = load_model(folder / "ours", torch.device(device))
    apply_precision(model, precision)
    with tempfile.TemporaryDirectory() as out:
        (Path(out) / "log").mkdir()
        history = train(
            model,
            Given(),
            Training(
                steps=len(tokens),
                batch_sequences=BATCH,
                optimizer=OptimizerConfig(
                    muon_learning_rate=0.0,
                    adam_learning_rate=RATE,
                    gradient_clip=CLIP,
                    moments="float32" if precision == "float32" else "bfloat16",
                ),
                schedule=ScheduleConfig(warmup_steps=0, decay_fraction=0.0),
                checkpoint_every=10**9,
            ),
            Path(out),
            silent,
            layout=LayoutConfig(profile=(len(tokens) - 1,) if profile else ()),
        )
        tables = [path.read_text() for path in (Path(out) / "log").glob("profile-*.txt")]
        timings = (Path(out) / "log" / "timings.jsonl").read_text().splitlines()
    flops = flops_per_token(model.config, VOCAB, LENGTH, mtp=False)
    seconds = [json.loads(line)["seconds"] for line in timings]
    losses = [row["main_loss"] for row in history.curves]
    return {"losses": losses, "seconds": seconds[WARM:], "flops": flops, "tables": tables}


def run_theirs(folder: Path, device: str, dtype: str, experts: str) -> dict[str, Any]:
    """The loop that one would write around it: fused AdamW, gradients clipped by their norm."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    tokens = torch.from_numpy(np.load(folder / "tokens.npy").astype(np.int64)).to(device)
    model = AutoModelForCausalLM.from_pretrained(folder / "theirs", dtype=torch.float32, experts_implementation=experts)
    model = model.to(device).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)
    losses, seconds = [], []
    for row in tokens:
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(row[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), row[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - began)
    return {"losses": losses, "seconds": seconds[WARM:]}


def measured(what: str, folder: Path, device: str, *arguments: str, threads: int) -> dict[str, Any]:
    """One of the functions above in a process of its own, with the most memory it held."""
    command = [
        sys.executable,
        "-P",
        __file__,
        "--threads",
        str(threads),
        "--run",
        what,
        str(folder),
        device,
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "RANK": "0"}
    if device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    environment |= {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{what} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _free_port() -> str:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def peak_mib(device: str) -> int:
    """Most memory of this process; on a GPU, most that torch had there."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() // 2**20
    peak = next(li for li in Path("/proc/self/status").read_text().splitlines() if li.startswith("VmHWM"))
    return int(peak.split()[1]) // 1024


def matmul_rate(device: str, precision: Precision, times: int = 20) -> float:
    """Operations a second of a product of squares, the fastest of several; bfloat16 where the precision is fp8."""
    import torch

    size = 1024 if device == "cpu" else 8192
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return 2 * size**3 / min(taken)


def compare(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both sides at one shape."""
    prepare(folder, name, arguments.steps)
    device = arguments.device
    profile = ["profile"] if arguments.profile else []
    sides: dict[str, tuple[str, ...]] = {f"ours {one}": ("run_ours", one, *profile) for one in arguments.ours}
    sides |= {f"theirs {one}": ("run_theirs", *one.split("/")) for one in arguments.theirs}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    last: dict[str, dict[str, Any]] = {}
    for _ in range(arguments.rounds):
        for side, (what, *how) in sides.items():
            last[side] = measured(what, folder, device, *how, threads=arguments.threads)
            seconds[side] += last[side]["seconds"]
            rate = BATCH * LENGTH / statistics.median(last[side]["seconds"])
            print(f"{name:6s} {side:28s} {rate:8.0f} tokens/s {last[side]['peak_mib']:6d} MiB", flush=True)
            print(*last[side].get("tables", []), sep="\n", end="", flush=True)
    rate = {side: BATCH * LENGTH / statistics.median(taken) for side, taken in seconds.items()}
    ours, theirs, same = (
        max((side for side in sides if side.startswith(which)), key=rate.__getitem__)
        for which in ("ours", "theirs", "theirs float32")
    )
    exact = "ours float32"

    def apart(one: str, other: str) -> float:
        return max(abs(a - b) / b for a, b in zip(last[one]["losses"], last[other]["losses"], strict=True))

    return {
        "ratio": rate[ours] / rate[theirs],
        "ratio_same_dtype": rate[exact] / rate[same],
        "memory_ratio": last[ours]["peak_mib"] / last[theirs]["peak_mib"],
        "peak_fraction": rate[ours] * last[ours]["flops"] / matmul_rate(device, ours.split()[1]),
        "tokens_per_second": rate[ours],
        "loss_apart": apart(exact, same),
        "loss_apart_fastest": apart(ours, theirs),
        "loss_apart_theirs": apart(theirs, same),
    }


def main() -> int:
    """Parse the arguments, run, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--theirs", nargs="+", default=list(THEIRS), choices=THEIRS)
    parser.add_argument("--ours", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "fp8"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--profile", action="store_true", help="print our last step's costliest operators")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        what, folder, *how = arguments.run
        if what == "run_ours":
            from gristmill.model.worker import settle

            settle(arguments.threads)
        result = {"run_ours": run_ours, "run_theirs": run_theirs}[what](Path(folder), *how)
        print(json.dumps({**result, "peak_mib": peak_mib(how[0])}))
        return 0
    import torch
    import transformers

    torch.set_num_threads(arguments.threads)
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{arguments.threads} threads"
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {where}")
    found = {}
    for name in arguments.shapes:
        with tempfile.TemporaryDirectory(prefix="gristmill-pretrain-") as folder:
            found[name] = compare(name, arguments, Path(folder))
    worst = {"memory_ratio": max, "loss_apart": max, "loss_apart_fastest": max, "loss_apart_theirs": max}
    result: dict[str, Any] = {}
    for key in found[arguments.shapes[0]]:
        values = [shape_found[key] for shape_found in found.values()]
        result[key] = round(worst.get(key, min)(values), 5)
    result["tokens_per_second"] = {name: round(shape_found["tokens_per_second"]) for name, shape_found in found.items()}
    print(json.dumps({**result, "steps": arguments.steps, "rounds": arguments.rounds, "threads": arguments.threads}))
    return int(max(result["loss_apart"], result["loss_apart_fastest"]) > APART)


if __name__ == "__main__":
    sys.exit(main())
