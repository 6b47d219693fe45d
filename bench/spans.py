"""Are all planted spans found and nothing else, how fast a core, in what memory? Ends with one line of JSON.

    python -P bench/spans.py [--spans 2000] [--peer-megabytes 20] [--keep FOLDER]

The corpus is the PEPs, WikiText-2 and the running Python's own sources, freed of what repeats in them, then with spans
of 50 to 150 tokens of earlier documents put into later ones. Four times as much text is the same in four alphabets
(letters and digits moved round), each with its own planted spans. The stage runs in a process of its own, disk to disk.

    mb_per_core_second    text in, over processor time, at the larger size; start of the process included
    planted_found         share of planted spans of which every byte went; 1.0 is right
    bytes_removed_else    bytes that went and were in no planted span; 0 is right
    peak_mib_per_worker   largest resident memory of the process, Python and numba included
    growth                core-seconds at 4 times the size over 4 times those at 1
    peer_mb_per_core_second, ratio   if `pydivsufsort` can be imported: the same tokens through a suffix array
                          (libdivsufsort) and its longest common prefixes, all in memory, nothing read or written
    peer_agrees           whether both name the same tokens
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import re
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import numpy as np
from numba import njit

from gristmill.data.documents import read_rows, shards, write_rows
from gristmill.data.spans import SpansConfig, remove_spans
from gristmill.data.spans.tokens import Tokeniser
from gristmill.data.stage_types import silent

TOKENS = 50
A_SHARD = 300
CONFIG = SpansConfig(least_characters_left=0)


def real_texts() -> list[str]:
    """PEPs and WikiText-2 of the shared data, and the standard library."""
    place = os.environ.get("GRISTMILL_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")
    texts = []
    for name in ("peps", "wikitext2"):
        with gzip.open(Path(place) / "corpus" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            texts += [json.loads(line)["text"] for line in file]
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return texts


def lay(folder: Path, texts: list[str]) -> Path:
    """Texts as document shards."""
    metadata = {"source": "bench", "kind": "prose", "url": None, "date": None, "licence": None}
    for start in range(0, len(texts), A_SHARD):
        rows = [
            {"text": t, "id": f"d{start + i}", "metadata": metadata}
            for i, t in enumerate(texts[start : start + A_SHARD])
        ]
        write_rows(folder / "documents" / f"{start // A_SHARD:05d}.jsonl.zst", rows)
    return folder


def without_repeats(folder: Path, texts: list[str]) -> list[str]:
    """What is left when nothing repeats any more."""
    for turn in range(20):
        out = folder / f"{turn}.out"
        out.mkdir(parents=True)
        changed = remove_spans(CONFIG, lay(folder / f"{turn}", texts), out, workers=0, progress=silent)["changed"]
        if not changed:
            return texts
        texts = [r["text"] for s in shards(out) for r in read_rows(s)]
    sys.exit("repeats do not end")


def moved(texts: list[str], turn: int) -> list[str]:
    """The texts in an alphabet moved round: other words of the same lengths."""
    table = {}
    for first, count, by in ((ord("a"), 26, 5), (ord("A"), 26, 5), (ord("0"), 10, 3)):
        table |= {first + i: first + (i + by * turn) % count for i in range(count)}
    return [t.translate(table) for t in texts]


def planted(texts: list[str], spans: int, seed: int) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """Spans of even documents put before tokens of odd, later ones; the new texts, and where the spans lie."""
    rng = random.Random(seed)
    tokeniser = Tokeniser()
    tokens = [
        [
            (p.at + a, p.at + b)
            for p in tokeniser.pieces(t)
            for a, b in zip(p.starts.tolist(), p.ends.tolist(), strict=True)
        ]
        for t in texts
    ]
    long = [d for d, t in enumerate(tokens) if len(t) > 4 * TOKENS * 3]
    where: list[dict[int, str]] = [{} for _ in texts]

    def token(d: int, i: int) -> str:
        return texts[d][slice(*tokens[d][i])]

    while spans:
        source, target = sorted(rng.sample(long, 2))
        size = rng.randint(TOKENS, 3 * TOKENS)
        a, at = rng.randrange(1, len(tokens[source]) - size - 1), rng.randrange(1, len(tokens[target]) // 60) * 60
        character = tokens[target][at][0]
        if source % 2 or not target % 2 or character in where[target] or tokens[target][at - 1][1] == character:
            continue
        if token(source, a - 1) == token(target, at - 1) or token(source, a + size) == token(target, at):
            continue  # the repeat would be longer than what is put
        where[target][character] = texts[source][tokens[source][a][0] : tokens[source][a + size - 1][1]]
        spans -= 1
    return _put(texts, where)


def _put(texts: list[str], where: list[dict[int, str]]) -> tuple[list[str], list[list[tuple[int, int]]]]:
    made, found = [], []
    for text, own in zip(texts, where, strict=True):
        parts, places, last, size = [], [], 0, 0
        for at, span in sorted(own.items()):
            parts += [text[last:at], span, " "]
            size += at - last
            places.append((size, size + len(span)))
            size, last = size + len(span) + 1, at
        made.append("".join([*parts, text[last:]]))
        found.append(places)
    return made, found


def run_stage(documents: Path, out: Path) -> dict[str, float]:
    """The stage in a process of its own."""
    command = [sys.executable, "-P", __file__, "--stage", str(documents), str(out)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def stage(documents: Path, out: Path) -> None:
    """In that process."""
    out.mkdir(parents=True)
    metrics = remove_spans(CONFIG, documents, out, workers=0, progress=silent)
    used = resource.getrusage(resource.RUSAGE_SELF)
    held = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())  # ru_maxrss is the parent's at first
    print(json.dumps({
        "core_seconds": used.ru_utime + used.ru_stime,
        "peak_mib": int(held[1]) / 1024 if held else used.ru_maxrss / 1024,
        "substring_characters": metrics["substring_characters"],
        "megabytes": metrics["bytes_in"] / 1e6,
    }))  # fmt: skip


def compare(texts: list[str], expected: list[list[tuple[int, int]]], out: Path) -> tuple[int, int]:
    """Planted spans that went, and bytes that went beside them."""
    edits = {r["id"]: r["edits"] for s in shards(out, "changed") for r in read_rows(s)}
    removed = {r["id"] for s in shards(out, "removed") for r in read_rows(s)}
    found = beside = 0
    for i, (text, spans) in enumerate(zip(texts, expected, strict=True)):
        gone = np.zeros(len(text), bool)
        for edit in edits.get(f"d{i}", []):
            gone[edit["start"] : edit["end"]] = True
        gone |= f"d{i}" in removed
        for start, end in spans:
            found += bool(gone[start:end].all())
            gone[start:end] = False
        beside += sum(len(text[j].encode()) for j in np.flatnonzero(gone).tolist())
    return found, beside


@njit(cache=True)
def _goes(order, common, least, width, starts, goes):
    """Mark tokens of windows that are not their kind's first in the corpus, by suffix array and common prefixes.

    `order` and `common` are of bytes, `width` a token; `starts` the first token of each token's document.
    """
    count, i = len(order), 0
    while i < count:
        j = i
        while j + 1 < count and common[j] >= least * width:
            j += 1
        first = np.int64(1) << 62
        for k in range(i, j + 1):
            if order[k] % width == 0:
                first = min(first, order[k] // width)
        for k in range(i, j + 1):
            if order[k] % width == 0 and first < starts[order[k] // width]:
                for t in range(order[k] // width, order[k] // width + least):
                    goes[t] = True
        i = j + 1


def peer(texts: list[str]) -> tuple[float, int] | None:
    """Core-seconds of a suffix array over the tokens as 32-bit numbers, and the characters that go; none without it."""
    try:
        from pydivsufsort import divsufsort, kasai
    except ImportError:
        return None
    _goes(np.zeros(4, np.int32), np.zeros(4, np.int32), 1, 4, np.zeros(1, np.int64), np.zeros(1, bool))  # compile
    began = time.process_time()
    tokeniser, hashes, spans, starts = Tokeniser(), [], [], []
    for number, text in enumerate(texts):
        start = sum(map(len, hashes[-1:])) + (starts[-1] if starts else 0)
        own = [np.stack([p.starts + p.at, p.ends + p.at], 1) for p in tokeniser.pieces(text)]
        hashes.append(
            np.concatenate([*(p.first.copy() for p in tokeniser.pieces(text)), [np.uint64(number)]]).astype(np.uint64)
        )
        spans += [*own, np.zeros((1, 2), np.int64)]
        starts.append(start)
    everything = np.concatenate(hashes)
    numbers = np.unique(everything, return_inverse=True)[1].astype(">u4")
    held = numbers.view(np.uint8).copy()
    order = divsufsort(held)
    common = kasai(held, order)
    document_starts = np.repeat(np.array(starts, np.int64), [len(h) for h in hashes])
    goes = np.zeros(len(numbers), bool)
    _goes(order, common, TOKENS, 4, document_starts, goes)
    seconds = time.process_time() - began
    places = np.concatenate(spans)
    joined = goes[1:] & goes[:-1]
    characters = int((places[goes, 1] - places[goes, 0]).sum() + (places[1:, 0] - places[:-1, 1])[joined].sum())
    return seconds, characters


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--spans", type=int, default=2000)
    parser.add_argument("--peer-megabytes", type=float, default=20)
    parser.add_argument("--keep", type=Path, help="keep corpora and results in this folder")
    parser.add_argument("--stage", nargs=2, type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.stage:
        stage(*asked.stage)
        return
    with tempfile.TemporaryDirectory(prefix="gristmill-spans-") as scratch:
        bench(asked, (asked.keep or Path(scratch)).absolute())


def bench(asked: argparse.Namespace, folder: Path) -> None:
    base = real_texts()
    results, found, beside = {}, 0, 0
    for times in (1, 4):
        grown = [text for turn in range(times) for text in moved(base, turn)]
        grown = without_repeats(folder / f"base{times}", grown)  # what has neither letters nor digits is there again
        texts, expected = planted(grown, times * asked.spans, times)
        documents, out = lay(folder / f"in{times}", texts), folder / f"out{times}"
        results[times] = run_stage(documents, out)
        found, beside = compare(texts, expected, out)
        print(
            {"times": times, **results[times], "planted": times * asked.spans, "found": found, "else": beside},
            flush=True,
        )
    summary = {
        "mb_per_core_second": round(results[4]["megabytes"] / results[4]["core_seconds"], 2),
        "planted_found": found / (4 * asked.spans),
        "bytes_removed_else": beside,
        "peak_mib_per_worker": round(max(r["peak_mib"] for r in results.values())),
        "growth": round(results[4]["core_seconds"] / results[1]["core_seconds"] / 4, 3),
    }
    print(json.dumps({**summary, **against_peer(asked, folder)}))


def against_peer(asked: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Both on the same documents, as many as the peer is given."""
    texts, size = [], 0.0
    for text in real_texts():
        if size < asked.peer_megabytes:
            texts.append(text)
            size += len(text.encode()) / 1e6
    theirs = peer(texts)
    if theirs is None:
        return {}
    ours = run_stage(lay(folder / "peer", texts), folder / "peer.out")
    print({"megabytes": round(size, 1), "ours": ours, "peer_core_seconds": theirs[0], "peer_characters": theirs[1]})
    return {
        "peer_mb_per_core_second": round(size / theirs[0], 2),
        "ratio": round(theirs[0] / ours["core_seconds"], 2),
        "peer_agrees": theirs[1] == ours["substring_characters"],
    }


if __name__ == "__main__":
    main()
