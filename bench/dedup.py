"""MinHash deduplication against datatrove and rensa, on one core each, disk to disk; the last line is JSON.

    python bench/dedup.py [--documents 100000] [--default-documents 600] [--rounds 3] [--keep FOLDER]
    python bench/dedup.py --growth 10000 100000 1000000 [--rounds 3]
    python bench/dedup.py --workers [--rounds 3]

14 buckets × 8 rows of 64-bit hashes over word 5-grams, threshold 0.8. Every run is a process of its own, started and
imported within its measure; core-seconds are the user and system time of the process, the median of the rounds. Keys
of the last line:

    ratio               datatrove with its fastest splitter (white space, xxhash) over ours, whole chain
    ratio_default       datatrove with its default splitter (English, spaCy) over ours, whole chain; measured on a
                        sample of documents, less the time of an empty run, and scaled by bytes
    ratio_signatures    the first step alone (reading and signatures), fastest splitter, over ours
    ratio_rensa         rensa's own recipe (white-space words, RMinHash of 112 permutations, LSH of 14 bands, in memory,
                        reading included, nothing written) over ours
    recall, precision   of the documents removed: those that brute force finds to have an earlier one at 0.8 or more
    datatrove_recall, datatrove_precision   the same for datatrove, which removes candidates unverified
    mb_per_core_second  of text, whole chain; signatures_mb_per_core_second of the first step
    peak_mib_per_worker of our process, imports included
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

THREADS = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "RAYON_NUM_THREADS": "1"}
BUCKETS, ROWS, THRESHOLD = 14, 8, 0.8
A_SHARD = 2500  # documents, where one and two workers are compared: what `ingest` puts in one by default
WHITE_SPACE = "white space"  # its "WhitespaceTokenizer" is spaCy's; str.split in its place is many times faster


class Split:
    """A word splitter for datatrove that is as fast as Python can be."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()


