"""Batches a second of the loader, shuffled and packed, against a bare copy of a memory map; first batch of a resume.

    python bench/loader.py [--tokens 40000000] [--length 4096] [--batch 32] [--seconds 4] [--ranks 8]

The bare copy is what a minimal trainer does: the next `length` + 1 tokens of one flat memory-mapped file, in order, as
inputs and targets in int64, no shuffling, no packing, no documents. Ours draws each sequence's source and place from
(seed, position), reads the pieces of its documents wherever they lie, and gives inputs, targets one and two ahead, and
the documents for the mask. Both run alone on one core in turns; the figures are batches a core-second, and the last
line is JSON:

    ratio               ours over the bare copy, median over rounds (goal: at least 0.5)
    resume_seconds      a process that is up opens the shards and the mixture and gets its first batch at position 10⁹
    resume_s3_seconds   the same from an S3 server on this machine (moto)
    ranks_seconds       `ranks` readers of one step each get their first batch of it; all together give it exactly once
    s3_batches_per_second, ranks_tokens_per_second
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}

import numpy as np

from gristmill.data.mix import MixConfig, mix
from gristmill.data.mixture import Mixture
from gristmill.data.shards import TokenShards, write_arrays, write_index
from gristmill.data.stage_types import silent

BILLION = 1_000_000_000
VOCAB = 129_280
WEIGHTS = {"code": 0.3, "prose": 0.6, "lessons": 0.1}
MEANS = {"code": 6.5, "prose": 6.2, "lessons": 4.0}  # of the logarithm of a document's tokens


def make(folder: Path, tokens: int, length: int) -> None:
    """Token shards of lognormal documents and a mixture of more than a billion sequences over them."""
    rng, streams = np.random.default_rng(0), {}
    for split, part in (("train", tokens), ("held_out", 200_000)):
        for source, weight in WEIGHTS.items():
            entries = []
            for number in range(4 if split == "train" else 1):
                size = int(part * weight / (4 if split == "train" else 1))
                sizes = 2 + rng.lognormal(MEANS[source], 1.0, size // 40).astype(np.int64)
                ends = np.cumsum(sizes)
                ends = ends[: max(1, int(np.searchsorted(ends, size)))]
                ids = rng.integers(3, VOCAB, int(ends[-1]), dtype=np.uint32)
                starts = np.concatenate([[0], ends[:-1]])
                ids[starts], ids[ends - 1] = 0, 1
                made = write_arrays(
                    folder / "tokens", split, source, number, ids, starts, rng.integers(0, 1 << 62, len(ends))
                )
                entries.append(made)
            streams[split, source] = (entries, 4 * sum(e.tokens for e in entries))
    write_index(folder / "tokens", VOCAB, "0" * 64, streams)
    (folder / "mixture").mkdir()
    config = MixConfig(sequence_length=length, sequences=BILLION + (1 << 20), weights=WEIGHTS)
    mix(config, folder, folder / "mixture", 0, workers=0, progress=silent)


def opened(folder: str) -> Mixture:
    return Mixture(f"{folder}/mixture", TokenShards(f"{folder}/tokens"))


def rate(batch: Callable[[int], object], seconds: float) -> float:
    """Batches a core-second."""
    began, number = time.process_time(), 0
    while time.process_time() - began < seconds:
        for _ in range(8):
            batch(number)
            number += 1
    return number / (time.process_time() - began)


def first_batch(folder: str, position: int, count: int) -> tuple[float, bytes]:
    """The seconds to open the folders and get a batch, and its tokens."""
    began = time.perf_counter()
    rows = opened(folder).batch(np.arange(position, position + count))
    return time.perf_counter() - began, rows.tokens.tobytes()


START: dict[str, Barrier] = {}


def up(folder: str, start: Barrier) -> None:
    """Import and compile before the clock runs, as a rank has done that builds its model."""
    opened(folder).batch(np.arange(2))
    START["all"] = start


def rank_batch(folder: str, position: int, count: int) -> tuple[float, bytes]:
    """One rank's first batch, when all of them are up; each of them takes one."""
    START["all"].wait(300)
    return first_batch(folder, position, count)


