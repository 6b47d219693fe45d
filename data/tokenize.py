"""The `tokenize` stage: a tokenizer trained on a sample, and token shards by split and source.

Which documents are held out, rearranged for filling in the middle, and in which order they lie are hashes of (seed,
document id): pure functions, whoever computes them. It is an external sort. Each document shard is encoded to a run of
tokens and the entries of its documents in the order of their hashes; each token shard is a range of these hashes, which
one task gathers from all runs. Nothing holds more than a batch of texts, or one token shard, at a time.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numba import njit
from pydantic import Field

from gristmill.data import fim, tokenizer_sample
from gristmill.data import tokenizer as bpe
from gristmill.data.config import Config
from gristmill.data.documents import Row, atomic, id_hash, read_rows, shards, write_json_lines
from gristmill.data.executor import Task, remove_work, run_tasks
from gristmill.data.shards import BOS_ID, DTYPES, EOS_ID, ShardEntry, dtype_for, write_arrays, write_index
from gristmill.data.stage_types import Metrics, Progress
from gristmill.data.tokenizer_sample import hashed, side

BATCH_CHARACTERS = 1 << 20  # of text encoded together: its encodings take some hundred bytes a token
BINS = 1 << 16  # of the order's hashes, at whose borders token shards may begin
ENTRY = np.dtype([("order", "<u8"), ("id", "<u8"), ("start", "<u8"), ("tokens", "<u4"), ("bytes", "<u4")])
Stream = tuple[str, str]


class TokenizeConfig(Config):
    """Size of the vocabulary, the sample it is learned on, and how tokens are laid out."""

    vocab_size: int = Field(
        default=1024, ge=bpe.LEAST, le=129_280, title="Vocabulary", description="Rows, special tokens included."
    )
    sample_bytes: int = Field(
        default=4_000_000,
        ge=1,
        title="Sample",
        description="Bytes of text the tokenizer is trained on, all sources alike.",
    )
    held_out: float = Field(
        default=0.02, gt=0, lt=1, title="Held out", description="Share of documents kept from training."
    )
    shard_tokens: int = Field(
        default=4_000_000,
        ge=1,
        le=1 << 27,
        title="Shard",
        description="Tokens after which a new shard begins; one shard is in memory at a time.",
    )
    fim_rate: float = Field(
        default=0.1,
        ge=0,
        le=1,
        title="FIM rate",
        description="Share of training documents rearranged for fill-in-the-middle (V3: 0.1).",
    )
    fim_kinds: tuple[str, ...] = Field(
        default=("code", "prose"), title="FIM kinds", description="Kinds of documents that are rearranged."
    )


def tokenize(
    config: TokenizeConfig, documents: Path, out: Path, seed: int, *, workers: int, progress: Progress
) -> Metrics:
    """Write tokenizer/ and tokens/ (see docs/token-shards.md); every document begins with bos and ends with eos.

    compression.jsonl has the bytes a token by source and language, samples.jsonl texts cut into their tokens.

    Raises:
        ValueError: a shard of `documents` is damaged, or there is no document.
    """
    work, sources = out / "work", shards(documents)
    work.mkdir(exist_ok=True)
    total = 4 * len(sources) + 1

    def run(tasks: list[Task], stage: int) -> list[Path]:
        run_tasks(tasks, workers, progress, stage * len(sources), total)
        return [t.result for t in tasks]

    surveyed = [work / f"{s.name}.survey" for s in sources]
    run(
        [
            Task(tokenizer_sample.survey_shard, (s, r, seed, config.held_out), r)
            for s, r in zip(sources, surveyed, strict=True)
        ],
        0,
    )
    survey = tokenizer_sample.merged(surveyed)
    if not survey:
        raise ValueError("no document is left to tokenize: loosen the filter or give more sources")
    if not (out / "tokenizer" / "tokenizer_config.json").exists():
        bounds = tokenizer_sample.bounds(survey, config.sample_bytes)
        drawn = [work / f"{s.name}.sample" for s in sources]
        run([Task(tokenizer_sample.draw_shard, (s, r, bounds), r) for s, r in zip(sources, drawn, strict=True)], 1)
        texts = tokenizer_sample.chosen(drawn, config.sample_bytes, len(survey))
        bpe.save(bpe.train(texts, config.vocab_size), out / "tokenizer")
    moved = tokenizer_sample.moved(survey)
    runs = run([Task(_encode, (s, out, seed, config, moved), work / f"{s.name}.json") for s in sources], 2)
    tokenizer = bpe.load(out / "tokenizer")
    streams = _gather(out, runs, config.shard_tokens, tokenizer.get_vocab_size(), workers, progress)
    digest = hashlib.sha256((out / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    write_index(out / "tokens", tokenizer.get_vocab_size(), digest, streams)
    compression = _compression(runs)
    write_json_lines(out / "compression.jsonl", compression)
    write_json_lines(out / "samples.jsonl", _samples(survey, tokenizer))
    progress(total, total)
    metrics = _metrics(streams, compression, config, tokenizer.get_vocab_size())
    remove_work(work)
    return metrics


# --- documents to runs


class _Run:
    """Encodes documents to a file of tokens, a batch of texts at a time, and keeps their entries by stream."""

    def __init__(self, file: IO[bytes], tokenizer: Any) -> None:
        self.file, self.tokenizer = file, tokenizer
        self.dtype = DTYPES[dtype_for(tokenizer.get_vocab_size())]
        self.marks = fim.Marks(tokenizer)
        self.items: list[int | str | _End] = []
        self.characters = 0
        self.written = 0  # tokens in the file
        self.begun = 0  # where the document at hand begins
        self.entries: dict[Stream, list[np.ndarray]] = {}
        self.compression: dict[tuple[str, str], list[int]] = {}

    def add(self, row: Row, stream: Stream, order: int, cut: tuple[int, int] | None) -> None:
        """Take in a document; `cut` is where its middle lies, if it is to be rearranged."""
        text = row["text"]
        self.items.append(BOS_ID)
        marked = 2
        if cut is None:
            self._text(text)
        else:
            marked += 3
            for mark, part in zip(
                (self.marks.begin, self.marks.hole, self.marks.end), fim.parts(text, *cut), strict=True
            ):
                self.items.append(mark)
                self._text(part)
        language = row["metadata"].get("language") or ""
        size = len(text.encode())
        self.items += [EOS_ID, _End(stream, order, id_hash(row["id"]), size, str(language), marked)]

    def _text(self, text: str) -> None:
        for piece in bpe.pieces(text):
            self.items.append(piece)
            self.characters += len(piece)
            if self.characters >= BATCH_CHARACTERS:
                self.flush()

    def flush(self) -> None:
        """Encode what is waiting, and write its tokens."""
        texts = [item for item in self.items if isinstance(item, str)]
        encoded = iter(self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        flat: list[int] = []
        ended: dict[Stream, list[tuple[int, int, int, int, int]]] = {}
        for item in self.items:
            if isinstance(item, str):
                flat += next(encoded).ids
            elif isinstance(item, int):
                flat.append(item)
            else:
                now = self.written + len(flat)
                entry = (item.order, item.id, self.begun, now - self.begun, item.bytes)
                ended.setdefault(item.stream, []).append(entry)
                self._count(item, now - self.begun - item.marked)
                self.begun = now
        self.file.write(np.array(flat, dtype=self.dtype).tobytes())
        self.written += len(flat)
        for stream, entries in ended.items():
            self.entries.setdefault(stream, []).append(np.array(entries, ENTRY))
        self.items, self.characters = [], 0

    def _count(self, end: _End, tokens: int) -> None:
        counts = self.compression.setdefault((end.stream[1], end.language), [0, 0, 0])
        for i, number in enumerate((1, end.bytes, tokens)):
            counts[i] += number


class _End:
    """The end of a document among what is to be encoded, and what its entry needs."""

    __slots__ = ("bytes", "id", "language", "marked", "order", "stream")

    def __init__(self, stream: Stream, order: int, identifier: int, size: int, language: str, marked: int) -> None:
        self.stream, self.order, self.id, self.bytes = stream, order, identifier, size
        self.language, self.marked = language, marked


def _encode(shard: Path, out: Path, seed: int, config: TokenizeConfig, moved: Mapping[str, str]) -> None:
    """work/<shard>.run: the tokens of its documents; .entries: these by stream and order; .json, last: the streams."""
    base = out / "work" / shard.name
    with atomic(Path(f"{base}.run")) as part, part.open("wb") as file:
        run = _Run(file, bpe.load_for_documents(out / "tokenizer"))
        for row in read_rows(shard):
            name, metadata = row["id"], row["metadata"]
            split = moved.get(name) or side(name, seed, config.held_out)
            rearranged = split == "train" and metadata["kind"] in config.fim_kinds
            cut = fim.cuts(row["text"], seed, name, config.fim_rate) if rearranged else None
            run.add(row, (split, metadata["source"]), hashed(f"{seed}/order", name), cut)
        run.flush()
    streams, first, sorted_entries = [], 0, []
    for (split, source), batches in sorted(run.entries.items()):
        entries = np.concatenate(batches)
        sorted_entries.append(entries[np.argsort(entries["order"], kind="stable")])
        streams.append([split, source, first, first + len(entries)])
        first += len(entries)
    with atomic(Path(f"{base}.entries")) as part:
        part.write_bytes(b"".join(e.tobytes() for e in sorted_entries))
    compression = [[*key, *counts] for key, counts in sorted(run.compression.items())]
    write_json_lines(Path(f"{base}.json"), [{"streams": streams, "compression": compression}])


# --- runs to token shards

Runs = dict[Stream, list[tuple[str, int, int]]]


def _gather(
    out: Path, runs: list[Path], shard_tokens: int, vocab_size: int, workers: int, progress: Progress
) -> dict[Stream, tuple[list[ShardEntry], int]]:
    """Write every stream's shards; their entries, and the bytes of text, by stream."""
    parts: Runs = {}
    for path in runs:
        for split, source, first, end in json.loads(path.read_text(encoding="utf-8"))["streams"]:
            parts.setdefault((split, source), []).append((path.name.removesuffix(".json"), first, end))
    tasks: dict[Stream, list[Task]] = {}
    for (split, source), pieces in sorted(parts.items()):
        for number, (low, high) in enumerate(_ranges(out / "work", pieces, shard_tokens)):
            arguments = (out, split, source, number, low, high, pieces, dtype_for(vocab_size))
            result = out / "work" / f"{split}.{source}.{number:05d}.shard"
            tasks.setdefault((split, source), []).append(Task(_gather_shard, arguments, result))
    flat = [task for own in tasks.values() for task in own]
    run_tasks(flat, workers, progress, 3 * len(runs), 3 * len(runs) + len(flat) + 1)
    made: dict[Stream, tuple[list[ShardEntry], int]] = {}
    for stream, own in tasks.items():
        rows = [json.loads(task.result.read_text(encoding="utf-8")) for task in own]
        made[stream] = ([ShardEntry(**row["entry"]) for row in rows], sum(row["bytes"] for row in rows))
    return made