def measured(what: str, *arguments: object) -> tuple[float, int]:
    """Run one of the functions below in a process of its own: core-seconds, and its peak memory in MiB."""
    command = [sys.executable, "-P", __file__, "--run", what, *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env={**os.environ, **THREADS}, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        said = log.read()
    if process.returncode:
        raise RuntimeError(f"{what} ended with {process.returncode}: {said[-2000:]}")
    return usage.ru_utime + usage.ru_stime, int(said.split()[-1])


def peak_mib() -> int:
    """The most memory this process held. Not ru_maxrss, which begins with what the process that started it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024


def run_ours(documents: str, out: str) -> None:
    """The stage, in one process."""
    from gristmill.data.dedup import DedupConfig, deduplicate
    from gristmill.data.stage_types import silent

    Path(out).mkdir(parents=True)
    config = DedupConfig(buckets=BUCKETS, rows=ROWS, threshold=THRESHOLD)
    deduplicate(config, Path(documents), Path(out), workers=0, progress=silent)


def run_our_signatures(documents: str, out: str) -> None:
    """The stage's first step."""
    from gristmill.data.dedup import DedupConfig
    from gristmill.data.dedup.sign import write_index
    from gristmill.data.documents import shards

    for shard in shards(Path(documents)):
        write_index(shard, Path(out), DedupConfig(buckets=BUCKETS, rows=ROWS, threshold=THRESHOLD))


def run_datatrove(documents: str, out: str, language: str) -> None:
    """datatrove's recipe (examples/minhash_deduplication.py) in one process.

    The core-seconds until its signatures are made, start and imports included, are left in `signatures.seconds`.
    """
    import datatrove.utils.hashes.xxhash as hashes
    import xxhash
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig

    # datatrove 0.10.1 hands text to xxhash, whose version 4 takes bytes alone: it gets them, since SHA-1 is slower
    hashes.xxhash64 = lambda data: xxhash.xxh64_intdigest(data.encode())
    config = MinhashConfig(n_grams=5, num_buckets=BUCKETS, hashes_per_bucket=ROWS, hash_config=HashConfig(64, "xxhash"))
    reader = JsonlReader(f"{documents}/documents", compression="zstd")
    signatures = MinhashDedupSignature(f"{out}/signatures", config, "eng" if language == WHITE_SPACE else language)
    if language == WHITE_SPACE:
        signatures.word_tokenizer = Split()
    removed = JsonlWriter(f"{out}/removed", compression="zstd", output_filename="${rank}.jsonl.zst")
    kept = JsonlWriter(f"{out}/documents", compression="zstd", output_filename="${rank}.jsonl.zst")
    buckets = MinhashDedupBuckets(f"{out}/signatures", f"{out}/buckets", config=config)
    cluster = MinhashDedupCluster(f"{out}/buckets", f"{out}/remove", config)
    sifted = [reader, MinhashDedupFilter(f"{out}/remove", exclusion_writer=removed), kept]
    tasks = len(list((Path(documents) / "documents").iterdir()))
    chain = [([reader, signatures], tasks), ([buckets], BUCKETS), ([cluster], 1), (sifted, tasks)]
    for number, (pipeline, count) in enumerate(chain):
        LocalPipelineExecutor(pipeline, tasks=count, workers=1, logging_dir=f"{out}/log{number}").run()
        if number == 0:
            Path(out, "signatures.seconds").write_text(str(time.process_time()))


def run_rensa(documents: str, out: str) -> None:
    """What rensa's README does, a MinHash a document and LSH, over word 5-grams for equal work."""
    from rensa import RMinHash, RMinHashLSH

    from gristmill.data.documents import read_rows, shards

    index = RMinHashLSH(threshold=THRESHOLD, num_perm=BUCKETS * ROWS, num_bands=BUCKETS)
    removed, number = [], 0
    for shard in shards(Path(documents)):
        for row in read_rows(shard):
            words = row["text"].lower().split()
            minhash = RMinHash(num_perm=BUCKETS * ROWS, seed=42)
            minhash.update([" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))])
            if index.query(minhash):
                removed.append(number)
            index.insert(number, minhash)
            number += 1
    Path(out).write_text(json.dumps(removed))


RUNS = {f.__name__: f for f in (run_ours, run_our_signatures, run_datatrove, run_rensa)}


def removed_ids(folder: Path) -> set[int]:
    """Numbers of the documents in a folder of removed rows."""
    from gristmill.data.documents import read_rows

    return {int(row["id"][1:]) for path in folder.glob("*.zst") for row in read_rows(path)}


def quality(removed: set[int], pairs: dict[tuple[int, int], float]) -> tuple[float, float]:
    """Recall and precision of removed documents against those with an earlier one at the threshold or above."""
    expected = {j for (_, j), alike in pairs.items() if alike >= THRESHOLD}
    return len(removed & expected) / len(expected), len(removed & expected) / max(1, len(removed))


def print_by_similarity(removed: set[int], pairs: dict[tuple[int, int], float]) -> None:
    """Removed documents by the similarity of their nearest earlier one, beside the LSH curve."""
    nearest: dict[int, float] = {}
    for (_, j), alike in pairs.items():
        nearest[j] = max(alike, nearest.get(j, 0))
    print("\nnearest earlier    documents   removed    1-(1-J^8)^14 at the middle")
    for low in (x / 20 for x in range(10, 21)):
        inside = [j for j, alike in nearest.items() if (low <= alike < low + 0.05 - 1e-12)]
        middle = min(1.0, low + 0.025)
        if inside:
            share = sum(j in removed for j in inside) / len(inside)
            curve = 1 - (1 - middle**ROWS) ** BUCKETS
            print(f"  {low:.2f} – {low + 0.05:.2f} {len(inside):12d} {share:9.3f} {curve:9.3f}")


def compare(documents: int, default_documents: int, rounds: int, folder: Path) -> dict[str, Any]:
    """The benchmark itself."""
    from dedup_corpus import grown, true_pairs, write_documents

    texts = list(grown(documents))
    size = write_documents(folder / "in", iter(texts)) / 1e6
    few = texts[:: max(1, len(texts) // default_documents)]
    few_size = write_documents(folder / "few", iter(few)) / 1e6
    write_documents(folder / "nothing", iter(["one document"]))
    print(f"{len(texts)} documents, {size:.1f} MB of text; the default setting on {len(few)}, {few_size:.1f} MB")
    measured("run_ours", folder / "nothing", folder / "warm")  # numba's cache on disk

    measures: dict[str, list[float]] = {}
    peak = 0

    def timed(name: str, *arguments: object) -> int:
        shutil.rmtree(folder / "out", ignore_errors=True)
        taken, mib = measured(*arguments)  # type: ignore[arg-type]
        measures.setdefault(name, []).append(taken)
        print(f"{name:34s} {taken:8.2f} core-seconds {mib:6d} MiB", flush=True)
        return mib

    for number in range(rounds):  # every side in every round, so that a slow hour is slow for all
        peak = max(peak, timed("ours", "run_ours", folder / "in", folder / f"ours-{number}"))
        timed("ours, signatures", "run_our_signatures", folder / "in", folder / "out")
        timed("datatrove, white space", "run_datatrove", folder / "in", folder / f"theirs-{number}", WHITE_SPACE)
        own = float((folder / f"theirs-{number}" / "signatures.seconds").read_text())
        measures.setdefault("datatrove, its signatures", []).append(own)
        print(f"  of these for signatures          {own:8.2f}")
        timed("datatrove, English, sample", "run_datatrove", folder / "few", folder / "out", "eng")
        timed("datatrove, English, nothing", "run_datatrove", folder / "nothing", folder / "out", "eng")
        timed("rensa, in memory", "run_rensa", folder / "in", folder / "rensa.json")
    seconds = {name: statistics.median(taken) for name, taken in measures.items()}
    start = seconds["datatrove, English, nothing"]
    default = start + (seconds["datatrove, English, sample"] - start) * size / few_size

    began = time.process_time()
    pairs = true_pairs(texts)
    print(f"brute force: {len(pairs)} pairs at 0.5 or more, {time.process_time() - began:.0f} core-seconds")
    ours = removed_ids(folder / "ours-0" / "removed")
    recall, precision = quality(ours, pairs)
    theirs = quality(removed_ids(folder / "theirs-0" / "removed"), pairs)
    print_by_similarity(ours, pairs)
    return {
        "ratio": round(seconds["datatrove, white space"] / seconds["ours"], 2),
        "ratio_default": round(default / seconds["ours"], 2),
        "ratio_signatures": round(seconds["datatrove, its signatures"] / seconds["ours, signatures"], 2),
        "ratio_rensa": round(seconds["rensa, in memory"] / seconds["ours"], 2),
        "recall": round(recall, 4),
        "precision": round(precision, 4),
        "datatrove_recall": round(theirs[0], 4),
        "datatrove_precision": round(theirs[1], 4),
        "mb_per_core_second": round(size / seconds["ours"], 2),
        "signatures_mb_per_core_second": round(size / seconds["ours, signatures"], 2),
        "peak_mib_per_worker": peak,
        "documents": len(texts),
        "mb": round(size, 1),
        "documents_default": len(few),
        "rounds": rounds,
    }


def growth(counts: list[int], rounds: int, folder: Path) -> dict[str, Any]:
    """Time and memory as the corpus grows, medians of the rounds.

    Each row has what a document more than in the row before it costs, and `linear` is the last of these over the
    second (none with fewer than three): the first one is little beside the start, and noise.
    """
    from dedup_corpus import small, write_documents

    write_documents(folder / "0", iter(["one document"]))
    measured("run_ours", folder / "0", folder / "warm")
    rows = [{"documents": 0, "mb": 0.0, "core_seconds": 0.0, "mib": 0}]
    for count in counts:
        size = write_documents(folder / str(count), small(count), 20_000) / 1e6
        rows.append({"documents": count, "mb": round(size, 1), "core_seconds": 0.0, "mib": 0})
    taken: dict[int, list[tuple[float, int]]] = {row["documents"]: [] for row in rows}
    for _ in range(rounds):
        for count, measures in taken.items():
            measures.append(measured("run_ours", folder / str(count), folder / "out"))
            shutil.rmtree(folder / "out")
    for number, row in enumerate(rows):
        seconds, peaks = zip(*taken[row["documents"]], strict=True)
        row |= {"core_seconds": round(statistics.median(seconds), 2), "mib": max(peaks)}
        if number:
            before = rows[number - 1]
            more = (row["core_seconds"] - before["core_seconds"]) / (row["documents"] - before["documents"])
            row["microseconds_each"] = round(1e6 * more, 1)
        print(row, flush=True)
    each = [row["microseconds_each"] for row in rows[1:]]
    linear = round(each[-1] / each[1], 3) if len(each) > 2 else None
    return {"growth": rows, "linear": linear, "rounds": rounds}


def workers(documents: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Wall time with one worker and with two, the cluster started before; medians of the rounds."""
    from dedup_corpus import grown, write_documents

    from gristmill.data.dedup import DedupConfig, deduplicate
    from gristmill.data.executor import close_cluster
    from gristmill.data.stage_types import silent

    write_documents(folder / "in", grown(documents), A_SHARD)
    write_documents(folder / "warm", (f"document {number}" for number in range(16)), 1)  # some for each worker
    walls: dict[int, list[float]] = {1: [], 2: []}
    config = DedupConfig(buckets=BUCKETS, rows=ROWS, threshold=THRESHOLD)
    for _ in range(rounds):
        for count, taken in walls.items():
            for source in ("warm", "in"):
                out = folder / "out"
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                began = time.perf_counter()
                deduplicate(config, folder / source, out, workers=count, progress=silent)
                wall = time.perf_counter() - began
            taken.append(wall)
            close_cluster()
            print(f"{count} workers: {wall:.2f} s", flush=True)
    medians = [statistics.median(taken) for taken in walls.values()]
    return {
        "speedup": round(medians[0] / medians[1], 2),
        "speedups": [round(one / two, 2) for one, two in zip(*walls.values(), strict=True)],
        "seconds": [round(median, 2) for median in medians],
        "documents": documents,
        "documents_a_shard": A_SHARD,
    }


def main() -> None:
    """Parse the arguments, run, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000, help="at least; real ones and grown ones")
    parser.add_argument("--default-documents", type=int, default=600, help="sample for datatrove's English setting")
    parser.add_argument("--rounds", type=int, default=3, help="times that each side is run")
    parser.add_argument("--growth", type=int, nargs="+", metavar="DOCUMENTS", help="measure growth instead")
    parser.add_argument("--workers", action="store_true", help="measure one and two workers instead")
    parser.add_argument("--keep", type=Path, help="work in this folder, and leave it")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        RUNS[arguments.run[0]](*arguments.run[1:])
        print(peak_mib())
        return
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ.update(THREADS)
    with tempfile.TemporaryDirectory(prefix="gristmill-dedup-") as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.growth:
            result = growth(arguments.growth, arguments.rounds, folder)
        elif arguments.workers:
            result = workers(arguments.documents, arguments.rounds, folder)
        else:
            result = compare(arguments.documents, arguments.default_documents, arguments.rounds, folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
