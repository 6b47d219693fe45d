"""Does it learn, in what time and memory? Runs `tiny` cold for several seeds and ends with one line of JSON.

    python bench/demo.py [--seeds 3] [--recipe tiny] [--keep FOLDER]

Each seed runs in a process of its own into a fresh store, as a user's `gristmill run` would. The keys of the last line:

    rl_gain         median over seeds of pass@1 after RL minus after cold start (held-out problems)
    rl_gain_min     the least of them
    final_pass1     median pass@1 after RL
    zero_gain       median of R1-Zero's pass@1 minus the base model's
    thought_growth  median of thought length after RL over that after cold start
    bpb_vs_unigram  largest held-out bits per byte of the base model over those of a unigram token model
    seconds         wall time of the slowest cold run, everything included
    peak_gib        largest memory of a run's process tree (sum of proportional set sizes), in GiB
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import psutil

SAMPLE_SECONDS = 1.0


class Memory:
    """The largest memory that a process and its descendants held together, sampled once a second."""

    def __init__(self, pid: int) -> None:
        self.root, self.peak, self.over = psutil.Process(pid), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.over.wait(SAMPLE_SECONDS):
            held = 0
            try:
                tree = [self.root, *self.root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in tree:
                try:
                    full = process.memory_full_info()
                    held += getattr(full, "pss", full.uss)
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue  # it ended between the listing and the look
            self.peak = max(self.peak, held)

    def stop(self) -> float:
        """Peak in GiB."""
        self.over.set()
        self.thread.join()
        return self.peak / 2**30


def cold_run(recipe: str, seed: int, folder: Path) -> dict[str, float]:
    """One run into a fresh store, and its numbers."""
    store = folder / f"seed-{seed}"
    command = [
        Path(sys.executable).with_name("gristmill"),
        "run",
        recipe,
        "--store",
        store,
        "--set",
        f"seed={seed}",
    ]
    began = time.perf_counter()
    with (folder / f"seed-{seed}.log").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        memory = Memory(process.pid)
        code = process.wait()
    seconds, peak = time.perf_counter() - began, memory.stop()
    if code:
        sys.exit(f"the run of seed {seed} ended with exit code {code}; its log is {folder / f'seed-{seed}.log'}")
    results = {row["model"]: row for row in _rows(_only(store, "evaluate") / "results.jsonl")}
    base, cold, zero, rl = (results[name] for name in ("base", "cold_start", "zero", "rl"))
    pretrain = json.loads((_only(store, "pretrain") / "manifest.json").read_text(encoding="utf-8"))["metrics"]
    return {
        "seed": seed,
        "base": base["pass1"],
        "cold_start": cold["pass1"],
        "zero": zero["pass1"],
        "rl": rl["pass1"],
        "problems": rl["problems"],
        "k": rl["k"],
        "thought_growth": rl["thought_length"] / max(cold["thought_length"], 1e-9),
        "bpb_vs_unigram": pretrain["bpb_vs_unigram"],
        "seconds": seconds,
        "peak_gib": peak,
    }


def _only(store: Path, stage: str) -> Path:
    (manifest,) = (store / stage).glob("*/manifest.json")
    return manifest.parent


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--keep", type=Path, help="keep stores and logs in this folder")
    asked = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory(prefix="gristmill-demo-") as scratch:
        folder = (asked.keep or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        runs = []
        for seed in range(asked.seeds):
            runs.append(cold_run(asked.recipe, seed, folder))
            print(json.dumps({k: round(v, 4) for k, v in runs[-1].items()}), flush=True)
    gains = [r["rl"] - r["cold_start"] for r in runs]
    summary = {
        "rl_gain": median(gains),
        "rl_gain_min": min(gains),
        "final_pass1": median(r["rl"] for r in runs),
        "zero_gain": median(r["zero"] - r["base"] for r in runs),
        "thought_growth": median(r["thought_growth"] for r in runs),
        "bpb_vs_unigram": max(r["bpb_vs_unigram"] for r in runs),
        "seconds": max(r["seconds"] for r in runs),
        "peak_gib": max(r["peak_gib"] for r in runs),
    }
    print(json.dumps({k: round(v, 4) for k, v in summary.items()}))


if __name__ == "__main__":
    main()