def _ranges(work: Path, pieces: list[tuple[str, int, int]], shard_tokens: int) -> list[tuple[int, int]]:
    """Ranges of bins of the order's hashes, each with `shard_tokens` tokens or a bin more; the last takes the rest."""
    tokens = np.zeros(BINS, np.int64)
    for name, first, end in pieces:
        entries = _entries(work, name, first, end)
        # counts of tokens are whole numbers below 2⁵³: the sums of floats are exact
        tokens += np.bincount(
            (entries["order"] >> np.uint64(48)).astype(np.int64), weights=entries["tokens"], minlength=BINS
        ).astype(np.int64)
    ranges, low, filled = [], 0, 0
    for at in np.flatnonzero(tokens).tolist():
        if filled >= shard_tokens:
            ranges.append((low, at))
            low, filled = at, 0
        filled += int(tokens[at])
    return [*ranges, (low, BINS)]


def _entries(work: Path, name: str, first: int, end: int) -> np.ndarray:
    return np.memmap(work / f"{name}.entries", ENTRY, "r")[first:end]


def _gather_shard(
    out: Path, split: str, source: str, number: int, low: int, high: int, pieces: list[tuple[str, int, int]], dtype: str
) -> None:
    """One token shard: the documents of all runs whose order lies in bins [low, high), in that order."""
    work, found, numbers = out / "work", [], []
    for place, (name, first, end) in enumerate(pieces):
        entries = _entries(work, name, first, end)
        a, b = (bisect.bisect_left(entries["order"], bin_ << 48) for bin_ in (low, high))
        found.append(np.array(entries[a:b]))
        numbers.append(np.full(b - a, place))
    own, run = np.concatenate(found), np.concatenate(numbers)
    order = np.argsort(own["order"], kind="stable")  # equal ones stay in the order of runs
    own, run = own[order], run[order]
    starts = np.zeros(len(own), np.int64)
    np.cumsum(own["tokens"][:-1], out=starts[1:])
    tokens = np.empty(int(own["tokens"].sum(dtype=np.int64)), DTYPES[dtype])
    for place in np.unique(run):
        mine = run == place
        source_tokens = np.asarray(np.memmap(work / f"{pieces[place][0]}.run", DTYPES[dtype], "r"))
        _copy(
            source_tokens,
            own["start"][mine].astype(np.int64),
            own["tokens"][mine].astype(np.int64),
            starts[mine],
            tokens,
        )
    entry = write_arrays(out / "tokens", split, source, number, tokens, starts, own["id"])
    row = {"entry": vars(entry), "bytes": int(own["bytes"].sum(dtype=np.int64))}
    write_json_lines(work / f"{split}.{source}.{number:05d}.shard", [row])