def speed(folder: Path, length: int, batch: int, seconds: float) -> tuple[float, float]:
    """Batches a core-second, ours and of the bare copy: medians of rounds in turn."""
    mixture = opened(str(folder))
    flat = np.memmap(folder / "tokens" / "train" / "prose" / "00000.tokens", "<u4", "r")
    steps = (len(flat) - 1) // (length * batch)

    def ours(step: int) -> object:
        return mixture.batch(np.arange(step * batch, (step + 1) * batch))

    def bare(step: int) -> object:
        at = step % steps * batch * length
        places = range(at, at + batch * length, length)
        inputs = np.stack([flat[p : p + length].astype(np.int64) for p in places])
        return inputs, np.stack([flat[p + 1 : p + length + 1].astype(np.int64) for p in places])

    for run in (ours, bare):
        for step in range(steps):  # the files are in memory for both
            run(step)
    rounds = [(rate(ours, seconds / 4), rate(bare, seconds / 4)) for _ in range(5)]
    for mine, other in rounds:
        print(
            f"ours {mine:10,.1f}   bare copy {other:10,.1f} batches of {batch} x {length} a core-s  {mine / other:.3f}"
        )
    middle = sorted(rounds, key=lambda r: r[0] / r[1])[len(rounds) // 2]
    return middle


def ranks(folder: Path, count: int, batch: int) -> tuple[float, float]:
    """Seconds until each of `count` processes has its part of one step, and tokens a second of all together."""
    at = BILLION
    whole = opened(str(folder)).batch(np.arange(at, at + count * batch)).tokens.tobytes()
    context = get_context("spawn")
    start = context.Barrier(count)
    with ProcessPoolExecutor(count, mp_context=context, initializer=up, initargs=(str(folder), start)) as pool:
        futures = [pool.submit(rank_batch, str(folder), at + rank * batch, batch) for rank in range(count)]
        made = [f.result() for f in futures]
    if b"".join(tokens for _, tokens in made) != whole:
        raise SystemExit("the ranks' parts are not the step")
    spent = max(seconds for seconds, _ in made)
    return spent, len(whole) / 8 / spent


def remote(folder: Path, batch: int) -> tuple[float, float]:
    """Seconds to the first batch at 10⁹ from S3, and batches a second when each next one is fetched ahead."""
    import fsspec
    from moto.server import ThreadedMotoServer

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    filesystem = fsspec.filesystem("s3")
    filesystem.mkdir("bench")
    for path in folder.rglob("*"):
        if path.is_file():
            filesystem.pipe_file(f"bench/{path.relative_to(folder).as_posix()}", path.read_bytes())
    filesystem.invalidate_cache()
    made = [first_batch("s3://bench", BILLION, batch) for _ in range(3)]
    if made[0][1] != first_batch(str(folder), BILLION, batch)[1]:
        raise SystemExit("S3 gave another batch than the local folder")
    mixture, steps = opened("s3://bench"), 20
    began = time.perf_counter()
    for step in range(steps):
        at = np.arange(step * batch, (step + 1) * batch)
        mixture.batch(at)
        mixture.prefetch(at + batch)
    rate_ = steps / (time.perf_counter() - began)
    mixture.shards.files.close()
    server.stop()
    return statistics.median(spent for spent, _ in made), rate_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=40_000_000)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--ranks", type=int, default=8)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(folder, asked.tokens, asked.length)
        ours, bare = speed(folder, asked.length, asked.batch, asked.seconds)
        resume = statistics.median(first_batch(str(folder), BILLION, asked.batch)[0] for _ in range(5))
        ranks_seconds, ranks_rate = ranks(folder, asked.ranks, asked.batch // asked.ranks)
        s3_seconds, s3_rate = remote(folder, asked.batch // asked.ranks)
    print(
        json.dumps(
            {
                "ratio": round(ours / bare, 4),
                "batches_per_core_second": round(ours, 1),
                "bare_batches_per_core_second": round(bare, 1),
                "tokens_per_core_second": round(ours * asked.batch * asked.length),
                "resume_seconds": round(resume, 4),
                "resume_s3_seconds": round(s3_seconds, 4),
                "ranks": asked.ranks,
                "ranks_seconds": round(ranks_seconds, 4),
                "ranks_tokens_per_second": round(ranks_rate),
                "s3_batches_per_second": round(s3_rate, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
