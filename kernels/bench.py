"""Times of the kernels against their peers on equal inputs: `python -P -m gristmill.kernels.bench [--device cpu|cuda]`.

Medians of nine runs (three, where a round of all sides takes ten seconds), the sides in turn in one process. A peer is
torch's own operation, and where they are installed Liger-Kernel's and the experts of `transformers`. In brackets is the
share of what the device reaches in a large square product of that dtype, as measured first; where memory sets the pace
there are the bytes a second that have to be moved too, and their share of a large copy's, above 1 where a CPU's caches
hold them. Memory is the most beyond the inputs, of the cross-entropy beyond its gradients too; on a CPU, where torch
counts none, that of a process of its own, and only of what has a goal there. On a CPU bfloat16 is that of operands,
while weights and results stay float32, which torch's side has its autocast for. A GPU's short kernels run from graphs.

With `--json` the last line is an object:

    rows      one for each goal: op, shape, dtype, device, seconds (ours), peer, peer_seconds, ratio, goal, met; and
              metric, which says what the ratio is (`Goal` in timing.py). Where several peers count it is the fastest.
              The peer of a share of copy is the copy, with the seconds in which it moves as many bytes; of memory
              there are also memory and peer_memory, bytes, and peer_seconds is null where the peer is no operation.
              What has no goal is not here.
    measured  one for each line that was printed, operation by peer, with or without a goal: the same keys up to ratio,
              and kernel (the folder), tflops, share; where they were measured bandwidth, bandwidth_share, memory and
              peer_memory
    torch, device_name, product (FLOP/s of the square product by dtype), copy (bytes/s)
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from gristmill.kernels.linear import linear
from gristmill.kernels.timing import (
    OURS,
    Case,
    Goal,
    Work,
    bandwidth,
    keep_freed_memory,
    memory,
    seconds,
    seconds_of_device,
    stored,
)
from gristmill.kernels.tune import SEARCHED, tune

OPERATIONS: dict[str, tuple[str, ...]] = {
    "grouped_gemm": ("grouped_gemm",),
    "moe_mlp": ("moe_mlp",),
    "mla_attention": ("attention",),
    "mla_decode": ("mla_decode",),
    "cross_entropy": ("cross_entropy", "linear_log_probs"),
    "norm_rope": ("rms_norm", "add_rms_norm", "rotate", "rotate_halves"),
    "swiglu": ("swiglu",),
    "linear": ("linear",),
    "likeliest": ("likeliest",),
    "router": ("router",),
    "optim": ("optim", "newton_schulz"),
    "fp8_gemm": ("fp8_gemm", "fp8_grouped_gemm", "quantise_rows", "fp8_weight_gradient", "swiglu_quantise"),
}
"""The operations of each folder: what their rows are called, up to a comma or a space."""
ROUNDED = ("linear", "moe_mlp", "grouped_gemm")  # folders that take their operands in bfloat16 on a CPU
Row = dict[str, Any]


def folders_of(name: str | None) -> list[str]:
    """The folders that an `--op` asks for: itself, or that of an operation; without one, all."""
    return [folder for folder, operations in OPERATIONS.items() if name in (None, folder, *operations)]


def cases_of(folder: str, name: str | None, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Of a folder, those that an `--op` asks for."""
    for case in importlib.import_module(f"gristmill.kernels.{folder}.bench").cases(device, dtype):
        if name in (None, folder, case.op.replace(",", " ").split()[0]):
            yield case


