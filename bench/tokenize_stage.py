"""Tokens a core-second of the tokenize stage, disk to disk, against `tokenizers`' own `encode_batch` in memory.

    python bench/tokenize.py [--megabytes 24] [--rounds 3] [--vocab 8192]

Both encode the same documents with the same tokenizer on one core. The peer gets texts that are in memory already, in
batches of 256, and nothing is done with what it returns but counting. Ours reads compressed document shards,
surveys them, encodes, sorts by the order's hashes, and writes token shards, document starts and ids with their hashes,
fsspec and Dask left out. The tokenizer is there before; its training is in neither figure. The last line is JSON:
`ratio` is ours over `encode_batch` in tokens a core-second, the median over the rounds, which alternate; `ratio_fast`
is the same against `encode_batch_fast`, which leaves the offsets out, and which ours calls.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

from gristmill.data import tokenizer as bpe
from gristmill.data.documents import write_rows
from gristmill.data.shards import TokenShards
from gristmill.data.stage_types import silent
from gristmill.data.tokenize import TokenizeConfig, tokenize

SHARED = Path(os.environ.get("GRISTMILL_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


def documents() -> Iterator[tuple[str, str, str]]:
    """(source, id, text): PEPs, Wikipedia articles, human-rights declarations, and this Python's own library."""
    for source in ("peps", "wikitext2", "udhr"):
        with gzip.open(SHARED / "corpus" / f"{source}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                yield source, row["id"], row["text"]
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if "site-packages" not in path.parts:
            yield "stdlib", path.relative_to(library).as_posix(), path.read_text(encoding="utf-8", errors="replace")


def rows(megabytes: int) -> list[dict]:
    """Rows of about so many megabytes, all sources in turn."""
    every, taken, size = list(documents()), [], 0
    for i in range(len(every)):  # a stride over the whole gives each source its part
        source, name, text = every[i * 7919 % len(every)]
        kind = "code" if source == "stdlib" else "prose"
        taken.append({"text": text, "id": f"{source}/{name}", "metadata": {"source": source, "kind": kind}})
        size += len(text.encode())
        if size >= megabytes * 1_000_000:
            break
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab", type=int, default=8192)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, given = Path(scratch), rows(asked.megabytes)
        for number, start in enumerate(range(0, len(given), 500)):
            write_rows(folder / "in" / "documents" / f"{number:05d}.jsonl.zst", given[start : start + 500])
        texts = [r["text"] for r in given]
        bpe.save(bpe.train((t[:20_000] for t in texts[::4]), asked.vocab), folder / "tokenizer")
        config = TokenizeConfig(vocab_size=asked.vocab)

        def ours() -> tuple[int, float]:
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(folder / "tokenizer", out / "tokenizer")
            began = time.process_time()
            metrics = tokenize(config, folder / "in", out, 0, workers=0, progress=silent)
            return metrics["tokens"] + metrics["held_out_tokens"], time.process_time() - began

        def theirs(method: str) -> tuple[int, float]:
            encode, total = getattr(bpe.load(folder / "tokenizer"), method), 0
            began = time.process_time()
            for start in range(0, len(texts), 256):
                total += sum(map(len, encode(texts[start : start + 256], add_special_tokens=False)))
            return total, time.process_time() - began

        ours()  # compiles and warms the caches of both
        peers = ("encode_batch", "encode_batch_fast")
        rates: dict[str, list[float]] = {"ours": [], **{peer: [] for peer in peers}}
        for number in range(asked.rounds):
            for name in rates:
                tokens, spent = ours() if name == "ours" else theirs(name)
                rates[name].append(tokens / spent)
                print(f"round {number}  {name:<17} {tokens:>10,} tokens {spent:7.2f} core-s {tokens / spent:>9,.0f}/s")
        if TokenShards(folder / "out" / "tokens").verify():
            sys.exit("the shards do not hash to what their index says")
    ratios = {p: statistics.median(o / t for o, t in zip(rates["ours"], rates[p], strict=True)) for p in peers}
    size = sum(len(t.encode()) for t in texts)
    print(
        json.dumps(
            {
                "ratio": round(ratios["encode_batch"], 4),
                "ratio_fast": round(ratios["encode_batch_fast"], 4),
                "tokens_per_core_second": round(statistics.median(rates["ours"])),
                "encode_batch_tokens_per_core_second": round(statistics.median(rates["encode_batch"])),
                "documents": len(texts),
                "megabytes": round(size / 1e6, 1),
                "vocab_size": asked.vocab,
            }
        )
    )


if __name__ == "__main__":
    main()