@njit(cache=True, nogil=True)
def _copy(run, starts, counts, into, out):
    """Documents of a run to their places; a loop over bytes, since a shard of short lessons has 100,000 of them."""
    for i in range(len(starts)):
        for k in range(counts[i]):
            out[into[i] + k] = run[starts[i] + k]


# --- what the card shows


def _compression(runs: list[Path]) -> list[Row]:
    """Documents, bytes, tokens (without control tokens) and bytes a token, by source and language."""
    whole: dict[tuple[str, str], list[int]] = {}
    for path in runs:
        for source, language, *numbers in json.loads(path.read_text(encoding="utf-8"))["compression"]:
            counts = whole.setdefault((source, language), [0, 0, 0])
            for i, number in enumerate(numbers):
                counts[i] += number
    return [
        {
            "source": source,
            "language": language or None,
            "documents": documents,
            "bytes": size,
            "tokens": tokens,
            "bytes_per_token": round(size / max(1, tokens), 4),
        }
        for (source, language), (documents, size, tokens) in sorted(whole.items())
    ]


def _metrics(
    streams: dict[Stream, tuple[list[ShardEntry], int]], compression: list[Row], config: TokenizeConfig, vocab_size: int
) -> Metrics:
    def count(split: str) -> dict[str, int]:
        return {source: sum(e.tokens for e in entries) for (s, source), (entries, _) in streams.items() if s == split}

    text_bytes = {source: size for (split, source), (_, size) in streams.items() if split == "train"}
    train, held = count("train"), count("held_out")
    return {
        "vocab_size": vocab_size,
        "vocab_size_asked": config.vocab_size,
        "tokens": sum(train.values()),
        "held_out_tokens": sum(held.values()),
        "documents": sum(e.documents for entries, _ in streams.values() for e in entries),
        "shards": sum(len(entries) for entries, _ in streams.values()),
        "bytes": sum(size for _, size in streams.values()),
        "bytes_per_token": round(sum(text_bytes.values()) / max(1, sum(train.values())), 4),
        "tokens_by_source": train,
        "held_out_tokens_by_source": held,
        "bytes_per_token_by_source": {s: round(text_bytes[s] / max(1, n), 4) for s, n in train.items()},
        "bytes_per_token_by_language": _by_language(compression),
    }


def _by_language(compression: list[Row], most: int = 20) -> dict[str, float]:
    """Of the languages with the most text; compression.jsonl has them all."""
    sizes: dict[str, list[int]] = {}
    for row in compression:
        if row["language"]:
            counts = sizes.setdefault(row["language"], [0, 0])
            counts[0] += row["bytes"]
            counts[1] += row["tokens"]
    largest = sorted(sizes, key=lambda name: (-sizes[name][0], name))[:most]
    return {name: round(sizes[name][0] / max(1, sizes[name][1]), 4) for name in sorted(largest)}


def _samples(survey: Mapping[str, Mapping[str, Any]], tokenizer: Any) -> list[Row]:
    """Beginnings of a few documents of each source, cut into their tokens."""
    samples = []
    for source, found in survey.items():
        for _, _, text in found["shown"]:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            samples.append({"source": source, "tokens": "·".join(tokenizer.decode([i]) for i in ids[:48])})
    return samples[:50]