def limit(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large square product; on a CPU in bfloat16 the faster of torch's and ours."""
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    products: list[Work] = [lambda: a @ b]
    if stored(device, dtype) != dtype:
        x, w = a.float(), b.float()
        products.append(lambda: linear(x, w, rounded=True))
    return 2 * size**3 / min(seconds(products, device))


def measured(case: Case, device: str, dtype: torch.dtype, best: float, copied: float) -> tuple[list[Row], list[Row]]:
    """A row for each peer, and one for each goal; `best` operations and `copied` bytes a second are the device's."""
    sides = {OURS: case.ours, **case.peers}
    timer = seconds_of_device if case.captured and device == "cuda" else partial(seconds, device=device)
    taken = dict(zip(sides, timer(list(sides.values())), strict=True))
    held = {name: _held(case, name, work, device) for name, work in sides.items()}
    ours, name = taken.pop(OURS), str(dtype).removeprefix("torch.")
    common = {"op": case.op, "shape": case.shape, "dtype": name, "device": device, "seconds": ours}
    rate: Row = {"tflops": case.flops / ours / 1e12, "share": case.flops / ours / best}
    if case.bytes is not None:
        rate |= {"bandwidth": case.bytes / ours, "bandwidth_share": case.bytes / ours / copied}
    table = []
    for peer, theirs in taken.items():
        row = {**common, "peer": peer, "peer_seconds": theirs, "ratio": theirs / ours, **rate}
        table.append(row if held[OURS] is None else {**row, "memory": held[OURS], "peer_memory": held[peer]})
    aimed = [_aimed(goal, case, ours, taken, held, copied) for goal in case.goals]
    return table, [{**common, **row} for row in aimed if row]


def _held(case: Case, name: str, work: Work, device: str) -> int | None:
    """Most bytes of a side beyond the inputs, and the results where these are known; None where nobody counts them."""
    if device == "cuda":
        return memory(work) - case.results
    return None if case.resident is None else case.resident(name)


def _aimed(
    goal: Goal, case: Case, ours: float, taken: dict[str, float], held: dict[str, int | None], copied: float
) -> Row:
    """What a goal's row says beyond the case; nothing where no memory is counted."""
    row: Row = {"metric": goal.metric, "goal": goal.value}
    if goal.metric == "memory":
        mine, (peer, wanted) = held[OURS], goal.whole or (goal.peers[0], held[goal.peers[0]])
        if mine is None or wanted is None:
            return {}
        row |= {"peer": peer, "peer_seconds": taken.get(peer), "memory": mine, "peer_memory": wanted}
        return {**row, "ratio": mine / wanted, "met": mine / wanted <= goal.value}
    if goal.metric == "share of copy":
        peer, theirs = "a copy of as many bytes", (case.bytes or 0) / copied
    else:
        peer, theirs = min(((name, taken[name]) for name in goal.peers), key=lambda side: side[1])
    return {**row, "peer": peer, "peer_seconds": theirs, "ratio": theirs / ours, "met": theirs / ours >= goal.value}


def said(row: Row) -> str:
    """A line of the table."""
    line = (
        f"{row['op']:<21} {row['shape']:<36} {row['dtype']:<8} {row['seconds'] * 1e3:8.3f} ms {row['tflops']:6.3g} "
        f"TFLOP/s ({row['share']:.2f})   {row['peer']}: {row['peer_seconds'] * 1e3:8.3f} ms   ratio {row['ratio']:.2f}"
    )
    if "bandwidth" in row:
        line += f"   {row['bandwidth'] / 1e12:.3g} TB/s ({row['bandwidth_share']:.2f} of a copy)"
    if "memory" in row:
        line += f"   {row['memory'] / 2**20:.1f} MiB against {row['peer_memory'] / 2**20:.1f}"
    return line


def said_of_goal(row: Row) -> str:
    bound = "at most" if row["metric"] == "memory" else "at least"
    met = "met" if row["met"] else "missed"
    return f"    goal: {row['metric']}, {row['ratio']:.3g} of {row['peer']}; {bound} {row['goal']}: {met}"


def main() -> None:
    names = sorted({*OPERATIONS, *(operation for operations in OPERATIONS.values() for operation in operations)})
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--op", choices=names, metavar="NAME", help=f"a folder or an operation: {', '.join(names)}")
    parser.add_argument("--tune", action="store_true", help="find the sizes of tiles on this GPU first, for tiles.json")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    asked = parser.parse_args()
    device, folders = asked.device, folders_of(asked.op)
    if asked.tune:
        if device != "cuda":
            parser.error("--tune is of GPUs: there are no tiles to choose on a CPU")
        tune([folder for folder in folders if folder in SEARCHED], device)
    where = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__}, {where}")
    if device == "cpu":
        keep_freed_memory()
    copied, products = bandwidth(device), {}
    print(f"a copy moves {copied / 1e12:.3g} TB/s, read and written")
    table: list[Row] = []
    goals: list[Row] = []
    for dtype in [torch.bfloat16] if device == "cuda" else [torch.float32, torch.bfloat16]:
        best = products[str(dtype).removeprefix("torch.")] = limit(device, dtype)
        print(f"a square product reaches {best / 1e12:.3g} TFLOP/s in {dtype}")
        for folder in folders if stored(device, dtype) == dtype else [f for f in folders if f in ROUNDED]:
            for case in cases_of(folder, asked.op, device, dtype):
                rows, aimed = measured(case, device, dtype, best, copied)
                print("\n".join([*map(said, rows), *map(said_of_goal, aimed)]), flush=True)
                table += [{"kernel": folder, **row} for row in rows]
                goals += aimed
    if asked.json:
        about = {"torch": torch.__version__, "device_name": where, "product": products, "copy": copied}
        print(json.dumps({"rows": goals, "measured": table, **about}))


if __name__ == "__main__":
    main()
